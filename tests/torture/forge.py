"""Makes processes that may die: imports what takes seconds once, then forks for every job that it reads on stdin.

A job is a line of JSON: {"file", "arguments", "out", "log"} runs a file of the repository as from the command line,
with stdout and stderr in log.out and log.err. More, if wanted: "dies_before": n kills the process with SIGKILL before
its n-th operation on files in "out"; "limit": bytes is the largest file that it can write, as on a full disk;
"memory": bytes that it can have. The number of operations is in log.operations when it has ended.

Answers, a line each: its process id at once, its exit code (negative: the signal) when it has ended.
"""

import io
import json
import os
import resource
import runpy
import signal
import sys
import traceback

import torch

torch.set_num_threads(1)
import train_dpo  # noqa: E402, F401
import train_ppo  # noqa: E402, F401
import train_rm  # noqa: E402, F401
import train_sft  # noqa: E402, F401

OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}


def watch(out: str, dies_before: int):
    """Counts the operations on files in `out` and, before the n-th, ends the process as a power cut would."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event in OPERATIONS and any(isinstance(a, str) and a.startswith(out) for a in arguments):
            count += 1
            if count == dies_before:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: count


def work(job: dict, out: int, err: int):
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
    sys.path.insert(0, os.path.dirname(os.path.abspath(job["file"])))
    sys.stdin = open(os.devnull)
    operations = watch(job["out"], job.get("dies_before", 0))
    if "limit" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], resource.RLIM_INFINITY))
    if "memory" in job:
        resource.setrlimit(resource.RLIMIT_AS, (job["memory"], resource.RLIM_INFINITY))
    sys.argv = [os.path.basename(job["file"]), *job["arguments"]]
    code = 0
    try:
        runpy.run_path(job["file"], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        if stream:
            stream.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    with open(f"{job['log']}.operations", "w") as f:
        f.write(str(operations()))
    os._exit(code)


def warm_up():
    """What PyTorch does only once, in a second: its first step, its first file."""
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    torch.load(file, weights_only=True)


if __name__ == "__main__":
    warm_up()
    for line in sys.stdin:
        job = json.loads(line)
        pipes = {end: os.pipe() for end in ("out", "err")}  # no limit on files applies to them
        pid = os.fork()
        if pid == 0:
            work(job, *(write for _, write in pipes.values()))
        print(pid, flush=True)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        for end, (read, write) in pipes.items():
            os.close(write)
            with open(read, "rb") as said, open(f"{job['log']}.{end}", "wb") as log:
                log.write(said.read())
        print(code, flush=True)
