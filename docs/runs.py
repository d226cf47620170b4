"""What docs/results.py runs: every step is a list of commands, and its outcome is kept until something changes.

A step runs again once the code that it depends on has changed (comments and docstrings do not count), or what it starts
from, or PyTorch, or the machine.
"""

import datetime
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanopost.config import UserError
from nanopost.resume import meaning

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART, HACKING = (ROOT / "recipes" / name for name in ("quickstart.sh", "hacking.sh"))

PREPARE = "$python data/notes/prepare.py\n"

# after quickstart and PPO without a penalty, in their folder: a picture of all kept copies, PPO without a critic, and
# PPO with two passes over the answers of an iteration, in four steps each
VARIANTS = """
$python -m nanopost evaluate $OUT/sft $OUT/dpo/step-* $OUT/ppo/step-* $OUT/ppo-beta0/step-* --reference $OUT/sft \\
    --reward $OUT/rm --gold data/notes/gold.py:score --limit 200 --samples 1 --show 0 --json $OUT/kl.json
$python -m nanopost plot $OUT/kl.json --out $OUT/plots || echo "(no pictures)"
$python train_ppo.py --seed $SEED --overwrite --init $OUT/sft --reward $OUT/rm --beta 0.15 \\
    --steps 30 --epochs 1 --minibatches 8 --out $OUT/ppo-trunk
$python train_ppo.py --seed $SEED --overwrite --init $OUT/sft --reward $OUT/rm --critic $OUT/rm --beta 0.15 \\
    --steps 30 --epochs 2 --minibatches 4 --out $OUT/ppo-two-passes
$python -m nanopost evaluate $OUT/ppo-trunk $OUT/ppo-two-passes --reference $OUT/sft --reward $OUT/rm \\
    --gold data/notes/gold.py:score --json $OUT/variants.json
"""

BEST_OF_N = """
for n in 4 16; do
    $python -m nanopost sample $seed0/sft --prompts data/notes/prompts_eval.jsonl --n $n --keep best \\
        --reward $seed0/rm --gold data/notes/gold.py:score --out $here/best$n.jsonl
done
"""

REST = """
cp -r $seed0/sft $here/rest0
for i in 1 2; do
    $python -m nanopost sample $here/rest$((i-1)) --n 8 --keep best --reward $seed0/rm --seed $i \\
        --out $here/rest$i.jsonl
    $python train_sft.py --init $here/rest$((i-1)) --data $here/rest$i.jsonl --valid "" --lr 1e-3 --out $here/rest$i
done
$python -m nanopost evaluate $here/rest1 $here/rest2 --reference $seed0/sft --reward $seed0/rm \\
    --gold data/notes/gold.py:score --json $here/report.json
"""

SUMS = """
$python data/notes/sums.py
$python train_ppo.py --init $seed0/sft --reward data/notes/sums.py:correct --prompts out/sums/train.jsonl \\
    --valid out/sums/eval.jsonl --missing-end-score 0 --beta 0.02 --lr 1e-3 --steps 100 --out $here/ppo
$python -m nanopost evaluate $seed0/sft $here/ppo --temperature 0,1 --reference $seed0/sft \\
    --gold data/notes/sums.py:correct --prompts out/sums/eval.jsonl --samples 5 --json $here/report.json
"""

CONTRAST = """
for percent in 20 50; do
    $python data/notes/annotate.py --policy $seed0/sft --contrast 0.$percent --out $here/prefs$percent
    $python train_rm.py --init $seed0/sft --data $here/prefs$percent/train.jsonl --valid "" --out $here/rm$percent
    $python -m nanopost evaluate $seed0/sft --reference $seed0/sft --reward $here/rm$percent --best-of 4 \\
        --gold data/notes/gold.py:score --pairs $seed0/prefs/valid.jsonl --json $here/report$percent.json
done
"""

PAIRS = """
$python data/notes/annotate.py --policy $seed0/sft --pairs 40000 --out $here/prefs
$python train_rm.py --init $seed0/sft --data $here/prefs/train.jsonl --valid "" --out $here/rm
$python -m nanopost evaluate $seed0/sft --reference $seed0/sft --reward $here/rm --best-of 4 \\
    --gold data/notes/gold.py:score --pairs $seed0/prefs/valid.jsonl --json $here/report.json
"""

BETAS = """
for beta in 0.1 1; do
    $python train_dpo.py --init $seed0/sft --data $seed0/prefs/train.jsonl --valid "" --beta $beta \\
        --batch-size 64 --lr 4e-4 --label-smoothing 0.1 --out $here/dpo-$beta
done
$python -m nanopost evaluate $here/dpo-0.1 $here/dpo-1 --reference $seed0/sft --reward $seed0/rm \\
    --gold data/notes/gold.py:score --json $here/report.json
"""

MEASURE = "$python docs/measure.py $seed0 --json $here/measured.json\n"

PROOFS = """
$python -m pytest -q --measured --slow tests/proofs --ignore tests/proofs/test_mutants.py | tee $here/measured.txt
"""

PARITY = "$python -m pytest -q --measured tests/borders/test_huggingface.py | tee $here/measured.txt\n"

CODE = ["train_*.py", "nanopost/*.py", "nanopost/tools/evaluate.py", "nanopost/tools/sample.py", "data/notes/*.py"]
TESTS = ["train_*.py", "nanopost/**/*.py", "data/notes/*.py", "tests/conftest.py"]

# the same commands with a few steps, pairs and prompts each
QUICK = {
    r" --steps \d+": "",
    r"--epochs (1|1\.6) --out": "--steps 400 --out",  # pretraining and SFT: a model that ends its answers
    r"--lr 1e-3 --out \$here/rest": "--lr 1e-3 --steps 30 --out $here/rest",
    r"train_(rm|dpo)\.py": r"train_\1.py --steps 30",
    r"train_ppo\.py": "train_ppo.py --steps 2",
    r"--keep-every 25": "--keep-every 20",
    r"--keep-every 5 ": "--keep-every 1 ",
    r" --pairs 40000": "",
    r"annotate\.py": "annotate.py --pairs 400 --valid-pairs 40",
    r"nanopost (evaluate|sample)": r"nanopost \1 --limit 20",
    r"tests/proofs --ignore \S+": "tests/proofs/test_losses.py",
}


@dataclass
class Step:
    """A script for bash, run in the root with one thread. It sees $python, $here (the step's folder) and $seed0 (the
    folder of the first seed's quickstart)."""

    name: str  # its folder
    script: str
    code: list[str]  # patterns of the files that its outcome depends on
    environment: dict[str, str] = field(default_factory=dict)


def all_steps(out: Path, seeds: int, instructions: str, quick: bool) -> list[Step]:
    """Everything to run; a step comes after those that it needs."""
    quickstart = QUICKSTART.read_text(encoding="utf-8")
    if PREPARE not in quickstart:
        raise UserError(f"{QUICKSTART.name} has no line {PREPARE.strip()!r}")
    # the data are a step of their own: two runs at a time would write the same files
    quickstart = quickstart.replace(PREPARE, "") + HACKING.read_text(encoding="utf-8") + VARIANTS
    steps = [Step("data", PREPARE, ["data/notes/*.py"])]
    for seed in range(seeds):
        name = f"seed{seed}"
        steps.append(Step(name, quickstart, CODE, {"SEED": str(seed), "OUT": str(out / name)}))
    steps.append(Step("best", BEST_OF_N, CODE))
    steps.append(Step("rest", REST, CODE))
    steps.append(Step("sums", SUMS, CODE))
    steps.append(Step("contrast", CONTRAST, CODE))
    steps.append(Step("pairs", PAIRS, CODE))
    steps.append(Step("betas", BETAS, CODE))
    steps.append(Step("measured", MEASURE, [*CODE, "docs/measure.py"]))
    steps.append(Step("proofs", PROOFS, [*TESTS, "tests/proofs/*.py"]))
    if importlib.util.find_spec("transformers") and not quick:
        steps.append(Step("parity", PARITY, [*TESTS, "tests/proofs/measured.py", "tests/borders/test_huggingface.py"]))
    if instructions:
        steps.append(recipe(out, instructions))
    if quick:
        for step in steps:
            for pattern, replacement in QUICK.items():
                step.script = re.sub(pattern, replacement, step.script)
    return steps


def recipe(out: Path, path: str) -> Step:
    """recipes/instructions.sh on a file of the user's."""
    if not os.path.isfile(path):
        raise UserError(f"--instructions: there is no file {path}")
    content = hashlib.sha256(Path(path).read_bytes()).hexdigest() + os.environ.get("VOCAB", "")
    script = f'set -- "$file"  # {content}\n' + (ROOT / "recipes" / "instructions.sh").read_text(encoding="utf-8")
    environment = {"OUT": str(out / "instructions"), "file": os.path.abspath(path)}
    return Step("instructions", script, [*CODE, "data/*.py", "data/alpaca/*.py"], environment)


def conditions() -> dict[str, str]:
    """The machine and the versions: the numbers of another machine are not these."""
    return {
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count()),
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def fingerprint(step: Step, start: str = "") -> str:
    """A hash of everything that the step's outcome depends on; `start` is that of the run that it starts from."""
    files = sorted({path for pattern in step.code for path in ROOT.glob(pattern)})
    commands = "\n".join(line for line in step.script.splitlines() if not line.lstrip().startswith("# "))
    parts = [commands, start, json.dumps(conditions())]
    parts += [f"{path.relative_to(ROOT)} {meaning(path)}" for path in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def run_step(step: Step, out: Path, start: str) -> dict:
    """Runs a step, unless its folder holds what the same code made. Returns {"hash", "date", "seconds", "cpu_seconds"}.

    What it prints goes to log.txt in its folder. Raises UserError if it fails.
    """
    folder, expected, began = out / step.name, fingerprint(step, start), time.time()
    stamp_file = folder / "stamp.json"
    if stamp_file.exists():
        stamp = json.loads(stamp_file.read_text())
        if stamp["hash"] == expected:
            tell(f"{step.name}: kept, it ran on {stamp['date']}")
            return stamp
    tell(f"{step.name}: started")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = os.environ | {"PYTHON": sys.executable, "python": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {"here": str(folder), "seed0": str(out / "seed0")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with open(folder / "log.txt", "w") as log:
        command = ["bash", "-e", "-o", "pipefail", "-c", step.script]
        process = subprocess.Popen(command, cwd=ROOT, env=environment | step.environment, stdout=log, stderr=log)
        _, process.returncode, usage = os.wait4(process.pid, 0)  # and how much processor time it took
    if process.returncode:
        raise UserError(
            f"{step.name} failed: the end of {folder}/log.txt is\n{(folder / 'log.txt').read_text()[-1000:]}"
        )
    stamp = {
        "hash": expected,
        "date": datetime.date.today().isoformat(),
        "seconds": round(time.time() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
    }
    stamp_file.write_text(json.dumps(stamp))  # last: a folder without it is not complete
    tell(f"{step.name}: done after {stamp['seconds']:.0f} s")
    return stamp


def tell(line: str):
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def run_all(steps: list[Step], out: Path, jobs: int) -> dict[str, dict]:
    """Runs the steps, `jobs` at a time, and returns their stamps."""
    started = {}

    def work(step: Step) -> dict:
        if step.name != "data":
            started["data"].result()
        start = started["seed0"].result()["hash"] if "$seed0" in step.script else ""
        return run_step(step, out, start)

    with ThreadPoolExecutor(jobs) as pool:
        for step in steps:
            started[step.name] = pool.submit(work, step)
        try:
            return {name: future.result() for name, future in started.items()}
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise
