"""The benchmark: its formulas against counts by hand, tokens without padding, a table with every row. No times."""

import json
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
    """Measures in this process what the benchmark would measure in one of its own."""

    def child(command, threads):
        options = dict(zip(command[2::2], command[3::2]))
        config = bench.Config(size=options["--size"], steps=int(options["--steps"]), threads=threads, device="cpu")
        return bench.measure(options["--measure"], SIZE, config)

    monkeypatch.setattr(bench, "child", child)


def test_table_and_json_have_every_row(here, capsys, tmp_path):
    bench.main(bench.Config(size="tiny", only="sft,rm,dpo,decode,ppo,ppo-critic", repeat=2, steps=2,
                            json=str(tmp_path / "x.json"), device="cpu"))
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


def test_real_tokens_are_counted():
    config = bench.Config(size="tiny", steps=2, device="cpu")
    for what, rows in (("sft", 1), ("rm", 2), ("dpo", 2)):
        data = bench.training_batches(what, SIZE, 2)
        lengths = [len(prompt) + len(answer) for batch in data for prompt, answers in batch for answer in answers]
        assert len(lengths) == 4 * rows and len(set(lengths)) > 1  # so padding there is, and
        assert bench.measure(what, SIZE, config)["tokens"] == sum(lengths)  # it does not count
    assert bench.measure("decode-2", SIZE, config)["tokens"] == 2 * 4
    assert bench.measure("ppo", SIZE, config)["tokens"] == sum(len(p) + 4 for p in bench.prompts(SIZE, 2))


def test_lengths_are_as_said():
    lengths = [len(prompt) + len(answer) for prompt, (answer,) in bench.texts(bench.SIZES["trl-small"], 2000, 1)]
    assert 47 < sum(lengths) / len(lengths) < 51 and max(lengths) <= 128
    assert {len(a) for _, (a,) in bench.texts(bench.SIZES["gpt2"], 2, 1, full=True)} == {1024}


@pytest.mark.parametrize("option, word", [("size=huge", "gpt2"), ("only=sft,grpo", "grpo"), ("repeat=0", "--repeat"),
                                          ("against=others", "others")])
def test_bad_options(option, word):
    name, value = option.split("=")
    config = bench.Config(**{name: type(getattr(bench.Config, name))(value)})
    with pytest.raises(bench.UserError, match=word):
        bench.main(config)


def test_a_mistake_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, "benchmarks/bench.py", "--size", "huge"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
