"""What idle OpenMP threads cost, idle and beside four spinning processes: `python -m benchmarks.busy`, eight minutes.

Processes take steps of the toy's student on one pack: their idle threads spin (ACTIVE), sleep at once (PASSIVE), sleep
after so many turns, or do as kernels/__init__.py has them (default; "one thread" has none that idles). They take turns,
and who has none is stopped.
A turn's figure is its median step. `python -m benchmarks.tables` puts busy.json into docs/measured.md.
"""

import amoe
import train
from benchmarks.measure import ROOT, in_turns, machine, record, wall_s
from benchmarks.speed import make_step, random_pack

# isort: split
import contextlib
import os
import signal
import subprocess
import sys
from statistics import median

SPINNERS, TURNS, SECONDS = 4, 5, 4.0  # processes; turns, and how long one is at least
POLICIES = "default", "PASSIVE", "1000", "3000", "ACTIVE", "one thread"


def answer_turns():
    """For every line of the standard input, a line with the median step in ms of SECONDS, or of two steps."""
    flags = train.parse(["--device", "cpu"])
    with contextlib.redirect_stdout(sys.stderr):  # it says how it runs
        process, _ = train.setup(flags)
    spaces = [amoe.Space("text", 64), amoe.Space("dense", 96, 2, register_variance=(1.0, 1.0))]
    pack = random_pack([(4 + i % 5, 4 + i % 4) for i in range(54)], 2048, spaces)  # images of 16 to 64 patches
    _, step = make_step(flags, process, False, spaces)
    for _ in sys.stdin:
        taken = []
        while len(taken) < 2 or sum(taken) < SECONDS:
            taken.append(wall_s(lambda: step(pack)))
        print(1e3 * median(taken), flush=True)


def start_process(policy):
    """A process that answers turns under a policy."""
    environment = {name: v for name, v in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    if policy.isdecimal():
        environment |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": policy}
    elif policy == "one thread":
        environment["OMP_NUM_THREADS"] = "1"
    elif policy != "default":
        environment["OMP_WAIT_POLICY"] = policy
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "benchmarks.busy", "answer"], env=environment, **pipes)


def take_turn(process):
    """Its figure; before and after it is stopped, for threads that spin would do so in the others' turns too."""
    process.send_signal(signal.SIGCONT)
    print(file=process.stdin, flush=True)
    step_ms = float(process.stdout.readline())
    process.send_signal(signal.SIGSTOP)
    return step_ms


def main():
    result = machine() | {"cores": os.cpu_count(), "spinners": SPINNERS, "step_ms": {}}
    processes, spinning = {}, []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that none of them is left behind
    try:
        for policy in POLICIES:
            processes[policy] = start_process(policy)
            take_turn(processes[policy])
        for where in ("idle", "beside"):
            result["step_ms"][where] = in_turns(processes, TURNS, take_turn)
            print(where, result["step_ms"][where], flush=True)
            if where == "idle":
                spinning += [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(SPINNERS)]
    finally:
        for process in (*processes.values(), *spinning):
            process.kill()
    record(ROOT / "benchmarks", "busy.json", "toy", result)


if __name__ == "__main__":
    answer_turns() if sys.argv[1:] == ["answer"] else main()
