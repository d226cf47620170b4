"""What a run logs: metrics.jsonl, one line of JSON per logged step, and, if wanted, the same for tensorboard."""

import json
import math
import os
import shutil

from nanopost.config import UserError
from nanopost.files import atomic, naming
from nanopost.records import parse_json


class Metrics:
    """The lines of a run's metrics.jsonl. add() collects them, flush() writes them (nothing if `silent`).

    The first line is {"method", "arguments"}, all others have "step", "seconds" and numbers.
    """

    def __init__(self, folder: str, header: dict, tensorboard: bool = False, silent: bool = False):
        self.path = os.path.join(folder, "metrics.jsonl")
        self.events = os.path.join(folder, "tensorboard") if tensorboard else None
        self.silent = silent
        self.writer = None
        self.lines = [header]

    def add(self, step: int, seconds: float, metrics: dict[str, float]):
        """A line: updates made, seconds since the start, and the metrics, with six significant digits; null (JSON has
        no NaN) where a statistic is undefined."""
        numbers = {name: float(f"{x:.6g}") if math.isfinite(x) else None for name, x in metrics.items()}
        self.lines.append({"step": step, "seconds": round(seconds, 2)} | numbers)

    def flush(self):
        lines, self.lines = self.lines, []
        if self.silent or not lines:
            return
        with naming(self.path), open(self.path, "a") as f:
            f.writelines(json.dumps(line) + "\n" for line in lines)
        if self.events:
            self.write_tensorboard(lines)

    def write_tensorboard(self, lines: list[dict]):
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is None:  # after --resume too it shows what metrics.jsonl holds, every step once
            shutil.rmtree(self.events, ignore_errors=True)
            self.writer = SummaryWriter(self.events)
            with open(self.path) as f:
                lines = [json.loads(line) for line in f]
        for line in lines:
            for name, value in line.items():
                if "step" in line and name not in ("step", "seconds") and value is not None:
                    self.writer.add_scalar(name, value, line["step"])
        self.writer.flush()

    def truncate(self, step: int):
        """After a resume: drops the lines after this step, which will be made again, and a half-written one. Raises
        UserError for a line that no run has written."""
        if self.silent or not os.path.exists(self.path):
            return
        self.lines, kept = [], []  # the file has a header already
        with open(self.path, "rb") as f:
            lines = [line for line in f if line.endswith(b"\n")]
        for n, line in enumerate(lines, 1):
            record = parse_json(f"{self.path}:{n}", line)
            made = record.get("step", 0) if isinstance(record, dict) else None
            if not isinstance(made, int):
                raise UserError(f"{self.path}:{n}: no line of a run; remove it, or give --overwrite to start again")
            if made <= step:
                kept.append(line)
        with atomic(self.path, "wb") as f:
            f.writelines(kept)
