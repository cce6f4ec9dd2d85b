"""Measures k-means and curation beside their peers: `python -m benchmarks.curation [--only PART ...]`.

Each part replaces its figures in curation.json, of which `python -m benchmarks.tables` makes docs/curation.md's tables.
Figures are CPU seconds of all threads, because the machine may be shared, and ratios of ways that take turns. Peers are
measured if installed (`pip install faiss-cpu scikit-learn superkmeans`; nothing else uses them).
"""

import curate
import kernels.kmeans
from benchmarks.measure import ROOT, in_turns, machine, record, timed

# isort: split
import argparse
import functools
import importlib
import time
from importlib.util import find_spec
from statistics import median
from unittest import mock

import numpy as np
import torch

WAYS = {"curate.kmeans": "curate", "curate.kmeans, float32 products only": "curate", "faiss-cpu": "faiss"}
WAYS |= {"scikit-learn": "sklearn.cluster", "SuperKMeans": "superkmeans"}  # each beside the module it needs
KINDS = {"Gaussian": (1, 0.0, 0.0), "mixture": (50, 0.0, 1.0), "Zipf": (2000, 1.0, 1.0)}  # groups, power, distance
TREES = {  # levels, resamplings
    "curate": ((1000, 100), 10),
    "no resampling": ((1000, 100), 0),
    "flat k-means, 1000 clusters": ((1000,), 0),
    "random": None,
}


def clusters(n, d, groups, power, distance, seed):
    """Gaussian clusters [n, d] of unit variance, centres ~ N(0, distance^2), sizes ~ rank^-power; a point's cluster."""
    rng = np.random.default_rng(seed)
    p = np.arange(1, groups + 1) ** -power
    label = rng.choice(groups, n, p=p / p.sum())
    centre = rng.standard_normal((groups, d)) * distance
    return (centre[label] + rng.standard_normal((n, d))).astype(np.float32), label


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


def speed(n, d, k, kind, n_iter=10, repeats=2):
    """CPU seconds of n_iter iterations over those of n_iter bare products x @ c.T; from one start, the mean squared
    distance to the nearest centroid (in float64, by differences)."""
    x, _ = clusters(n, d, *KINDS[kind], seed=0)
    init = x[np.random.default_rng(0).choice(n, k, replace=False)]
    x_ND, c_KD = torch.from_numpy(x), torch.from_numpy(init)
    found = [name for name, module in WAYS.items() if find_spec(module.split(".")[0])]
    ways = {name: functools.partial(centroids_by, name, x, init, n_iter) for name in found}
    seconds, result = in_turns({"product": lambda: x_ND @ c_KD.T} | ways, repeats, time.process_time), {}
    product = seconds.pop("product")
    for name, taken in seconds.items():
        times, c = [t / p / n_iter for t, p in zip(taken, product, strict=True)], ways[name]()
        nearest = c[curate.kmeans(x, init_KD=c, n_iter=0)[1]]
        inertia = float(((x.astype(np.float64) - nearest) ** 2).sum(1).mean())
        result[name] = {"median": median(times), "all": times, "inertia": inertia}
    seeding = timed(lambda: curate.kmeans(x, k=k, n_iter=0), time.process_time)
    return {
        "data": f"{n // 1000}k x {d}, K = {k}, {kind}",
        "gemm_cpu_s": median(product),
        "seeding_over_gemm": seeding / median(product),
        "ratio_to_gemm": result,
    }


def balance(distance):
    """Normalised entropy of 2000 kept points over the 50 true clusters, and CPU seconds, of five seeds."""
    ways = {name: {"entropy": [], "cpu_s": []} for name in TREES}
    for seed in range(5):
        x, label = clusters(50_000, 64, 50, 1.5, distance, seed)
        for name, how in TREES.items():
            began, kept = time.process_time(), slice(2000)  # points are in no order
            if how is not None:
                config = curate.Config(levels=how[0], resamplings=how[1], seed=seed)
                kept = curate.sample(curate.build_tree(curate.Points(x), config), 2000, seed)
            ways[name]["cpu_s"].append(time.process_time() - began)
            ways[name]["entropy"].append(curate.entropy(np.bincount(label[kept], minlength=50)))
    return {"ways": ways}


PARTS = {
    "speed, K = 1000, Gaussian": lambda: speed(100_000, 384, 1000, "Gaussian", repeats=3),
    "speed, K = 1000, mixture": lambda: speed(100_000, 384, 1000, "mixture", repeats=3),
    "speed, K = 4096, Gaussian": lambda: speed(200_000, 256, 4096, "Gaussian"),
    "speed, K = 4096, mixture": lambda: speed(200_000, 256, 4096, "mixture"),
    "speed, K = 1000, Zipf": lambda: speed(100_000, 384, 1000, "Zipf"),
    "speed, K = 4096, Zipf": lambda: speed(100_000, 384, 4096, "Zipf"),
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
