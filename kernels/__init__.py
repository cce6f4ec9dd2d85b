"""One operation a file: the plain-torch reference is the specification, faster forms stand beside it."""

import os
import time


def others_running():
    """How many threads of other programs are running or waiting for a core; 0 where the system does not say.

    The least of 20 counts within a tenth of a second: a short burst of work is no busy machine.
    """
    if not os.path.exists("/proc/loadavg"):
        return 0
    counts = []
    for _ in range(20):
        with open("/proc/loadavg") as file:
            counts.append(int(file.read().split()[3].split("/")[0]))  # of "running/all"
        time.sleep(0.005)
    return min(counts) - 1  # this thread


# Idle OpenMP threads sleep after a short spin. By default they spin on, and two busy programs starve each other: with
# other work running, a step that takes 0.15 s alone took 1.8 to 16 s. Where half of the cores are taken already they
# sleep at once, which makes an idle machine slower (docs/measured.md). torch reads these variables when it is loaded,
# so they are set here; values of yours win.
BUSY = False
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"], BUSY = "PASSIVE", 2 * others_running() >= (os.cpu_count() or 1)
    if not BUSY:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's products are small here, and its idle threads spin too

try:
    import triton
except ImportError:  # a torch build without it: the plain-torch forms remain
    triton = None


# Whether kernels are defined for Triton's interpreter. A constant: torch 2.11 cannot trace a question about a kernel.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(device, dtype, dtypes):
    """Why Triton kernels that compute in `dtypes` cannot run on the device in `dtype`, or None."""
    if triton is None:
        return "needs the triton package, which is not installed (pip install triton)"
    if device.type != "cuda" and not INTERPRETED:
        return f"needs a CUDA device and was asked to run on {device.type} (TRITON_INTERPRET=1 runs it there, slowly)"
    if dtype not in dtypes:
        return f"computes in {', '.join(map(str, dtypes))} and was given {dtype}".replace("torch.", "")
    return None


def check_impl(operation, impl, reasons, instead):
    """impl, if reasons {impl: why it cannot run, or None} has none for it; else ValueError, naming `instead`."""
    if impl not in reasons:
        raise ValueError(f"kernels.{operation} has no implementation '{impl}'; it has {', '.join(reasons)}")
    if reasons[impl]:
        raise ValueError(f"kernels.{operation}: '{impl}' {reasons[impl]}; use {instead}")
    return impl
