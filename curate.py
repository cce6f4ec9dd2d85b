"""Curation: choose a balanced subset of a long-tailed pool, by hierarchical k-means with resampling.

    python curate.py --features CACHE|FILE.npy --levels 20000 500 50 --keep 100000 --out DIR

After Vo et al., "Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach" (arXiv 2405.15613).
A random subset of web images repeats the head of the distribution. One k-means does too: its centroids settle with a
density that grows with the data's. The way out has three steps, and this file reads bottom-up in their order.

1. k-means (`kmeans`): D^2 seeding, then Lloyd's iterations. Sections *points*, *nearest centroid*, *seeding*, *Lloyd*.
2. A hierarchy (`grow`). Level 1 clusters the points, level 2 the centroids of level 1, and so on: centroids are spread
   more evenly than what they stand for, so every level is flatter. *Resampling* pushes on within a level: keep only the
   r points nearest to each centroid, cluster those afresh, assign all points again, repeat. A pool with r points a
   cluster has forgotten how large the clusters were.
3. Balanced sampling (`sample`): descend from the top, split the budget evenly among the children, and hand on what a
   small child cannot fill.

Nothing here depends on how many processes share the work. Points live in fixed blocks and a rank owns whole blocks;
assignments are proven nearest (`nearest`), sums are exact (`Points.exact`), random numbers are a hash of (seed, id).

Shape letters: N points, K centroids, D channels, B points of a block, M points of a selection, T tree nodes.
"""

import argparse
import heapq
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import torch.distributed as dist

from kernels.kmeans import cpu_bf16_products, cpu_has_fast_bf16, top2

BLOCK = 2048  # points; ranks own whole blocks, so a block's arithmetic is the same for any number of ranks
UNIT_BF16, UNIT_F32 = 2.0**-8, 2.0**-24


# -------------------------------------------------------------------------------------------------- ranks and threads


def world():
    """(rank, number of ranks); alone is (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_sum(x):
    """Sum a CPU tensor over the ranks, in place. Exact (so order-free) for the integers and grid values given here."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_concat(array):
    """Numpy arrays of all ranks, end to end in rank order."""
    if not dist.is_initialized():
        return array
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, array)
    return np.concatenate(parts)


def on_blocks(work, blocks, device):
    """[work(lo, hi) for lo, hi in blocks], on one Python thread a core.

    Each thread runs torch single-threaded: GEMM and numpy release the GIL, and OpenMP's threads, which spin while one
    of them searches the scores, cost 1.3x the CPU time.
    """
    n_threads = torch.get_num_threads()
    if n_threads == 1 or len(blocks) < 2 or device.type == "cuda":
        return [work(lo, hi) for lo, hi in blocks]
    try:
        with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda block: work(*block), blocks))
    finally:
        torch.set_num_threads(n_threads)


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


# -------------------------------------------------------------------------------------------------------------- points


class Points:
    """Rows of a feature matrix, read block by block and centred: the only way the rest of this file sees the data.

    x_ND: a numpy array or memmap, a torch tensor, or a tensorstore; anything that slices and has a shape. It may be
    larger than memory. Floats of any width and integers are taken; all arithmetic is float32 after centring.

    Centring is what makes float32 enough: |x|^2 - 2 x.c + |c|^2 loses (offset / spread)^2 digits, while x - mean is
    correctly rounded. The mean of up to 4096 rows spread over the data serves; any point near the middle would.
    """

    def __init__(self, x_ND, device=None, name="features"):
        if len(getattr(x_ND, "shape", ())) != 2 or 0 in x_ND.shape:
            raise ValueError(f"{name}: want a matrix [N, D] with rows, got shape {tuple(getattr(x_ND, 'shape', ()))}")
        self.x, self.name, (self.n, self.d) = x_ND, name, x_ND.shape
        self.device = torch.device(device or (x_ND.device if isinstance(x_ND, torch.Tensor) else "cpu"))
        self.mean_D = 0.0
        probe = self.raw(np.unique(np.linspace(0, self.n - 1, min(self.n, 4096)).astype(np.int64)))
        if not np.issubdtype(probe.dtype, np.floating):
            raise ValueError(f"{name}: want real numbers, got {probe.dtype}")
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is reported by row, below
            self.mean_D = probe.mean(0, dtype=np.float64).astype(probe.dtype)
        n_blocks = -(-self.n // BLOCK)
        rank, size = world()
        first, last = n_blocks * rank // size, n_blocks * (rank + 1) // size
        self.lo, self.hi = first * BLOCK, min(last * BLOCK, self.n)  # this rank's points
        self.blocks = [(lo, min(lo + BLOCK, self.n)) for lo in range(self.lo, self.hi, BLOCK)]
        largest = np.concatenate([[0.0], *on_blocks(self._largest, self.blocks, self.device)])
        largest = all_concat(largest.max(keepdims=True)).max()
        # A grid on which n numbers of this size add up without rounding in float64 (see `exact`).
        exponent = np.ceil(np.log2(max(largest, 1e-30))) + np.ceil(np.log2(self.n)) - 51
        self.shift = float(1.5 * 2.0 ** (52 + exponent))

    def raw(self, index):
        """Rows at a slice or an array of ids, as numpy, minus the mean."""
        if isinstance(self.x, torch.Tensor):
            rows = self.x[torch.from_numpy(index) if isinstance(index, np.ndarray) else index].detach().cpu()
            rows = (rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows).numpy()
        else:
            rows = self.x[index]
            rows = np.asarray(rows.read().result() if hasattr(rows, "read") else rows)
        return np.subtract(rows, self.mean_D, dtype=np.result_type(rows.dtype, np.float32))

    def rows(self, index):
        """Rows at a slice or an array of ids: centred float32 [M, D] on the device."""
        return torch.from_numpy(self.raw(index).astype(np.float32, copy=False)).to(self.device)

    def _largest(self, lo, hi):
        x_BD = self.rows(slice(lo, hi))
        largest = x_BD.abs().amax().item()
        if not np.isfinite(largest) or largest > 1e18:  # |x|^2 must stay within float32
            bad = lo + int((~(x_BD.abs() <= 1e18)).any(1).nonzero()[0])
            raise ValueError(f"{self.name}: row {bad} holds NaN, infinity or more than 1e18; drop or fix such rows first")
        return [largest]

    def exact(self, x_MD):
        """Rows in float64, rounded to the grid on which sums are exact in any order and by any number of ranks.

        Reproducible summation by pre-rounding (Demmel & Nguyen, "Fast reproducible floating-point summation", 2013):
        adding and subtracting 1.5 * 2^52 grid steps rounds to the grid. A sum of n such numbers stays below 2^53 steps,
        so float64 adds without error, and taking a point out of a sum leaves what was there before it came in. The step
        is 2^-33 of the largest coordinate at n = 100k and 2^-20 at n = 1e9.
        """
        return x_MD.double().add_(self.shift).sub_(self.shift)

    def uncentre(self, c_KD):
        """Centroids in the data's own place, float32 numpy."""
        return (c_KD.double().cpu().numpy() + self.mean_D).astype(np.float32)

    def centre(self, c_KD):
        """The inverse, up to float32."""
        return torch.from_numpy((c_KD.astype(np.float64) - self.mean_D).astype(np.float32)).to(self.device)


# ---------------------------------------------------------------------------------------------------- nearest centroid


class Nearest:
    """Finds nearest centroids, proven: the cheapest product whose error bound settles a point answers for it.

    s_k = x . c_k - |c_k|^2 / 2 is largest for the nearest centroid. A product of rounded vectors x', c' is off by at most

        e = |x - x'| |c| + |x'| |c - c'| + (D + 2) 2^-24 |x| |c| + 2^-23 |c|^2       (Cauchy-Schwarz; sums in float32)

    so a best score that leads the second by more than 2e is the true best. The cascade:
      1. x', c' = bfloat16 (AMX or tensor cores, a fifth of float32's time): settles most points;
      2. x' = high + low bfloat16 parts (one product of length 3 D: high.high + high.low + low.high);
         without fast bfloat16, float32 stands in for both;
      3. float64 for near ties.
    Which steps ran never shows in the result. A step that settles fewer than 40% of its points is not tried again.
    """

    def __init__(self, c_KD, fast):
        self.c_KD = c_KD
        self.square_K = c_KD.double().square().sum(1)
        self.bias_K = (-self.square_K / 2).float()
        self.norm = self.square_K.max().sqrt().item()
        self.hopeless = set()
        self.steps = [self.rounded, self.split] if fast else [self.full]
        if fast:
            self.high_KD, low_KD, self.rest_high, self.rest_low = self.parts(c_KD)
            self.norm_low = self.largest_norm(low_KD)
            self.split_KD = torch.cat([self.high_KD, low_KD, self.high_KD], 1)
            self.rest_high, self.rest_low = self.rest_high.max().item(), self.rest_low.max().item()

    @staticmethod
    def largest_norm(x):
        return x.float().norm(dim=1).max().item()

    @staticmethod
    def parts(x):
        """High and low bfloat16 parts, and the norms of what the first and what both leave over."""
        high = x.bfloat16()
        rest = x - high.float()
        low = rest.bfloat16()
        return high, low, rest.norm(dim=1), (rest - low.float()).norm(dim=1)

    def accumulation(self, norm_B, length):
        return UNIT_F32 * self.norm * ((length + 2) * norm_B + 2 * self.norm)

    def rounded(self, x_BD, norm_B):
        high_BD = x_BD.bfloat16()
        rest_B = (x_BD - high_BD.float()).norm(dim=1)
        error_B = rest_B * self.norm + norm_B * (1 + UNIT_BF16) * self.rest_high
        return *top2(high_BD, self.high_KD, self.bias_K), error_B + self.accumulation(norm_B, x_BD.shape[1])

    def split(self, x_BD, norm_B):
        high_BD, low_BD, rest_B, rest_low_B = self.parts(x_BD)
        error_B = rest_low_B * self.norm + norm_B * self.rest_low + rest_B * (1 + UNIT_BF16) * self.norm_low
        out = top2(torch.cat([high_BD, high_BD, low_BD], 1), self.split_KD, self.bias_K)
        return *out, error_B * (1 + UNIT_BF16) + self.accumulation(norm_B, 3 * x_BD.shape[1])

    def full(self, x_BD, norm_B):
        return *top2(x_BD, self.c_KD, self.bias_K), self.accumulation(norm_B, x_BD.shape[1])

    def double(self, x_MD):
        """Near ties: float64, no proof; equal to the last bit of float64, the lower index wins."""
        k = len(self.c_KD)
        label_M = torch.empty(len(x_MD), dtype=torch.int64, device=x_MD.device)
        for at in torch.arange(len(x_MD), device=x_MD.device).split(max(1, (1 << 22) // k)):
            label_M[at] = torch.addmm(-self.square_K / 2, x_MD[at].double(), self.c_KD.double().T).argmax(1)
        return label_M

    def __call__(self, x_BD):
        """label_B int64 and gap_B float32: a lower bound of (distance to the second nearest) - (to the nearest)."""
        label_B = torch.zeros(len(x_BD), dtype=torch.int64, device=x_BD.device)
        gap_B = torch.zeros(len(x_BD), device=x_BD.device)
        if len(self.c_KD) == 1:
            return label_B, gap_B.fill_(torch.inf)
        norm_B = x_BD.norm(dim=1)
        left = torch.arange(len(x_BD), device=x_BD.device)
        for step in self.steps:
            if len(left) == 0 or step.__name__ in self.hopeless:
                continue
            every = len(left) == len(x_BD)  # spares a copy
            norm_M = norm_B if every else norm_B[left]
            label_M, best_M, second_M, error_M = step(x_BD if every else x_BD[left], norm_M)
            lead_M = best_M - second_M - 2.001 * error_M
            sure_M = lead_M > 0
            at = left[sure_M]
            label_B[at] = label_M[sure_M]
            # d2 - d1 = (d2^2 - d1^2) / (d2 + d1), and each d^2 = |x|^2 - 2 s; 0.999 covers the rounding here.
            far_M = (norm_M**2 - 2 * (second_M - error_M)).clamp_(min=0).sqrt_()
            near_M = (norm_M**2 - 2 * (best_M - error_M)).clamp_(min=0).sqrt_()
            gap_B[at] = (0.999 * 2 * lead_M / (far_M + near_M))[sure_M]
            if len(at) < 0.4 * len(left):
                self.hopeless.add(step.__name__)
            left = left[~sure_M]
        if len(left):
            label_B[left] = self.double(x_BD[left])
        return label_B, gap_B


def distance2(x_BD, c_KD, label_B):
    """Squared distance to the own centroid, by differences: no cancellation."""
    return (x_BD - c_KD[label_B]).square_().sum(1)


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
    ids_N = np.arange(points.lo, points.hi)
    first_N = uniform(ids_N, seed, 0)
    best = np.argsort(first_N)[:1]
    key, chosen = all_concat(first_N[best]), all_concat(ids_N[best])
    chosen = [int(chosen[key.argmin()])]
    d2_N = np.full(len(ids_N), np.inf)
    fresh, round_ = 1, 0  # how many of the chosen the distances have not seen
    while len(chosen) < k:
        c_MD = points.rows(np.array(chosen[-fresh:]))
        norm2_M = c_MD.square().sum(1)

        def update(lo, hi, c_MD=c_MD, norm2_M=norm2_M):
            x_BD = points.rows(slice(lo, hi))
            label_B, best_B, _ = top2(x_BD, c_MD, -norm2_M / 2)
            norm2_B = x_BD.square().sum(1)
            d2_B = norm2_B - 2 * best_B
            close = (d2_B < 2.0**-6 * (norm2_B + norm2_M[label_B])).nonzero()[:, 0]  # cancellation: take differences
            if len(close):
                d2_B[close] = distance2(x_BD[close], c_MD, label_B[close])
            at = slice(lo - points.lo, hi - points.lo)
            d2_N[at] = np.minimum(d2_N[at], d2_B.cpu().numpy())

        on_blocks(update, points.blocks, points.device)
        round_ += 1
        m = min(max(16, 2 * len(chosen)), 1024, 2 * (k - len(chosen)) + 16)
        with np.errstate(divide="ignore"):
            key_N = -np.log(uniform(ids_N, seed, round_)) / d2_N  # infinite where D^2 is 0
        top = np.argpartition(key_N, m - 1)[:m] if m < len(key_N) else np.arange(len(key_N))
        top = top[np.isfinite(key_N[top])]
        key_M, id_M, start_M = (all_concat(a) for a in (key_N[top], ids_N[top], d2_N[top]))
        order = np.lexsort((id_M, key_M))[:m]
        id_M, start_M = id_M[order], start_M[order]
        if len(id_M) == 0:  # every point coincides with a seed: any others will do, they make empty clusters
            spare = np.setdiff1d(np.arange(points.n), chosen)
            chosen += spare[np.argsort(uniform(spare, seed, 0))[: k - len(chosen)]].tolist()
            break
        x_MD = points.rows(id_M)
        now_M, refuse_M = start_M.copy(), uniform(id_M, seed, round_, 1)
        before = len(chosen)
        for i in range(len(id_M)):
            if refuse_M[i] * start_M[i] < now_M[i] and len(chosen) < k:
                chosen.append(int(id_M[i]))
                now_M = np.minimum(now_M, (x_MD - x_MD[i]).square_().sum(1).cpu().numpy())
        fresh = len(chosen) - before
    return np.array(chosen)


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
        size, donor, given = heapq.heappop(heap)
        gifts.setdefault(donor, []).append(int(k))
        if given + 2 < count_K[donor]:
            heapq.heappush(heap, (-int(count_K[donor]) // (given + 2), donor, given + 1))
    donors = np.array(sorted(gifts), np.int64)
    at = np.flatnonzero(np.isin(label_N, donors))
    order = at[np.lexsort((uniform(at + points.lo, seed, 2), label_N[at]))]
    wanted = np.array([len(gifts[d]) for d in donors.tolist()], np.int64)
    order = order[rank_in_group(label_N[order]) < wanted[np.searchsorted(donors, label_N[order])]]
    ids, of = all_concat(order + points.lo), all_concat(label_N[order])  # at most `wanted` a rank and donor
    order = np.lexsort((uniform(ids, seed, 2), of))
    keep = order[rank_in_group(of[order]) < wanted[np.searchsorted(donors, of[order])]]
    return np.array([k for d in donors.tolist() for k in gifts[d]], np.int64), ids[keep]


def rank_in_group(sorted_N):
    """0, 1, 2, ... within each run of equal values."""
    start = np.flatnonzero(np.r_[True, sorted_N[1:] != sorted_N[:-1]])[: len(sorted_N)]
    return np.arange(len(sorted_N)) - np.repeat(start, np.diff(np.r_[start, len(sorted_N)]))


def lloyd(points, c_KD, n_iter, seed=0, stats=None):
    """n_iter times (assign every point, move every centroid to the mean of its points), then assign once more.

    c_KD: centred float32. Returns centroids (centred, representable in the data's own place) and this rank's labels
    int64, which belong to the returned centroids. Stops early when no label changes.

    A point is looked at again only if it could have moved (Hamerly, 2010, one float a point): its gap, the distance to
    the second nearest centroid minus that to its own, shrinks by at most its own centroid's step plus the longest step
    of any other. And a sum changes only by the points that moved; exactly, so nothing drifts (`Points.exact`).
    """
    k, n = len(c_KD), points.hi - points.lo
    label_N = torch.full((n,), -1, dtype=torch.int64, device=points.device)
    gap_N = torch.full((n,), -torch.inf, device=points.device)
    sum_KD = torch.zeros(k, points.d, dtype=torch.float64, device=points.device)
    count_K = torch.zeros(k, dtype=torch.int64)
    fast = points.device.type == "cuda" or cpu_has_fast_bf16()
    hopeless, lock = set(), Lock()
    for iteration in range(n_iter + 1):
        nearest = Nearest(c_KD, fast)
        nearest.hopeless = hopeless if iteration % 4 else set()  # a second chance: centroids settle

        def work(lo, hi, nearest=nearest, last=iteration == n_iter):
            at = slice(lo - points.lo, hi - points.lo)
            look = (gap_N[at] <= 0).nonzero()[:, 0]
            if len(look) == 0:
                return 0, 0
            every = len(look) > 0.8 * (hi - lo)  # a contiguous read beats a gather
            look = look.new_tensor(range(hi - lo)) if every else look
            x_MD = points.rows(slice(lo, hi) if every else (look + lo).cpu().numpy())
            new_M, gap_M = nearest(x_MD)
            old_M = label_N[at][look]
            gap_N[at][look], label_N[at][look] = gap_M, new_M
            moved = (new_M != old_M).nonzero()[:, 0]
            if len(moved) and not last:
                x_MD = points.exact(x_MD if len(moved) == len(x_MD) else x_MD[moved])
                gone = old_M[moved] >= 0
                with lock:
                    sum_KD.index_add_(0, new_M[moved], x_MD)
                    if gone.any():
                        sum_KD.index_add_(0, old_M[moved][gone], x_MD[gone], alpha=-1)
            return len(look), len(moved)

        with cpu_bf16_products(fast and points.device.type == "cpu"):
            done = on_blocks(work, points.blocks, points.device)
        looked, moved = all_sum(torch.tensor([sum(d[0] for d in done), sum(d[1] for d in done)]))
        if stats is not None:
            stats.append({"looked": looked.item() / points.n, "moved": moved.item() / points.n})
        if iteration == n_iter or (iteration and not moved and count_K.all()):
            break
        count_K = all_sum(torch.bincount(label_N, minlength=k).cpu())
        total_KD = all_sum(sum_KD.cpu().clone())
        new_KD = c_KD.cpu().double()
        filled = count_K > 0
        new_KD[filled] = total_KD[filled] / count_K[filled, None]
        if not filled.all():
            clusters, ids = refill(points, count_K, label_N.cpu().numpy(), seed + iteration)
            if len(clusters):
                new_KD[clusters] = points.rows(ids).double().cpu()
        # Rounded where they will be handed out, so that the last assignment belongs to what the caller gets.
        new_KD = points.centre(points.uncentre(new_KD))
        step_K = (new_KD.double() - c_KD.double()).norm(dim=1).float() * (1 + 1e-5)
        first, second = (step_K.topk(min(2, k)).values.tolist() * 2)[:2]
        others_K = torch.full_like(step_K, first)
        others_K[step_K.argmax()] = second  # the longest step of any *other* centroid
        gap_N -= (step_K + others_K)[label_N]
        c_KD = new_KD
    return c_KD, label_N


def start(points, k, seed):
    """D^2 seeds as centred centroids."""
    if not 1 <= k <= points.n:
        raise ValueError(f"k={k}: want 1 <= k <= {points.n}, the number of points")
    return points.rows(seeds(points, k, seed))


def kmeans(x_ND, k=None, init_KD=None, n_iter=10, seed=0):
    """k-means by Lloyd's algorithm: (centroids_KD float32, assign_N int64), numpy for numpy in, torch for torch in.

    x_ND: numpy, memmap, torch or tensorstore [N, D]. Starts from `init_KD` if given, otherwise from k D^2 seeds.
    n_iter times: assign, then move each centroid to its points' mean (an empty cluster restarts at a random member of
    the largest). `assign_N` is the assignment to the *returned* centroids (one more pass over what could have moved, as
    faiss's index and scikit-learn's labels_ give it); n_iter=0 only assigns. Of equally near centroids the lowest wins.
    Under torch.distributed every rank passes the same x and gets the whole result, the same bits for any number of ranks.
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
    c_KD, label_N = points.uncentre(c_KD), all_concat(label_N.cpu().numpy())
    if isinstance(x_ND, torch.Tensor):
        return torch.from_numpy(c_KD).to(x_ND.device), torch.from_numpy(label_N).to(x_ND.device)
    return c_KD, label_N
