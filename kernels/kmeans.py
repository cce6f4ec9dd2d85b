"""k-means assignment: the nearest centroid of every point, proven, without an N x K tensor.

`top3` is the operation with its Triton kernel; `Nearest`, which kmeans.py uses, makes proofs of scores. The score of
point n and centroid k is

    s_nk = x_n . c_k + bias_k        with bias_k = -|c_k|^2 / 2,   so that   |x_n - c_k|^2 = |x_n|^2 - 2 s_nk

and the nearest centroid is the one of the largest score. The second and third best are returned as well, because the
lead of the first is what makes a low-precision product useful: where it exceeds the error bound of the product the
answer is proven, and where only the second is that close two centroids are left to compare.

dtypes: float32, or bfloat16 (products exact, sums in float32); any N, K and D. The reference runs wherever torch does,
the Triton kernel on CUDA devices that have bfloat16 (compute capability 8.0 on), or under TRITON_INTERPRET=1.

Shape letters: N points, K centroids, D channels, G groups of S centroids, P = S G places, B rows of a tile or block,
M of a selection, E channels of an extended product.
"""

import threading
from functools import cache

import torch

from kernels import triton, why_not_on

if triton is not None:
    import triton.language as tl

GROUPS = 32  # of centroids; a point keeps one float for each
UNIT = 2.0**-24  # half a unit in the last place of float32, relative
TILE_BYTES = 16 << 20  # of scores at a time: 4 to 32 MiB ran within 4% of each other, 256 MiB 1.3x slower


# ---------------------------------------------------------------------------------------------------------- reference

_scratch = threading.local()


def scratch(name, rows, columns, dtype):
    """An uninitialised CPU matrix, a thread's own, kept: fresh memory costs a page fault every 4 KiB."""
    held = getattr(_scratch, name, None)
    if held is None or len(held) < rows * columns or held.dtype != dtype:
        held = torch.empty(rows * columns, dtype=dtype)
        setattr(_scratch, name, held)
    return held[: rows * columns].view(rows, columns)


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
    if x_ND.is_cuda:
        buffer_BK = torch.empty(tile, k, device=x_ND.device)
    else:
        buffer_BK = scratch("score", tile, k, torch.float32)
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


def obstacle(device):
    """Why the Triton kernel cannot run on `device`, or None."""
    reason = why_not_on(device)
    if reason is None and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "this GPU has no bfloat16 (compute capability below 8.0)"
    return reason


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
    reason = None if impl == "ref" else obstacle(x_ND.device)
    if impl == "triton" and reason:
        raise ValueError(f"impl='triton' cannot run: {reason}")
    if impl == "triton" or (impl == "auto" and x_ND.is_cuda and not reason):
        return top3_triton(x_ND, c_KD, bias_K)
    return top3_ref(x_ND, c_KD, bias_K)


# ------------------------------------------------------------------------------------------------------------ proven


@cache
def cpu_has_fast_bf16():
    """Whether this CPU multiplies bfloat16 in tiles (AMX). Elsewhere the detour through bfloat16 costs time."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private, hence the care
    return bool(probe and probe()) and torch.backends.mkldnn.is_available()


PRODUCTS = {  # how the first sieve multiplies
    "fused": "bfloat16 on the GPU, search fused (Triton)",
    "bfloat16": "bfloat16 in the CPU's tiles (AMX)",
    "float32": "float32 (this CPU has no bfloat16 tiles)",
}


def product_for(device):
    """The fastest of PRODUCTS that a device has."""
    return "fused" if device.type == "cuda" else "bfloat16" if cpu_has_fast_bf16() else "float32"


def argmax(x_MK):
    """Of each row. numpy's added 3% to the product's time where torch's added 15 to 25%."""
    return x_MK.argmax(1) if x_MK.is_cuda else torch.from_numpy(x_MK.numpy().argmax(1))


def group(c_KD, at_most=GROUPS):
    """Centroids in equal groups of neighbours: ids int64 [G, S], -1 where one is short. G is a power of two.

    Halved again and again across the direction of largest variance (power iteration). Any partition is correct; one
    that follows the data lets more groups be ruled out together.
    """
    groups = [torch.arange(len(c_KD), device=c_KD.device)]
    while 2 * len(groups) <= at_most and len(c_KD) >= 16 * len(groups):
        halves = []
        for ids in groups:
            x_MD = c_KD[ids] - c_KD[ids].mean(0)
            direction_D = x_MD[x_MD.square().sum(1).argmax()]
            for _ in range(10):
                direction_D = torch.nn.functional.normalize((x_MD @ direction_D) @ x_MD, dim=0)
            halves += ids[(x_MD @ direction_D).argsort()].tensor_split(2)
        groups = halves
    return torch.nn.utils.rnn.pad_sequence(groups, batch_first=True, padding_value=-1)


class Nearest:
    """Finds nearest centroids, proven: three sieves, each dearer and finer than the one before.

    A point keeps `near`, at least the distance to its own centroid, and for each group of centroids `far`, at most the
    distance to any other centroid of the group. A group is *open* for the point while far <= near; with no group open
    the label is proven.

    1. `screen`: one product with all centroids, in bfloat16 where that is fast. s_k = x.c_k - |c_k|^2 / 2 is largest
       for the nearest centroid, and rounded x', c' change it by at most

           |x - x'| |c_k| + |x'| |c_k - c'_k| + E 2^-24 (|x| |c_k| + |c_k|^2)          (Cauchy-Schwarz; float32 sums)

       which is at most h |c_k| with one h a point: rank one, so an extra channel (h beside x', |c_k| beside c') makes
       the product return upper bounds of s themselves. (One bound for all will not do: a cluster of one point in 384-d
       can be 8 times as long as its neighbours of 100.) Largest bounds by group give `far`, the best's lower bound
       gives `near`. It runs only if so many groups are open that the next sieve would be dearer.
    2. `compare`: float32, only a point's open groups and its own, about the middle of the group, where both are short.
    3. `double`: float64 for near ties. Equal to its last bit, the lower index wins.
    Which sieves ran never shows in the labels.

    Bounds by groups of centroids that outlive a pass: Ding et al., "Yinyang K-Means" (2015).
    """

    def __init__(self, c_KD, group_GS, product):
        self.c_KD, self.exact_KD, self.fused = c_KD, c_KD.double(), product == "fused"
        self.square_K = self.exact_KD.square().sum(1)
        length_K = self.square_K.sqrt().float()
        self.longest = length_K.max().item()
        # With a larger share of the groups open, one product with all centroids is cheaper than comparing them apart.
        self.screen_above = 0.5 if product == "float32" else 0.125
        # The first sieve's factor, places P = S x G so that the maximum by group runs along memory.
        self.place_P = group_GS.T.reshape(-1)
        self.bias_P = (-self.square_K / 2).float()[self.place_P].masked_fill_(self.place_P < 0, -3e38)
        self.kind = torch.float32 if product == "float32" else torch.bfloat16
        if product == "float32":  # h is so small that one bound for all will do, and it need not be in the product
            self.e = c_KD.shape[1]
            self.factor_EP = c_KD[self.place_P].T.contiguous()
        else:
            rounded_KD = c_KD.bfloat16().float()
            self.rounding = ((c_KD - rounded_KD).norm(dim=1) / length_K.clamp(min=1e-30)).max().item()
            self.output_error = 0.0 if self.fused else 1.02 * 2.0**-8  # the product is rounded to bfloat16
            self.bound_K = (1.01 * length_K).bfloat16().float()
            self.e = -(-(c_KD.shape[1] + 4) // 32) * 32  # rows of whole cache lines
            factor_PE = torch.zeros(len(self.place_P), self.e, dtype=torch.bfloat16, device=c_KD.device)
            factor_PE[:, : c_KD.shape[1]], rest_P = rounded_KD[self.place_P], self.bias_P.clone()
            for channel in range(c_KD.shape[1], c_KD.shape[1] + 3):  # |c|^2 / 2 to 24 bits
                factor_PE[:, channel] = rest_P
                rest_P -= factor_PE[:, channel].float()
            factor_PE[:, c_KD.shape[1] + 3] = self.bound_K[self.place_P]
            self.factor_EP = factor_PE.T if self.fused else factor_PE.T.contiguous()
        # The second sieve's, by group: ids, middle, centroids about it, their squares, the longest.
        self.group_K = torch.empty(len(c_KD), dtype=torch.int64, device=c_KD.device)
        self.groups = []
        for g, ids in enumerate(group_GS):
            ids = ids[ids >= 0].sort().values
            self.group_K[ids] = g
            middle_D = self.exact_KD[ids].mean(0).float()
            local_SD = c_KD[ids] - middle_D
            square_S = local_SD.double().square().sum(1).float()
            self.groups.append((ids, middle_D, local_SD.T.contiguous(), -square_S, square_S.max().sqrt()))

    def bounds(self, norm_B, lower_B, upper_BG):
        """near_B and far_BG from bounds of scores, |x - c|^2 = |x|^2 - 2 s; float32's rounding on the safe side."""
        square_B, error_B = norm_B.square(), (len(self.c_KD[0]) + 16) * UNIT * (norm_B + self.longest).square()
        near_B = (square_B - 2 * lower_B).add_(error_B).clamp_(min=0).sqrt_()
        far_BG = torch.sub((square_B - error_B)[:, None], upper_BG, alpha=2).clamp_(min=0).sqrt_()
        return near_B, far_BG

    def screen(self, x_BD, norm_B, rounding_B):
        """label_B, near_B, far_BG, open_BG by one product with all centroids."""
        (b, d), n_groups = x_BD.shape, len(self.groups)
        h_B = 2 * self.e * UNIT * (norm_B + self.longest)
        if self.kind == torch.bfloat16:
            h_B = 1.02 * (h_B + rounding_B + 1.01 * norm_B * self.rounding)  # 1.02: for rounding h itself
            h_B = h_B.bfloat16().float()
            make = torch.empty if x_BD.is_cuda else lambda *shape, dtype, device: scratch("x", *shape, dtype)
            x_BE = make(b, self.e, dtype=self.kind, device=x_BD.device)
            x_BE[:, :d], x_BE[:, d : d + 3], x_BE[:, d + 3], x_BE[:, d + 4 :] = x_BD, 1, h_B, 0
        if self.fused:
            return self.screen_fused(x_BD, x_BE, norm_B, h_B)
        place_B, best_B, upper_BG = torch.empty(b, dtype=torch.int64), torch.empty(b), torch.empty(b, n_groups)
        for rows in torch.arange(b).split(max(64, TILE_BYTES // (4 * len(self.place_P)))):
            at, m = slice(int(rows[0]), int(rows[-1]) + 1), len(rows)
            score_MP = scratch("score", m, len(self.place_P), torch.float32)
            if self.kind == torch.float32:
                torch.addmm(self.bias_P, x_BD[at], self.factor_EP, out=score_MP)
            else:
                product_MP = scratch("product", m, len(self.place_P), torch.bfloat16)
                score_MP.copy_(torch.mm(x_BE[at], self.factor_EP, out=product_MP))
            score_MSG = score_MP.view(m, -1, n_groups)
            top_MG = score_MSG.amax(1)
            g_M = argmax(top_MG)
            own_MS = score_MSG[rows - at.start, :, g_M]
            s_M = argmax(own_MS)
            best_B[at] = own_MS.gather(1, s_M[:, None])[:, 0]
            top_MG[rows - at.start, g_M] = own_MS.scatter_(1, s_M[:, None], -3e38).amax(1)
            place_B[at], upper_BG[at] = s_M * n_groups + g_M, top_MG
        label_B = self.place_P[place_B]
        if self.kind == torch.float32:
            slack_B = h_B * self.longest
            lower_B, upper_BG = best_B - slack_B, upper_BG + slack_B[:, None]
        else:
            lower_B = best_B - self.output_error * best_B.abs() - 2 * h_B * self.bound_K[label_B]
            upper_BG += self.output_error * upper_BG.abs()
        near_B, far_BG = self.bounds(norm_B, lower_B, upper_BG)
        return label_B, near_B, far_BG, far_BG <= near_B[:, None]

    def screen_fused(self, x_BD, x_BE, norm_B, h_B):
        """The same with the scores kept on the chip: one group. Where two centroids are left, differences decide."""
        place_B2, upper_B3 = top3(x_BE, self.factor_EP.T, torch.zeros(len(self.place_P), device=x_BE.device))
        label_B2 = self.place_P[place_B2]
        lower_B2 = upper_B3[:, :2] - 2 * h_B[:, None] * self.bound_K[label_B2]
        two = ((lower_B2[:, 0] <= upper_B3[:, 1]) & (lower_B2.amax(1) > upper_B3[:, 2])).nonzero()[:, 0]
        x_MD = x_BD[two].double()
        first_M, second_M = ((x_MD - self.exact_KD[label_B2[two, i]]).square_().sum(1) for i in (0, 1))
        tie_M = (first_M == second_M) & (label_B2[two, 1] < label_B2[two, 0])
        swap = two[(second_M < first_M) | tie_M]
        chosen_B = torch.zeros_like(h_B, dtype=torch.int64)
        chosen_B[swap] = 1
        label_B, lower_B = (t.gather(1, chosen_B[:, None])[:, 0] for t in (label_B2, lower_B2))
        near_B, far_B1 = self.bounds(norm_B, lower_B, upper_B3.gather(1, 1 - chosen_B[:, None]))
        open_B1 = far_B1 <= near_B[:, None]
        open_B1[two] = False
        return label_B, near_B, far_B1, open_B1

    def compare(self, x_BD, wanted_BG):
        """label_B, near_B, far_BG from the wanted groups alone; far is infinite for the others."""
        best_BG = torch.full(wanted_BG.shape, torch.inf, device=x_BD.device)  # squared distances
        next_BG, error_BG, label_BG = best_BG.clone(), torch.zeros_like(best_BG), torch.zeros_like(wanted_BG, dtype=int)
        g_M, row_M = wanted_BG.T.nonzero(as_tuple=True)
        for g, rows in enumerate(row_M.split(torch.bincount(g_M, minlength=len(self.groups)).tolist())):
            if len(rows):
                ids, middle_D, local_DS, minus_square_S, longest = self.groups[g]
                x_MD = x_BD.index_select(0, rows).sub_(middle_D)  # twice as fast as x_BD[rows]
                square_M = torch.linalg.vecdot(x_MD, x_MD)
                score_MS = torch.addmm(minus_square_S, x_MD, local_DS, alpha=2)
                s_M = argmax(score_MS)[:, None]
                label_BG[rows, g], best_BG[rows, g] = ids[s_M[:, 0]], square_M - score_MS.gather(1, s_M)[:, 0]
                next_BG[rows, g] = square_M - score_MS.scatter_(1, s_M, -torch.inf).amax(1)
                error_BG[rows, g] = (len(middle_D) + 16) * UNIT * (square_M.sqrt() + longest).square()
        g_B = best_BG.argmin(1)[:, None]
        near_B = (best_BG.gather(1, g_B) + error_BG.gather(1, g_B))[:, 0].clamp_(min=0).sqrt_()
        best_BG.scatter_(1, g_B, next_BG.gather(1, g_B))
        return label_BG.gather(1, g_B)[:, 0], near_B, (best_BG - error_BG).clamp_(min=0).sqrt_()

    def double(self, x_MD):
        """label_M of near ties."""
        label_M = torch.empty(len(x_MD), dtype=torch.int64, device=x_MD.device)
        for at in torch.arange(len(x_MD), device=x_MD.device).split(max(1, TILE_BYTES // (4 * len(self.c_KD)))):
            label_M[at] = argmax(torch.addmm(-self.square_K / 2, x_MD[at].double(), self.exact_KD.T))
        return label_M

    def __call__(self, x_BD, norm_B, rounding_B, label_B, near_B, far_BG):
        """New label_B, near_B, far_BG of points whose old ones are given (-1, inf and -inf know nothing)."""
        open_BG = far_BG <= near_B[:, None]
        if open_BG.float().mean() > self.screen_above:
            label_B, near_B, far_BG, open_BG = self.screen(x_BD, norm_B, rounding_B)
        else:
            label_B, near_B, far_BG = label_B.clone(), near_B.clone(), far_BG.clone()
        left = open_BG.any(1).nonzero()[:, 0]
        if len(left):
            wanted_MG = open_BG[left].scatter_(1, self.group_K[label_B[left]][:, None], True)
            x_MD = x_BD if len(left) == len(x_BD) else x_BD.index_select(0, left)
            label_B[left], near_M, far_MG = self.compare(x_MD, wanted_MG)
            far_MG = torch.where(wanted_MG, far_MG, far_BG[left])
            ties = (far_MG <= near_M[:, None]).any(1).nonzero()[:, 0]
            if len(ties):
                label_B[left[ties]] = self.double(x_MD[ties])
                far_MG[ties] = 0  # either of the tied may have become a stranger
            near_B[left], far_BG[left] = near_M, far_MG
        return label_B, near_B, far_BG
