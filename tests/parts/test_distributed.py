"""Two processes make the steps of one: same losses, same statistics, same weights, for all four scripts."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":  # one of the processes that this file starts: pytest is not there to find conftest
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_dpo
from conftest import ROOT, Killed, Workshop, die_after, free_port, make_model, tensors
from nanopost import distributed
from nanopost.config import UserError
from nanopost.data import Batch, Example, Pair

# batches that do not divide by two; of 24 records the last batch of an epoch has one row, so one process has none
OPTIONS = {
    "sft": dict(batch_size=23, micro_batch=5),
    "rm": dict(batch_size=23, micro_batch=4, normalise=8),
    "dpo": dict(batch_size=23, micro_batch=0),
    "ppo": dict(batch_size=9, micro_batch=2, minibatches=2),
    "ppo critic": dict(batch_size=8, kl_target=0.1, kl_horizon=16),
    "ppo resumed": dict(batch_size=8, save_every=2),
}


def run_all(folder, out):
    workshop = Workshop(Path(folder))
    for name, options in OPTIONS.items():
        script, _, kind = name.partition(" ")
        if kind == "critic":
            options = options | {"critic": workshop.path("rm")}
        if kind == "resumed" and distributed.is_distributed():  # dies in its third step, continues from its second
            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
                die_after(patch, 3)
                workshop.run(script, Path(out) / name, keep_every=2, **options)
            options = options | {"overwrite": False, "resume": True}
        workshop.run(script, Path(out) / name, keep_every=2, **options)


def start(count, *arguments):
    """This file in `count` processes at once, as torchrun starts them -> [(exit code, stdout, stderr)]."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    processes = []
    for rank in range(count):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, __file__, *map(str, arguments)]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, cwd=ROOT, env=own, text=True, stdout=pipe, stderr=pipe))
    ends = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *end) for process, end in zip(processes, ends)]


@pytest.fixture(scope="module")
def both(workshop, tmp_path_factory):
    """(folder of one process's runs, folder of two processes' runs, what the two processes printed)"""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    printed = start(2, workshop.folder, two)
    assert [code for code, *_ in printed] == [0, 0], printed
    torch.set_default_dtype(torch.float64)
    run_all(workshop.folder, one)
    torch.set_default_dtype(torch.float32)
    return one, two, printed


@pytest.mark.parametrize("script", OPTIONS)
def test_two_processes_log_the_losses_and_statistics_of_one(script, both, metrics):
    one, two, _ = both
    lines = [metrics(folder / script, "seconds") for folder in (one, two)]
    assert len(lines[0]) == len(lines[1]) > 4
    for a, b in zip(*lines):
        if a["step"] == 1 and script == "dpo":  # the policy is still the reference: which reward is higher is rounding
            del a["rewards/accuracies"], b["rewards/accuracies"]
        assert a == pytest.approx(b, rel=1e-5, abs=1e-9)  # the file has six digits


@pytest.mark.parametrize("script", OPTIONS)
def test_two_processes_end_with_the_weights_of_one(script, both):
    one, two, _ = both
    a, b = (tensors(folder / script) for folder in (one, two))
    assert a.keys() == b.keys() and a["wte.weight"].dtype == torch.float64
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("script", OPTIONS)
def test_two_processes_leave_the_same_files_and_only_the_first_prints(script, both):
    one, two, printed = both
    files = [sorted(p.relative_to(folder).as_posix() for p in (folder / script).rglob("*")) for folder in (one, two)]
    assert files[0] == files[1] and f"{script}/config.json" in files[0] and f"{script}/step-2/model.pt" in files[0]
    (_, first, _), (_, second, bar) = printed
    assert f"{script.split()[0]}: 4 steps on cpu x 2" in first and second == "" and f"{script}:" not in bar


def test_without_torchrun_there_is_one_process_that_has_everything():
    device = torch.device("cpu")
    assert distributed.start("cuda:1") == ("cuda:1", 0, 1) and not distributed.is_distributed()
    rows, stats, x = [1, 2, 3], {"loss": torch.tensor(1.0)}, torch.ones(2)
    assert distributed.shard(rows) is rows
    assert distributed.all_reduce(stats, device) is stats
    assert distributed.all_gather(x) is x


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


@pytest.mark.slow
def test_three_processes_gather_rows_and_add_up_numbers():
    """The functions *_by_three, below."""
    printed = start(3, "three")
    assert [code for code, *_ in printed] == [0, 0, 0], printed


CPU = torch.device("cpu")


def gather_by_three(rank):
    """Seven rows of growing width, dealt out to three processes, come back as they were: tensors, and a Batch."""
    whole = torch.tensor([[i * 10 + j if j <= i else 0 for j in range(7)] for i in range(7)])
    mine = distributed.shard(list(range(7)))
    assert mine == list(range(rank, 7, 3))
    own = whole[mine, : max(mine) + 1]
    assert torch.equal(distributed.all_gather(own), whole)
    positive = distributed.all_gather(own > 0)
    assert positive.dtype == torch.bool and torch.equal(positive, whole > 0)
    assert distributed.all_gather(torch.tensor(mine)).tolist() == list(range(7))

    lengths = torch.arange(1, 8)
    mask = torch.arange(1, 7) < lengths[:, None]  # (7, 6)
    logprobs = whole[:, 1:].double().masked_fill(~mask, 0.0)
    batch = Batch(whole, mask, lengths, logprobs=logprobs, ended=lengths > 3, scores=lengths.double())
    part = batch.rows(torch.tensor(mine))
    back = distributed.all_gather(part)
    for name, x in batch.tensors().items():
        assert torch.equal(getattr(back, name), x) and getattr(back, name).dtype == x.dtype, name
    assert torch.equal(back.index, batch.index) and back.values is None


def reduce_by_three(rank):
    """Statistics and gradients are added up, whether or not a process has rows."""
    few = distributed.shard([5])
    assert few == ([5] if rank == 0 else [])
    total = distributed.all_reduce({"loss": torch.tensor(0.25)} if few else {}, CPU)
    assert total == ({"loss": torch.tensor(0.25)} if few else {})
    total = distributed.all_reduce({"a": torch.tensor(float(rank)), "b": 1.0}, CPU)
    assert total == {"a": torch.tensor(3.0), "b": torch.tensor(3.0)}
    p = torch.nn.Parameter(torch.ones(2))
    if rank:
        p.grad = torch.full((2,), float(rank))
    distributed.all_reduce_gradients([p])
    assert p.grad.tolist() == [3.0, 3.0]


def few_by_three(rank):
    """Fewer pairs than processes: those without a pair have the others' reference log-probabilities too."""
    pairs = [Pair(Example([1, 2, 3], [False, True, True]), Example([1, 4], [False, True]))]
    model = make_model(8).eval()
    both = distributed.all_gather(train_dpo.reference_logprobs(model, distributed.shard(pairs), CPU))
    torch.testing.assert_close(both, train_dpo.reference_logprobs(model, pairs, CPU))


if __name__ == "__main__":
    if sys.argv[1] == "three":
        rank = distributed.start("cpu")[1]
        for check in (gather_by_three, reduce_by_three, few_by_three):
            check(rank)
        distributed.barrier()
    else:
        torch.set_default_dtype(torch.float64)
        run_all(*sys.argv[1:])
