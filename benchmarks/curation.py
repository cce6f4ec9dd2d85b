"""Measures k-means and curation beside their peers: `python -m benchmarks.curation [--only PART ...]`.

Each part replaces its figures in curation.json, of which `python -m benchmarks.tables` makes docs/curation.md's tables.
Figures are CPU seconds of all threads, because the machine may be shared, and ratios of ways that take turns. Peers are
measured if installed (`pip install faiss-cpu scikit-learn superkmeans`; nothing else uses them).
"""

import curate
import kernels.kmeans
from benchmarks.measure import ROOT, in_turns, machine, ratios, record, timed

# isort: split
import argparse
import functools
import importlib.util
import time
from statistics import median
from unittest import mock

import numpy as np
import torch

# ---- speed ----


WAYS = {"curate.kmeans": "curate", "curate.kmeans, float32 products only": "curate", "faiss-cpu": "faiss"}
WAYS |= {"scikit-learn": "sklearn.cluster", "SuperKMeans": "superkmeans"}  # each beside the module it needs


def centroids_by(name, x, init, n_iter):
    """Lloyd from one start, by one of WAYS."""
    module, k = importlib.import_module(WAYS[name]), len(init)
    if name == "faiss-cpu":
        kmeans = module.Kmeans(x.shape[1], k, niter=n_iter, max_points_per_centroid=10**9)
        kmeans.train(x, init_centroids=init)
        return kmeans.centroids
    if name == "SuperKMeans":  # from random points of its own choice
        plain = {"hierarchical": False, "sampling_fraction": 1.0, "early_termination": False, "tol": 0.0}
        plain |= {"iters": n_iter, "max_points_per_cluster": 10**9, "n_threads": torch.get_num_threads()}
        return module.SuperKMeans(k, x.shape[1], **plain).train(x)
    if name == "scikit-learn":
        kmeans = module.KMeans(k, init=init, n_init=1, max_iter=n_iter, tol=0, algorithm="lloyd")
        return kmeans.fit(x).cluster_centers_
    product = "float32" if name.endswith("only") else kernels.kmeans.product_for(torch.device("cpu"))
    with mock.patch.object(kernels.kmeans, "product_for", lambda device: product):
        return curate.kmeans(x, init_KD=init, n_iter=n_iter)[0]


def inertia(x, c):
    """Mean squared distance to the nearest centroid, in float64 by differences."""
    _, label = curate.kmeans(x, init_KD=c, n_iter=0)
    return float(((x.astype(np.float64) - c[label]) ** 2).sum(1).mean())


def speed(n, d, k, kind, n_iter=10, repeats=3):
    """CPU seconds of n_iter iterations over those of n_iter bare products x @ c.T; inertia from one start."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, d), dtype=np.float32)
    if kind == "mixture":
        x += rng.standard_normal((50, d), dtype=np.float32)[rng.integers(0, 50, n)]
    if kind == "Zipf":
        p = 1 / np.arange(1, 2001)
        x += rng.standard_normal((2000, d), dtype=np.float32)[rng.choice(2000, n, p=p / p.sum())]
    init, centroids = x[rng.choice(n, k, replace=False)], {}
    x_ND, c_KD = torch.from_numpy(x), torch.from_numpy(init)

    def run(name):
        centroids[name] = centroids_by(name, x, init, n_iter)

    found = [name for name in WAYS if importlib.util.find_spec(WAYS[name].split(".")[0])]
    print(
        f"{n} x {d}, K = {k}, {kind}; not installed, left out: {', '.join(WAYS.keys() - found) or 'none'}", flush=True
    )
    ways = {"product": lambda: x_ND @ c_KD.T} | {name: functools.partial(run, name) for name in found}
    seconds = in_turns(ways, repeats, time.process_time)
    product = seconds.pop("product")
    times = {name: [t / n_iter for t in ratios(taken, product)] for name, taken in seconds.items()}
    return {
        "data": f"{n // 1000}k x {d}, K = {k}, {kind}",
        "gemm_cpu_s": median(product),
        "seeding_over_gemm": timed(lambda: curate.kmeans(x, k=k, n_iter=0), time.process_time) / median(product),
        "ratio_to_gemm": {
            name: {"median": median(t), "all": t, "inertia": inertia(x, centroids[name])} for name, t in times.items()
        },
    }


# ---- balance ----


def zipf(distance, seed, n=50_000, groups=50, d=64):
    """Gaussian clusters of unit variance, centres ~ N(0, distance^2), sizes ~ rank^-1.5."""
    rng = np.random.default_rng(seed)
    p = np.arange(1, groups + 1) ** -1.5
    y = rng.choice(groups, n, p=p / p.sum())
    centre = rng.standard_normal((groups, d)) * distance
    return (centre[y] + rng.standard_normal((n, d))).astype(np.float32), y


TREES = {  # levels, resamplings
    "curate": ((1000, 100), 10),
    "no resampling": ((1000, 100), 0),
    "flat k-means, 1000 clusters": ((1000,), 0),
    "random": None,
}


def keep(how, x, seed, n=2000):
    """Indices of n points, by a tree of these (levels, resamplings), or random ones."""
    if how is None:
        return np.random.default_rng(seed).choice(len(x), n, replace=False)
    config = curate.Config(levels=how[0], resamplings=how[1], seed=seed)
    return curate.sample(curate.build_tree(curate.Points(x), config), n, seed)


def balance(distance):
    """Normalised entropy of 2000 kept points over the 50 true clusters, and CPU seconds, of five seeds."""
    ways = {name: {"entropy": [], "cpu_s": []} for name in TREES}
    for seed in range(5):
        x, y = zipf(distance, seed)
        for name, how in TREES.items():
            began = time.process_time()
            kept = keep(how, x, seed)
            ways[name]["cpu_s"].append(time.process_time() - began)
            ways[name]["entropy"].append(curate.entropy(np.bincount(y[kept], minlength=50)))
    return {"ways": ways}


# ---- command line ----


PARTS = {
    "speed, K = 1000, Gaussian": lambda: speed(100_000, 384, 1000, "Gaussian"),
    "speed, K = 1000, mixture": lambda: speed(100_000, 384, 1000, "mixture"),
    "speed, K = 4096, Gaussian": lambda: speed(200_000, 256, 4096, "Gaussian", repeats=2),
    "speed, K = 4096, mixture": lambda: speed(200_000, 256, 4096, "mixture", repeats=2),
    "speed, K = 1000, Zipf": lambda: speed(100_000, 384, 1000, "Zipf", repeats=2),
    "speed, K = 4096, Zipf": lambda: speed(100_000, 384, 4096, "Zipf", repeats=2),
    "balance 1.0": lambda: balance(1.0),
    "balance 0.5": lambda: balance(0.5),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART", help=", ".join(PARTS))
    for name in parser.parse_args().only:
        result = PARTS[name]() | machine()
        print(name, result, flush=True)
        record(ROOT / "benchmarks", "curation.json", name, result)


if __name__ == "__main__":
    main()
