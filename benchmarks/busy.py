"""What idle OpenMP threads cost on an idle machine and on a busy one: `python -m benchmarks.busy`.

A process takes steps of the toy's student on one pack and says the median. Processes whose idle threads spin (ACTIVE),
sleep at once (PASSIVE) or do as kernels/__init__.py has them (default: a short spin, then sleep) take turns, first
alone, then beside four processes that spin.
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import amoe
import train
from benchmarks.step import in_turns, make_step, random_pack
from kernels.bench import record

SPINNERS = 4
POLICIES = "default", "PASSIVE", "ACTIVE"


def median_step_ms(warmup=4, steps=12):
    """The toy's step on one pack of 2048 tokens, cut into images of 16 to 64 patches."""
    flags = train.parse(["--device", "cpu"])
    process, _ = train.setup(flags)
    spaces = [amoe.Space("text", 64), amoe.Space("dense", 96, 2, register_variance=(1.0, 1.0))]
    pack = random_pack([(4 + i % 5, 4 + i % 4) for i in range(54)], 2048, spaces)
    _, step = make_step(flags, process, False, spaces)
    return 1e3 * statistics.median(in_turns({"step": lambda: step(pack)}, warmup + steps)["step"][warmup:])


def run_step(policy):
    environment = {name: v for name, v in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= {} if policy == "default" else {"OMP_WAIT_POLICY": policy}
    command = [sys.executable, "-m", "benchmarks.busy", "step"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return float(said.split()[-1])


def main(repeats=5):
    result = {"name": "toy", "repeats": repeats, "cores": os.cpu_count(), "spinners": SPINNERS, "step_ms": {}}
    for beside in (0, SPINNERS):
        spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
        try:
            turns = [{policy: run_step(policy) for policy in POLICIES} for _ in range(repeats)]
        finally:
            for process in spinning:
                process.kill()
        for policy in POLICIES:
            result["step_ms"][f"{policy}, beside {beside}"] = statistics.median(turn[policy] for turn in turns)
            ratio = statistics.median(turn[policy] / turn["default"] for turn in turns)
            result[f"{policy}_over_default_beside_{beside}"] = ratio
    medians = result["step_ms"]
    result["busy_over_idle"] = medians[f"default, beside {SPINNERS}"] / medians["default, beside 0"]
    print(result)
    record(Path("benchmarks"), "busy.json", result["name"], result)


if __name__ == "__main__":
    print(median_step_ms()) if "step" in sys.argv else main()
