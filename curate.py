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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import count
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import torch.distributed as dist

from kernels.kmeans import cpu_bf16_products, cpu_has_fast_bf16, top3

BLOCK = 2048  # points; ranks own whole blocks, so a block's arithmetic is the same for any number of ranks
GREEDY_UP_TO = 1 << 20  # points times clusters for which greedy seeding is affordable
UNIT_F32 = 2.0**-24  # half a unit in the last place, relative


# -------------------------------------------------------------------------------------------------- ranks and threads

_alone = False  # set by `alone`


def world():
    """(rank, number of ranks); alone is (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if together() else (0, 1)


@contextmanager
def alone():
    """Within it this rank works by itself, as if there were no others."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def together():
    return dist.is_initialized() and not _alone


def all_sum(x):
    """Sum a CPU tensor over the ranks, in place. Exact (so order-free) for the integers and grid values given here."""
    if together():
        dist.all_reduce(x)
    return x


def all_concat(array):
    """Numpy arrays of all ranks, end to end in rank order."""
    if not together():
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
        torch.set_num_threads(1)
        first = work(*blocks[0])  # on this thread, so that libraries set themselves up lazily in one place
        with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return [first, *pool.map(lambda block: work(*block), blocks[1:])]
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
            probe = probe[np.isfinite(probe).all(1)]
            self.mean_D = probe.mean(0, dtype=np.float64).astype(probe.dtype) if len(probe) else np.float32(0)
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
            raise ValueError(
                f"{self.name}: row {bad} holds NaN, infinity or more than 1e18; drop or fix such rows first"
            )
        return [largest]

    def settle(self, c_KD):
        """Centred centroids (numpy), rounded to what `uncentre` hands out."""
        return self.centre(self.uncentre(torch.from_numpy(c_KD)))

    def part(self, ids):
        """Some of the points, centred, as Points in memory on every rank (its `uncentre` leads back to here)."""
        return Points(self.raw(ids), self.device, self.name)

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

    s_k = x . c_k - |c_k|^2 / 2 is largest for the nearest centroid. A product of rounded x', c' is off by at most

        |x - x'| |c_k| + |x'| |c_k - c'_k| + 2^-24 ((D + 2) |x| |c_k| + 2 |c_k|^2)      (Cauchy-Schwarz; float32 sums)

    which h |c_k| bounds, with one h a point: rank one, so an extra channel (h beside x', |c_k| beside c') makes the
    product return upper bounds u_k themselves. (One bound for all will not do: a cluster of one point in 384-d can be
    8 times as long as its neighbours of 100.) If u_1 - 2 h |c_1|, a lower bound of s_1, exceeds the second largest
    u, then 1 is nearest; if it exceeds the third, two centroids are left, compared by differences in float64.
      1. x', c' = bfloat16 (AMX or tensor cores, a fifth of float32's time): settles most points;
      2. x' = high + low bfloat16 parts (one product of length 3 D: high.high + high.low + low.high);
         without fast bfloat16, float32 stands in for both;
      3. float64 for what is left, near ties of three.
    Which steps ran never shows in the result.
    """

    def __init__(self, c_KD, fast):
        self.c_KD, self.exact_KD = c_KD, c_KD.double()
        self.square_K = self.exact_KD.square().sum(1)
        self.bias_K = (-self.square_K / 2).float()
        self.norm_K = self.square_K.sqrt().float()
        self.longest = self.norm_K.max().item()
        self.open = []  # (points the first product left open, points), a block each
        self.steps = [self.rounded, self.split] if fast else [self.full]
        length_K1 = (1.01 * self.norm_K)[:, None]
        if fast:
            high, low, rest_K, rest_low_K = self.parts(c_KD)
            length_K1 = length_K1.bfloat16().float()
            shorter_K = self.norm_K.clamp(min=1e-30)
            self.rest, self.rest_low = (rest_K / shorter_K).max().item(), (rest_low_K / shorter_K).max().item()
            # oneDNN takes bfloat16 values in float32 tensors and hands back float32 sums; CUDA takes bfloat16.
            kind = torch.bfloat16 if c_KD.is_cuda else torch.float32
            self.rounded_KE = self.padded(high, length_K1).to(kind)
            self.split_KE = self.padded(high, low, high, length_K1).to(kind)
        else:
            self.full_KE = self.padded(c_KD, length_K1)
        self.length_K = length_K1[:, 0]

    @staticmethod
    def parts(x):
        """High and low bfloat16 parts (in float32), and the norms of what the first and what both leave over."""
        high = x.bfloat16().float()
        rest = x - high
        low = rest.bfloat16().float()
        return high, low, rest.norm(dim=1), (rest - low).norm(dim=1)

    @staticmethod
    def padded(*columns):
        """Columns side by side, then zeros up to a multiple of 32: rows of whole cache lines."""
        width = sum(c.shape[1] for c in columns)
        out = columns[0].new_zeros(len(columns[0]), -(-width // 32) * 32)
        torch.cat(columns, 1, out=out[:, :width])
        return out

    def slack(self, error_B, norm_B, length):
        """h of the docstring: rounding (given), sums in float32, and 2% for the rounding of h and |c| themselves."""
        return (1.02 * (error_B + UNIT_F32 * ((length + 3) * norm_B + 2 * self.longest)))[:, None]

    def rounded(self, x_BD, norm_B):
        high_BD = x_BD.bfloat16().float()
        h_B1 = self.slack((x_BD - high_BD).norm(dim=1) + 1.01 * norm_B * self.rest, norm_B, x_BD.shape[1])
        h_B1 = h_B1.bfloat16().float()
        return *top3(self.padded(high_BD, h_B1).to(self.rounded_KE.dtype), self.rounded_KE, self.bias_K), h_B1[:, 0]

    def split(self, x_BD, norm_B):
        high_BD, low_BD, rest_B, rest_low_B = self.parts(x_BD)
        h_B1 = self.slack(rest_low_B + norm_B * self.rest_low + 1.01 * rest_B * self.rest, norm_B, 3 * x_BD.shape[1])
        h_B1 = h_B1.bfloat16().float()
        x_BE = self.padded(high_BD, high_BD, low_BD, h_B1).to(self.split_KE.dtype)
        return *top3(x_BE, self.split_KE, self.bias_K), h_B1[:, 0]

    def full(self, x_BD, norm_B):
        h_B1 = self.slack(torch.zeros_like(norm_B), norm_B, x_BD.shape[1])
        return *top3(self.padded(x_BD, h_B1), self.full_KE, self.bias_K), h_B1[:, 0]

    def nearer(self, x_MD, label_M2):
        """Of two centroids the nearer, by differences in float64; the lower index if equal."""
        low_M, high_M = label_M2.aminmax(dim=1)
        x_MD = x_MD.double()
        d2_low_M = (x_MD - self.exact_KD[low_M]).square_().sum(1)
        return torch.where((x_MD - self.exact_KD[high_M]).square_().sum(1) < d2_low_M, high_M, low_M)

    def double(self, x_MD):
        """Near ties: float64, no proof; equal to the last bit of float64, the lower index wins."""
        k = len(self.c_KD)
        label_M = torch.empty(len(x_MD), dtype=torch.int64, device=x_MD.device)
        for at in torch.arange(len(x_MD), device=x_MD.device).split(max(1, (1 << 22) // k)):
            label_M[at] = torch.addmm(-self.square_K / 2, x_MD[at].double(), self.exact_KD.T).argmax(1)
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
            if len(left) < 128 and step != self.steps[0]:  # so few are cheaper in float64 at once
                break
            every = len(left) == len(x_BD)  # spares a copy
            norm_M = norm_B if every else norm_B[left]
            x_MD = x_BD if every else x_BD[left]
            label_M2, upper_M3, h_M = step(x_MD, norm_M)
            lower_M2 = upper_M3[:, :2] - 2 * h_M[:, None] * self.length_K[label_M2]
            lead_M = lower_M2[:, 0] - upper_M3[:, 1]
            # d2 - d1 = (d2^2 - d1^2) / (d2 + d1), and each d^2 = |x|^2 - 2 s; 0.999 covers the rounding here.
            far_M = (norm_M**2 - 2 * upper_M3[:, 1]).clamp_(min=0).sqrt_()
            near_M = (norm_M**2 - 2 * lower_M2[:, 0]).clamp_(min=0).sqrt_()
            gap_B[left] = (0.999 * 2 * lead_M / (far_M + near_M)).clamp_(min=0)
            open_M = lower_M2.amax(1) <= upper_M3[:, 2]
            two = ((lead_M <= 0) & ~open_M).nonzero()[:, 0]
            label_B[left] = label_M2[:, 0]
            label_B[left[two]] = self.nearer(x_MD[two], label_M2[two])
            left = left[open_M]
            if step == self.steps[0]:
                self.open.append((len(left), len(x_BD)))
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
    if points.n * k <= GREEDY_UP_TO:
        return greedy_seeds(points, k, seed)
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
            label_B2, score_B3 = top3(x_BD, c_MD, -norm2_M / 2)
            label_B, best_B = label_B2[:, 0], score_B3[:, 0]
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


def greedy_seeds(points, k, seed):
    """Greedy k-means++: of 2 + ln k candidates ~ D^2, each time the one that lowers the sum of D^2 most. Ids int64 [k].

    Sequential, and 2 + ln k times the products, so for small problems only: the upper levels, where a seed more or less
    in a region is a large share of it. There it lifted the balance of the sample (50 Gaussian clusters, centres 1.0 and
    0.5 apart) from 0.978 to 0.996 and from 0.857 to 0.914; at the first level it changed 0.996 to 0.995 and 0.914 to
    0.913 for twice the CPU time of everything. Every rank computes it, alike.
    """
    x_ND = points.rows(slice(0, points.n)).cpu().double()
    ids_N, tries = np.arange(points.n), np.arange(2 + int(np.log(k)))
    chosen = [int(uniform(ids_N, seed, 0).argmin())]
    square_N = x_ND.square().sum(1)
    d2_N = (x_ND - x_ND[chosen[0]]).square_().sum(1)
    while len(chosen) < k:
        total_N = d2_N.cumsum(0)
        if total_N[-1] <= 0:  # every point coincides with a seed: any others will do, they make empty clusters
            spare = np.setdiff1d(ids_N, chosen)
            return np.array(chosen + spare[np.argsort(uniform(spare, seed, 0))][: k - len(chosen)].tolist())
        draw_M = torch.from_numpy(uniform(tries, seed, len(chosen), 6)) * total_N[-1]
        draw_M = torch.searchsorted(total_N, draw_M).clamp_(max=points.n - 1)
        d2_MN = square_N[draw_M, None] + square_N - 2 * (x_ND[draw_M] @ x_ND.T)
        d2_MN[d2_MN < 1e-12 * (square_N[draw_M, None] + square_N)] = 0  # float64's rounding, and what it made of zeros
        d2_MN = d2_MN.minimum(d2_N)
        best = int(d2_MN.sum(1).argmin())
        d2_N, chosen = d2_MN[best], [*chosen, int(draw_M[best])]
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
        _, donor, given = heapq.heappop(heap)
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
    lock = Lock()
    for iteration in count():
        nearest = Nearest(c_KD, fast)

        def work(lo, hi, nearest=nearest, last=iteration == n_iter):
            at = slice(lo - points.lo, hi - points.lo)
            look = (gap_N[at] <= 0).nonzero()[:, 0]
            if len(look) == 0:
                return 0, 0
            every = len(look) > 0.8 * (hi - lo)  # a contiguous read beats a gather
            look = torch.arange(hi - lo, device=look.device) if every else look
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
        left_open, seen = np.array(nearest.open or [(0, 1)]).sum(0)
        fast &= bool(left_open < 0.15 * seen)  # beyond that, float32 alone is faster
        looked, moved = all_sum(torch.tensor([sum(d[0] for d in done), sum(d[1] for d in done)]))
        if stats is not None:
            stats.append({"looked": looked.item() / points.n, "moved": moved.item() / points.n})
        if iteration == n_iter:
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
        if iteration and not moved and filled.all():
            n_iter = iteration + 1  # nothing will change any more
        new_KD = new_KD.float().to(points.device)
        if iteration + 1 == n_iter:  # rounded as handed out, so that the labels belong to what is returned
            new_KD = points.centre(points.uncentre(new_KD))
        step_K = (new_KD.double() - c_KD.double()).norm(dim=1).float() * (1 + 1e-5)
        first, second = (step_K.topk(min(2, k)).values.tolist() * 2)[:2]
        others_K = torch.full_like(step_K, first)
        others_K[step_K.argmax()] = second  # the longest step of any *other* centroid
        gap_N.sub_((step_K + others_K)[label_N])
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
    the largest). `assign_N` is the assignment to the *returned* centroids (one more pass, as
    faiss's index and scikit-learn's labels_ give it); n_iter=0 only assigns. Of equally near centroids the lowest wins.
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
    c_KD, label_N = points.uncentre(c_KD), all_concat(label_N.cpu().numpy())
    if isinstance(x_ND, torch.Tensor):
        return torch.from_numpy(c_KD).to(x_ND.device), torch.from_numpy(label_N).to(x_ND.device)
    return c_KD, label_N


# ----------------------------------------------------------------------------------------------------------- hierarchy


@dataclass
class Config:
    """What `python curate.py` takes; the fields are the flags."""

    # changes results
    levels: list[int] = field(default=None, metadata={"help": "clusters per level, from the points up, decreasing"})
    keep: int = field(default=None, metadata={"help": "how many images to keep"})
    seed: int = field(default=0, metadata={"help": "the result is a function of the features, these flags and this"})
    iterations: int = field(default=10, metadata={"help": "Lloyd iterations of every k-means"})
    resamplings: int = field(
        default=10, metadata={"help": "resampling steps a level; 0 for plain hierarchical k-means"}
    )
    share: float = field(
        default=0.3, metadata={"help": "points a cluster gives to a resampling (r): this share of the mean"}
    )
    nearest: int = field(
        default=32, metadata={"help": "r is at most this (at least 2); r x clusters points are in memory"}
    )
    split_above: int = field(
        default=50_000,
        metadata={"help": "a level of more clusters is made in two steps: coarse cells, k-means in each"},
    )
    # speed only
    device: str = field(default=None, metadata={"help": "cpu or cuda (default: cuda if there is one)"})
    # paths
    features: str = field(default=None, metadata={"help": "a feature cache (folder) or an .npy file [N, D]"})
    teacher: str = field(
        default=None, metadata={"help": "cached teacher whose summaries are clustered (default: first)"}
    )
    images: str = field(default=None, metadata={"help": "folder whose sorted images are the rows of an .npy"})
    out: str = field(default=None, metadata={"help": "folder for kept.npy, the tree, report.json and clusters.png"})


def check_levels(n, levels, keep):
    """Raises ValueError unless N > levels[0] > levels[1] > ... >= 1 and 1 <= keep <= N."""
    if not levels or list(levels) != sorted(set(levels), reverse=True) or levels[-1] < 1:
        raise ValueError(f"levels {list(levels or [])}: want decreasing numbers of clusters, for instance 20000 500 50")
    if levels[0] > n:
        raise ValueError(
            f"levels {list(levels)}: {levels[0]} clusters of {n} points; the first level must have at most N"
        )
    if not 1 <= keep <= n:
        raise ValueError(f"keep={keep}: want 1 <= keep <= {n}, the number of points")


def even_shares(budget, size_M, seed=0):
    """Split a budget over groups as evenly as their sizes allow; what a small group cannot take goes to the others.

    The shares are min(size, w) for the water level w at which they add up to min(budget, all); what a whole level
    leaves over goes one each to groups picked by the seed.
    """
    size_M = np.asarray(size_M, np.int64)
    budget = min(int(budget), int(size_M.sum()))
    order = np.sort(size_M)
    filled = np.cumsum(order) + order * np.arange(len(order) - 1, -1, -1)  # the total at water level order[i]
    i = int(np.searchsorted(filled, budget, side="left"))
    below = int(order[:i].sum())
    level = (budget - below) // max(len(order) - i, 1)
    share_M = np.minimum(size_M, level)
    room = np.flatnonzero(size_M > level)
    share_M[room[np.argsort(uniform(room, seed, 3))[: budget - int(share_M.sum())]]] += 1
    return share_M


def own_distance2(points, c_KD, label_N):
    """This rank's squared distances to the own centroid, float32 numpy."""

    def work(lo, hi):
        at = slice(lo - points.lo, hi - points.lo)
        return distance2(points.rows(slice(lo, hi)), c_KD, label_N[at]).cpu().numpy()

    return np.concatenate([np.zeros(0, np.float32), *on_blocks(work, points.blocks, points.device)])


def closest(points, c_KD, label_N, r):
    """Ids of the r points nearest to each centroid (all of a smaller cluster), sorted."""
    d2_N, label_N = own_distance2(points, c_KD, label_N), label_N.cpu().numpy()
    order = np.lexsort((d2_N, label_N))
    order = order[rank_in_group(label_N[order]) < r]
    ids, d2_M, of_M = (all_concat(a) for a in (order + points.lo, d2_N[order], label_N[order]))
    order = np.lexsort((ids, d2_M, of_M))
    return np.sort(ids[order[rank_in_group(of_M[order]) < r]])


def in_two_steps(points, k, config, seed):
    """k centroids by k-means into sqrt(k) coarse cells, then k-means inside each: 2 N sqrt(k) products, not N k.

    Every cell gets the same number of clusters as far as it has points for them, whatever its size, as the paper's
    first level does (100k cells of 100 clusters). Cells are shared out over ranks; one cell's points fit in memory.
    """
    coarse = round(k**0.5)
    _, label_N = lloyd(points, start(points, coarse, seed), config.iterations, seed)
    label_N = all_concat(label_N.cpu().numpy())
    order, size = np.argsort(label_N, kind="stable"), np.bincount(label_N, minlength=coarse)
    quota, end = even_shares(k, size, seed), np.cumsum(size)
    rank, n_ranks = world()
    mine = []
    for cell in range(rank, coarse, n_ranks):
        if quota[cell]:
            with alone():
                members = points.part(order[end[cell] - size[cell] : end[cell]])
                c_MD, _ = lloyd(members, start(members, int(quota[cell]), seed), config.iterations, seed)
                mine.append((cell, members.uncentre(c_MD)))  # in `points`' centred place
    parts = [mine]
    if together():
        parts = [None] * n_ranks
        dist.all_gather_object(parts, mine)
    return points.settle(
        np.concatenate([c for _, c in sorted((p for part in parts for p in part), key=lambda p: p[0])])
    )


def level(points, k, config, seed, log=lambda line: None):
    """One level of the hierarchy: k-means, then resampling. Returns centred centroids and this rank's labels.

    Each resampling starts afresh from D^2 seeds of the pool (warm or random starts lose most of the gain).
    """
    if k > config.split_above:
        return lloyd(points, in_two_steps(points, k, config, seed), 0)
    c_KD, label_N = lloyd(points, start(points, k, seed), config.iterations, seed)
    r = max(2, min(config.nearest, int(config.share * points.n / k)))
    for step in range(config.resamplings):
        ids = closest(points, c_KD, label_N, r)
        if len(ids) < k:  # duplicates left clusters empty: a pool this small cannot fill them either
            log(f"resampling {step}: {len(ids)} points for {k} clusters, stopped")
            break
        pool = points.part(ids)
        c_MD, _ = lloyd(pool, start(pool, k, seed + step + 1), config.iterations, seed)
        c_KD, label_N = lloyd(points, points.settle(pool.uncentre(c_MD)), 0)
    return c_KD, label_N


def grow(points, config, folder=None, log=lambda line: None):
    """The tree, bottom-up: for each level its centroids [K, D] float32 and the parent of each node below (int64).

    With a folder, each finished level is written there and read back by the next run: a killed run continues.
    """
    tree = []
    for depth, k in enumerate(config.levels):
        path = folder and folder / f"level{depth + 1}.npz"
        if path and path.exists():
            with np.load(path) as saved:
                tree.append({name: saved[name] for name in ("centroids", "parent", "inertia")})
            log(f"level {depth + 1}: {k} clusters, read from {path.name}")
        else:
            begin = time.perf_counter()
            here = points if depth == 0 else Points(tree[-1]["centroids"], points.device, f"level {depth}")
            c_KD, label_N = level(here, k, config, config.seed + 1000 * depth, log)
            d2_N = all_concat(own_distance2(here, c_KD, label_N))  # summed in id order: the same for any ranks
            tree.append(
                {
                    "centroids": here.uncentre(c_KD),
                    "parent": all_concat(label_N.cpu().numpy()),
                    "inertia": np.float64(d2_N.mean(dtype=np.float64)),
                }
            )
            if path and world()[0] == 0:
                write(path, lambda f, node=tree[-1]: np.savez(f, **node))
            seconds = time.perf_counter() - begin
            log(f"level {depth + 1}: {k} clusters of {here.n}, mean d^2 {tree[-1]['inertia']:.5g}, {seconds:.1f} s")
        if together():
            dist.barrier()
    return tree


def leaf_counts(tree):
    """Points under every node, per level."""
    counts = [np.bincount(tree[0]["parent"], minlength=len(tree[0]["centroids"]))]
    for node in tree[1:]:
        counts.append(np.bincount(node["parent"], counts[-1], len(node["centroids"])).astype(np.int64))
    return counts


def sample(tree, keep, seed=0):
    """Balanced hierarchical sampling: sorted ids int64 of exactly `keep` points.

    From the top down a node splits its budget evenly over its children (`even_shares`); a leaf draws at random.
    """
    counts = leaf_counts(tree)
    quota = even_shares(keep, counts[-1], seed)
    for depth in range(len(tree) - 1, 0, -1):
        parent, below = tree[depth]["parent"], np.zeros(len(counts[depth - 1]), np.int64)
        order = np.argsort(parent, kind="stable")
        ends = np.cumsum(np.bincount(parent, minlength=len(quota)))
        for node, children in enumerate(np.split(order, ends[:-1])):
            below[children] = even_shares(quota[node], counts[depth - 1][children], seed + node)
        quota = below
    leaf = tree[0]["parent"]
    order = np.lexsort((uniform(np.arange(len(leaf)), seed, 4), leaf))
    return np.sort(order[rank_in_group(leaf[order]) < quota[leaf[order]]])


def curate(x_ND, levels, keep, seed=0):
    """The whole pipeline in memory: sorted int64 ids (numpy) of `keep` rows of x_ND, balanced over its clusters.

    x_ND: as for `kmeans`. levels: clusters per level, from the points up, decreasing. Raises ValueError for bad input.
    """
    check_levels(len(x_ND), levels, keep)
    config = Config(levels=list(levels), keep=keep, seed=seed)
    return sample(grow(Points(x_ND), config), keep, seed)


# ------------------------------------------------------------------------------------------------------------- command


def write(path, save):
    """Atomically: a temporary beside it, fsync, rename; nothing half-written is ever read."""
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "wb") as f:
        save(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_json(path, value):
    write(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))


def load_features(config):
    """(ids int64 [N], features [N, D], thumbnails(rows) -> list of uint8 [H, W, 3], or None without images)."""
    path = Path(config.features)
    if path.is_dir() and (path / "cache.json").exists():
        import data

        teacher = config.teacher or next(iter(json.loads((path / "cache.json").read_text())["teachers"]), None)
        teacher = teacher["name"] if isinstance(teacher, dict) else teacher
        ids, x_ND = data.summaries(path, teacher)
        return np.asarray(ids), x_ND, lambda rows: data.thumbnails(path, np.asarray(ids)[rows])
    if path.suffix != ".npy" or not path.is_file():
        raise ValueError(f"--features {path}: want a cache folder (with cache.json) or an .npy file, and it is neither")
    try:
        x_ND = np.load(path, mmap_mode="r")
    except ValueError as e:
        raise ValueError(f"--features {path}: not a readable .npy matrix ({e})") from None
    thumbnails = None
    if config.images:
        kinds = (".jpg", ".jpeg", ".png", ".webp")
        files = sorted(p for p in Path(config.images).rglob("*") if p.suffix.lower() in kinds)
        if len(files) != len(x_ND):
            raise ValueError(f"--images {config.images}: {len(files)} images for {len(x_ND)} rows of {path}")

        def thumbnails(rows):
            from PIL import Image

            images = (Image.open(files[i]).convert("RGBA") for i in rows)  # alpha goes over white
            return [
                np.asarray(Image.alpha_composite(Image.new("RGBA", i.size, "white"), i).convert("RGB")) for i in images
            ]

    return np.arange(len(x_ND)), x_ND, thumbnails


def entropy(count_K):
    """Of a histogram, over the log of its number of bins: 1 is uniform."""
    p = count_K[count_K > 0] / count_K.sum()
    return float(-(p * np.log(p)).sum() / np.log(len(count_K))) if len(count_K) > 1 else 1.0


def report(tree, kept, config):
    """What was balanced, by level: sizes, inertia, and the entropy of cluster membership before and after."""
    levels, node_N = [], np.arange(len(tree[0]["parent"]))
    for node in tree:
        node_N = node["parent"][node_N]
        size = np.bincount(node_N, minlength=len(node["centroids"]))
        after = np.bincount(node_N[kept], minlength=len(size))
        levels.append(
            {
                "clusters": len(size),
                "empty": int((size == 0).sum()),
                "points_min_median_max": [int(size.min()), float(np.median(size)), int(size.max())],
                "kept_min_median_max": [int(after.min()), float(np.median(after)), int(after.max())],
                "mean_squared_distance": float(node["inertia"]),
                "entropy_before": entropy(size),
                "entropy_after": entropy(after),
            }
        )
    return {"points": len(tree[0]["parent"]), "kept": len(kept), "config": asdict(config), "levels": levels}


def contact_sheet(tree, kept, thumbnails, path, clusters=8, across=12, side=72):
    """A PNG of the top level's largest and smallest clusters: a row each, kept images first, then a few left out."""
    from PIL import Image, ImageDraw

    node_N = tree[0]["parent"]
    for node in tree[1:]:
        node_N = node["parent"][node_N]
    size = np.bincount(node_N, minlength=len(tree[-1]["centroids"]))
    order = np.argsort(-size, kind="stable")
    order = order[size[order] > 0]
    shown = order if len(order) <= 2 * clusters else np.r_[order[:clusters], order[-clusters:]]
    is_kept = np.isin(np.arange(len(node_N)), kept)
    margin = 150
    sheet = Image.new("RGB", (margin + across * side, len(shown) * side), "white")
    draw = ImageDraw.Draw(sheet)
    for row, k in enumerate(shown):
        members = np.flatnonzero(node_N == k)
        members = members[np.lexsort((uniform(members, 5), ~is_kept[members]))]
        n_kept = int(is_kept[members].sum())
        in_, out = members[:n_kept], members[n_kept:]
        pick = np.r_[in_[: max(across - min(len(out), across // 3), 0)], out][:across]
        draw.text(
            (6, row * side + side // 2 - 12),
            f"{len(members)} image{'s' * (len(members) > 1)}\n{n_kept} kept (framed)",
            fill="black",
        )
        for column, (i, image) in enumerate(zip(pick, thumbnails(pick), strict=True)):
            image = Image.fromarray(np.asarray(image))
            image.thumbnail((side - 6, side - 6))
            x, y = margin + column * side, row * side
            if is_kept[i]:
                draw.rectangle((x, y, x + side - 1, y + side - 1), outline=(0, 120, 60), width=2)
            sheet.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2))
    write(path, lambda f: sheet.save(f, "PNG"))


def run(config):
    """The command: features in, DIR/kept.npy, level*.npz, report.json and clusters.png out."""
    for flag in ("features", "levels", "keep", "out"):
        if getattr(config, flag) is None:
            raise ValueError(f"--{flag} is missing; see --help")
    ids, x_ND, thumbnails = load_features(config)
    check_levels(len(x_ND), config.levels, config.keep)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no GPU here")
    log = print if world()[0] == 0 else lambda line: None
    how = "Triton kernel" if device.startswith("cuda") else "bfloat16 tiles" if cpu_has_fast_bf16() else "float32"
    log(f"{len(x_ND)} points of {x_ND.shape[1]} channels, {world()[1]} rank(s), {device}: {how}, near ties in float64")
    points = Points(x_ND, device, config.features)
    out = Path(config.out)
    # A tree belongs to its features and to the flags that change it; --keep may change, and reuses it.
    tree_of = {k: v for k, v in asdict(config).items() if k not in ("keep", "device", "images", "out", "features")}
    check = points.raw(np.unique(np.linspace(0, points.n - 1, min(points.n, 64)).astype(np.int64)))
    tree_of |= {"points": points.n, "channels": points.d, "checksum": float(np.abs(check).sum(dtype=np.float64))}
    if world()[0] == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "tree.json").exists():
            write_json(out / "tree.json", tree_of)
    if together():
        dist.barrier()
    before = json.loads((out / "tree.json").read_text())
    if before != tree_of:
        differ = {k: (before.get(k), tree_of.get(k)) for k in before | tree_of if before.get(k) != tree_of.get(k)}
        raise ValueError(f"--out {out} holds the tree of another run, (then, now): {differ}; choose another folder")
    tree = grow(points, config, out, log)
    kept = sample(tree, config.keep, config.seed)
    if world()[0] == 0:
        write(out / "kept.npy", lambda f: np.save(f, np.sort(ids[kept]).astype(np.int64)))
        write_json(out / "report.json", report(tree, kept, config))
        if thumbnails:
            contact_sheet(tree, kept, thumbnails, out / "clusters.png")
        else:
            log("no contact sheet: an .npy has no pictures unless --images names their folder")
        for line in report(tree, kept, config)["levels"]:
            log(f"{line['clusters']} clusters: entropy {line['entropy_before']:.3f} -> {line['entropy_after']:.3f}")
        log(f"kept {len(kept)} of {points.n} in {out / 'kept.npy'}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="balanced subset by hierarchical k-means", allow_abbrev=False)
    for f in fields(Config):
        kind = {"type": int, "nargs": "+"} if f.name == "levels" else {"type": f.type}
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(flag, default=f.default, help=f"{f.metadata['help']} (default: {f.default})", **kind)
    parser.add_argument("--bench", metavar="JSON", help="measure speed and balance instead, and write them there")
    flags = vars(parser.parse_args(argv))
    bench = flags.pop("bench")
    if bench:
        from benchmarks.curation import main as measure

        return measure(Path(bench))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")  # what travels are sums, counts and ids in CPU memory
    try:
        run(Config(**flags))
    except ValueError as e:
        parser.exit(2, f"curate.py: error: {e}\n")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
