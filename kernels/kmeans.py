"""k-means assignment: the nearest centroid of every point, proven, without an N x K tensor.

`nearest_ref` specifies every label: float64, and of equally near centroids the lowest index. `top3` is a product that
finds candidates, `NearestSearch` proves labels by cheap products, and `Assignment`, which curate.py uses, keeps what a
search has proven while the centroids move.

The score of point n and centroid k is x_n.c_k + bias_k. With bias_k = -|c_k|^2 / 2 it is (|x_n|^2 - |x_n-c_k|^2) / 2,
so the nearest centroid has the largest score. `top3` returns the second and third best as well: where the best leads by
more than a low-precision product errs, its label is proven; where only the second is that close, two are left.

`top3` takes float32, or bfloat16 (products exact, sums in float32); its Triton kernel needs a GPU that has bfloat16.

Shape letters: N points, K centroids, D channels, G groups of S centroids, P = S G slots, B points of a block or tile,
M points of a selection, E channels of an extended product, F choices.
"""

import threading
from functools import cache

import torch

from kernels import check_impl, triton, why_not_triton

if triton is not None:
    import triton.language as tl

IMPLS = ("ref", "triton")  # of top3
GROUPS = 32  # of centroids, at most; a point keeps one float for each
GATHERING = 160  # comparing a point with a group costs as much as so many more centroids: its row has to be gathered
RATE = {"float32": 1.0, "bfloat16": 0.5}  # cost of each centroid that `screen` multiplies, in float32 products
SCREENING = 50  # cost of `screen` for a point, however few centroids it multiplies
UNIT = 2.0**-24  # half a unit in the last place of float32, relative
TILE_BYTES = 8 << 20  # of scores at a time: 4 and 16 MiB take up to a twentieth longer, 256 MiB 1.3 times as long


# ---- references ----

kept_memory = threading.local()


def scratch(name, rows, columns, dtype, device):
    """An uninitialised matrix. On a CPU each thread keeps its own: fresh memory costs a page fault every 4 KiB."""
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    kept = getattr(kept_memory, name, None)
    if kept is None or len(kept) < rows * columns or kept.dtype != dtype:
        kept = torch.empty(rows * columns, dtype=dtype)
        setattr(kept_memory, name, kept)
    return kept[: rows * columns].view(rows, columns)


def tiles(n, k):
    """Slices of n points whose scores with k centroids are still in the CPU's cache when they are searched."""
    size = max(64, TILE_BYTES // (4 * k))
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]


def argmax(x_MK):
    """Of each row. numpy's added 3% to the product's time where torch's added 15 to 25%."""
    return x_MK.argmax(1) if x_MK.is_cuda else torch.from_numpy(x_MK.numpy().argmax(1))


def nearest_ref(x_ND, c_KD, square_K=None):
    """The nearest centroid of every point, int64 [N], in float64. square_K: the centroids' |c|^2, if known."""
    c_KD = c_KD.double()
    square_K = c_KD.square().sum(1) if square_K is None else square_K
    label_N = torch.empty(len(x_ND), dtype=torch.int64, device=x_ND.device)
    for tile in tiles(len(x_ND), len(c_KD)):
        label_N[tile] = argmax(torch.addmm(-square_K / 2, x_ND[tile].double(), c_KD.T))
    return label_N


def top3_ref(x_ND, c_KD, bias_K):
    """The three best scores of every point, and the indices of the best two.

    x_ND, c_KD: both float32 or both bfloat16. bias_K: float32.
    Returns label_N2 int64 (the lower index first among equal scores) and score_N3 float32, descending; where K < 3 the
    missing scores are -inf and the labels beside them mean nothing.
    """
    n, k, device = len(x_ND), len(c_KD), x_ND.device
    label_N2 = torch.zeros(n, 2, dtype=torch.int64, device=device)
    score_N3 = torch.empty(n, 3, dtype=torch.float32, device=device)
    x_ND, c_DK = x_ND.float(), c_KD.float().T  # bfloat16 values are exact in float32
    for tile in tiles(n, k):
        score_BK = scratch("score", tile.stop - tile.start, k, torch.float32, device)
        torch.addmm(bias_K, x_ND[tile], c_DK, out=score_BK)
        for rank in range(2):
            label_B = argmax(score_BK)
            label_N2[tile, rank] = label_B
            score_N3[tile, rank] = score_BK.gather(1, label_B[:, None])[:, 0]
            score_BK.scatter_(1, label_B[:, None], -torch.inf)
        score_N3[tile, 2] = score_BK.amax(1) if score_BK.is_cuda else torch.from_numpy(score_BK.numpy().max(1))
    return label_N2, score_N3


# ---- top3 in Triton ----

if triton is not None:

    @triton.jit
    def pop_best(score, BK: tl.constexpr):
        """The best score of each row, where it stands, and the scores without it."""
        best, at = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
        return best, at, tl.where(tl.arange(0, BK)[None, :] == at[:, None], float("-inf"), score)

    @triton.jit
    def top3_kernel(
        x_ptr, c_ptr, bias_ptr, label_ptr, score_ptr, N, K, D, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr
    ):
        """One program owns BN points, walks over all centroids, BK at a time, and keeps five numbers a point."""
        row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # int64: N x D passes 2^31
        s1, l1 = tl.full([BN], float("-inf"), tl.float32), tl.zeros([BN], tl.int32)
        s2, s3, l2 = s1, s1, l1
        for k0 in range(0, K, BK):
            col = k0 + tl.arange(0, BK)
            score = tl.zeros([BN, BK], tl.float32)
            for d0 in range(0, D, BD):
                d = d0 + tl.arange(0, BD)
                x = tl.load(x_ptr + row[:, None] * D + d, mask=(row[:, None] < N) & (d < D), other=0.0)
                c_at = c_ptr + col[None, :].to(tl.int64) * D + d[:, None]
                c = tl.load(c_at, mask=(col < K) & (d[:, None] < D), other=0.0)
                score = tl.dot(x, c, score, input_precision="ieee")  # no TF32: float32 means float32
            bias = tl.load(bias_ptr + col, mask=col < K, other=float("-inf"))  # columns past K never win
            t1, i1, score = pop_best(score + bias[None, :], BK)
            t2, i2, score = pop_best(score, BK)
            t3 = tl.max(score, 1)
            i1 += k0
            i2 += k0
            # The j-th best of two sorted lists is the largest min(a-th, b-th) with a + b = j. Earlier columns win ties.
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
    blocks = (128, 128, 64) if x_ND.dtype == torch.bfloat16 else (64, 64, 32)  # of points, centroids, channels
    if not x_ND.is_cuda:  # the interpreter multiplies the bits of bfloat16 as integers (triton 3.7)
        x_ND, c_KD = x_ND.float(), c_KD.float()
    if n:
        tensors = (x_ND.contiguous(), c_KD.contiguous(), bias_K.contiguous(), label_N2, score_N3)
        top3_kernel[(triton.cdiv(n, blocks[0]),)](*tensors, n, k, d, *blocks, num_warps=8, num_stages=3)
    return label_N2.long(), score_N3


def choose(impl, device):
    """The form that `impl` means on `device` (auto: triton on CUDA, else ref); ValueError where it cannot run."""
    reason = why_not_triton(device, torch.float32, (torch.float32,))
    if reason is None and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        reason = "needs a GPU with bfloat16 (compute capability 8.0 on)"
    if impl == "auto":
        return "triton" if device.type == "cuda" and reason is None else "ref"
    return check_impl("kmeans", impl, {"ref": None, "triton": reason}, "ref")


def top3(x_ND, c_KD, bias_K, impl="auto"):
    """`top3_ref`, by the fastest implementation at hand ("auto": Triton on CUDA) or the one named ("ref", "triton").

    Raises ValueError for shapes or dtypes that do not fit and for an implementation that cannot run.
    """
    form = {"ref": top3_ref, "triton": top3_triton}[choose(impl, x_ND.device)]
    alike = x_ND.ndim == c_KD.ndim == 2 and x_ND.shape[1] == c_KD.shape[1] and bias_K.shape == c_KD.shape[:1]
    alike &= x_ND.dtype == c_KD.dtype and x_ND.dtype in (torch.float32, torch.bfloat16)
    if not alike or bias_K.dtype != torch.float32:
        given = ", ".join(f"{n} {list(t.shape)} {t.dtype}" for n, t in (("x", x_ND), ("c", c_KD), ("bias", bias_K)))
        raise ValueError(f"{given}: want [N, D] [K, D] [K], x and c both float32 or both bfloat16, bias float32")
    if len(c_KD) == 0:
        raise ValueError("no centroids: K is 0")
    return form(x_ND, c_KD, bias_K)


# ---- a search that proves its labels ----


PRODUCTS = {  # how the first step of a search multiplies
    "fused": "bfloat16 on the GPU, search fused (Triton)",
    "bfloat16": "bfloat16 in the CPU's tiles (AMX)",
    "float32": "float32 (this CPU has no bfloat16 tiles)",
}


@cache
def product_for(device):
    """The fastest of PRODUCTS that a device has."""
    if device.type == "cuda":
        return "fused"
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private: a later torch may not have it
    return "bfloat16" if probe and probe() and torch.backends.mkldnn.is_available() else "float32"


def split_into_groups(c_KD, at_most=GROUPS):
    """Centroids in equal groups of neighbours: ids int64 [G, S], -1 where one is short. G is a power of two.

    Halved again and again across the direction of largest variance (power iteration). Any partition is correct; one
    that follows the data lets more groups be ruled out together.
    """
    groups = [torch.arange(len(c_KD), device=c_KD.device)]
    while 2 * len(groups) <= at_most and len(c_KD) >= 8 * len(groups) ** 2:  # at most the root of K / 2
        halves = []
        for ids in groups:
            x_MD = c_KD[ids] - c_KD[ids].mean(0)
            direction_D = x_MD[x_MD.square().sum(1).argmax()]
            for _ in range(10):
                direction_D = torch.nn.functional.normalize((x_MD @ direction_D) @ x_MD, dim=0)
            halves += ids[(x_MD @ direction_D).argsort()].tensor_split(2)
        groups = halves
    return torch.nn.utils.rnn.pad_sequence(groups, batch_first=True, padding_value=-1)


class NearestSearch:
    """Finds the nearest of fixed centroids, in three steps, each dearer and finer than the one before.

    Of a point it keeps `near`, which is at least the distance to its own centroid, and for each group of centroids
    `far`, which is at most the distance to any other centroid of the group. A group is *open* for the point while
    far <= near; with no group open the label is proven. (After Ding et al., "Yinyang K-Means", 2015.)

    1. `screen`: one product with all centroids, or the first fresh_G of every group, in bfloat16 where that is fast.
       s_k = x.c_k - |c_k|^2 / 2 is largest for the nearest centroid, and rounded x', c' change it by at most

           |x - x'| |c_k| + |x'| |c_k - c'_k| + E 2^-24 (|x| |c_k| + |c_k|^2)          (Cauchy-Schwarz; float32 sums)

       which is at most h |c_k| with one h a point. That is one more channel of the product (h beside x', |c_k| beside
       c'), which then returns upper bounds of s themselves. (One bound for all centroids will not do: a cluster of one
       point in 384-d can be 8 times as long as its neighbours of 100.) The largest bounds by group give `far`, the
       best's lower bound gives `near`.
    2. `compare`: float32, only with a point's open groups and its own. Both are taken about the middle of the group:
       the shorter the vectors, the smaller the error.
    3. `nearest_ref`: float64, for near ties.
    """

    def __init__(self, c_KD, group_GS, product, fresh_G=None):
        self.c_KD, self.exact_KD, self.product = c_KD, c_KD.double(), product
        self.square_K = self.exact_KD.square().sum(1)
        length_K = self.square_K.sqrt().float()
        self.longest = length_K.max().item()
        k, device = len(c_KD), c_KD.device
        self.id_GS = group_GS.masked_fill(group_GS < 0, k).sort(dim=1).values  # k: the last place of a short group
        self.group_K = self.id_GS.flatten().argsort()[:k] // self.id_GS.shape[1]
        # What `compare` multiplies: a group's centroids about its middle. The place that is left over scores -inf.
        sum_GD = self.exact_KD.new_zeros(len(group_GS), c_KD.shape[1]).index_add_(0, self.group_K, self.exact_KD)
        self.middle_GD = (sum_GD / (group_GS >= 0).sum(1, keepdim=True)).float()
        local_GSD = c_KD[self.id_GS.clamp(max=k - 1)] - self.middle_GD[:, None]
        square_GS = torch.linalg.vector_norm(local_GSD, dim=2, dtype=torch.float64).square_().float()
        self.longest_G = square_GS.masked_fill(self.id_GS == k, 0).amax(1).sqrt()
        self.local_GDS, self.bias_GS = local_GSD.mT.contiguous(), (-square_GS).masked_fill(self.id_GS == k, -torch.inf)
        self.every = fresh_G is None
        self.fresh_G = torch.full_like(group_GS[:, 0], group_GS.shape[1]) if self.every else fresh_G
        # What `screen` multiplies, group by group; of a short group -1 fills the last place, which never wins.
        self.slot_P = group_GS[torch.arange(group_GS.shape[1], device=device) < self.fresh_G[:, None]]
        self.place_K = torch.full((k + 1,), -1, device=device)  # in slot_P; the last is that of -1
        self.place_K[self.slot_P] = torch.arange(len(self.slot_P), device=device)
        self.prepare_screen(length_K)

    def prepare_screen(self, length_K):
        """The factor of `screen`'s product, by slots; in bfloat16 with the bias and the error bound as channels."""
        d, slot_P = self.c_KD.shape[1], self.slot_P
        self.bias_P = (-self.square_K / 2).float()[slot_P].masked_fill_(slot_P < 0, -3e38)
        if self.product == "float32":  # h is so small that one bound for all will do, and it need not be in the product
            self.channels, self.factor_PE = d, self.c_KD[slot_P]
            return
        rounded_KD = self.c_KD.bfloat16().float()
        self.rounding = ((self.c_KD - rounded_KD).norm(dim=1) / length_K.clamp(min=1e-30)).max().item()
        self.output_error = 0.0 if self.product == "fused" else 1.02 * 2.0**-8  # the product is rounded to bfloat16
        self.bound_K = (1.01 * length_K).bfloat16().float()
        self.channels = -(-(d + 4) // 32) * 32  # rows of whole cache lines
        self.factor_PE = torch.zeros(len(slot_P), self.channels, dtype=torch.bfloat16, device=self.c_KD.device)
        self.factor_PE[:, :d], rest_P = rounded_KD[slot_P], self.bias_P.clone()
        for channel in range(d, d + 3):  # |c|^2 / 2 to 24 bits
            self.factor_PE[:, channel] = rest_P
            rest_P -= self.factor_PE[:, channel].float()
        self.factor_PE[:, d + 3] = self.bound_K[slot_P]

    def bounds(self, norm_B, lower_B, upper_BG):
        """near_B and far_BG from bounds of scores: |x - c|^2 = |x|^2 - 2 s, and float32's own rounding."""
        square_B, error_B = norm_B.square(), (len(self.c_KD[0]) + 16) * UNIT * (norm_B + self.longest).square()
        near_B = (square_B - 2 * lower_B).add_(error_B).clamp_(min=0).sqrt_()
        far_BG = torch.sub((square_B - error_B)[:, None], upper_BG, alpha=2).clamp_(min=0).sqrt_()
        return near_B, far_BG

    def screen(self, x_BD, norm_B, rounding_B, label_B):
        """label_B, near_B and far_BG by one product. Of `every` centroid label_B becomes the best; of some of
        them it stays, and near is infinite where the own centroid is not one of these."""
        h_B = 2 * self.channels * UNIT * (norm_B + self.longest)
        if self.product == "float32":
            label_B, best_B, upper_BG = self.best_scores(x_BD, label_B)
            slack_B = h_B * self.longest
            return label_B, *self.bounds(norm_B, best_B - slack_B, upper_BG + slack_B[:, None])
        h_B += rounding_B + 1.01 * norm_B * self.rounding
        h_B = (1.02 * h_B).bfloat16().float()  # 1.02: for rounding h itself
        d, x_BE = x_BD.shape[1], scratch("x", len(x_BD), self.channels, torch.bfloat16, x_BD.device)
        x_BE[:, :d], x_BE[:, d : d + 3], x_BE[:, d + 3], x_BE[:, d + 4 :] = x_BD, 1, h_B, 0
        if self.product == "fused":
            return self.screen_fused(x_BD, x_BE, norm_B, h_B)
        label_B, best_B, upper_BG = self.best_scores(x_BE, label_B)
        lower_B = best_B - self.output_error * best_B.abs() - 2 * h_B * self.bound_K[label_B]
        return label_B, *self.bounds(norm_B, lower_B, upper_BG + self.output_error * upper_BG.abs())

    def best_scores(self, x_BE, label_B):
        """The label and score of each point, and for each group the best score of the others. On a CPU."""
        n_groups, label_B, best_B = len(self.id_GS), label_B.clone(), torch.full((len(x_BE),), -torch.inf)
        other_GB = torch.full((n_groups, len(x_BE)), -3e38)
        for tile in tiles(len(x_BE), len(self.slot_P)):
            row_M = torch.arange(tile.stop - tile.start)
            score_PM = scratch("score", len(self.slot_P), len(row_M), x_BE.dtype, x_BE.device)
            if self.product == "float32":
                torch.addmm(self.bias_P[:, None], self.factor_PE, x_BE[tile].T, out=score_PM)
            else:
                torch.mm(self.factor_PE, x_BE[tile].T, out=score_PM)
            if self.every:
                score_GSM = score_PM.view(n_groups, -1, len(row_M))
                top_GM = score_GSM.amax(1).float()
                g_M = argmax(top_GM.T)
                own_MS = score_GSM[g_M, :, row_M].float()
                s_M = argmax(own_MS)
                label_B[tile], best_B[tile] = self.slot_P[g_M * own_MS.shape[1] + s_M], own_MS[row_M, s_M]
                top_GM[g_M, row_M] = own_MS.scatter_(1, s_M[:, None], -3e38).amax(1)
                other_GB[:, tile] = top_GM
            else:
                place_M = self.place_K[label_B[tile]]
                row_M = (place_M >= 0).nonzero()[:, 0]
                own = place_M[row_M], row_M
                best_B[tile.start + row_M], score_PM[own] = score_PM[own].float(), -3e38
                for other_B, score_SM in zip(other_GB, score_PM.split(self.fresh_G.tolist()), strict=True):
                    if len(score_SM):
                        other_B[tile] = score_SM.amax(0)
        return label_B, best_B, other_GB.T

    def screen_fused(self, x_BD, x_BE, norm_B, h_B):
        """The same with the scores kept on the chip: one group. Where two centroids are left, float64 decides."""
        slot_B2, upper_B3 = top3(x_BE, self.factor_PE, torch.zeros(len(self.slot_P), device=x_BE.device))
        label_B2 = self.slot_P[slot_B2]
        lower_B2 = upper_B3[:, :2] - 2 * h_B[:, None] * self.bound_K[label_B2]
        near_B, far_B2 = self.bounds(norm_B, lower_B2[:, 0], upper_B3[:, 1:])
        label_B, far_B1 = label_B2[:, 0].clone(), far_B2[:, :1].clone()
        two = ((lower_B2[:, 0] <= upper_B3[:, 1]) & (lower_B2.amax(1) > upper_B3[:, 2])).nonzero()[:, 0]
        d_M2, order_M2 = (x_BD[two, None].double() - self.exact_KD[label_B2[two]]).norm(dim=2).sort()
        label_B[two] = label_B2[two].gather(1, order_M2)[:, 0]
        near_B[two] = (d_M2[:, 0] * (1 + 2 * UNIT)).float()  # rounding takes at most one UNIT back
        far_B1[two] = (d_M2[:, 1:] * (1 - 2 * UNIT)).float().minimum(far_B2[two, 1:])
        return label_B, near_B, far_B1

    def compare(self, x_ND, wanted_BG, at_B):
        """label_B, near_B, far_BG of the points at_B from the wanted groups alone; far is infinite for the others."""
        g_M, row_M = wanted_BG.T.nonzero(as_tuple=True)
        pairs = (self.compare_pairs(x_ND, at_B[row_M[m]], g_M[m]) for m in tiles(len(g_M), self.id_GS.shape[1]))
        label_M, best_M, next_M, error_M = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        far_BG = torch.full(wanted_BG.shape, torch.inf, device=x_ND.device).index_put_((row_M, g_M), best_M)
        won_M = far_BG.argmin(1)[row_M] == g_M
        far_BG[row_M, g_M] = torch.where(won_M, next_M, best_M).sub_(error_M).clamp_(min=0).sqrt_()
        won_B = torch.empty_like(at_B)  # the pair of each point's nearest centroid
        won_B[row_M[won_M]] = won_M.nonzero()[:, 0]
        return label_M[won_B], (best_M + error_M)[won_B].clamp_(min=0).sqrt_(), far_BG

    def compare_pairs(self, x_ND, at_M, g_M):
        """For each pair of a point and a group, group by group: nearest centroid, d^2 to it and to the next, error."""
        score_MS = scratch("pair", len(g_M), self.id_GS.shape[1], torch.float32, x_ND.device)
        d, length_M = x_ND.shape[1], torch.empty(len(g_M), device=x_ND.device)
        lengths = torch.bincount(g_M, minlength=len(self.id_GS)).tolist()
        parts = zip(*(t.split(lengths) for t in (at_M, length_M, score_MS)), strict=True)
        for g, (at, length, score) in enumerate(parts):
            if len(at):
                x_MD = scratch("row", len(at), d, torch.float32, x_ND.device)
                torch.index_select(x_ND, 0, at, out=x_MD).sub_(self.middle_GD[g])  # twice as fast as x_ND[at]
                torch.linalg.vector_norm(x_MD, dim=1, out=length)  # a tenth of vecdot's time
                torch.addmm(self.bias_GS[g], x_MD, self.local_GDS[g], alpha=2, out=score)
        s_M = argmax(score_MS)[:, None]  # for all groups at once: such small operations took a third of the time
        square_M, best_M = length_M.square(), score_MS.gather(1, s_M)[:, 0]
        next_M = score_MS.scatter_(1, s_M, -torch.inf).amax(1)
        error_M = (length_M + self.longest_G[g_M]).square_().mul_((d + 16) * UNIT)
        return self.id_GS[g_M, s_M[:, 0]], square_M - best_M, square_M - next_M, error_M

    def find(self, x_BD, norm_B, rounding_B, label_B, near_B, far_BG):
        """New label_B, near_B, far_BG of points from their old ones (-1, inf and -inf where nothing is known).
        far_BG need not hold for the first fresh_G centroids of every group."""
        if self.every:
            label_B, near_B, far_BG = self.screen(x_BD, norm_B, rounding_B, label_B)
        elif len(self.slot_P):
            label_B, fresh_near_B, fresh_far_BG = self.screen(x_BD, norm_B, rounding_B, label_B)
            near_B, far_BG = near_B.fmin(fresh_near_B), far_BG.fmin(fresh_far_BG)
        label_B, open_BG = label_B.clone(), far_BG <= near_B[:, None]
        left = open_BG.any(1).nonzero()[:, 0]
        if len(left):
            wanted_MG = open_BG[left].scatter_(1, self.group_K[label_B[left]][:, None], True)
            label_M, near_M, far_MG = self.compare(x_BD, wanted_MG, left)
            far_MG = torch.where(wanted_MG, far_MG, far_BG[left])
            ties = (far_MG <= near_M[:, None]).any(1).nonzero()[:, 0]
            if len(ties):
                label_M[ties] = nearest_ref(x_BD[left[ties]], self.exact_KD, self.square_K)
                far_MG[ties] = 0  # `compare` left its own choice out of far; float64 may have chosen another
            label_B[left], near_B[left], far_BG[left] = label_M, near_M, far_MG
        return label_B, near_B, far_BG


# ---- an assignment that follows its centroids ----


class Assignment:
    """The nearest centroid of every point, while the centroids move: `label_N`, -1 before the first `update`.

    What one pass proved is of use to the next. When the centroids move, a point's `near` grows by the step of its own
    centroid, and its `far` shrinks by the longest step of the group; the point is looked at again only where that opens
    a group. A point that cannot change its cluster is not even read. Most centroids hardly move while a few go far, so
    a group lists its fastest first: multiplied afresh, they leave to `far` the longest step of the others.

    norm_N: |x| of every point. rounding_N: |x - bfloat16(x)|. Both float32, on the device that computes.
    """

    def __init__(self, norm_N, rounding_N):
        self.norm_N, self.rounding_N, self.search, self.moves = norm_N, rounding_N, None, 0
        self.label_N = torch.full(norm_N.shape, -1, dtype=torch.int64, device=norm_N.device)
        self.near_N = torch.full_like(norm_N, torch.inf)

    def set_centroids(self, c_KD):
        """Take float32 centroids [K, D] and widen all bounds by their steps."""
        product, before, n = product_for(c_KD.device), self.search, len(self.norm_N)
        if before is None:
            groups = split_into_groups(c_KD, 1 if product == "fused" else GROUPS)
            self.far_NG = torch.full((n, len(groups)), -torch.inf, device=c_KD.device)
            self.step_K = c_KD.new_zeros(len(c_KD))
        else:
            # 1 + 1e-6 and the last bits of near and far, which are at most the data's extent, cover float32's rounding.
            extent = before.longest + (self.norm_N.max().item() if n else 0.0)
            self.step_K = (c_KD.double() - before.exact_KD).norm(dim=1).float() * (1 + 1e-6) + 2.0**-22 * extent
            groups, self.moves = self.group_GS, self.moves + 1
        if self.moves == 1:  # means group better than seeds, and after this long a step no bound is worth keeping
            groups = split_into_groups(c_KD, len(groups))
            self.far_NG.fill_(-torch.inf)
        step_GS, order_GS = self.step_K[groups].masked_fill_(groups < 0, 0.0).sort(dim=1, descending=True, stable=True)
        self.group_GS, self.step_GS = groups.gather(1, order_GS), torch.nn.functional.pad(step_GS, (0, 1))
        fresh_G = None if self.moves < 2 or product == "fused" or not n else self.choose_fresh(product)
        self.search = NearestSearch(c_KD, self.group_GS, product, fresh_G)
        self.rest_G = self.step_GS.gather(1, self.search.fresh_G[:, None])[:, 0]  # the longest of those not multiplied

    def choose_fresh(self, product):
        """How many centroids of every group to multiply anew, its fastest; None: all. What costs least for a sample of
        points, in products of a point and a centroid. On a CPU."""
        some, (n_groups, size) = slice(None, None, -(-len(self.norm_N) // 2048)), self.group_GS.shape
        near_M, far_MG, label_M = self.near_N[some], self.far_NG[some], self.label_N[some]
        step_M, group_M = self.step_K[label_M], self.search.group_K[label_M]
        looked = (far_MG - self.step_GS[:, 0] <= (near_M + step_M)[:, None]).any(1)
        near_M, far_MG, step_M, group_M = near_M[looked], far_MG[looked], step_M[looked], group_M[looked]
        choices = torch.tensor([size * part // 16 for part in (0, 1, 2, 3, 4, 6, 8, 12, 16)])
        rest_FG = self.step_GS.T[choices]  # the longest step of those that are not multiplied
        near_FM = near_M + step_M * (step_M <= rest_FG[:, group_M])  # unless the own centroid is multiplied
        open_FMG = far_MG - rest_FG[:, None] <= near_FM[:, :, None]
        open_FMG[-1] = False
        m, rate, pair, blurred = len(near_M), RATE[product], size + GATHERING, product != "float32"
        f_G = (m * rate * choices[:, None] + pair * open_FMG.sum(1)).argmin(0)
        own_MG = torch.nn.functional.one_hot(group_M, n_groups) > 0  # is compared if any other group is
        left_MG = open_FMG[f_G, :, torch.arange(n_groups)].T
        left_MG = left_MG | own_MG & (left_MG.any(1, keepdim=True) | blurred)  # bfloat16 leaves the own group open
        cost_of_some = m * (SCREENING + rate * choices[f_G].sum()) + pair * left_MG.sum()
        cost_of_none, cost_of_all = pair * (open_FMG[0] | own_MG).sum(), m * (rate * len(self.step_K) + pair * blurred)
        if cost_of_all < min(cost_of_some, cost_of_none):
            return None
        return choices[f_G] * (cost_of_some < cost_of_none)

    def update(self, block, read_rows):
        """Bring the labels of a block (a slice of the points) up to date, once after each `set_centroids`.

        read_rows(index): float32 rows [M, D] of a slice or an int64 tensor of points.
        Returns the points that were looked at: their rows x_MD (None where there are none), labels before and after.
        """
        near_B, far_BG = self.near_N[block], self.far_NG[block]
        near_B += self.step_K[self.label_N[block]]
        looked_M = (far_BG - self.step_GS[:, 0] <= near_B[:, None]).any(1).nonzero()[:, 0]
        if len(looked_M) == 0:
            far_BG -= self.step_GS[:, 0]
            return None, looked_M, looked_M
        at = block if len(looked_M) > 0.8 * len(near_B) else looked_M + block.start  # a contiguous read beats a gather
        x_MD, old_M, far_MG = read_rows(at), self.label_N[at].clone(), self.far_NG[at] - self.rest_G
        far_BG -= self.step_GS[:, 0]
        known = (self.norm_N[at], self.rounding_N[at], old_M, self.near_N[at], far_MG)
        self.label_N[at], self.near_N[at], self.far_NG[at] = self.search.find(x_MD, *known)
        return x_MD, old_M, self.label_N[at]
