"""Curation: choose a balanced subset of a long-tailed pool, by hierarchical k-means with resampling.

    python curate.py --features CACHE|FILE.npy --levels 20000 500 50 --keep 100000 --out DIR

After Vo et al., "Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach" (arXiv 2405.15613).
A random subset of web images repeats the most frequent concepts. So does one k-means: its centroids are densest where
the data are. The remedy has two steps.

1. A hierarchy (`build_tree`). Level 1 clusters the points, level 2 the centroids of level 1, and so on: centroids are
   more evenly spread than what they stand for, so every level is flatter. *Resampling* flattens within a level:
   keep only the r points nearest to each centroid, cluster those from new seeds, assign all points again, repeat. With
   r points of each cluster, the sizes of clusters no longer matter.
2. Balanced sampling (`sample`): descend from the top, split the budget evenly among the children, and pass on what a
   small child cannot fill.

The features may be larger than memory. Nothing depends on how many processes (torchrun) share the work: points are in
fixed blocks and a rank owns whole blocks, labels are those of float64, sums are exact, random numbers hash (seed, id).

Shape letters: N points (or this rank's), K centroids, D channels, B points of a block, M points of a selection.
"""

# Before torch: importing these runs kernels/__init__.py, which sets how OpenMP's threads wait.
import data
from common.commands import Parser, choose_device, in_range, one_line_errors, run_command
from common.pictures import ACROSS, cluster_sheet
from common.process import single_threaded_pool
from common.sources import find_sources
from common.store import digest, write_atomically, write_json
from images import load_image
from kernels.kmeans import PRODUCTS, Assignment, product_for
from kernels.seeds import draw_seeds, random_of, single_threaded

# isort: split
import contextlib
import itertools
import json
import os
import threading
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

BLOCK = 8192  # points; ranks own whole blocks, so a block's arithmetic is the same for any number of ranks


# ---- flags ----


def flag(default, text, allowed=None):
    """A field of Config; allowed: a number's (least, most)."""
    return field(default=default, metadata={"help": text, "allowed": allowed})


@dataclass
class Config:
    """What `python curate.py` takes; the fields are the flags."""

    # changes results
    levels: tuple[int, ...] = flag(None, "clusters per level, from the points up, decreasing (required)", (1, 10**9))
    keep: int = flag(None, "how many images to keep (required)", (1, 10**12))
    seed: int = flag(0, "the result depends only on features, these flags and this", (0, 2**63 - 1))
    iterations: int = flag(10, "Lloyd iterations of every k-means", (1, 10**4))
    resamplings: int = flag(10, "resampling steps per level; 0: plain hierarchical k-means", (0, 10**4))
    share: float = flag(0.3, "r, points per cluster in a resampling: this share of the mean size", (0, 1))
    nearest: int = flag(32, "r is at most this; r x clusters points have to fit in memory", (2, 10**6))
    split_above: int = flag(50_000, "more clusters than this are made in two steps: cells, k-means in each", (1, 10**9))
    # speed only
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    # paths
    features: str = flag(None, "a feature cache (folder) or an .npy file [N, D] (required)")
    teacher: str = flag(None, "cached teacher whose summaries are clustered (default: the first)")
    images: str = flag(None, "folder, tar or .txt list of an .npy's rows, sorted, or of a cache without pixels")
    out: str = flag(None, "folder for kept.npy, the tree, report.json and clusters.png (required)")


# ---- points ----


def first_of_each(cluster_N, n, *keys):
    """Indices of the first n (a number, or one per cluster) points of every cluster, sorted by the last key first."""
    order = np.lexsort((*keys, cluster_N))
    sorted_N = cluster_N[order]
    place_N = np.arange(len(order)) - np.searchsorted(sorted_N, sorted_N)
    return order[place_N < (n if np.isscalar(n) else n[sorted_N])]


class Points:
    """Rows of a feature matrix, read block by block and centred, and the ranks and threads that share them.

    x_ND: a numpy array or memmap, a torch tensor or a tensorstore, of real numbers; it may be larger than memory.
    Under torch.distributed every rank holds the same x and owns the points lo to hi (exclusive), unless `alone`.

    Points are centred so that float32 is enough: in |x|^2 - 2 x.c + |c|^2 a large offset cancels, and relative errors
    grow by (offset / spread)^2. The mean of up to 4096 rows spread over the data is near enough to the middle.
    A mean of less than a quarter of the rows' length costs no digit: it stays, and blocks are read in place.
    """

    def __init__(self, x_ND, device=None, name="features", alone=False):
        if len(getattr(x_ND, "shape", ())) != 2 or 0 in x_ND.shape:
            raise ValueError(f"{name}: want a matrix [N, D] with rows, got shape {tuple(getattr(x_ND, 'shape', ()))}")
        self.x, self.name, (self.n, self.d) = x_ND, name, x_ND.shape
        self.device = torch.device(device or (x_ND.device if isinstance(x_ND, torch.Tensor) else "cpu"))
        self.shared = dist.is_initialized() and not alone
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if self.shared else (0, 1)
        self.threads = torch.get_num_threads()
        n_blocks = -(-self.n // BLOCK)
        self.lo, self.hi = (min(n_blocks * r // self.ranks * BLOCK, self.n) for r in (self.rank, self.rank + 1))
        self.mean_D = self.mean_of_a_sample()
        self.norm_N, self.rounding_N = torch.empty(2, self.hi - self.lo, device=self.device)  # |x|, |x - bfloat16(x)|
        largest = self.all_concat(np.array(self.each_block(self.measure_block))).max()
        # A grid on which n numbers of this size add up without rounding in float64 (see `round_to_grid`).
        exponent = np.ceil(np.log2(max(largest, 1e-30))) + np.ceil(np.log2(self.n)) - 51
        self.shift = float(1.5 * 2.0 ** (52 + exponent))

    def mean_of_a_sample(self):
        """The mean of rows spread over the data, without those that are not finite: `measure_block` reports them."""
        sample = self.read(np.unique(np.linspace(0, self.n - 1, min(self.n, 4096)).astype(np.int64)))
        if not np.issubdtype(sample.dtype, np.number) or np.iscomplexobj(sample):
            raise ValueError(f"{self.name}: want real numbers, got {sample.dtype}")
        with np.errstate(over="ignore", invalid="ignore"):
            sample = sample[np.isfinite(sample).all(1)]
            mean_D = sample.mean(0, dtype=np.float64) if len(sample) else np.zeros(self.d)
            if 16 * np.square(mean_D).sum() < np.square(sample, dtype=np.float64).sum(1).mean():
                mean_D[:] = 0
            return mean_D.astype(np.float32) if sample.dtype in (np.float16, np.float32) else mean_D

    def read(self, index):
        """Rows at a slice or an array of ids, as they are, in numpy."""
        if isinstance(self.x, torch.Tensor):
            rows = self.x[torch.from_numpy(index) if isinstance(index, np.ndarray) else index].detach().cpu()
            return (rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows).numpy()
        rows = self.x[index]
        return np.asarray(rows.read().result() if hasattr(rows, "read") else rows)

    def rows(self, index):
        """Rows at a slice or an array of ids: centred float32 [M, D] on the device. Not to be written to."""
        rows = self.read(index)
        if self.mean_D.any():
            rows = np.subtract(rows, self.mean_D, dtype=np.result_type(rows.dtype, self.mean_D.dtype))
        return torch.from_numpy(np.require(rows, np.float32, "CW")).to(self.device)

    def own_rows(self, index):
        """`rows` by a slice or a tensor of numbers counted from this rank's first point."""
        if isinstance(index, slice):
            return self.rows(slice(self.lo + index.start, self.lo + index.stop))
        return self.rows(self.lo + index.cpu().numpy())

    def measure_block(self, block):
        """Fill in the block's norms; returns its largest coordinate."""
        x_BD = self.own_rows(block)
        self.norm_N[block] = x_BD.norm(dim=1)
        self.rounding_N[block] = torch.cat([(x - x.bfloat16()).norm(dim=1) for x in x_BD.split(1024)])
        bad = ~(self.norm_N[block] <= 1e18)  # |x|^2 must stay within float32; NaN compares false
        if bad.any():
            row = self.lo + block.start + int(bad.nonzero()[0])
            raise ValueError(f"{self.name}: row {row} holds NaN, infinity or more than 1e18; drop or fix such rows")
        return max(abs(v.item()) for v in x_BD.aminmax())

    def hash_rows(self):
        """The hash of all rows as they are stored, the same for any number of ranks."""

        def work(block):
            raw = np.ascontiguousarray(self.read(slice(self.lo + block.start, self.lo + block.stop))).view(np.uint8)
            return [digest(raw[first : first + BLOCK]) for first in range(0, len(raw), BLOCK)]

        blocks = itertools.chain(*self.all_gather(list(itertools.chain(*self.each_block(work)))))
        return digest("".join(blocks).encode())

    def subset(self, ids, alone=False):
        """Some of the points as Points in memory, on every rank."""
        return Points(self.read(ids), self.device, self.name, alone)

    def uncentre(self, c_KD):
        """Centred centroids back to the data's coordinates, float32 numpy."""
        return (c_KD.double().cpu().numpy() + self.mean_D).astype(np.float32)

    def centre(self, c_KD):
        """The inverse of `uncentre`, up to float32 rounding."""
        return torch.from_numpy((c_KD.astype(np.float64) - self.mean_D).astype(np.float32)).to(self.device)

    def round_to_grid(self, x_MD):
        """Rows in float64, on a grid on which their sums are exact, in any order and by any number of ranks.

        Adding and subtracting 1.5 * 2^52 grid steps rounds to the grid (Demmel & Nguyen, "Fast reproducible
        floating-point summation", 2013). A sum of n such numbers stays below 2^53 steps, so float64 adds them, and
        takes them out again, without error. The step is 2^-33 of the largest coordinate at n = 100k, 2^-20 at 1e9.
        """
        return x_MD.double().add_(self.shift).sub_(self.shift)

    def all_sum(self, x):
        """Sum a CPU tensor over the ranks, in place. Exact, so order-free, for the integers and grid values given."""
        if self.shared:
            dist.all_reduce(x)
        return x

    def all_gather(self, value):
        """A list of the ranks' values, in rank order."""
        values = [value] * self.ranks
        if self.shared:
            dist.all_gather_object(values, value)
        return values

    def all_concat(self, array):
        """Numpy arrays of all ranks, end to end in rank order."""
        return np.concatenate(self.all_gather(array))

    def each_block(self, work):
        """[work(block)] of this rank's blocks (slices counted from its first point), on one Python thread per core."""
        step, n = BLOCK if self.device.type == "cpu" else 8 * BLOCK, self.hi - self.lo
        blocks = [slice(first, min(first + step, n)) for first in range(0, n, step)]
        with single_threaded():
            if self.threads == 1 or len(blocks) < 2 or self.device.type == "cuda":
                return [work(block) for block in blocks]
            first = work(blocks[0])  # on this thread, so that libraries set themselves up in one place
            with single_threaded_pool(self.threads) as pool:
                return [first, *pool.map(work, blocks[1:])]

    def squared_distances(self, c_KD, label_N):
        """Of this rank's points to their own centroids, float32 numpy, by differences: no cancellation."""
        d2 = self.each_block(lambda block: (self.own_rows(block) - c_KD[label_N[block]]).square_().sum(1).cpu().numpy())
        return np.concatenate([np.zeros(0, np.float32), *d2])


# ---- seeds ----


def seed_centroids(points, k, seed):
    """k centroids (centred, float32) at points drawn ~ D^2."""
    if not 1 <= k <= points.n:
        raise ValueError(f"k={k}: want 1 <= k <= {points.n}, the number of points")
    ids = draw_seeds(points, k, seed)
    if len(ids) < k:  # every point coincides with a seed: any others will do, they make empty clusters
        spare = np.setdiff1d(np.arange(points.n), ids)
        ids = np.r_[ids, spare[np.argsort(random_of(spare, seed, 0))][: k - len(ids)]]
    return points.rows(ids)


# ---- k-means ----


def assign(points, c_KD, assignment, sum_KD=None):
    """Assign every point to its nearest centroid. Returns how many points were read, and how many moved.
    sum_KD, if given, are the exact sums of each cluster's points: they follow the points that move, and never drift.
    """
    assignment.set_centroids(c_KD)
    lock = threading.Lock()

    def work(block):
        x_MD, old_M, new_M = assignment.update(block, points.own_rows)
        moved = (new_M != old_M).nonzero()[:, 0]
        if len(moved) and sum_KD is not None:
            for rows in moved.split(256 if x_MD.device.type == "cpu" else len(moved)):  # in the cache: half the time
                x_CD = points.round_to_grid(x_MD.index_select(0, rows))
                with lock:
                    sum_KD.index_add_(0, new_M[rows], x_CD)
                    if old_M[0] >= 0:  # not the first pass
                        sum_KD.index_add_(0, old_M[rows], x_CD, alpha=-1)
        return len(old_M), len(moved)

    counts = torch.tensor(points.each_block(work), dtype=torch.int64).reshape(-1, 2)
    return points.all_sum(counts.sum(0)).tolist()


@single_threaded()
def lloyd(points, c_KD, n_iter, seed=0):
    """n_iter times (assign every point, move every centroid to the mean of its points), then assign once more.

    c_KD: centred float32. Returns centroids (centred, of float32 values when uncentred) and this rank's labels
    int64, which belong to the returned centroids. Stops early when no label changes.
    """
    assignment = Assignment(points.norm_N, points.rounding_N)
    sum_KD = torch.zeros(c_KD.shape, dtype=torch.float64, device=points.device)
    for iteration in range(n_iter):
        _, moved = assign(points, c_KD, assignment, sum_KD)
        count_K = points.all_sum(torch.bincount(assignment.label_N, minlength=len(c_KD)).cpu())
        mean_KD, empty_K = points.all_sum(sum_KD.cpu().clone()) / count_K[:, None], count_K == 0
        if empty_K.any():
            mean_KD[empty_K] = c_KD.cpu().double()[empty_K]  # stays, if there are too few points to restart it
            clusters, ids = draw_restarts(points, count_K, assignment.label_N.cpu().numpy(), seed + iteration)
            mean_KD[clusters] = points.rows(ids).double().cpu()
        c_KD = mean_KD.float().to(points.device)
        if not moved and not empty_K.any():
            break
    if n_iter:  # rounded as handed out, so that the labels belong to what is returned
        c_KD = points.centre(points.uncentre(c_KD))
    assign(points, c_KD, assignment)
    return c_KD, assignment.label_N


def draw_restarts(points, count_K, label_N, seed):
    """For every empty cluster, a random member of the cluster that is largest by then. Returns clusters, ids.
    Largest by count, each member given away counting as an even split (as in faiss). A cluster of one gives nothing.
    """
    count_K, donors = count_K.numpy(), []
    empty, share_K, given_K = np.flatnonzero(count_K == 0), count_K.copy(), np.zeros_like(count_K)
    while len(donors) < len(empty) and share_K.max() > 1:
        donors.append(donor := share_K.argmax())
        given_K[donor] += 1
        parts = given_K[donor] + 1
        share_K[donor] = -(-count_K[donor] // parts) if parts < count_K[donor] else 0
    mine = np.flatnonzero(given_K[label_N])
    mine = mine[first_of_each(label_N[mine], given_K, random_of(mine + points.lo, seed, 2))]
    ids, of = points.all_concat(mine + points.lo), points.all_concat(label_N[mine])
    return empty[np.argsort(donors, kind="stable")], ids[first_of_each(of, given_K, random_of(ids, seed, 2))]


def check_centroids(init_KD, points, k):
    """init_KD as a finite numpy matrix that fits the points; ValueError says what is wrong."""
    init_KD = init_KD.detach().cpu().double().numpy() if isinstance(init_KD, torch.Tensor) else np.asarray(init_KD)
    if init_KD.ndim != 2 or init_KD.shape[1] != points.d or k not in (None, len(init_KD)):
        raise ValueError(f"init_KD: shape {init_KD.shape} does not fit k={k} and features of {points.d} channels")
    if not 1 <= len(init_KD) <= points.n:
        raise ValueError(f"init_KD: {len(init_KD)} centroids, want 1 to {points.n}, the number of points")
    if not np.isfinite(init_KD).all():
        raise ValueError("init_KD holds NaN or infinity")
    return init_KD


def kmeans(x_ND, k=None, init_KD=None, n_iter=10, seed=0):
    """k-means by Lloyd's algorithm: (centroids_KD float32, assign_N int64), numpy for numpy in, torch for torch in.

    x_ND: numpy, memmap, torch or tensorstore [N, D]. Starts from `init_KD` if given, otherwise from k D^2 seeds.
    n_iter times: assign, then move each centroid to its points' mean (an empty cluster restarts at a random member of
    the largest). `assign_N` belongs to the *returned* centroids (one more pass, as scikit-learn's labels_ do); n_iter=0
    only assigns. Of equally near centroids the lowest wins. Under torch.distributed every rank passes the same x and
    gets the whole result. ValueError for NaN or infinity, k > N, or an init_KD of other width or count.
    """
    points = Points(x_ND)
    if init_KD is None and k is None:
        raise ValueError("kmeans: give k, the number of clusters, or init_KD, their first centroids")
    if n_iter < 0:
        raise ValueError(f"n_iter={n_iter}: want 0 or more")
    if init_KD is None:
        c_KD = seed_centroids(points, k, seed)
    else:
        init_KD = check_centroids(init_KD, points, k)
        c_KD = points.centre(init_KD.astype(np.float32) if n_iter == 0 else init_KD)
    c_KD, label_N = lloyd(points, c_KD, n_iter, seed)
    c_KD, label_N = points.uncentre(c_KD), points.all_concat(label_N.cpu().numpy())
    if isinstance(x_ND, torch.Tensor):
        return torch.from_numpy(c_KD).to(x_ND.device), torch.from_numpy(label_N).to(x_ND.device)
    return c_KD, label_N


# ---- hierarchy ----


def check_levels(n, levels, keep):
    """Raises ValueError unless N >= levels[0] > levels[1] > ... >= 1 and 1 <= keep <= N."""
    levels = [] if levels is None else list(levels)
    if not levels or levels != sorted(set(levels), reverse=True) or levels[-1] < 1:
        raise ValueError(f"levels {levels}: want decreasing numbers of clusters, for instance 20000 500 50")
    if levels[0] > n:
        raise ValueError(f"levels {levels}: {levels[0]} clusters of {n} points; the first level must have at most {n}")
    if not 1 <= keep <= n:
        raise ValueError(f"keep={keep}: want 1 <= keep <= {n}, the number of points")


def even_shares(budget, size_M, seed=0):
    """Split a budget over groups as evenly as their sizes allow; what a small group cannot take goes to the others.
    The shares are min(size, w) for the largest whole w that the budget allows; the seed picks who gets the rest.
    """
    size_M = np.asarray(size_M, np.int64)
    budget, order = min(int(budget), int(size_M.sum())), np.sort(size_M)
    filled = np.cumsum(order) + order * np.arange(len(order) - 1, -1, -1)  # the total at w = order[i]
    i = int(np.searchsorted(filled, budget, side="left"))
    level = (budget - int(order[:i].sum())) // max(len(order) - i, 1)
    share_M = np.minimum(size_M, level)
    room = np.flatnonzero(size_M > level)
    share_M[room[np.argsort(random_of(room, seed, 3))[: budget - int(share_M.sum())]]] += 1
    return share_M


def nearest_members(points, c_KD, label_N, r):
    """Ids of the r points nearest to each centroid (all of a smaller cluster), sorted."""
    d2_N, label_N = points.squared_distances(c_KD, label_N), label_N.cpu().numpy()
    mine = first_of_each(label_N, r, d2_N)
    ids, d2_M, of_M = (points.all_concat(a) for a in (mine + points.lo, d2_N[mine], label_N[mine]))
    return np.sort(ids[first_of_each(of_M, r, ids, d2_M)])


def cluster_in_cells(points, k, config, seed):
    """k clusters by k-means into sqrt(k) coarse cells, then k-means inside each: 2 N sqrt(k) products, not N k.
    Returns what `lloyd` does; a point's centroid is the nearest within its cell. Every cell gets the same number of
    clusters if it has enough points, as in the paper's first level (100k cells of 100 clusters). Ranks divide the cells
    among themselves; the points of one cell must fit in memory.
    """
    coarse = round(k**0.5)
    _, label_N = lloyd(points, seed_centroids(points, coarse, seed), config.iterations, seed)
    label_N = points.all_concat(label_N.cpu().numpy())
    order, size = np.argsort(label_N, kind="stable"), np.bincount(label_N, minlength=coarse)
    cells, quota = np.split(order, np.cumsum(size)[:-1]), even_shares(k, size, seed)
    mine = {}
    for cell in range(points.rank, coarse, points.ranks):
        if quota[cell]:  # 0 only for a cell without points
            members = points.subset(cells[cell], alone=True)
            c_MD, label_M = lloyd(members, seed_centroids(members, quota[cell], seed), config.iterations, seed)
            mine[cell] = members.uncentre(c_MD), label_M.cpu().numpy()
    split = {cell: result for of_rank in points.all_gather(mine) for cell, result in of_rank.items()}
    first = np.cumsum(quota) - quota
    for cell, (_, label_M) in split.items():
        label_N[cells[cell]] = first[cell] + label_M
    c_KD = points.centre(np.concatenate([split[cell][0] for cell in sorted(split)]))
    return c_KD, torch.from_numpy(label_N[points.lo : points.hi]).to(points.device)


def cluster_points(points, k, config, seed, log=lambda line: None):
    """One level of the hierarchy: k-means, then resampling. Returns centred centroids and this rank's labels.
    Each resampling draws new D^2 seeds from its pool (starting from the old centroids, or at random, loses most of the
    gain). A level made in two steps is not resampled: equal quotas for its cells already even out some of the density.
    """
    if k > config.split_above:
        return cluster_in_cells(points, k, config, seed)
    c_KD, label_N = lloyd(points, seed_centroids(points, k, seed), config.iterations, seed)
    r = max(2, min(config.nearest, int(config.share * points.n / k)))
    for step in range(config.resamplings):
        ids = nearest_members(points, c_KD, label_N, r)
        if len(ids) < k:  # duplicates left clusters empty, and so would this pool
            log(f"resampling {step}: {len(ids)} points for {k} clusters, stopped")
            break
        pool = points.subset(ids)
        c_MD, _ = lloyd(pool, seed_centroids(pool, k, seed + step + 1), config.iterations, seed)
        c_KD, label_N = lloyd(points, points.centre(pool.uncentre(c_MD)), 0)
    return c_KD, label_N


def build_tree(points, config, folder=None, log=lambda line: None, tree_hash=""):
    """The tree, bottom-up: for each level its centroids [K, D] float32 and the parent of each node below (int64).
    With a folder, each finished level is written there, and a later run with the same tree_hash reads it.
    """
    tree = []
    for depth, k in enumerate(config.levels):
        path = folder and folder / f"level{depth + 1}.npz"
        if path and path.exists():
            with one_line_errors(path), np.load(path) as saved:
                if str(saved["tree"]) != tree_hash:
                    raise ValueError("a level of another tree: remove it, and it is made anew")
                tree.append({name: saved[name] for name in ("centroids", "parent", "inertia")})
            log(f"level {depth + 1}: {k} clusters, read from {path.name}")
        else:
            began = time.perf_counter()
            nodes = points if depth == 0 else Points(tree[-1]["centroids"], points.device, f"level {depth}")
            c_KD, label_N = cluster_points(nodes, k, config, config.seed + 1000 * depth, log)
            d2_N = nodes.all_concat(nodes.squared_distances(c_KD, label_N))  # in id order: the same mean for any ranks
            parent, inertia = nodes.all_concat(label_N.cpu().numpy()), d2_N.mean(dtype=np.float64)
            tree.append({"centroids": nodes.uncentre(c_KD), "parent": parent, "inertia": inertia})
            if path and points.rank == 0:
                write_atomically(path, lambda file, level=tree[-1]: np.savez(file, **level, tree=tree_hash))
            about = f"{k} clusters of {nodes.n}, mean d^2 {inertia:.5g}, {time.perf_counter() - began:.1f} s"
            log(f"level {depth + 1}: {about}")
        if points.shared:
            dist.barrier()
    return tree


# ---- sampling ----


def clusters_of_points(tree):
    """For each level from the points up: the cluster of every point, int64 [N], and how many clusters there are."""
    cluster_N = np.arange(len(tree[0]["parent"]))
    for level in tree:
        cluster_N = level["parent"][cluster_N]
        yield cluster_N, len(level["centroids"])


def sample(tree, keep, seed=0):
    """Balanced hierarchical sampling: sorted ids int64 of exactly `keep` points.
    From the top down a node splits its budget evenly over its children (`even_shares`); a leaf draws at random.
    """
    sizes = [np.bincount(cluster_N, minlength=k) for cluster_N, k in clusters_of_points(tree)]
    quota = even_shares(keep, sizes[-1], seed)
    for depth in range(len(tree) - 1, 0, -1):
        parent, below = tree[depth]["parent"], np.zeros(len(sizes[depth - 1]), np.int64)
        order, ends = np.argsort(parent, kind="stable"), np.cumsum(np.bincount(parent, minlength=len(quota)))
        for node, children in enumerate(np.split(order, ends[:-1])):
            below[children] = even_shares(quota[node], sizes[depth - 1][children], seed + node)
        quota = below
    leaf_N = tree[0]["parent"]
    return np.sort(first_of_each(leaf_N, quota, random_of(np.arange(len(leaf_N)), seed, 4)))


def curate(x_ND, levels, keep, seed=0):
    """The whole pipeline in memory: sorted int64 ids (numpy) of `keep` rows of x_ND, balanced over its clusters.
    x_ND: as for `kmeans`. levels: clusters per level, from the points up, decreasing. Raises ValueError for bad input.
    """
    points = Points(x_ND)
    check_levels(points.n, levels, keep)
    return sample(build_tree(points, Config(levels=list(levels), keep=keep, seed=seed)), keep, seed)


# ---- command ----


def entropy(count_K):
    """Of a histogram, over the log of its number of bins: 1 is uniform."""
    p = count_K[count_K > 0] / count_K.sum()
    return float((p * np.log(1 / p)).sum() / np.log(len(count_K))) if len(count_K) > 1 else 1.0


def report(tree, kept, config):
    """What was balanced, by level: sizes, inertia, and the entropy of cluster membership before and after."""
    levels = []
    for (cluster_N, k), level in zip(clusters_of_points(tree), tree, strict=True):
        size, after = np.bincount(cluster_N, minlength=k), np.bincount(cluster_N[kept], minlength=k)
        about = {"clusters": k, "empty": int((size == 0).sum()), "mean_squared_distance": float(level["inertia"])}
        for name, n_K in (("points", size), ("kept", after)):
            about[f"{name}_min_median_max"] = [int(n_K.min()), float(np.median(n_K)), int(n_K.max())]
        levels.append(about | {"entropy_before": entropy(size), "entropy_after": entropy(after)})
    return {"points": len(tree[0]["parent"]), "kept": len(kept), "config": asdict(config), "levels": levels}


def contact_sheet(tree, kept, read_images, path, clusters=8):
    """A PNG of the top level's largest and smallest clusters: a row each, kept images framed, then a few left out.
    The bars beside a row are the cluster's share of the pool (grey) and of the subset (green). read_images(rows) gives
    uint8 [H, W, 3] each, or None for one that cannot be read: its square stays empty. Returns how many those are.
    """
    *_, (cluster_N, n_clusters) = clusters_of_points(tree)
    is_kept = np.isin(np.arange(len(cluster_N)), kept)
    size, n_kept = (np.bincount(c, minlength=n_clusters) for c in (cluster_N, cluster_N[kept]))
    order = np.argsort(-size, kind="stable")[: (size > 0).sum()]
    shown = order if len(order) <= 2 * clusters else np.r_[order[:clusters], order[-clusters:]]
    bars, rows = np.stack([size / size.sum(), n_kept / n_kept.sum()], 1), []
    for k in shown:
        at = choose_pictures(np.flatnonzero(cluster_N == k), is_kept)
        rows.append((f"{n_kept[k]} of {size[k]}", bars[k] / bars.max(), read_images(at), is_kept[at]))
    of = f"{len(kept)} of {len(cluster_N)} images kept (framed)"
    sheet = cluster_sheet(f"{of}; of {len(order)} clusters the largest and the smallest", rows)
    write_atomically(path, lambda file: sheet.save(file, "PNG"))
    return sum(image is None for _, _, images, _ in rows for image in images)


def choose_pictures(members, is_kept):
    """Points of a cluster to show: kept ones first, then some left out, in a third of the places if enough."""
    members = members[np.lexsort((random_of(members, 5), ~is_kept[members]))]
    inside, outside = np.split(members, [int(is_kept[members].sum())])
    return np.r_[inside[: ACROSS - min(len(outside), ACROSS // 3)], outside][:ACROSS]


def load_features(config):
    """(ids int64 [N], features [N, D], read_images of `contact_sheet` or None where there are no images)."""
    path = Path(config.features)
    if path.is_dir() and (path / "cache.json").exists():
        about = data.Cache(path, images := config.images and [config.images]).about  # others: an error before the work
        ids, x_ND = data.open_summaries(path, config.teacher or next(iter(about["teachers"]), None))
        show = lambda rows: data.thumbnails(path, ids[rows], images)  # noqa: E731
        return ids, x_ND, show if about["pixels"] or images else None
    if path.suffix != ".npy" or not path.is_file():
        raise ValueError(f"--features {path}: want a cache folder (with cache.json) or an .npy file, and it is neither")
    with one_line_errors(path):
        x_ND = np.load(path, mmap_mode="r")
        if x_ND.ndim != 2 or not x_ND.size or x_ND.dtype.kind not in "fiu":
            raise ValueError(f"no matrix [N, D] of numbers, but {x_ND.dtype} {list(x_ND.shape)}")
    if not config.images:
        return np.arange(len(x_ND)), x_ND, None
    sources = find_sources(config.images)
    if len(sources) != len(x_ND):
        raise ValueError(f"--images {config.images}: {len(sources)} images for {len(x_ND)} rows of {path}")
    return np.arange(len(x_ND)), x_ND, lambda rows: [read_thumbnail(sources[row]) for row in rows]


def read_thumbnail(source):
    """A small picture of a source, uint8 [H, W, 3], or None if it cannot be read."""
    with contextlib.suppress(ValueError):
        return load_image(source, max_tokens=64, draft=True).numpy()


def check_same_tree(out, points, config):
    """Make the folder; ValueError if it holds the tree of other features or flags. Another --keep may reuse it.
    Returns the hash of what the tree is made of; its levels carry it.
    """
    about = {k: v for k, v in asdict(config).items() if k not in ("keep", "device", "images", "out", "features")}
    about |= {"points": points.n, "channels": points.d, "hash": points.hash_rows()}
    about = json.loads(json.dumps(about))  # as JSON gives it back
    if points.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "tree.json").exists():
            write_json(out / "tree.json", about)
    if points.shared:
        dist.barrier()
    with one_line_errors(out / "tree.json"):
        before = dict(json.loads((out / "tree.json").read_bytes()))
    if differ := {k: (before.get(k), about.get(k)) for k in before | about if before.get(k) != about.get(k)}:
        raise ValueError(f"--out {out} holds the tree of another run, (then, now): {differ}; choose another folder")
    return digest(json.dumps(about, sort_keys=True).encode())


def run(config):
    """The command: features in, DIR/kept.npy, level*.npz, report.json and clusters.png out."""
    ids, x_ND, read_images = load_features(config)
    check_levels(len(x_ND), config.levels, config.keep)
    device = choose_device(config.device)
    points = Points(x_ND, device, config.features)
    log = print if points.rank == 0 else lambda line: None
    shape, how = f"{points.n} points of {points.d} channels", PRODUCTS[product_for(points.device)]
    log(f"{shape}, {points.ranks} rank(s), {device}: {how}")
    tree_hash = check_same_tree(Path(config.out), points, config)
    tree = build_tree(points, config, Path(config.out), log, tree_hash)
    if points.rank == 0:
        write_results(tree, sample(tree, config.keep, config.seed), ids, read_images, config, log)


def write_results(tree, kept, ids, read_images, config, log):
    out, about = Path(config.out), report(tree, kept, config)
    write_atomically(out / "kept.npy", lambda file: np.save(file, np.sort(ids[kept]).astype(np.int64)))
    write_json(out / "report.json", about)
    if read_images is None:
        log("no contact sheet: an .npy, or a cache without pixels, has pictures where --images names their folder")
    elif unreadable := contact_sheet(tree, kept, read_images, out / "clusters.png"):
        log(f"{unreadable} pictures of the contact sheet cannot be read: their squares are empty")
    for level in about["levels"]:
        log(f"{level['clusters']} clusters: entropy {level['entropy_before']:.3f} -> {level['entropy_after']:.3f}")
    log(f"kept {len(kept)} of {about['points']} in {out / 'kept.npy'}")


def main(argv=None):
    parser = Parser(prog="curate.py", description="balanced subset by hierarchical k-means")
    for f in fields(Config):
        how = {"help": f.metadata["help"], "default": f.default, "required": "(required)" in f.metadata["help"]}
        if f.metadata["allowed"]:
            how["type"] = in_range(f.type if f.type is float else int, *f.metadata["allowed"])
        parser.add_argument("--" + f.name.replace("_", "-"), nargs="+" if f.name == "levels" else None, **how)
    config = Config(**vars(parser.parse_args(argv)))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # ranks wait for as long as a level may take
    try:
        run(config)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_command("curate.py", main, "what is finished stays, the same command goes on from there")
