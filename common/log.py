"""The log of a run: log.jsonl, one JSON object a line, and the same numbers for TensorBoard or Weights & Biases."""

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from common.commands import one_line_errors
from common.store import write_atomically


class Log:
    """log.jsonl, one JSON object per line, on rank 0 only; a run resumed at `step` first drops the lines after it."""

    def __init__(self, folder, rank, step, flags):
        self.path = Path(folder) / "log.jsonl" if rank == 0 else None
        self.track = open_tracker(flags, step) if rank == 0 and flags.track else lambda step, numbers: None
        if self.path and self.path.exists():
            lines = []
            for line in self.path.read_bytes().split(b"\n") if step else ():
                with contextlib.suppress(ValueError, TypeError, AttributeError):  # a line that a kill cut short
                    if json.loads(line).get("step", 0) <= step:
                        lines.append(line + b"\n")
            write_atomically(self.path, lambda file: file.writelines(lines))

    def write(self, **entry):
        """Append a line; if it belongs to a step, give its numbers to the tracker."""
        if self.path:
            with one_line_errors(self.path), open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
            if "step" in entry:
                self.track(entry["step"], {k: v for k, v in entry.items() if isinstance(v, (int, float))})


def open_tracker(flags, step):
    """A function of (step, {name: number}) that writes to TensorBoard (in --out) or to Weights & Biases."""
    if flags.track == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(flags.out, purge_step=step + 1)  # hides what a resumed run writes again
        return lambda step, numbers: [writer.add_scalar(k, v, step) for k, v in numbers.items()] and writer.flush()
    import wandb

    own = Path(flags.out) / "wandb-id"  # a resumed run goes on under the same one
    if not step or not own.exists():
        own.write_text(os.urandom(8).hex())
    words = {"project": "amoe", "name": own.parent.name, "dir": flags.out, "config": asdict(flags)}
    run = wandb.init(id=own.read_text(), resume="allow", **words)
    return lambda step, numbers: run.log(numbers, step=step)


def first_line(flags, process, trunk):
    """The log's first line: what it takes to repeat the run. trunk: its sizes, or its factory."""
    commit = ""
    with contextlib.suppress(OSError):  # no git on this machine
        words = ["git", "-C", str(Path(__file__).parents[1]), "rev-parse", "HEAD"]
        commit = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    gpu = process.device.type == "cuda"
    device = torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores, {platform.machine()}"
    return {
        "config": asdict(flags),
        "model": trunk,
        "argv": sys.argv,
        "commit": commit or "unknown",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": device,
        "world": process.world,
    }


class Skipped:
    """The steps that `update` skipped since their loss or gradient was not finite, and their images.

    counts: [2] int64 on the device, of such steps in a row and in all. images: ids of the newest.
    """

    def __init__(self, counts, images=()):
        self.counts, self.images, self.recent = counts, list(images), []

    def add(self, ids):
        """Note the images of a step; only the device knows whether it was skipped, and `note` asks it."""
        self.recent.append((ids, self.counts[0] > 0))

    def note(self, process):
        """Add the images, of all ranks, of skipped recent steps; returns how many were skipped in a row."""
        ids, self.recent = [i for ids, skipped in self.recent if skipped for i in ids], []
        if ids:  # on every rank alike
            ids = torch.tensor(ids, dtype=torch.int64, device=process.device)
            ids = process.gather(ids[:, None], process.gather_counts(len(ids))).flatten().tolist()
            self.images = (self.images + ids)[-1000:]
        return int(self.counts[0])


class Interval:
    """What happens between two lines of the log: losses averaged over its finite steps, tokens, waiting for data.

    total: on the device, sums of losses and, as "steps", the number of steps summed. earlier_tokens (of all ranks) and
    earlier_seconds: those of training before this interval. A checkpoint keeps these three.
    """

    def __init__(self, total=None, earlier_tokens=0, earlier_seconds=0.0):
        self.total, self.earlier_tokens, self.earlier_seconds = total or {}, earlier_tokens, earlier_seconds
        self.begin()

    def begin(self):
        """Restart counts and time; `end` empties `total`."""
        self.steps, self.tokens, self.waited, self.began = 0, 0, 0.0, time.perf_counter()

    def so_far(self, world):
        """(tokens, seconds) of training so far, without padding; every rank is taken to have as many tokens as this."""
        seconds = time.perf_counter() - self.began if self.steps else 0.0
        return self.earlier_tokens + self.tokens * world, self.earlier_seconds + seconds

    def wait(self, batches):
        """The next of `batches`; the time that it took is counted as waiting."""
        asked = time.perf_counter()
        batch, position = next(batches)
        self.waited += time.perf_counter() - asked
        self.tokens += int(batch.starts[-1])
        return batch, position

    def add(self, measured):
        """Count a step; its losses stay on the device."""
        self.steps += 1
        finite = torch.isfinite(measured["loss"])
        for name, value in (measured | {"steps": torch.ones_like(measured["loss"])}).items():
            self.total[name] = self.total.get(name, 0) + torch.where(finite, value, 0)

    def end(self, run, rate, norm, expert_load, more):
        """Write the line of the log, and what more(run) adds to it, whose time does not count as training.

        This is the one place where the host waits for the device. Returns what the progress bar shows.
        """
        total = {name: float(value) for name, value in self.total.items()}
        counted = total.pop("steps") or math.nan  # no finite step: the line says NaN
        losses, self.total = {name: value / counted for name, value in total.items()}, {}
        seconds, tokens = time.perf_counter() - self.began, self.tokens * run.process.world
        relative = expert_load / expert_load.mean(1, keepdim=True) if expert_load.numel() else torch.ones(1, 1)
        run.log.write(
            step=run.step,
            **losses,
            lr=rate,
            grad_norm=float(norm),
            epoch=run.position.epoch,
            step_ms=1e3 * seconds / self.steps,
            tokens_per_s=tokens / seconds,
            data_wait_share=self.waited / seconds,
            expert_load_min=float(relative.min()),
            expert_load_max=float(relative.max()),
            expert_load=[[round(x, 3) for x in row] for row in relative.tolist()],
            skipped_steps=int(run.skipped.counts[1]),
            **more(run),
        )
        self.earlier_tokens, self.earlier_seconds = self.earlier_tokens + tokens, self.earlier_seconds + seconds
        self.begin()
        return {"loss": f"{losses['loss']:.3f}", "tokens_per_s": f"{tokens / seconds:.0f}"}
