"""What all measuring scripts share: ways take turns, figures are kept as JSON at once, `tables.py` makes tables of it.

Whatever else a machine does slows every way of a turn alike, so what is compared is measured in one process, turn by
turn: medians over turns, and the median of the turns' ratios rather than the ratio of two medians.
"""

import json
import platform
import time
from pathlib import Path
from statistics import median

import torch

import kernels
from common.store import write_json

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def timed(way, clock=time.perf_counter):
    """Seconds of way(), until the GPU has done it; time.process_time counts all threads, and other processes little."""
    began = clock()
    way()
    if CUDA:
        torch.cuda.synchronize()
    return clock() - began


def in_turns(ways, repeats, clock=time.perf_counter):
    """{name: [seconds of each turn]} of ways {name: way}; a first turn, which finds its pages, is not counted."""
    turns = [{name: timed(way, clock) for name, way in ways.items()} for _ in range(1 + repeats)]
    return {name: [turn[name] for turn in turns[1:]] for name in ways}


def median_ms(function):
    """Median milliseconds of a call; on CUDA with L2 cleared before each."""
    if not CUDA:
        return 1e3 * median(in_turns({"calls": function}, 10)["calls"])
    from triton.testing import do_bench

    return do_bench(function, warmup=100, rep=400, return_mode="median")


def peaks():
    """Measured FLOP/s of a large matrix product (bfloat16 on CUDA) and bytes/s of a large copy, read and written."""
    n, dtype = (8192, torch.bfloat16) if CUDA else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    source = torch.ones(2**28 if CUDA else 2**24, device=DEVICE)
    target = torch.empty_like(source)
    product_ms, copy_ms = median_ms(lambda: a @ b), median_ms(lambda: target.copy_(source))
    return {"matmul_flops": 2 * n**3 / product_ms * 1e3, "copy_bytes": 8 * source.numel() / copy_ms * 1e3}


def machine():
    return {
        "machine": torch.cuda.get_device_name() if CUDA else platform.processor() or platform.machine(),
        "device": DEVICE.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": kernels.triton and kernels.triton.__version__,
    }


def record(folder, file, key, value):
    """Put {key: value} into a JSON file of the folder, atomically; no folder, no file."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, content | {key: value})
