"""What idle OpenMP threads cost, idle and beside four spinning processes: `python -m benchmarks.busy`, four minutes.

Three processes take steps of the toy's student on one pack: their idle threads spin (ACTIVE), sleep at once (PASSIVE)
or do as kernels/__init__.py has them (default: a short spin, then sleep). They take turns, and who has none is stopped.
A turn's figure is its median step. `python -m benchmarks.tables` puts busy.json into docs/measured.md.
"""

import amoe
import train
from benchmarks.measure import machine, record
from benchmarks.speed import make_step, random_pack

# isort: split
import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

SPINNERS = 4
POLICIES = "default", "PASSIVE", "ACTIVE"


def answer_turns(seconds):
    """For every line of the standard input, a line with the median step in ms of `seconds`, or of two steps."""
    flags = train.parse(["--device", "cpu"])
    with contextlib.redirect_stdout(sys.stderr):  # it says how it runs
        process, _ = train.setup(flags)
    spaces = [amoe.Space("text", 64), amoe.Space("dense", 96, 2, register_variance=(1.0, 1.0))]
    pack = random_pack([(4 + i % 5, 4 + i % 4) for i in range(54)], 2048, spaces)  # images of 16 to 64 patches
    _, step = make_step(flags, process, False, spaces)
    step(pack)
    for _ in sys.stdin:
        taken = []
        while len(taken) < 2 or sum(taken) < seconds:
            began = time.perf_counter()
            step(pack)
            taken.append(time.perf_counter() - began)
        print(1e3 * statistics.median(taken), flush=True)


def start_process(policy, seconds):
    """A process that answers turns under a policy."""
    environment = {name: v for name, v in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= {} if policy == "default" else {"OMP_WAIT_POLICY": policy}
    command = [sys.executable, "-m", "benchmarks.busy", "--answer", "--seconds", str(seconds)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def take_turn(process):
    """Its figure; before and after it is stopped, for threads that spin would do so in the others' turns too."""
    process.send_signal(signal.SIGCONT)
    print(file=process.stdin, flush=True)
    step_ms = float(process.stdout.readline())
    process.send_signal(signal.SIGSTOP)
    return step_ms


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="of a turn, at least (default: 4)")
    parser.add_argument("--answer", action="store_true", help="be one of the three processes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of busy.json")
    args = parser.parse_args()
    if args.answer:
        return answer_turns(args.seconds)
    result = machine() | {"cores": os.cpu_count(), "spinners": SPINNERS, "step_ms": {}}
    processes, spinning = {}, []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that none of them is left behind
    try:
        for policy in POLICIES:
            processes[policy] = start_process(policy, args.seconds)
            take_turn(processes[policy])
        for where in ("idle", "beside"):
            turns = [{name: take_turn(process) for name, process in processes.items()} for _ in range(args.turns)]
            result["step_ms"][where] = {policy: [turn[policy] for turn in turns] for policy in POLICIES}
            print(where, result["step_ms"][where], flush=True)
            if where == "idle":
                spinning += [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(SPINNERS)]
    finally:
        for process in (*processes.values(), *spinning):
            process.kill()
    record(args.out, "busy.json", "toy", result)


if __name__ == "__main__":
    main()
