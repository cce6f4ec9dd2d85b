"""Seeds of k-means, drawn with probability ~ D^2, the squared distance to the seeds before (k-means++).

`draw_seeds_greedily` draws them one at a time; `draw_seeds` draws many at a time, for k too large for that. Points come
as curate.Points: centred rows by id, in blocks, over any number of ranks.

Shape letters: N points (or this rank's), K centroids, D channels, B points of a block, M points of a selection.
"""

from contextlib import contextmanager

import numpy as np
import torch

from kernels.kmeans import top3

GREEDY_UP_TO = 1 << 20  # points times clusters for which greedy seeding is affordable


@contextmanager
def single_threaded():
    """Torch's own threads off, as a `with` or a decorator: `Points.each_block` runs one Python thread per core instead.
    (GEMM and numpy release the GIL. OpenMP's threads, which spin while one of them works alone, cost 1.3x the CPU time,
    and on small problems beside another busy process 30x.)
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_of(ids, *salt):
    """A float64 in (0, 1) for each id: splitmix64 of (salt, id), so it depends on the id and on no order."""
    with np.errstate(over="ignore"):
        z = np.zeros(1, np.uint64)
        for value in (*(np.uint64(s) for s in salt), np.asarray(ids).astype(np.uint64)):
            z = (z ^ value) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(11)) + 0.5) * 2.0**-53


def draw_seeds_greedily(points, k, seed):
    """Greedy k-means++: of 2 + ln k candidates ~ D^2, each time the one that lowers the sum of D^2 most.
    Sequential, and 2 + ln k times the products, so for small problems only: the upper levels of a hierarchy, where each
    seed counts (docs/curation.md says how much). Every rank computes the same.
    """
    x_ND = points.rows(slice(0, points.n)).cpu().double()
    ids_N, tries = np.arange(points.n), np.arange(2 + int(np.log(k)))
    chosen = [int(random_of(ids_N, seed, 0).argmin())]
    square_N = x_ND.square().sum(1)
    d2_N = (x_ND - x_ND[chosen[0]]).square_().sum(1)
    while len(chosen) < k and d2_N.any():
        total_N = d2_N.cumsum(0)
        draw_M = torch.from_numpy(random_of(tries, seed, len(chosen), 6)) * total_N[-1]
        draw_M = torch.searchsorted(total_N, draw_M).clamp_(max=points.n - 1)
        d2_MN = square_N[draw_M, None] + square_N - 2 * (x_ND[draw_M] @ x_ND.T)
        d2_MN[d2_MN < 1e-12 * (square_N[draw_M, None] + square_N)] = 0  # float64's rounding, and what it made of zeros
        d2_MN = d2_MN.minimum(d2_N)
        best = int(d2_MN.sum(1).argmin())
        d2_N, chosen = d2_MN[best], [*chosen, int(draw_M[best])]
    return np.array(chosen)


@single_threaded()
def draw_seeds(points, k, seed):
    """k-means++ (Arthur & Vassilvitskii, 2007): each seed is drawn with probability ~ D^2, its squared distance to the
    seeds before it. Returns distinct ids int64 [k], fewer if all other points coincide with these.

    Drawn one at a time that takes k passes over the data. Here candidates are drawn many at a time from the D^2 of the
    round's start, and one is accepted with probability (its D^2 now) / (its D^2 at the start): rejection sampling, so
    what is accepted follows the distribution of the moment. That costs one GEMM's worth of products in about log2(k) +
    k/1024 rounds. (Deviation: a candidate refused in a round cannot come up again in that round.)
    """
    if points.n * k <= GREEDY_UP_TO:
        return draw_seeds_greedily(points, k, seed)
    ids_N = np.arange(points.lo, points.hi)
    best = random_of(ids_N, seed, 0).argsort()[:1]  # none where a rank has no points
    best = points.all_concat(ids_N[best])
    chosen = new = [int(best[random_of(best, seed, 0).argmin()])]
    d2_N, round_ = np.full(len(ids_N), np.inf), 0
    while len(chosen) < k and new:
        round_ += 1
        lower_squared_distances(points, d2_N, new)
        at_most = min(max(16, 2 * len(chosen)), 1024, 2 * (k - len(chosen)) + 16)
        new = draw_by_rejection(points, d2_N, at_most, seed, round_)[: k - len(chosen)]
        chosen = chosen + new
    return np.array(chosen)


def lower_squared_distances(points, d2_N, new):
    """Lower this rank's D^2, in place, by new seeds."""
    c_MD = points.rows(np.array(new))
    square_M = c_MD.square().sum(1)

    def lower_block(block):
        x_BD, square_B = points.own_rows(block), points.norm_N[block].square()
        label_B2, score_B3 = top3(x_BD, c_MD, -square_M / 2)
        label_B, d2_B = label_B2[:, 0], square_B - 2 * score_B3[:, 0]
        close = (d2_B < 2.0**-6 * (square_B + square_M[label_B])).nonzero()[:, 0]  # cancellation: take differences
        if len(close):
            d2_B[close] = (x_BD[close] - c_MD[label_B[close]]).square_().sum(1)
        d2_N[block] = np.minimum(d2_N[block], d2_B.cpu().numpy())

    points.each_block(lower_block)


def draw_by_rejection(points, d2_N, at_most, seed, round_):
    """Draw candidates ~ D^2 without replacement, over all ranks, and list the ids of those accepted.
    The draw keeps the smallest -log(u) / D^2 (Efraimidis & Spirakis, 2006), which depends on no order and no rank.
    """
    ids_N = np.arange(points.lo, points.hi)
    with np.errstate(divide="ignore"):
        key_N = -np.log(random_of(ids_N, seed, round_)) / d2_N  # infinite where D^2 is 0
    top = np.argpartition(key_N, at_most - 1)[:at_most] if at_most < len(key_N) else np.arange(len(key_N))
    top = top[np.isfinite(key_N[top])]
    key_M, id_M, d2_M = (points.all_concat(a) for a in (key_N[top], ids_N[top], d2_N[top]))
    order = np.lexsort((id_M, key_M))[:at_most]
    id_M, d2_M, accepted = id_M[order], d2_M[order], []
    x_MD, now_M, random_M = points.rows(id_M), d2_M.copy(), random_of(id_M, seed, round_, 1)
    for i in range(len(id_M)):
        if random_M[i] * d2_M[i] < now_M[i]:
            accepted.append(int(id_M[i]))
            now_M = np.minimum(now_M, (x_MD - x_MD[i]).square_().sum(1).cpu().numpy())
    return accepted
