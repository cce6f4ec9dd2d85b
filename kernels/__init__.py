"""One operation a file: the plain-torch reference is the specification, faster forms stand beside it."""

import os

# Idle OpenMP threads sleep. Spinning, as they do by default, two busy programs starve each other: beside other work a
# step took 1.8 to 16 s that takes 0.15 s alone. Read when torch is loaded, so it is set here, before; yours wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import triton
except ImportError:  # a torch build without it: the plain-torch forms remain
    triton = None


def why_not_on(device, kernel):
    """Why a Triton kernel cannot run on the device, or None. `kernel()` is the one asked about."""
    if triton is None:
        return "needs the triton package, which is not installed (pip install triton)"
    if device.type != "cuda" and not interpreted(kernel()):
        return f"needs a CUDA device and was asked to run on {device.type} (TRITON_INTERPRET=1 runs it there, slowly)"
    return None


def interpreted(kernel):
    """Whether TRITON_INTERPRET=1 was set when the kernel was defined."""
    return not isinstance(kernel, triton.JITFunction)
