"""The benchmark: its formulas against counts by hand, tokens without padding, a table with every row. No times."""

import json
import math
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench
from nanopost.model import GPT, GPTConfig

SIZE = bench.SIZES["tiny"]
EVERY = ["sft", "rm", "dpo", "decode-2", "ppo", "ppo-critic"]


def test_flops_by_hand():
    """One layer, 2 wide, 3 words, rows of 1 and 2 tokens, logits at 2 positions."""
    matrices = 3 * (2 * 6 + 2 * 2 + 2 * 8 + 8 * 2)  # multiply-adds of 3 tokens: qkv, projection, MLP up and down
    attention = (1 + (1 + 2)) * (2 + 2)  # pairs of a token and one it sees: q k and p v of 2 channels each
    logits = 2 * 2 * 3
    model = GPTConfig(vocab_size=3, block_size=8, n_layer=1, n_head=1, n_embd=2)
    assert bench.forward_flops(model, [1, 2], 2) == 2 * (matrices + attention + logits)


def test_flops_of_the_real_model():
    """The linear layers and the output matrix, forward and backward, as PyTorch counts them."""
    config = GPTConfig(vocab_size=64, block_size=32, n_layer=2, n_head=2, n_embd=16)
    model, ids = GPT(config).double(), torch.zeros(3, 8, dtype=torch.long)  # double: PyTorch's own products
    attention = 2 * 2 * config.n_layer * config.n_embd * 3 * sum(range(1, 9))

    def linear(counter):
        counts = counter.get_flop_counts()["Global"]
        return sum(n for operator, n in counts.items() if str(operator) in ("aten.mm", "aten.addmm"))

    with FlopCounterMode(display=False) as counter:
        loss = model.logits(model(ids)[:, :5]).sum()
    assert linear(counter) == bench.forward_flops(config, [8] * 3, 15) - attention
    with counter:
        loss.backward()
    assert linear(counter) == 2 * (bench.forward_flops(config, [8] * 3, 15) - attention)


def test_parameters():
    for size in bench.SIZES.values():
        with torch.device("meta"):
            assert bench.parameters(size.model) == sum(p.numel() for p in GPT(size.model).parameters())


def test_decoding_costs_what_the_whole_rows_would():
    """Multiply-adds of the prompts and of all steps together are those of one forward pass over the finished rows."""
    machine = {"flops": 1.0, "bytes": float("inf"), "item": 4}
    assert bench.decode_floor(SIZE.model, [3, 5], 4, machine) == bench.forward_flops(SIZE.model, [6, 8], 2 * 4)


@pytest.fixture
def here(monkeypatch):
    """Measures in this process what the benchmark would measure in one of its own, and the machine with small sizes."""

    def child(command, threads):
        options = dict(zip(command[2::2], command[3::2]))
        config = bench.Config(size=options["--size"], steps=int(options["--steps"]), threads=threads, device="cpu")
        return bench.measure(options["--measure"], SIZE, config)

    multiply, copy = bench.multiplication_rate, bench.copying_rate
    monkeypatch.setattr(bench, "child", child)
    monkeypatch.setattr(bench, "multiplication_rate", lambda n, k, m, run: multiply(n // 16, k // 16, m // 16, run))
    monkeypatch.setattr(bench, "copying_rate", lambda n, device: copy(min(n, 2**16), device))


def test_table_and_json_have_every_row(here, capsys, tmp_path):
    only = "sft,rm,dpo,decode,ppo,ppo-critic"
    bench.main(bench.Config(size="tiny", only=only, repeat=2, steps=2, json=str(tmp_path / "x.json"), device="cpu"))
    table, figures = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    assert list(figures["rows"]) == EVERY
    assert {"device", "cpu", "threads", "torch", "python", "dtype", "size"} <= set(figures["conditions"])
    for name, sides in figures["rows"].items():
        assert any(line.startswith(name) for line in table.splitlines())
        figure = sides["nanopost"]
        assert len(figure["runs"]) == 2 and figure["floor_ms"] > 0
        for key in ("tokens_per_s", "step_ms", "of_floor", "memory_mb"):
            assert 0 < figure[key]["min"] <= figure[key]["median"] <= figure[key]["max"]
    for name in ("ppo", "ppo-critic"):
        phases = set(figures["rows"][name]["nanopost"]["phases_ms"])
        assert phases == {"generation", "reference", "reward", "advantages", "update"}
    assert set(figures["rows"]["dpo"]["nanopost"]["phases_ms"]) == {"reference", "update"}


def test_beside_sft_a_profile_says_what_its_operations_cost(here, capsys, tmp_path):
    bench.main(bench.Config(size="tiny", only="sft", repeat=1, steps=2, json=str(tmp_path / "x.json"), device="cpu"))
    profile = json.loads((tmp_path / "x.json").read_text())["profile"]
    assert list(profile) == [*bench.KINDS, "the rest"]
    assert min(profile.values()) > 0 and math.isclose(sum(profile.values()), 1)  # every pattern found something
    assert f"matrix products {profile['matrix products']:.0%}, attention" in capsys.readouterr().out
    bench.main(bench.Config(size="tiny", only="rm", repeat=1, steps=2, device="cpu"))
    assert "matrix products" not in capsys.readouterr().out


def test_the_table_says_which_vector_instructions_were_used(here, capsys):
    bench.main(bench.Config(size="tiny", only="decode", repeat=1, steps=1, device="cpu"))
    assert f"({torch.backends.cpu.get_cpu_capability()})" in capsys.readouterr().out.splitlines()[0]


def test_only_real_tokens_are_counted():
    config = bench.Config(size="tiny", steps=2, device="cpu")
    for what, answers in (("sft", 1), ("rm", 2), ("dpo", 2)):
        batches = bench.training_batches(what, SIZE, 2)
        lengths = [len(side) for batch in batches for row in batch for side in bench.sides(row)]
        assert len(lengths) == 4 * answers and len(set(lengths)) > 1  # so there is padding,
        assert bench.measure(what, SIZE, config)["tokens"] == sum(lengths)  # and it does not count
    assert bench.measure("decode-2", SIZE, config)["tokens"] == 2 * 4
    assert bench.measure("ppo", SIZE, config)["tokens"] == sum(len(p) + 4 for p in bench.prompts(SIZE, 2))


def test_lengths_are_those_of_the_sizes():
    lengths = [len(prompt) + len(answer) for prompt, (answer,) in bench.texts(bench.SIZES["trl-small"], 2000, 1)]
    assert 47 < sum(lengths) / len(lengths) < 51 and max(lengths) <= 128
    assert {len(answer) for _, (answer,) in bench.texts(bench.SIZES["gpt2"], 2, 1, full=True)} == {1024}


def test_whole_contexts_have_every_token_but_the_first_as_a_target():
    [[first, *_]] = bench.training_batches("sft", bench.SIZES["gpt2"], 1)
    assert len(first) == sum(first.mask) == 1024


@pytest.mark.parametrize(
    "option, word",
    [
        ({"size": "huge"}, "gpt2"),
        ({"only": "sft,grpo"}, "grpo"),
        ({"repeat": 0}, "--repeat"),
        ({"steps": 0}, "--steps"),
        ({"against": "others"}, "others"),
    ],
)
def test_bad_options(option, word):
    with pytest.raises(bench.UserError, match=word):
        bench.Config(**option)


def test_a_mistake_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, "benchmarks/bench.py", "--size", "huge"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
