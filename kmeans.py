"""k-means on matrices larger than memory: exact assignments, exact sums, the same bits for any number of ranks.

    centroids_KD, label_N = kmeans(x_ND, k=1000)

Reads bottom-up: points, nearest centroid, seeding, Lloyd. Three ideas carry it.

- `Points` is the only way to the data: read in blocks, centred, summed without rounding.
- `Nearest` proves each assignment by the cheapest arithmetic that can: bfloat16 products rule out groups of centroids,
  float32 decides within what is left, float64 within the near ties. What a pass learned holds, less the centroids'
  steps, in the next pass: whole groups are never looked at again, and a point that cannot move is not read.
- `seeds` draws k-means++'s seeds many at a time.

Nothing here depends on how many processes share the work: points live in fixed blocks and a rank owns whole blocks,
labels are those of float64, sums are exact, random numbers are a hash of (seed, id).

Shape letters: N points, K centroids, D channels, G groups of S centroids, B points of a block, M points of a selection,
E channels of an extended product.
"""

import heapq
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import count

import numpy as np
import torch
import torch.distributed as dist

from kernels.kmeans import top3

BLOCK = 8192  # points; ranks own whole blocks, so a block's arithmetic is the same for any number of ranks
GROUPS = 32  # of centroids; a point keeps one float for each
GREEDY_UP_TO = 1 << 20  # points times clusters for which greedy seeding is affordable
UNIT = 2.0**-24  # half a unit in the last place of float32, relative
TILE = 1 << 22  # scores at a time


def uniform(ids, *salt):
    """A float64 in (0, 1) for each id: splitmix64 of (salt, id), so that it belongs to the id and not to an order."""
    with np.errstate(over="ignore"):
        z = np.zeros(1, np.uint64)
        for value in (*(np.uint64(s) for s in salt), np.asarray(ids).astype(np.uint64)):
            z = (z ^ value) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(11)) + 0.5) * 2.0**-53


def rank_in_group(sorted_N):
    """0, 1, 2, ... within each run of equal values."""
    start = np.flatnonzero(np.r_[True, sorted_N[1:] != sorted_N[:-1]])[: len(sorted_N)]
    return np.arange(len(sorted_N)) - np.repeat(start, np.diff(np.r_[start, len(sorted_N)]))


# -------------------------------------------------------------------------------------------------------------- points


class Points:
    """Rows of a feature matrix, read block by block and centred, and the ranks and threads that share them.

    x_ND: a numpy array or memmap, a torch tensor, or a tensorstore; anything that slices and has a shape. It may be
    larger than memory. Floats of any width and integers are taken; all arithmetic is float32 after centring.
    Under torch.distributed every rank holds the same x and owns the points lo to hi (exclusive), unless `alone`.

    Centring is what makes float32 enough: |x|^2 - 2 x.c + |c|^2 loses (offset / spread)^2 digits, while x - mean is
    correctly rounded. The mean of up to 4096 rows spread over the data serves; any point near the middle would.
    """

    def __init__(self, x_ND, device=None, name="features", alone=False):
        if len(getattr(x_ND, "shape", ())) != 2 or 0 in x_ND.shape:
            raise ValueError(f"{name}: want a matrix [N, D] with rows, got shape {tuple(getattr(x_ND, 'shape', ()))}")
        self.x, self.name, (self.n, self.d) = x_ND, name, x_ND.shape
        self.device = torch.device(device or (x_ND.device if isinstance(x_ND, torch.Tensor) else "cpu"))
        self.shared = dist.is_initialized() and not alone
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if self.shared else (0, 1)
        n_blocks = -(-self.n // BLOCK)
        first, last = n_blocks * self.rank // self.ranks, n_blocks * (self.rank + 1) // self.ranks
        self.lo, self.hi = first * BLOCK, min(last * BLOCK, self.n)

        probe = self.read(np.unique(np.linspace(0, self.n - 1, min(self.n, 4096)).astype(np.int64)))
        if not np.issubdtype(probe.dtype, np.number) or np.iscomplexobj(probe):
            raise ValueError(f"{name}: want real numbers, got {probe.dtype}")
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is reported by row, in `measure`
            probe = probe[np.isfinite(probe).all(1)]
            self.mean_D = probe.mean(0, dtype=np.float64) if len(probe) else np.zeros(self.d)
            if probe.dtype in (np.float16, np.float32):
                self.mean_D = self.mean_D.astype(np.float32)
        self.norm_N = torch.empty(self.hi - self.lo, device=self.device)  # |x|
        self.rounding_N = torch.empty(self.hi - self.lo, device=self.device)  # |x - bfloat16(x)|
        largest = self.all_concat(np.array(self.each_block(self.measure))).max()
        # A grid on which n numbers of this size add up without rounding in float64 (see `exact`).
        exponent = np.ceil(np.log2(max(largest, 1e-30))) + np.ceil(np.log2(self.n)) - 51
        self.shift = float(1.5 * 2.0 ** (52 + exponent))

    def read(self, index):
        """Rows at a slice or an array of ids, as they are, in numpy."""
        if isinstance(self.x, torch.Tensor):
            rows = self.x[torch.from_numpy(index) if isinstance(index, np.ndarray) else index].detach().cpu()
            return (rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows).numpy()
        rows = self.x[index]
        return np.asarray(rows.read().result() if hasattr(rows, "read") else rows)

    def rows(self, index):
        """Rows at a slice or an array of ids: centred float32 [M, D] on the device."""
        rows = self.read(index)
        rows = np.subtract(rows, self.mean_D, dtype=np.result_type(rows.dtype, self.mean_D.dtype))
        return torch.from_numpy(rows.astype(np.float32, copy=False)).to(self.device)

    def measure(self, lo, hi):
        """Fill in a block's norms; the largest coordinate."""
        x_BD = self.rows(slice(lo, hi))
        at = slice(lo - self.lo, hi - self.lo)
        self.norm_N[at] = x_BD.norm(dim=1)
        self.rounding_N[at] = torch.cat([(x - x.bfloat16()).norm(dim=1) for x in x_BD.split(1024)])
        bad = ~(self.norm_N[at] <= 1e18)  # |x|^2 must stay within float32; NaN compares false
        if bad.any():
            row = lo + int(bad.nonzero()[0])
            raise ValueError(f"{self.name}: row {row} holds NaN, infinity or more than 1e18; drop or fix such rows")
        return max(abs(v.item()) for v in x_BD.aminmax())

    def part(self, ids, alone=False):
        """Some of the points as Points in memory, on every rank."""
        return Points(self.read(ids), self.device, self.name, alone)

    def uncentre(self, c_KD):
        """Centroids in the data's own place, float32 numpy."""
        return (c_KD.double().cpu().numpy() + self.mean_D).astype(np.float32)

    def centre(self, c_KD):
        """The inverse, up to float32."""
        return torch.from_numpy((c_KD.astype(np.float64) - self.mean_D).astype(np.float32)).to(self.device)

    def exact(self, x_MD):
        """Rows in float64, rounded to the grid on which sums are exact in any order and by any number of ranks.

        Reproducible summation by pre-rounding (Demmel & Nguyen, "Fast reproducible floating-point summation", 2013):
        adding and subtracting 1.5 * 2^52 grid steps rounds to the grid. A sum of n such numbers stays below 2^53 steps,
        so float64 adds without error, and taking a point out of a sum leaves what was there before it came in. The step
        is 2^-33 of the largest coordinate at n = 100k and 2^-20 at n = 1e9.
        """
        return x_MD.double().add_(self.shift).sub_(self.shift)

    def all_sum(self, x):
        """Sum a CPU tensor over the ranks, in place. Exact, so order-free, for the integers and grid values given."""
        if self.shared:
            dist.all_reduce(x)
        return x

    def all_concat(self, array):
        """Numpy arrays of all ranks, end to end in rank order."""
        return np.concatenate(self.all_gather(array))

    def all_gather(self, value):
        """A list of the ranks' values, in rank order."""
        values = [value]
        if self.shared:
            values = [None] * self.ranks
            dist.all_gather_object(values, value)
        return values

    def each_block(self, work):
        """[work(lo, hi)] of this rank's blocks in order, on one Python thread a core.

        Each thread runs torch single-threaded: GEMM and numpy release the GIL, and OpenMP's threads, which spin while
        one of them searches the scores, cost 1.3x the CPU time.
        """
        step = BLOCK if self.device.type == "cpu" else 32 * BLOCK
        blocks = [(lo, min(lo + step, self.hi)) for lo in range(self.lo, self.hi, step)]
        threads = torch.get_num_threads()
        if threads == 1 or len(blocks) < 2 or self.device.type == "cuda":
            return [work(lo, hi) for lo, hi in blocks]
        try:
            torch.set_num_threads(1)
            first = work(*blocks[0])  # on this thread, so that libraries set themselves up in one place
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return [first, *pool.map(lambda block: work(*block), blocks[1:])]
        finally:
            torch.set_num_threads(threads)

    def own_distance2(self, c_KD, label_N):
        """This rank's squared distances to the own centroid, float32 numpy, by differences: no cancellation."""

        def work(lo, hi):
            at = slice(lo - self.lo, hi - self.lo)
            return (self.rows(slice(lo, hi)) - c_KD[label_N[at]]).square_().sum(1).cpu().numpy()

        return np.concatenate([np.zeros(0, np.float32), *self.each_block(work)])


# ---------------------------------------------------------------------------------------------------- nearest centroid


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


_scratch = threading.local()


def scratch(name, rows, columns, dtype):
    """An uninitialised CPU matrix, a thread's own, kept: fresh memory costs a page fault every 4 KiB."""
    held = getattr(_scratch, name, None)
    if held is None or len(held) < rows * columns or held.dtype != dtype:
        held = torch.empty(rows * columns, dtype=dtype)
        setattr(_scratch, name, held)
    return held[: rows * columns].view(rows, columns)


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
        self.screen_above = 0.5 if product == "float32" else 0.125  # share of groups open; times in benchmarks/
        # The first sieve's factor [E, P], places P = S x G so that the maximum by group runs along memory.
        self.kind = torch.float32 if product == "float32" else torch.bfloat16
        self.output_error = 0.0 if product != "bfloat16" else 1.02 * 2.0**-8  # what the product is rounded to
        rounded_KD = c_KD.to(self.kind).float()
        self.rounding = ((c_KD - rounded_KD).norm(dim=1) / length_K.clamp(min=1e-30)).max().item()
        rest_K, bias = -self.square_K / 2, []
        for _ in range(1 if product == "float32" else 3):  # |c|^2 / 2 to 24 bits in bfloat16 channels
            bias.append(rest_K.to(self.kind).double())
            rest_K = rest_K - bias[-1]
        self.bound_K = (1.01 * length_K).to(self.kind).float()
        rows_KE = torch.cat([rounded_KD, *(b.float()[:, None] for b in bias), self.bound_K[:, None]], 1)
        self.n_bias, self.e = len(bias), -(-rows_KE.shape[1] // 32) * 32  # rows of whole cache lines
        self.place_P = group_GS.T.reshape(-1)
        used_P = self.place_P >= 0
        factor_PE = torch.zeros(len(self.place_P), self.e, device=c_KD.device)
        factor_PE[used_P, : rows_KE.shape[1]] = rows_KE[self.place_P[used_P]]
        factor_PE[~used_P, c_KD.shape[1]] = -3e38
        self.factor_PE = factor_PE.to(self.kind)
        self.factor_EP = None if self.fused else self.factor_PE.T.contiguous()
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
        rounding_B = rounding_B if self.kind == torch.bfloat16 else 0
        h_B = 1.02 * (rounding_B + 1.01 * norm_B * self.rounding + 2 * self.e * UNIT * (norm_B + self.longest))
        h_B = h_B.to(self.kind).float()  # 1.02: for rounding h itself
        make = torch.empty if x_BD.is_cuda else lambda *shape, dtype, device: scratch("x", *shape, dtype)
        x_BE = make(b, self.e, dtype=self.kind, device=x_BD.device)
        x_BE[:, :d], x_BE[:, d:] = x_BD, 0
        x_BE[:, d : d + self.n_bias], x_BE[:, d + self.n_bias] = 1, h_B
        if self.fused:
            return self.screen_fused(x_BD, x_BE, norm_B, h_B)
        place_B, best_B, upper_BG = torch.empty(b, dtype=torch.int64), torch.empty(b), torch.empty(b, n_groups)
        for rows in torch.arange(b).split(max(64, TILE // len(self.place_P))):
            at, m = slice(int(rows[0]), int(rows[-1]) + 1), len(rows)
            score_MP = scratch("product", m, len(self.place_P), self.kind)
            torch.mm(x_BE[at], self.factor_EP, out=score_MP)
            if self.kind != torch.float32:
                score_MP = scratch("score", m, len(self.place_P), torch.float32).copy_(score_MP)
            score_MSG = score_MP.view(m, -1, n_groups)
            top_MG = score_MSG.amax(1)
            g_M = argmax(top_MG)
            own_MS = score_MSG[rows - at.start, :, g_M]
            s_M = argmax(own_MS)
            best_B[at] = own_MS.gather(1, s_M[:, None])[:, 0]
            top_MG[rows - at.start, g_M] = own_MS.scatter_(1, s_M[:, None], -3e38).amax(1)
            place_B[at], upper_BG[at] = s_M * n_groups + g_M, top_MG
        label_B = self.place_P[place_B]
        lower_B = best_B - self.output_error * best_B.abs() - 2 * h_B * self.bound_K[label_B]
        upper_BG += self.output_error * upper_BG.abs() if self.output_error else 0
        near_B, far_BG = self.bounds(norm_B, lower_B, upper_BG)
        return label_B, near_B, far_BG, far_BG <= near_B[:, None]

    def screen_fused(self, x_BD, x_BE, norm_B, h_B):
        """The same with the scores kept on the chip: one group. Where two centroids are left, differences decide."""
        place_B2, upper_B3 = top3(x_BE, self.factor_PE, torch.zeros(len(self.factor_PE), device=x_BE.device))
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
        for at in torch.arange(len(x_MD), device=x_MD.device).split(max(1, TILE // len(self.c_KD))):
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


# ------------------------------------------------------------------------------------------------------------- seeding


def seeds(points, k, seed):
    """k-means++ (Arthur & Vassilvitskii, 2007): each seed is drawn with probability ~ D^2, its squared distance to the
    seeds before it. Returns ids int64 [k], distinct.

    Drawn one at a time that takes k passes over the data. Here candidates are drawn many at a time from the D^2 of the
    round's start, and a candidate is accepted with probability (its D^2 now) / (its D^2 at the start): rejection
    sampling, so an accepted candidate follows the distribution of the moment. k seeds cost one GEMM's worth of products
    in about log2(k) + k/1024 rounds. (Deviation: a candidate refused in a round cannot come up again in that round.)

    A draw without replacement ~ D^2 keeps the smallest -log(u) / D^2 (Efraimidis & Spirakis, 2006): a sort key a point,
    which does not care in what order, or on which rank, the points are looked at.
    """
    if points.n * k <= GREEDY_UP_TO:
        return greedy_seeds(points, k, seed)
    ids_N = np.arange(points.lo, points.hi)
    first_N = uniform(ids_N, seed, 0)
    best = np.argsort(first_N)[:1]
    key, chosen = points.all_concat(first_N[best]), points.all_concat(ids_N[best])
    chosen = [int(chosen[key.argmin()])]
    d2_N = np.full(len(ids_N), np.inf)
    fresh, round_ = 1, 0  # how many of the chosen the distances have not seen
    while len(chosen) < k:
        c_MD = points.rows(np.array(chosen[-fresh:]))
        square_M = c_MD.square().sum(1)

        def update(lo, hi, c_MD=c_MD, square_M=square_M):
            at = slice(lo - points.lo, hi - points.lo)
            x_BD, square_B = points.rows(slice(lo, hi)), points.norm_N[at].square()
            label_B2, score_B3 = top3(x_BD, c_MD, -square_M / 2)
            label_B, d2_B = label_B2[:, 0], square_B - 2 * score_B3[:, 0]
            close = (d2_B < 2.0**-6 * (square_B + square_M[label_B])).nonzero()[:, 0]  # cancellation: take differences
            if len(close):
                d2_B[close] = (x_BD[close] - c_MD[label_B[close]]).square_().sum(1)
            d2_N[at] = np.minimum(d2_N[at], d2_B.cpu().numpy())

        points.each_block(update)
        round_ += 1
        m = min(max(16, 2 * len(chosen)), 1024, 2 * (k - len(chosen)) + 16)
        with np.errstate(divide="ignore"):
            key_N = -np.log(uniform(ids_N, seed, round_)) / d2_N  # infinite where D^2 is 0
        top = np.argpartition(key_N, m - 1)[:m] if m < len(key_N) else np.arange(len(key_N))
        top = top[np.isfinite(key_N[top])]
        key_M, id_M, start_M = (points.all_concat(a) for a in (key_N[top], ids_N[top], d2_N[top]))
        order = np.lexsort((id_M, key_M))[:m]
        id_M, start_M = id_M[order], start_M[order]
        if len(id_M) == 0:
            return with_spares(chosen, points.n, k, seed)
        x_MD = points.rows(id_M)
        now_M, refuse_M = start_M.copy(), uniform(id_M, seed, round_, 1)
        before = len(chosen)
        for i in range(len(id_M)):
            if refuse_M[i] * start_M[i] < now_M[i] and len(chosen) < k:
                chosen.append(int(id_M[i]))
                now_M = np.minimum(now_M, (x_MD - x_MD[i]).square_().sum(1).cpu().numpy())
        fresh = len(chosen) - before
    return np.array(chosen)


def with_spares(chosen, n, k, seed):
    """Every point coincides with a seed: any others will do, they make empty clusters."""
    spare = np.setdiff1d(np.arange(n), chosen)
    return np.array(chosen + spare[np.argsort(uniform(spare, seed, 0))][: k - len(chosen)].tolist())


def greedy_seeds(points, k, seed):
    """Greedy k-means++: of 2 + ln k candidates ~ D^2, each time the one that lowers the sum of D^2 most. Ids int64 [k].

    Sequential, and 2 + ln k times the products, so for small problems only: the upper levels of a hierarchy, where a
    seed more or less in a region is a large share of it (docs/curation.md has what it is worth). Every rank computes
    it, alike.
    """
    x_ND = points.rows(slice(0, points.n)).cpu().double()
    ids_N, tries = np.arange(points.n), np.arange(2 + int(np.log(k)))
    chosen = [int(uniform(ids_N, seed, 0).argmin())]
    square_N = x_ND.square().sum(1)
    d2_N = (x_ND - x_ND[chosen[0]]).square_().sum(1)
    while len(chosen) < k:
        total_N = d2_N.cumsum(0)
        if total_N[-1] <= 0:
            return with_spares(chosen, points.n, k, seed)
        draw_M = torch.from_numpy(uniform(tries, seed, len(chosen), 6)) * total_N[-1]
        draw_M = torch.searchsorted(total_N, draw_M).clamp_(max=points.n - 1)
        d2_MN = square_N[draw_M, None] + square_N - 2 * (x_ND[draw_M] @ x_ND.T)
        d2_MN[d2_MN < 1e-12 * (square_N[draw_M, None] + square_N)] = 0  # float64's rounding, and what it made of zeros
        d2_MN = d2_MN.minimum(d2_N)
        best = int(d2_MN.sum(1).argmin())
        d2_N, chosen = d2_MN[best], [*chosen, int(draw_M[best])]
    return np.array(chosen)


def start(points, k, seed):
    """D^2 seeds as centred centroids."""
    if not 1 <= k <= points.n:
        raise ValueError(f"k={k}: want 1 <= k <= {points.n}, the number of points")
    return points.rows(seeds(points, k, seed))


# --------------------------------------------------------------------------------------------------------------- Lloyd


def refill(points, count_K, label_N, seed):
    """For every empty cluster, a random member of the cluster that is largest by then. Returns clusters, ids.

    Largest by count, each member given away counting as an even split (as in faiss). A cluster of one gives nothing.
    """
    heap = [(-int(n), k, 0) for k, n in enumerate(count_K.tolist()) if n > 1]
    heapq.heapify(heap)
    gifts, empty = {}, np.flatnonzero(count_K.numpy() == 0)
    for k in empty:
        if not heap:
            break
        _, donor, given = heapq.heappop(heap)
        gifts.setdefault(donor, []).append(int(k))
        if given + 2 < count_K[donor]:
            heapq.heappush(heap, (-int(count_K[donor]) // (given + 2), donor, given + 1))
    donors = np.array(sorted(gifts), np.int64)
    wanted = np.array([len(gifts[d]) for d in donors.tolist()], np.int64)

    def draw(ids, of):
        """Of each donor's members the `wanted` that come first in a random order."""
        order = np.lexsort((uniform(ids, seed, 2), of))
        return order[rank_in_group(of[order]) < wanted[np.searchsorted(donors, of[order])]]

    at = np.flatnonzero(np.isin(label_N, donors))
    at = at[draw(at + points.lo, label_N[at])]  # at most `wanted` a rank and donor
    ids, of = points.all_concat(at + points.lo), points.all_concat(label_N[at])
    return np.array([k for d in donors.tolist() for k in gifts[d]], np.int64), ids[draw(ids, of)]


def lloyd(points, c_KD, n_iter, seed=0, stats=None):
    """n_iter times (assign every point, move every centroid to the mean of its points), then assign once more.

    c_KD: centred float32. Returns centroids (centred, representable in the data's own place) and this rank's labels
    int64, which belong to the returned centroids. Stops early when no label changes.

    Between two passes a centroid makes a step, so a point's `near` grows by its own centroid's and its `far` shrinks by
    the longest of the group; it is looked at again only if a group is open then. And a sum changes only by the points
    that moved; exactly, so nothing drifts (`Points.exact`).
    """
    k, n, device = len(c_KD), points.hi - points.lo, points.device
    product = product_for(device)
    group_GS = group(c_KD, 1 if product == "fused" else GROUPS)
    label_N = torch.full((n,), -1, dtype=torch.int64, device=device)
    near_N = torch.full((n,), torch.inf, device=device)
    far_NG = torch.full((n, len(group_GS)), -torch.inf, device=device)
    step_K, step_G = torch.zeros(k, device=device), torch.zeros(len(group_GS), device=device)
    sum_KD = torch.zeros(k, points.d, dtype=torch.float64, device=device)
    lock = threading.Lock()
    for iteration in count():
        if (
            iteration == 1
        ):  # a first step is long, so nothing is lost by grouping anew, and means group better than seeds
            group_GS = group(c_KD, len(group_GS))
            far_NG.fill_(-torch.inf)
        nearest = Nearest(c_KD, group_GS, product)

        def work(lo, hi, nearest=nearest, step_K=step_K, step_G=step_G, last=iteration == n_iter):
            at = slice(lo - points.lo, hi - points.lo)
            label_B, near_B, far_BG = label_N[at], near_N[at], far_NG[at]
            near_B += step_K[label_B]
            far_BG -= step_G
            look = (far_BG <= near_B[:, None]).any(1).nonzero()[:, 0]
            if len(look) == 0:
                return 0, 0
            every = len(look) > 0.8 * (hi - lo)  # a contiguous read beats a gather
            look = slice(0, hi - lo) if every else look
            x_MD = points.rows(slice(lo, hi) if every else (look + lo).cpu().numpy())
            old_M = label_B[look].clone()
            new_M, near_B[look], far_BG[look] = nearest(
                x_MD, points.norm_N[at][look], points.rounding_N[at][look], old_M, near_B[look], far_BG[look]
            )
            label_B[look] = new_M
            moved = (new_M != old_M).nonzero()[:, 0]
            if len(moved) and not last:
                x_MD = points.exact(x_MD if len(moved) == len(x_MD) else x_MD[moved])
                gone = old_M[moved] >= 0
                with lock:
                    sum_KD.index_add_(0, new_M[moved], x_MD)
                    if gone.any():
                        sum_KD.index_add_(0, old_M[moved][gone], x_MD[gone], alpha=-1)
            return len(old_M), len(moved)

        done = torch.tensor(points.each_block(work), dtype=torch.int64).reshape(-1, 2)
        looked, moved = points.all_sum(done.sum(0)).tolist()
        if stats is not None:
            stats.append({"looked": looked / points.n, "moved": moved / points.n})
        if iteration == n_iter:
            return c_KD, label_N
        count_K = points.all_sum(torch.bincount(label_N, minlength=k).cpu())
        total_KD = points.all_sum(sum_KD.cpu().clone())
        new_KD = c_KD.cpu().double()
        filled = count_K > 0
        new_KD[filled] = total_KD[filled] / count_K[filled, None]
        if not filled.all():
            clusters, ids = refill(points, count_K, label_N.cpu().numpy(), seed + iteration)
            if len(clusters):
                new_KD[clusters] = points.rows(ids).double().cpu()
        if iteration and not moved and filled.all():
            n_iter = iteration + 1  # nothing will change any more
        new_KD = new_KD.float().to(device)
        if iteration + 1 == n_iter:  # rounded as handed out, so that the labels belong to what is returned
            new_KD = points.centre(points.uncentre(new_KD))
        # 1 + 1e-6 and the last bits of near and far, which are at most the data's extent, cover float32's rounding.
        extent = points.norm_N.max().item() if n else 0.0
        extent += nearest.longest
        step_K = (new_KD.double() - c_KD.double()).norm(dim=1).float() * (1 + 1e-6) + 4 * UNIT * extent
        step_G = torch.stack([step_K[ids].max() for ids, *_ in nearest.groups])
        c_KD = new_KD


def kmeans(x_ND, k=None, init_KD=None, n_iter=10, seed=0):
    """k-means by Lloyd's algorithm: (centroids_KD float32, assign_N int64), numpy for numpy in, torch for torch in.

    x_ND: numpy, memmap, torch or tensorstore [N, D]. Starts from `init_KD` if given, otherwise from k D^2 seeds.
    n_iter times: assign, then move each centroid to its points' mean (an empty cluster restarts at a random member of
    the largest). `assign_N` is the assignment to the *returned* centroids (one more pass, as faiss's index and
    scikit-learn's labels_ give it); n_iter=0 only assigns. Of equally near centroids the lowest wins.
    Under torch.distributed every rank passes the same x and gets the whole result, whatever the number of ranks.
    Raises ValueError for a matrix with NaN or infinity, k > N, or an init_KD of other width or count.
    """
    points = Points(x_ND)
    if init_KD is None and k is None:
        raise ValueError("kmeans: give k, the number of clusters, or init_KD, their first centroids")
    if n_iter < 0:
        raise ValueError(f"n_iter={n_iter}: want 0 or more")
    if init_KD is not None:
        init_KD = init_KD.detach().cpu().double().numpy() if isinstance(init_KD, torch.Tensor) else np.asarray(init_KD)
        if init_KD.ndim != 2 or init_KD.shape[1] != points.d or (k is not None and k != len(init_KD)):
            raise ValueError(f"init_KD: shape {init_KD.shape} does not fit k={k} and features of {points.d} channels")
        if not 1 <= len(init_KD) <= points.n:
            raise ValueError(f"init_KD: {len(init_KD)} centroids, want 1 to {points.n}, the number of points")
        if not np.isfinite(init_KD).all():
            raise ValueError("init_KD holds NaN or infinity")
        c_KD = points.centre(init_KD.astype(np.float32) if n_iter == 0 else init_KD)
    else:
        c_KD = start(points, k, seed)
    c_KD, label_N = lloyd(points, c_KD, n_iter, seed)
    c_KD, label_N = points.uncentre(c_KD), points.all_concat(label_N.cpu().numpy())
    if isinstance(x_ND, torch.Tensor):
        return torch.from_numpy(c_KD).to(x_ND.device), torch.from_numpy(label_N).to(x_ND.device)
    return c_KD, label_N
