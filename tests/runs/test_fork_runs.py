"""The forks, whole: short runs on toy data, and how far they are from the scripts that they were copied from."""

import difflib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":  # one of the processes that this file starts: pytest is not there to find conftest
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_grpo
from conftest import (
    FORKS,
    ROOT,
    Killed,
    Workshop,
    assert_same_tensors,
    copies,
    die_after,
    free_port,
    one_line,
    script_path,
    tensors,
)
from nanopost.checkpoint import load_model
from nanopost.config import UserError, flag
from nanopost.tools.plot import PANELS

VARIANTS = {
    "RLOO": {},
    "GRPO": dict(baseline="group", divide_by_std=True, length_mean=True, kl="k3"),
    "Dr. GRPO": dict(baseline="group", beta=0.0),
    "k2": dict(kl="k2", k=2),
}


def training(lines):
    return [line for line in lines if "lr" in line]


# ---------------------------------------------------------------------------------------------- how far from its parent

PARENTS = {"ipo": "dpo", "grpo": "ppo"}
LARGEST = {"ipo": 31, "grpo": 207}  # lines that are only in the fork or only in its parent
THE_SAME = {  # what the fork is not about: these functions are the parent's, to the letter
    "ipo": ["answer_logprobs", "pair_logprobs", "reference_logprobs", "update", "evaluate"],
    "grpo": ["answer_means"],
}


def source(script, function=None) -> list[str]:
    text = script_path(script).read_text(encoding="utf-8")
    if function:
        text = text[text.index(f"def {function}(") :]
        text = text[: text.index("\n\n\n")]
    return text.splitlines()


def changed(fork, function=None) -> list[str]:
    """The lines that only the parent has (-) or only the fork (+)."""
    lines = difflib.ndiff(source(PARENTS[fork], function), source(fork, function))
    return [line for line in lines if line[0] in "+-" and line[1:].strip()]


@pytest.mark.parametrize("fork", FORKS)
def test_a_fork_says_what_it_is_a_fork_of_and_stays_near_it(fork):
    assert f"A fork of train_{PARENTS[fork]}.py" in "\n".join(source(fork))
    assert len(changed(fork)) <= LARGEST[fork]
    for function in THE_SAME[fork]:
        assert changed(fork, function) == [], function


def test_grpo_differs_from_ppo_by_values_and_groups_alone():
    """Most of the diff is what PPO has for values. Outside its docstring and its own two functions 50 lines are new."""
    own = {line for name in ("group_advantages", "kl_loss") for line in source("grpo", name)}
    doc = set(source("grpo")[: source("grpo").index("import copy")])
    new = [line for line in changed("grpo") if line[0] == "+" and line[2:] not in own | doc]
    assert len(new) <= 50, new


@pytest.mark.parametrize("fork", FORKS)
def test_the_diffs_of_the_readme_are_those_of_the_files(fork):
    page = (ROOT / "forks" / "README.md").read_text(encoding="utf-8").split("## ")
    [section] = [text for text in page if f"forks/train_{fork}.py" in text and "```diff" in text]
    shown = [line for block in section.split("```diff\n")[1:] for line in block.split("```")[0].splitlines()]
    assert len(shown) > 3 and set(shown) <= {line[0] + line[2:] for line in changed(fork)}


def test_grpo_is_at_most_260_lines():
    assert len(source("grpo")) <= 260


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("fork", FORKS)
def test_a_run_of_a_fork_writes_a_loadable_folder_and_logs_finite_numbers(fork, workshop, tmp_path, metrics):
    out = workshop.run(fork, tmp_path / "out")
    assert sorted(os.listdir(out)) == ["config.json", "metrics.jsonl", "model.pt", "vocab.tiktoken"]
    assert json.loads((out / "config.json").read_text())["method"] == fork
    load_model(str(out))
    lines = metrics(out)
    assert [line["step"] for line in lines if "lr" not in line] == [0, 2, 4] and len(training(lines)) == 4
    assert all(isinstance(value, (int, float)) for line in lines for value in line.values())
    logged = {name for line in lines for name in line}
    assert {name for _, *names in PANELS[fork] for name in names if name} <= logged  # so nanopost plot can draw it


@pytest.mark.parametrize("reward", ["rm", "reward.py:vowels"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_grpo_learns_from_a_reward_model_and_from_a_function(variant, reward, workshop, tmp_path, metrics):
    out = workshop.run("grpo", tmp_path / "out", reward=workshop.path(reward), steps=3, **VARIANTS[variant])
    lines = training(metrics(out))
    assert [line["val/first_ratio"] for line in lines] == pytest.approx([1.0] * 3, abs=1e-5)
    assert {"policy/clipfrac", "policy/approxkl", "objective/kl", "val/ratio", "groups/equal"} <= lines[0].keys()
    assert lines[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert (lines[-1]["loss/kl"] > 0) == (VARIANTS[variant].get("kl", "reward") != "reward")
    before, after = tensors(workshop.path("sft")), tensors(out)
    assert not torch.equal(before["wte.weight"], after["wte.weight"])


def test_grpo_raises_a_reward_that_is_a_python_function(workshop, tmp_path, metrics):
    options = dict(steps=20, batch_size=24, beta=0.0, lr=2e-2, epochs=4, valid="", missing_end_score=0.0)
    out = workshop.run("grpo", tmp_path / "out", reward=workshop.path("reward.py:vowels"), **options)
    scores = [line["objective/scores"] for line in metrics(out)]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.15


def test_grpo_logs_the_share_of_groups_with_equal_scores_and_learns_nothing_from_them(workshop, tmp_path, metrics):
    (tmp_path / "flat.py").write_text("def score(prompts, completions):\n    return [0.5] * len(prompts)\n")
    options = dict(reward=f"{tmp_path / 'flat.py'}:score", missing_end_score=0.5, beta=0.0, steps=1)
    out = workshop.run("grpo", tmp_path / "out", **options)
    [line] = training(metrics(out))
    assert line["groups/equal"] == 1.0 and line["grad_norm"] == 0.0
    assert_same_tensors(tensors(out), tensors(workshop.path("sft")))


def test_ipo_comes_nearer_to_its_target_margin_and_not_beyond(workshop, tmp_path, metrics):
    """1/(2 beta) nats between the log-ratios of the two answers; rewards are beta times that."""
    out = workshop.run("ipo", tmp_path / "out", steps=60, batch_size=24, beta=0.1)
    margins = [line["rewards/margins"] for line in training(metrics(out))]
    assert margins[0] == pytest.approx(0.0, abs=1e-4) and margins[-1] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("case", ["ipo", "grpo RLOO", "grpo GRPO"])
def test_a_killed_and_resumed_fork_ends_with_the_same_bits_as_an_uninterrupted_one(
    case, workshop, tmp_path, monkeypatch, metrics
):
    fork, _, variant = case.partition(" ")
    options = dict(steps=6, save_every=2, keep_every=3, init=workshop.path("dropout"), **VARIANTS.get(variant, {}))
    whole, killed = workshop.run(fork, tmp_path / "whole", **options), tmp_path / "killed"
    restore_log = die_after(monkeypatch, 5)  # after the checkpoint of step 4
    with pytest.raises(Killed):
        workshop.run(fork, killed, **options)
    restore_log()
    assert (killed / "state.pt").exists()
    workshop.run(fork, killed, overwrite=False, resume=True, **options)
    assert copies(whole) == copies(killed) == ["step-3", "step-6"]
    for name in ("", "step-3", "step-6"):
        assert_same_tensors(tensors(whole / name), tensors(killed / name))
    assert metrics(whole, "seconds") == metrics(killed, "seconds")
    assert_same_tensors(tensors(whole / "step-6"), tensors(whole))


# ---------------------------------------------------------------------------------------------------- several processes

PARALLEL = {
    "grpo": dict(batch_size=12, k=3, micro_batch=2, minibatches=2),
    "grpo published": dict(batch_size=9, k=3, **VARIANTS["GRPO"]),
    "ipo": dict(batch_size=23, micro_batch=5),
}


PATH = os.pathsep.join([str(ROOT), str(ROOT / "forks")])


def run_all(folder, out):
    workshop = Workshop(Path(folder))
    torch.set_default_dtype(torch.float64)
    for name, options in PARALLEL.items():
        workshop.run(name.split()[0], Path(out) / name, **options)
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(workshop, tmp_path, metrics):
    environment = {**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, __file__, str(workshop.folder), str(tmp_path / "two")]
    both = [subprocess.Popen(command, cwd=ROOT, env=environment | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    run_all(workshop.folder, tmp_path / "one")
    for name in PARALLEL:
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        for a, b in zip(metrics(one, "seconds"), metrics(two, "seconds"), strict=True):
            if a["step"] == 1 and name == "ipo":
                # the policy is still the reference: which reward is higher is rounding
                del a["rewards/accuracies"], b["rewards/accuracies"]
            assert a == pytest.approx(b, rel=1e-5, abs=1e-9)
        for weight, x in tensors(one).items():
            torch.testing.assert_close(tensors(two)[weight], x, rtol=0, atol=1e-9)


# -------------------------------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize("fork", FORKS)
def test_the_command_line_runs_a_fork_from_the_root(fork, workshop, tmp_path, command):
    arguments = []
    for name, value in vars(workshop.config(fork, tmp_path / "out", steps=2)).items():
        arguments += [flag(name if value else f"no_{name}")] if isinstance(value, bool) else [flag(name), value]
    code, out, err = command(f"forks/train_{fork}.py", *arguments)
    assert code == 0 and err == "" and f"wrote {tmp_path / 'out'}" in out


WRONG = {
    "one answer per prompt": (["--k", "1"], "--k must be at least 2, not 1"),
    "half a group": (["--batch-size", "10", "--k", "4"], "--batch-size must be a multiple of --k"),
    "another baseline": (["--baseline", "mean"], "--baseline must be one of loo, group, not mean"),
    "k1 as a loss": (["--kl", "k1"], "--kl must be one of reward, k2, k3, not k1"),
    "more minibatches than answers": (["--batch-size", "4", "--minibatches", "5"], "must be at least --minibatches"),
    "no option of a fork": (["--critic", "out/rm"], "--critic"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_users_mistake_is_one_line_and_exit_code_2(kind, workshop, tmp_path, command):
    arguments, message = WRONG[kind]
    out = tmp_path / "out"
    options = ["--init", workshop.path("sft"), "--reward", workshop.path("rm"), "--device", "cpu", "--out", out]
    code, _, err = command("forks/train_grpo.py", *options, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1 and "Traceback" not in err
    assert not out.exists()


def test_a_run_may_not_overwrite_what_it_starts_from(workshop):
    with pytest.raises(UserError, match="would overwrite --reward") as error:
        train_grpo.Config(out=workshop.path("rm"), reward=workshop.path("rm"))
    one_line(error)


if __name__ == "__main__":
    run_all(*sys.argv[1:])
