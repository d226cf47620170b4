"""Two processes make the steps of one: same losses, same statistics, same weights, for all four scripts."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for the processes that this file starts
from conftest import ROOT, Workshop  # noqa: E402

import train_ppo  # noqa: E402
from nanopost import distributed  # noqa: E402
from nanopost.config import UserError  # noqa: E402

# batches that do not divide by two; of 24 records the last batch of an epoch has one row, so one process has none
OPTIONS = {"sft": dict(batch_size=23, micro_batch=5), "rm": dict(batch_size=23, micro_batch=4, normalise=8),
           "dpo": dict(batch_size=23, micro_batch=0), "ppo": dict(batch_size=9, micro_batch=2, minibatches=2),
           "ppo critic": dict(batch_size=8, kl_target=0.1, kl_horizon=16),
           "ppo resumed": dict(batch_size=8, save_every=2)}


class Killed(Exception):
    pass


def run_all(folder, out):
    workshop = Workshop(Path(folder))
    for name, options in OPTIONS.items():
        script, _, kind = name.partition(" ")
        if kind == "critic":
            options = options | {"critic": workshop.path("rm")}
        if kind == "resumed" and distributed.many():  # dies in its third step, and goes on from its second
            update = train_ppo.update
            train_ppo.update = kill_in_the_third_step(update)
            with contextlib.suppress(Killed):
                workshop.run(script, Path(out) / name, keep_every=2, **options)
            train_ppo.update, options = update, options | {"resume": True}
        workshop.run(script, Path(out) / name, keep_every=2, **options)


def kill_in_the_third_step(update):
    steps = []

    def counted(*arguments):
        steps.append(1)
        if len(steps) == 3:
            raise Killed
        return update(*arguments)

    return counted


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(count, *arguments):
    """This file in so many processes at once, as torchrun starts them -> [(exit code, stdout, stderr)]."""
    port = str(free_port())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONDONTWRITEBYTECODE": "1"}
    processes = [subprocess.Popen([sys.executable, __file__, *map(str, arguments)], cwd=ROOT, text=True,
                                  env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in range(count)]
    ends = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *end) for process, end in zip(processes, ends)]


@pytest.fixture(scope="module")
def both(workshop, tmp_path_factory):
    """(folder of one process's runs, folder of two processes' runs, what the two processes printed)"""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    said = start(2, workshop.folder, two)
    assert [code for code, *_ in said] == [0, 0], said
    torch.set_default_dtype(torch.float64)
    run_all(workshop.folder, one)
    torch.set_default_dtype(torch.float32)
    return one, two, said


@pytest.mark.parametrize("script", OPTIONS)
def test_two_processes_log_the_losses_and_statistics_of_one(script, both, metrics):
    one, two, _ = both
    lines = [metrics(folder / script, "seconds") for folder in (one, two)]
    assert len(lines[0]) == len(lines[1]) > 4
    for a, b in zip(*lines):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-9)  # the file has six digits


@pytest.mark.parametrize("script", OPTIONS)
def test_two_processes_end_with_the_weights_of_one(script, both):
    one, two, _ = both
    a, b = (torch.load(folder / script / "model.pt", weights_only=True) for folder in (one, two))
    assert a.keys() == b.keys() and a["wte.weight"].dtype == torch.float64
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("script", OPTIONS)
def test_two_processes_leave_the_same_files_and_only_the_first_speaks(script, both):
    one, two, said = both
    files = [sorted(p.relative_to(folder).as_posix() for p in (folder / script).rglob("*")) for folder in (one, two)]
    assert files[0] == files[1] and f"{script}/config.json" in files[0] and f"{script}/step-2/model.pt" in files[0]
    (_, first, _), (_, second, bar) = said
    assert f"{script.split()[0]}: 4 steps on cpu x 2" in first and second == "" and f"{script}:" not in bar


def test_without_torchrun_there_is_one_process_that_has_everything():
    device = torch.device("cpu")
    assert distributed.start("cuda:1") == ("cuda:1", 0, 1) and not distributed.many()
    rows, stats = [1, 2, 3], {"loss": torch.tensor(1.0)}
    assert distributed.shard(rows) is rows and distributed.add_up(stats, device) is stats
    assert distributed.gather(stats, device) is stats


def test_every_process_takes_the_gpu_of_its_own_number_before_it_touches_any(monkeypatch):
    taken = []
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    for name, result in {"is_initialized": True, "get_rank": 0, "get_world_size": 2}.items():
        monkeypatch.setattr(f"torch.distributed.{name}", lambda result=result: result)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    assert distributed.start("auto") == distributed.start("cuda") == ("cuda:1", 0, 2) and taken == ["cuda:1"] * 2
    assert distributed.start("cpu") == ("cpu", 0, 2) and len(taken) == 2
    with pytest.raises(UserError, match="--device cuda:0: with several processes each has a GPU of its own"):
        distributed.start("cuda:0")


def test_rows_of_different_number_and_width_are_gathered_in_their_order(workshop, tmp_path):
    assert [code for code, *_ in start(3, "gather")] == [0, 0, 0]


def gather_by_three():
    """Seven rows of growing width, dealt out to three processes, come back as they were."""
    device, rank, world = distributed.start("cpu")
    whole = torch.tensor([[i * 10 + j if j <= i else 0 for j in range(7)] for i in range(7)])
    mine = distributed.shard(list(range(7)))
    assert mine == list(range(rank, 7, world))
    own = whole[mine, : max(mine) + 1]
    back = distributed.gather({"x": own, "mask": own > 0, "number": torch.tensor(mine)}, device)
    assert torch.equal(back["x"], whole) and torch.equal(back["mask"], whole > 0)
    assert back["number"].tolist() == list(range(7)) and back["mask"].dtype == torch.bool
    few = distributed.shard([5])
    assert few == ([5] if rank == 0 else [])
    summed = distributed.add_up({"loss": torch.tensor(0.25)} if few else {}, device)
    assert summed == ({"loss": torch.tensor(0.25)} if few else {})
    p = torch.nn.Parameter(torch.ones(2))
    if rank:
        p.grad = torch.full((2,), float(rank))
    distributed.add_gradients([p])
    assert p.grad.tolist() == [3.0, 3.0]
    distributed.wait()


if __name__ == "__main__":
    if sys.argv[1] == "gather":
        gather_by_three()
    else:
        torch.set_default_dtype(torch.float64)
        run_all(*sys.argv[1:])
