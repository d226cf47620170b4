"""What the tests share: a byte-level tokenizer, tiny models, and a workshop of toy data on which every script runs.

Fixtures: tokenizer, tiny, lines, workshop, metrics, command, tool, gpt2, in_float64. Helpers to import: ROOT, SCRIPTS,
FORKS and, for the folders of runs and for runs that die, those at the end.
"""

import ast
import importlib
import json
import os
import runpy
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["sft", "rm", "dpo", "ppo"]
FORKS = ["ipo", "grpo"]  # in forks/
VARIANTS = ["simpo_loss", "orpo_loss", "kto_loss"]  # that readers of exercises/ write into a copy of train_dpo.py

# as in pyproject.toml, for processes that pytest did not start
for folder in (*(ROOT / name for name in ("tests/exercises", "tests/proofs", "data/notes", "forks", "lab")), ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from nanopost.__main__ import main as nanopost  # noqa: E402
from nanopost.checkpoint import save_model  # noqa: E402
from nanopost.config import UserError  # noqa: E402
from nanopost.model import GPT, GPTConfig  # noqa: E402
from nanopost.run import Run  # noqa: E402
from nanopost.tokenizer import Tokenizer, load_tokenizer  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_every_time_and_offline(monkeypatch):
    """Fixed random numbers, the working directory at the root, and no way to reach the network."""

    def refuse(*_):
        raise OSError("the tests run without a network")

    torch.manual_seed(0)
    torch.set_num_threads(1)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(ROOT)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


# ------------------------------------------------------------------------------------------- tokenizer and tiny models

MERGES = (b"th", b"the", b" a", b" th", b"an", b"and")  # in order of rank, each made of two earlier tokens


def make_tokenizer() -> Tokenizer:
    tokens = [bytes([i]) for i in range(256)] + list(MERGES)
    return Tokenizer({token: rank for rank, token in enumerate(tokens)})


def make_model(vocab_size, block_size=48, dropout=0.0, scalar_head=False, favour=None, seed=0, noise=0.2) -> GPT:
    """Two layers, two heads, 16 wide, far from its initialisation: no bias is 0 and no distribution uniform.

    `favour` is a token that the model likes to say next, about once in five tokens: the end token, so that answers end.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = dict(n_layer=2, n_head=2, n_embd=16)
    model = GPT(GPTConfig(vocab_size, block_size, dropout=dropout, scalar_head=scalar_head, **sizes))
    with torch.no_grad():
        for p in model.parameters():
            start = torch.ones_like(p) if p.dim() == 1 and p.mean() == 1 else torch.zeros_like(p)
            p.copy_(start + noise * torch.randn(p.shape, generator=generator))
        if favour is not None:
            row = model.wte.weight[favour]
            model.ln_f.bias += 4.2 * row / row.square().sum()
    return model


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny():
    """make_model: a function that makes a tiny model."""
    return make_model


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """The GPT-2 tokenizer from OpenAI's two files, copied to where tiktoken's cache looks for them."""
    folder = Path(os.environ.get("NANOPOST_GPT2_FILES", ""))
    if not (folder / "vocab.bpe").exists() or not (folder / "encoder.json").exists():
        pytest.skip("NANOPOST_GPT2_FILES names no folder with GPT-2's vocab.bpe and encoder.json")
    shutil.copy(folder / "vocab.bpe", tmp_path / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    shutil.copy(folder / "encoder.json", tmp_path / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    return load_tokenizer("gpt2")


@pytest.fixture
def in_float64():
    """Weights, and with them everything that is computed, in double precision, so that 1e-10 means equal."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------------------------- the workshop


def write_lines(path, records) -> str:
    with open(path, "w", encoding="utf-8") as f:
        f.writelines((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    return str(path)


@pytest.fixture
def lines(tmp_path):
    """lines(records, name) writes a JSONL file (strings go in as they are) and returns its path."""
    return lambda records, name="data.jsonl": write_lines(tmp_path / name, records)


REWARD = '''
def vowels(prompts, completions):
    """The share of vowels in an answer."""
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]
'''


@dataclass
class Workshop:
    """Toy data and toy models in one folder, and how to run a script on them: workshop.run("dpo", out, steps=2)."""

    folder: Path

    def path(self, name) -> str:
        return str(self.folder / name)

    def config(self, script: str, out, **options):
        """The configuration of a quick run of train_<script>.py into the folder `out`."""
        common = dict(
            out=str(out), overwrite=True, steps=4, batch_size=8, micro_batch=0, lr=1e-2, log_every=1, eval_every=2,
            save_every=100, device="cpu", compile="off",
        )  # fmt: skip
        pairs = dict(data=self.path("pairs.jsonl"), valid=self.path("pairs_valid.jsonl"), max_new_tokens=8)
        prompts = dict(prompts=self.path("prompts.jsonl"), valid=self.path("prompts_valid.jsonl"), max_new_tokens=8)
        own = {
            "sft": dict(init=self.path("base"), data=self.path("sft.jsonl"), valid=self.path("sft_valid.jsonl")),
            "rm": dict(init=self.path("sft"), normalise=8, **pairs),
            "dpo": dict(init=self.path("sft"), **pairs),
            "ppo": dict(
                init=self.path("sft"), reward=self.path("rm"), eval_prompts=4, epochs=2, minibatches=2, warmup=0,
                **prompts,
            ),
        }  # fmt: skip
        own |= {"ipo": own["dpo"], "grpo": own["ppo"]}
        return self.module(script).Config(**{**common, **own[script], **options})

    def module(self, script: str):
        return importlib.import_module(f"train_{script}")

    def run(self, script: str, out, **options):
        self.module(script).main(self.config(script, out, **options))
        return Path(out)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    """Made once, and only read by the tests. The models favour the end token, so that most answers end."""
    folder, tokenizer = tmp_path_factory.mktemp("workshop"), make_tokenizer()
    end = tokenizer.end
    other = Tokenizer({bytes([255 - i]): i for i in range(256)} | {token: 256 + i for i, token in enumerate(MERGES)})

    def save(name, vocabulary=tokenizer, **options):
        save_model(str(folder / name), make_model(vocabulary.vocab_size, **options), vocabulary, {"method": "toy"})

    save("base", seed=1)
    save("sft", seed=2, favour=end)
    save("dropout", seed=3, favour=end, dropout=0.1)
    save("rm", seed=4, scalar_head=True)
    save("other_vocab", other, seed=5)
    save("other_vocab_rm", other, seed=5, scalar_head=True)
    with open(folder / "vocab.tiktoken", "w") as f:
        tokenizer.write(f)

    words = ["cat", "dog", "sun", "moon", "tree", "map", "hat", "lamp", "bus", "key", "cup", "pen"]
    say = [{"prompt": f"Say {w}!", "completion": f"The {w} and the {w}."} for w in words]
    pairs = [
        {"prompt": f"Say {w}!", "chosen": f"Oh, {w}" + "!" * (i % 4), "rejected": f"{w} no"}
        for i, w in enumerate(words * 2)
    ]
    write_lines(folder / "sft.jsonl", say + say)
    write_lines(folder / "sft_valid.jsonl", say[:5])
    write_lines(folder / "pairs.jsonl", pairs)
    write_lines(folder / "pairs_valid.jsonl", pairs[:5])
    write_lines(folder / "prompts.jsonl", [{"prompt": r["prompt"]} for r in say + say])
    write_lines(folder / "prompts_valid.jsonl", [{"prompt": r["prompt"]} for r in say[:5]])
    (folder / "reward.py").write_text(REWARD)
    return Workshop(folder)


def read_metrics(folder, *without) -> list[dict]:
    records = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in record.items() if k not in without} for record in records if "step" in record]


@pytest.fixture(scope="session")
def metrics():
    """metrics(folder, *without): the logged steps of metrics.jsonl, without these keys and without its header line."""
    return read_metrics


# ---------------------------------------------------------------------------------------------------- command lines


def run_and_capture(function, capfd):
    """Calls function() -> (exit code, stdout, stderr)."""
    capfd.readouterr()
    code = 0
    try:
        function()
    except SystemExit as end:
        code = end.code or 0
    out, err = capfd.readouterr()
    return code, out, err


@pytest.fixture
def command(monkeypatch, capfd):
    """command("train_sft.py", "--lr", "1") runs a file as from the command line -> (exit code, stdout, stderr)."""

    def run(file, *arguments):
        monkeypatch.setattr(sys, "argv", [os.path.basename(file), *map(str, arguments)])
        return run_and_capture(lambda: runpy.run_path(str(ROOT / file), run_name="__main__"), capfd)

    return run


@pytest.fixture
def tool(monkeypatch, capfd):
    """tool("chat", "out/ppo") runs `nanopost chat out/ppo` -> (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["nanopost", *map(str, arguments)])
        return run_and_capture(nanopost, capfd)

    return run


# --------------------------------------------------------------------------------- folders of runs, and runs that die


def one_line(error) -> str:
    """The message of a pytest.raises, which must be one line."""
    text = str(error.value)
    assert text and "\n" not in text
    return text


def contents(folder) -> dict:
    """{path in the folder: what is in the file}"""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def tensors(folder) -> dict:
    return torch.load(Path(folder) / "model.pt", weights_only=True)


def assert_same_tensors(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs"


def copies(folder) -> list[str]:
    """The kept copies in the folder of a run."""
    return sorted(path.name for path in Path(folder).glob("step-*"))


class Killed(BaseException):
    """The power goes off."""


def die_after(monkeypatch, step):
    """The next run raises Killed right after it has logged this step. Returns a function that ends this."""
    log = Run.log

    def log_and_die(self, at, values):
        log(self, at, values)
        if at == step:
            raise Killed

    monkeypatch.setattr(Run, "log", log_and_die)
    return lambda: monkeypatch.setattr(Run, "log", log)


def free_port() -> int:
    """For the processes of one run to meet at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---------------------------------------------------------------------------------------- --slow, --mine, --measured


def rest_slow(values) -> list:
    """Parameters of which the first is always tried, the others only with --slow."""
    first, *rest = values
    return [first, *(pytest.param(value, marks=pytest.mark.slow) for value in rest)]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that are marked slow")
    parser.addoption("--mine", metavar="FILE", help="test the functions of this file in the place of ours")
    parser.addoption("--measured", action="store_true", help="print the error that every proof measured")
    parser.addoption("--torture", metavar="N", type=int, default=1, help="tests/torture: N times the small amount")
    parser.addoption("--torture-seed", metavar="N", type=int, default=0, help="tests/torture: the seed of it all")


def pytest_configure(config):
    if path := config.getoption("--mine"):
        try:
            config.mine = put_in_place(path)  # [(script, function)]
        except UserError as error:
            pytest.exit(f"--mine: {error}", returncode=2)
        if config.option.tbstyle == "auto":
            config.option.tbstyle = "no"  # the summary says it in words
            config.option.reportchars = ""


def pytest_report_header(config):
    if path := config.getoption("--mine"):
        return (
            f"{path} in the place of {', '.join(dict.fromkeys(script_path(script).name for script, _ in config.mine))}"
        )


def script_path(script) -> Path:
    return ROOT / ("forks" if script in FORKS else "") / f"train_{script}.py"


def functions_in(path) -> dict[str, str]:
    """{name: what it does, the same whatever its comments and its layout} of the functions of a file."""
    tree, functions = ast.parse(Path(path).read_text(encoding="utf-8"), str(path)), {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            functions[node.name] = ast.dump(node)
    return functions


def unwritten(path) -> list[str]:
    """The functions of a file that only raise NotImplementedError: exercises that wait for their answer."""
    stubs = []
    for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and isinstance(node.body[-1], ast.Raise):
            alone = len(node.body) == 1 + (ast.get_docstring(node) is not None)
            if alone and "NotImplementedError" in ast.unparse(node.body[-1]):
                stubs.append(node.name)
    return stubs


def resembled(path) -> str:
    """The script that has the most functions in common with this file, and of several the most lines: dpo."""
    names, lines = functions_in(path).keys(), set(Path(path).read_text(encoding="utf-8").splitlines())

    if names & set(VARIANTS):
        return "dpo"

    def likeness(script):
        text = script_path(script).read_text(encoding="utf-8")
        return len(names & functions_in(script_path(script)).keys()), len(lines & set(text.splitlines()))

    return max(SCRIPTS + FORKS, key=likeness)


def put_in_place(path) -> list[tuple[str, str]]:
    """Runs the file in the namespace of the script that it resembles: what it defines replaces ours, the rest stays.
    A function that only other scripts have replaces theirs; one that is not written yet replaces nothing. Returns
    [(script, function)] of what was replaced; of a file with a loss of VARIANTS, which is DPO no longer, that loss."""
    if not os.path.isfile(path):
        raise UserError(f"no file {path}")
    try:
        stubs, home = unwritten(path), resembled(path)
        names = [name for name in functions_in(path) if name not in stubs]
        module = importlib.import_module(f"train_{home}")
        ours = dict(vars(module))
        file = os.path.abspath(path)
        exec(compile(Path(path).read_text(encoding="utf-8"), file, "exec"), vars(module))
        module.__file__ = file
        vars(module).update({name: ours[name] for name in stubs if name in ours})
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path}: {error}".splitlines()[0]) from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}".splitlines()[0]) from None
    replaced = []
    for name in names:
        owners = [script for script in SCRIPTS + FORKS if name in functions_in(script_path(script))]
        for script in [home] if home in owners else owners[:1]:
            setattr(importlib.import_module(f"train_{script}"), name, getattr(module, name))
            replaced.append((script, name))
    if not replaced and stubs:
        raise UserError(f"{path}: nothing is written yet; replace `raise NotImplementedError` in one of its functions")
    if not replaced:
        raise UserError(f"{path} defines no function of the scripts, such as dpo_loss or policy_loss")
    return [("dpo", name) for name in names if name in VARIANTS] or replaced


@pytest.fixture
def as_they_were():
    """What a test puts in the place of the scripts' functions is gone afterwards."""
    modules = [importlib.import_module(f"train_{script}") for script in SCRIPTS + FORKS]
    before = [dict(vars(module)) for module in modules]
    yield
    for module, names in zip(modules, before):
        vars(module).clear()
        vars(module).update(names)


def pytest_collection_modifyitems(config, items):
    """With --mine, the properties of its functions are run and no other tests; else, without --slow, no slow ones."""
    kept = items
    if config.getoption("--mine"):
        from properties import properties

        wanted = {script: set() for script, _ in config.mine}
        for script, name in config.mine:
            wanted[script].update(properties(f"train_{script}.{name}"))

        def asked(item):
            script = getattr(item, "callspec", SimpleNamespace(params={})).params.get("script")
            scripts = [script] if script in SCRIPTS + FORKS else wanted
            return any(item.function in wanted.get(script, ()) for script in scripts)

        kept = [item for item in items if asked(item)]
    elif not config.getoption("--slow"):
        kept = [item for item in items if not item.get_closest_marker("slow")]
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--measured"):
        from measured import MEASURED

        for test, (error, bound) in MEASURED.items():
            terminalreporter.write_line(f"{error:8.1e} <= {bound:.0e}  {test.removeprefix('tests/')}")
    if config.getoption("--mine"):
        tell_in_words(terminalreporter, config.getoption("--mine"), config.mine)


def tell_in_words(terminal, path, mine):
    """Which properties hold, which fail, each in words and with the function that it may be in, and what does not
    apply. A function that is the same as ours cannot be wrong."""
    from properties import known_mistake, properties, words_for

    ours = {script: functions_in(script_path(script)) for script in SCRIPTS + FORKS}
    theirs = functions_in(path)
    changed = [(script, name) for script, name in mine if theirs[name] != ours[script].get(name)] or mine
    failed, passed = {}, {}  # {name of the test: its first report}
    for kind, reports in (("failed", failed), ("error", failed), ("passed", passed)):
        for report in terminal.stats.get(kind, []):
            reports.setdefault(report.nodeid.split("::")[1].split("[")[0], report)

    def suspects(test):
        functions, _ = words_for(test)
        looked_at = [f for script, f in changed if test in {t.__name__ for t in properties(f"train_{script}.{f}")}]
        return [f for f in looked_at if f in functions] or looked_at or [f for _, f in changed]

    terminal.section(f"the properties of {path}")
    for test in passed.keys() - failed.keys():
        terminal.write_line(f"holds: {test.removeprefix('test_').replace('_', ' ')}")

    def distance(test):  # from the mistake: those that look at one function alone are the nearest
        functions, _ = words_for(test)
        return len(functions) if set(functions) & set(suspects(test)) else 99

    certain = {f for test in failed for f in suspects(test) if len(suspects(test)) == 1}
    for test in sorted(failed, key=distance):
        functions = [f for f in suspects(test) if f in certain] or suspects(test)
        terminal.write_line(f"FAILS: {' or '.join(functions)}: {what_is_wrong(words_for(test)[1], failed[test])}")
    for script, name in changed if failed else []:
        if mistake := known_mistake(f"train_{script}", name):
            terminal.write_line(f"{name} returns what it would with this mistake of mutants.py: {mistake}")
    if absent := {name: None for functions in ours.values() for name in functions if name not in theirs}:
        terminal.write_line(f"does not apply, for {path} does not define it: {', '.join(absent)}")
    if stubs := unwritten(path):
        terminal.write_line(f"not written yet: {', '.join(stubs)}")


def what_is_wrong(words, report) -> str:
    """The words for a failure, with what was measured in the place of {}; of any error but a failed assertion, that."""
    crash = getattr(report.longrepr, "reprcrash", None)
    found = crash.message.splitlines()[0] if crash else ""
    if found and not found.startswith(("AssertionError", "assert")):
        return f"it raises {found}"
    return words.replace("{}", found.removeprefix("AssertionError: "))
