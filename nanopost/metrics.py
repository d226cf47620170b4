"""What a run logs: a line of JSON a logged step in metrics.jsonl and, if wanted, the same for tensorboard."""

import json
import math
import os
import shutil

from nanopost.checkpoint import atomic


class Metrics:
    """The lines of a run's metrics.jsonl. Between hold() and release() they are kept in memory: a fresh run shall not
    touch what an earlier one left in its folder before it has made a step. A `silent` one (of all processes but the
    first) writes nothing."""

    def __init__(self, folder: str, tensorboard: bool = False, silent: bool = False):
        self.folder, self.tensorboard, self.silent = folder, tensorboard, silent
        self.path, self.held, self.writer = os.path.join(folder, "metrics.jsonl"), None, None

    def hold(self):
        self.held = []

    def release(self):
        lines, self.held = self.held, None
        self.write(lines)

    def add(self, step: int, seconds: float, metrics: dict[str, float]):
        """A line: `step` updates done, seconds since the start, and the metrics, with six digits. JSON has no NaN: null
        where a statistic is undefined."""
        line = {"step": step, "seconds": round(seconds, 2)}
        line |= {name: float(f"{x:.6g}") if math.isfinite(x) else None for name, x in metrics.items()}
        if self.held is not None:
            self.held.append(line)
        else:
            self.write([line])

    def write(self, lines: list[dict]):
        if self.silent:
            return
        with open(self.path, "a") as f:
            f.writelines(json.dumps(line) + "\n" for line in lines)
        if self.tensorboard:
            self.draw(lines)

    def draw(self, lines: list[dict]):
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is None:  # after --resume too it shows what metrics.jsonl holds, every step once
            shutil.rmtree(os.path.join(self.folder, "tensorboard"), ignore_errors=True)
            self.writer = SummaryWriter(os.path.join(self.folder, "tensorboard"))
            with open(self.path) as f:
                lines = [json.loads(line) for line in f]
        for line in lines:
            for name, value in line.items():
                if name not in ("step", "seconds") and value is not None:
                    self.writer.add_scalar(name, value, line["step"])
        self.writer.flush()

    def cut(self, step: int):
        """Drops the lines after this step, which will be made again, and a line that was cut off."""
        if self.silent or not os.path.exists(self.path):
            return
        with open(self.path) as f:
            lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
        with atomic(self.path) as f:
            f.writelines(lines)
