"""What sleeping OpenMP threads cost on an idle machine, and save on a busy one: `python -m benchmarks.busy`.

A process takes steps of the toy's student on one pack and says the median; processes whose idle threads spin (ACTIVE)
and sleep (PASSIVE, this repository's default) take turns, first alone, then beside four processes that spin.
"""

import os
import statistics
import subprocess
import sys
import time

import torch

import amoe
import data
import train
from common.process import Process, keep_freed_memory
from kernels.bench import record

SPINNERS = 4
STEP = [sys.executable, "-m", "benchmarks.busy", "step"]


def median_step_ms(warmup=4, steps=12):
    """The toy's step on one pack of 2048 tokens, cut into images of 16 to 64 patches."""
    torch.manual_seed(0)
    shapes = [(4 + i % 5, 4 + i % 4) for i in range(54)]
    batch = data.pack([torch.randint(256, (h * w, amoe.ROW), dtype=torch.uint8) for h, w in shapes], shapes, 2048)
    spaces = [amoe.Space("text", 64), amoe.Space("dense", 96, 2, register_variance=(1.0, 1.0))]
    for space in spaces:
        shape = {"patch": (2048,), "summary": (54,), "registers": (54, space.registers)}
        batch.targets[space.name] = {kind: torch.randn(*size, space.dim) for kind, size in shape.items()}
    flags, process = train.parse(["--device", "cpu"]), Process(0, 1, torch.device("cpu"))
    model, taken = train.build(flags, spaces, process.device), []
    optimizer, bad_steps = train.make_optimizer(model, flags), torch.zeros(2, dtype=torch.int64)
    keep_freed_memory()
    for _ in range(warmup + steps):
        began = time.perf_counter()
        packs = [train.to_device(batch, process, False, [], spaces)]
        measured, load = train.gradients(model, packs, spaces, flags, process)
        train.update(model, optimizer, {}, measured, load, bad_steps, 0, flags)
        taken.append(time.perf_counter() - began)
    return 1e3 * statistics.median(taken[warmup:])


def run_step(policy):
    environment = os.environ | {"OMP_WAIT_POLICY": policy}
    return float(subprocess.run(STEP, env=environment, capture_output=True, text=True, check=True).stdout)


def main(repeats=5):
    result = {"name": "toy", "repeats": repeats, "cores": os.cpu_count(), "spinners": SPINNERS, "step_ms": {}}
    for beside in (0, SPINNERS):
        spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
        try:
            turns = [{policy: run_step(policy) for policy in ("PASSIVE", "ACTIVE")} for _ in range(repeats)]
        finally:
            for process in spinning:
                process.kill()
        for policy in turns[0]:
            result["step_ms"][f"{policy}, beside {beside}"] = statistics.median(turn[policy] for turn in turns)
        result[f"active_over_passive_beside_{beside}"] = statistics.median(t["ACTIVE"] / t["PASSIVE"] for t in turns)
    medians = result["step_ms"]
    result["busy_over_idle"] = medians[f"PASSIVE, beside {SPINNERS}"] / medians["PASSIVE, beside 0"]
    print(result)
    record("benchmarks", "busy.json", result["name"], result)


if __name__ == "__main__":
    print(median_step_ms()) if "step" in sys.argv else main()
