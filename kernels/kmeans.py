"""k-means assignment: the best centroids of every point, without an N x K tensor.

Used by kmeans.py. The score of point n and centroid k is

    s_nk = x_n . c_k + bias_k        with bias_k = -|c_k|^2 / 2,   so that   |x_n - c_k|^2 = |x_n|^2 - 2 s_nk

and the nearest centroid is the one of the largest score. The second and third best are returned as well, because the
lead of the first is what makes a low-precision product useful: where it exceeds the error bound of the product the
answer is proven, and where only the second is that close two centroids are left to compare (`kmeans.Nearest`).

dtypes: float32, or bfloat16 (products exact, sums in float32); any N, K and D. The reference runs wherever torch does,
the Triton kernel on CUDA devices that have bfloat16 (compute capability 8.0 on), or under TRITON_INTERPRET=1.

Shape letters: N points, K centroids, D channels, B rows of one tile.
"""

import os
import threading

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


def top3_ref(x_ND, c_KD, bias_K):
    """The three best scores of every point, and the indices of the best two.

    x_ND, c_KD: both float32 or both bfloat16. bias_K: float32.
    Returns label_N2 int64 (the lower index first among equal scores) and score_N3 float32, descending; where K < 3 the
    missing scores are -inf and the labels beside them mean nothing.
    Works through tiles of rows, so that a tile's scores are still in the CPU's cache when they are searched.
    """
    n, k = len(x_ND), len(c_KD)
    label_N2 = torch.zeros(n, 2, dtype=torch.int64, device=x_ND.device)
    score_N3 = torch.empty(n, 3, dtype=torch.float32, device=x_ND.device)
    tile = min(max(64, TILE_BYTES // (4 * k)), max(n, 1))
    buffer_BK = _buffer(tile * k, x_ND.device).view(tile, k)
    x_ND, c_DK = x_ND.float(), c_KD.float().T  # bfloat16 values are exact in float32
    for start in range(0, n, tile):
        at = slice(start, min(start + tile, n))
        score_BK = buffer_BK[: at.stop - at.start]
        torch.addmm(bias_K, x_ND[at], c_DK, out=score_BK)
        for place in range(2):
            # numpy's argmax added 3% to the GEMM's time where torch's added 15 to 25%
            index_B = score_BK.argmax(1) if score_BK.is_cuda else torch.from_numpy(score_BK.numpy().argmax(1))
            label_N2[at, place] = index_B
            score_N3[at, place] = score_BK.gather(1, index_B[:, None])[:, 0]
            score_BK.scatter_(1, index_B[:, None], -torch.inf)
        score_N3[at, 2] = score_BK.amax(1) if score_BK.is_cuda else torch.from_numpy(score_BK.numpy().max(1))
    return label_N2, score_N3


# ------------------------------------------------------------------------------------------------------------- Triton

if triton is not None:

    @triton.jit
    def _pop(score, BLOCK_K: tl.constexpr):
        """The best score of each row, where it stands, and the scores without it."""
        best, at = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
        return best, at, tl.where(tl.arange(0, BLOCK_K)[None, :] == at[:, None], float("-inf"), score)

    @triton.jit
    def _top3_kernel(
        x_ptr,
        c_ptr,
        bias_ptr,
        label_ptr,
        score_ptr,
        N,
        K,
        D,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_D: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        """One program owns BLOCK_N points, walks over all centroids and keeps five numbers a point."""
        row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # int64: N x D passes 2^31
        s1 = tl.full([BLOCK_N], float("-inf"), tl.float32)
        s2 = tl.full([BLOCK_N], float("-inf"), tl.float32)
        s3 = tl.full([BLOCK_N], float("-inf"), tl.float32)
        l1 = tl.zeros([BLOCK_N], tl.int32)
        l2 = tl.zeros([BLOCK_N], tl.int32)
        for k0 in range(0, K, BLOCK_K):
            col = k0 + tl.arange(0, BLOCK_K)
            score = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            for d0 in range(0, D, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                x = tl.load(x_ptr + row[:, None] * D + d, mask=(row[:, None] < N) & (d < D), other=0.0)
                c_at = c_ptr + col[None, :].to(tl.int64) * D + d[:, None]
                c = tl.load(c_at, mask=(col < K) & (d[:, None] < D), other=0.0)
                if UPCAST:  # the interpreter multiplies the bits of bfloat16 as integers (triton 3.7)
                    x = x.to(tl.float32)
                    c = c.to(tl.float32)
                score = tl.dot(x, c, score, input_precision="ieee")  # no TF32: float32 means float32
            bias = tl.load(bias_ptr + col, mask=col < K, other=float("-inf"))  # columns past K never win
            t1, i1, score = _pop(score + bias[None, :], BLOCK_K)
            t2, i2, score = _pop(score, BLOCK_K)
            t3 = tl.max(score, 1)
            i1 += k0
            i2 += k0
            # The j-th best of two sorted lists is the largest of min(a of one, b of the other) with a + b = j. Earlier
            # columns keep ties.
            s3 = tl.maximum(tl.maximum(s3, t3), tl.maximum(tl.minimum(s1, t2), tl.minimum(s2, t1)))
            l2 = tl.where(t1 > s1, tl.where(t2 > s1, i2, l1), tl.where(t1 > s2, i1, l2))
            l1 = tl.where(t1 > s1, i1, l1)
            s2 = tl.maximum(tl.maximum(s2, t2), tl.minimum(s1, t1))
            s1 = tl.maximum(s1, t1)
        tl.store(label_ptr + 2 * row, l1, mask=row < N)
        tl.store(label_ptr + 2 * row + 1, l2, mask=row < N)
        tl.store(score_ptr + 3 * row, s1, mask=row < N)
        tl.store(score_ptr + 3 * row + 1, s2, mask=row < N)
        tl.store(score_ptr + 3 * row + 2, s3, mask=row < N)


def top3_triton(x_ND, c_KD, bias_K):
    """`top3_ref` in one pass over the centroids; the scores never leave the chip."""
    (n, d), k = x_ND.shape, len(c_KD)
    label_N2 = torch.empty(n, 2, dtype=torch.int32, device=x_ND.device)
    score_N3 = torch.empty(n, 3, dtype=torch.float32, device=x_ND.device)
    block_n, block_k, block_d = (128, 128, 64) if x_ND.dtype == torch.bfloat16 else (64, 64, 32)
    if n:
        _top3_kernel[(triton.cdiv(n, block_n),)](
            x_ND.contiguous(),
            c_KD.contiguous(),
            bias_K.contiguous(),
            label_N2,
            score_N3,
            n,
            k,
            d,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            UPCAST=not x_ND.is_cuda,
            num_warps=8,
            num_stages=3,
        )
    return label_N2.long(), score_N3


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


def top3(x_ND, c_KD, bias_K, impl="auto"):
    """`top3_ref`, by the fastest implementation at hand ("auto": Triton on CUDA) or the one named ("ref", "triton").

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
        return top3_triton(x_ND, c_KD, bias_K)
    return top3_ref(x_ND, c_KD, bias_K)
