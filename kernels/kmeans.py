"""k-means assignment: the two best centroids of every point, without an N x K tensor.

Used by curate.py (DESIGN.md section 7). The score of point n and centroid k is

    s_nk = x_n . c_k + bias_k        with bias_k = -|c_k|^2 / 2,   so that   |x_n - c_k|^2 = |x_n|^2 - 2 s_nk

and the nearest centroid is the one of the largest score. The *second* best score is returned as well, because the lead
of the first over the second is what makes a low-precision product useful: where the lead exceeds the error bound of the
product, the answer is proven (see `curate.nearest`).

dtypes: float32, or bfloat16 (products exact, sums in float32); any N, K and D. The reference runs wherever torch does,
the Triton kernel on CUDA devices that have bfloat16 (compute capability 8.0 on), or under TRITON_INTERPRET=1.

Shape letters: N points, K centroids, D channels, B rows of one tile.
"""

import os
import threading
from contextlib import contextmanager
from functools import cache

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

TILE_BYTES = 16 << 20  # of scores at a time: 4 to 32 MiB ran within 4% of each other, 256 MiB 1.3x slower


# ---------------------------------------------------------------------------------------------------------- reference

_local = threading.local()


def _buffer(size, device):
    """Scratch, kept from call to call on a CPU: memory fresh from the kernel costs a page fault every 4 KiB."""
    if device.type == "cuda":
        return torch.empty(size, device=device)
    if getattr(_local, "buffer", None) is None or len(_local.buffer) < size:
        _local.buffer = torch.empty(size)
    return _local.buffer[:size]


def top2_ref(x_ND, c_KD, bias_K):
    """Best and second-best score of every point, and the index of the best.

    x_ND, c_KD: both float32 or both bfloat16. bias_K: float32.
    Returns label_N int64 (the lowest index among equal scores), best_N and second_N float32 (-inf where K = 1).
    Works through tiles of rows, so that a tile's scores are still in the CPU's cache when they are searched.
    """
    n, k = len(x_ND), len(c_KD)
    label_N = torch.empty(n, dtype=torch.int64, device=x_ND.device)
    best_N, second_N = (torch.empty(n, dtype=torch.float32, device=x_ND.device) for _ in range(2))
    tile = min(max(64, TILE_BYTES // (4 * k)), max(n, 1))
    buffer_BK = _buffer(tile * k, x_ND.device).view(tile, k)
    x_ND, c_DK = x_ND.float(), c_KD.float().T  # bfloat16 values are exact in float32
    for start in range(0, n, tile):
        at = slice(start, min(start + tile, n))
        score_BK = buffer_BK[: at.stop - at.start]
        torch.addmm(bias_K, x_ND[at], c_DK, out=score_BK)
        if score_BK.is_cuda:
            index_B1 = score_BK.argmax(1, keepdim=True)
        else:  # numpy's argmax added 3% to the GEMM's time where torch's added 15 to 25%
            index_B1 = torch.from_numpy(score_BK.numpy().argmax(1))[:, None]
        label_N[at] = index_B1[:, 0]
        best_N[at] = score_BK.gather(1, index_B1)[:, 0]
        score_BK.scatter_(1, index_B1, -torch.inf)
        second_N[at] = score_BK.amax(1) if score_BK.is_cuda else torch.from_numpy(score_BK.numpy().max(1))
    return label_N, best_N, second_N


@cache
def cpu_has_fast_bf16():
    """Whether this CPU multiplies bfloat16 in tiles (AMX). Elsewhere the detour through bfloat16 costs time."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private, hence the care
    return bool(probe and probe()) and torch.backends.mkldnn.is_available()


@contextmanager
def cpu_bf16_products(enabled=True):
    """Within it, oneDNN may round the inputs of float32 matmuls to bfloat16: lossless where they already are rounded.

    The switch belongs to the process, not to the thread: enter it once, around all threads of a pass.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    if enabled:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


# ------------------------------------------------------------------------------------------------------------- Triton

if triton is not None:

    @triton.jit
    def _top2_kernel(
        x_ptr,
        c_ptr,
        bias_ptr,
        label_ptr,
        best_ptr,
        second_ptr,
        N,
        K,
        D,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """One program owns BLOCK_N points, walks over all centroids and keeps three numbers a point."""
        row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # int64: N x D passes 2^31
        best = tl.full([BLOCK_N], float("-inf"), tl.float32)
        second = tl.full([BLOCK_N], float("-inf"), tl.float32)
        label = tl.zeros([BLOCK_N], tl.int32)
        for k0 in range(0, K, BLOCK_K):
            col = k0 + tl.arange(0, BLOCK_K)
            score = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            for d0 in range(0, D, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                x = tl.load(x_ptr + row[:, None] * D + d, mask=(row[:, None] < N) & (d < D), other=0.0)
                c = tl.load(
                    c_ptr + col[None, :].to(tl.int64) * D + d[:, None], mask=(col < K) & (d[:, None] < D), other=0.0
                )
                score = tl.dot(x, c, score, input_precision="ieee")  # no TF32: float32 means float32
            bias = tl.load(bias_ptr + col, mask=col < K, other=float("-inf"))  # columns past K never win
            score += bias[None, :]
            tile_best, at = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
            rest = tl.where(tl.arange(0, BLOCK_K)[None, :] == at[:, None], float("-inf"), score)
            # The second best is the loser of the two firsts or the better of the two seconds.
            second = tl.maximum(tl.minimum(best, tile_best), tl.maximum(second, tl.max(rest, 1)))
            label = tl.where(tile_best > best, k0 + at, label)  # strict: the lower index keeps a tie
            best = tl.maximum(best, tile_best)
        tl.store(label_ptr + row, label, mask=row < N)
        tl.store(best_ptr + row, best, mask=row < N)
        tl.store(second_ptr + row, second, mask=row < N)


def top2_triton(x_ND, c_KD, bias_K):
    """`top2_ref` in one pass over the centroids; the scores never leave the chip."""
    (n, d), k = x_ND.shape, len(c_KD)
    label_N = torch.empty(n, dtype=torch.int32, device=x_ND.device)
    best_N, second_N = (torch.empty(n, dtype=torch.float32, device=x_ND.device) for _ in range(2))
    block_n, block_k, block_d = (128, 128, 64) if x_ND.dtype == torch.bfloat16 else (64, 64, 32)
    if n:
        _top2_kernel[(triton.cdiv(n, block_n),)](
            x_ND.contiguous(),
            c_KD.contiguous(),
            bias_K.contiguous(),
            label_N,
            best_N,
            second_N,
            n,
            k,
            d,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=8,
            num_stages=3,
        )
    return label_N.long(), best_N, second_N


# ------------------------------------------------------------------------------------------------------------- public


def triton_obstacle(device):
    """Why the Triton kernel cannot run on `device`, or None."""
    if triton is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if torch.device(device).type != "cuda":
        return f"the tensors are on {torch.device(device).type}, not cuda (TRITON_INTERPRET=1 runs it on a CPU, slowly)"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "this GPU has no bfloat16 (compute capability below 8.0)"
    return None


def top2(x_ND, c_KD, bias_K, impl="auto"):
    """`top2_ref`, by the fastest implementation at hand ("auto": Triton on CUDA) or the one named ("ref", "triton").

    Raises ValueError for shapes or dtypes that do not fit and for an implementation that cannot run.
    """
    if impl not in ("auto", "ref", "triton"):
        raise ValueError(f"impl={impl!r}: choose auto, ref or triton")
    if x_ND.ndim != 2 or c_KD.ndim != 2 or x_ND.shape[1] != c_KD.shape[1] or bias_K.shape != c_KD.shape[:1]:
        raise ValueError(
            f"x {list(x_ND.shape)}, c {list(c_KD.shape)}, bias {list(bias_K.shape)}: want [N, D] [K, D] [K]"
        )
    if len(c_KD) == 0:
        raise ValueError("no centroids: K is 0")
    if x_ND.dtype != c_KD.dtype or x_ND.dtype not in (torch.float32, torch.bfloat16) or bias_K.dtype != torch.float32:
        raise ValueError(
            f"x {x_ND.dtype}, c {c_KD.dtype}, bias {bias_K.dtype}: want float32 or bfloat16 twice, float32"
        )
    obstacle = triton_obstacle(x_ND.device)
    if impl == "triton" and obstacle:
        raise ValueError(f"impl='triton' cannot run: {obstacle}")
    if impl == "triton" or (impl == "auto" and x_ND.is_cuda and not obstacle):
        return top2_triton(x_ND, c_KD, bias_K)
    return top2_ref(x_ND, c_KD, bias_K)
