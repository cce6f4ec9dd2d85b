"""k-means on matrices larger than memory: exact assignments, exact sums, the same bits for any number of ranks.

    centroids_KD, label_N = kmeans(x_ND, k=1000)

Reads bottom-up: points, seeding, Lloyd; what finds the nearest centroid is in kernels/kmeans.py. Three ideas carry it.

- `Points` is the only way to the data: read in blocks, centred, summed without rounding.
- `Nearest` proves each assignment by the cheapest arithmetic that can: bfloat16 products rule out groups of centroids,
  float32 decides within what is left, float64 within the near ties. What a pass learned holds, less the centroids'
  steps, in the next pass: whole groups are never looked at again, and a point that cannot move is not read.
- `seeds` draws k-means++'s seeds many at a time.

Nothing here depends on how many processes share the work: points live in fixed blocks and a rank owns whole blocks,
labels are those of float64, sums are exact, random numbers are a hash of (seed, id).

Shape letters: N points, K centroids, D channels, G groups of S centroids, B points of a block, M points of a selection.
"""

import heapq
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count

import numpy as np
import torch
import torch.distributed as dist

from kernels.kmeans import GROUPS, Nearest, group, product_for, top3

BLOCK = 8192  # points; ranks own whole blocks, so a block's arithmetic is the same for any number of ranks
GREEDY_UP_TO = 1 << 20  # points times clusters for which greedy seeding is affordable


@contextmanager
def single_threaded():
    """Within it (or in a function it decorates) torch leaves all threading to `Points.each_block`.

    GEMM and numpy release the GIL, so one Python thread a core does; OpenMP's threads, which spin while one of them
    works alone, cost 1.3x the CPU time, and on small problems beside another busy process 30x.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        self.threads = torch.get_num_threads()
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
        """[work(lo, hi)] of this rank's blocks in order, on one Python thread a core."""
        step = BLOCK if self.device.type == "cpu" else 8 * BLOCK
        blocks = [(lo, min(lo + step, self.hi)) for lo in range(self.lo, self.hi, step)]
        with single_threaded():
            if self.threads == 1 or len(blocks) < 2 or self.device.type == "cuda":
                return [work(lo, hi) for lo, hi in blocks]
            first = work(*blocks[0])  # on this thread, so that libraries set themselves up in one place
            with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return [first, *pool.map(lambda block: work(*block), blocks[1:])]

    def own_distance2(self, c_KD, label_N):
        """This rank's squared distances to the own centroid, float32 numpy, by differences: no cancellation."""

        def work(lo, hi):
            at = slice(lo - self.lo, hi - self.lo)
            return (self.rows(slice(lo, hi)) - c_KD[label_N[at]]).square_().sum(1).cpu().numpy()

        return np.concatenate([np.zeros(0, np.float32), *self.each_block(work)])


# ------------------------------------------------------------------------------------------------------------- seeding


@single_threaded()
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


@single_threaded()
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
        step_K = (new_KD.double() - c_KD.double()).norm(dim=1).float() * (1 + 1e-6) + 2.0**-22 * extent
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
