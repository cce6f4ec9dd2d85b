"""The process that trains: its rank among others, its device, how it talks to the others, the signals it is sent."""

import kernels.moe
from common.commands import choose_device

# isort: split
import contextlib
import ctypes
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import PIL
import torch
import torch.distributed as dist


@dataclass
class Process:
    """This process among those that train together; alone it is a world of one."""

    rank: int
    world: int
    device: torch.device
    patient: object = None  # a process group whose barrier waits for days, where NCCL gives up after ten minutes

    def sum(self, tensor):
        """The tensor summed over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    @property
    def group(self):
        """The process group of all ranks; None alone."""
        return dist.group.WORLD if self.world > 1 else None

    def barrier(self):
        """Wait for all ranks, for as long as it takes: one may be calibrating or evaluating for the others."""
        if self.world > 1:
            dist.barrier(group=self.patient)

    def gather_counts(self, n):
        """[n of every rank], from host to host: asking the device would make it wait."""
        if self.world == 1:
            return [n]
        counts = [torch.tensor([0]) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([n]))
        return [int(count) for count in counts]

    def gather(self, x_NC, counts):
        """Rows of all ranks [B, C] in rank order, `counts` of them each."""
        if self.world == 1:
            return x_NC
        padded = x_NC.new_zeros(max(counts), x_NC.shape[1])
        padded[: len(x_NC)] = x_NC
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([p[:n] for p, n in zip(parts, counts, strict=True)])


def decoder():
    """Which Pillow decodes, in words; docs/measured.md says what the difference is."""
    simd = ".post" in PIL.__version__  # pillow-simd's versions are Pillow's and that
    return f"pillow-simd {PIL.__version__}" if simd else f"Pillow {PIL.__version__}, slower than pillow-simd (README)"


def setup(flags):
    """(this Process, whether to compile); prints what was chosen, and why, on rank 0."""
    device = choose_device(flags.device)
    why = "asked for" if flags.device != "auto" else "no GPU is there" if device == "cpu" else "a GPU is there"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device != "cpu":
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    if device == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    experts = kernels.moe.choose(flags.kernels, torch.device(device), dtype)
    compiled = flags.compile == "on" or (flags.compile == "auto" and device.startswith("cuda") and not flags.student)
    if rank == 0:
        form = "FlexAttention, compiled" if compiled and device != "cpu" else "SDPA on each image"
        print(
            f"device {device} ({why}), {world} rank(s), attention: {form}, experts: {experts}, "
            f"compile {'on' if compiled else 'off'}, images: {decoder()}",
            flush=True,
        )
        if device == "cpu" and kernels.BUSY:
            said = "other programs keep half of the cores busy: this one's idle threads make way (docs/measured.md)"
            print(said, flush=True)
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if world > 1 else None
    return Process(rank, world, torch.device(device), patient), compiled


def catch_signals():
    """The list that SIGINT and SIGTERM will append themselves to, so that a run is saved before it ends."""
    caught = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: caught.append(n))
    return caught


def keep_freed_memory():
    """glibc hands large freed tensors back to the system; faulting their pages in anew was 14% of the toy's step."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def single_threaded_pool(workers=None):
    """A ThreadPoolExecutor in whose threads torch computes alone.

    A second team of OpenMP threads makes more of them than there are cores. From then on libgomp lets none of them
    spin: beside a reader with a team, a student's forward pass over 92k tokens takes 2.4 s on two cores, else 1.7.
    """
    torch.get_num_threads()  # the calling thread keeps its number: a thread takes the last one set when it first asks
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
