"""Measures k-means and curation beside their peers: `python -m benchmarks.curation [--only PART ...]`.

Each part replaces its figures in curation.json, of which `python -m benchmarks.tables` makes docs/curation.md's tables.
CPU seconds (all threads), because the machine may be shared; every ratio is of runs that alternate in one process.
Peers are measured if installed (`pip install faiss-cpu scikit-learn superkmeans`; nothing else uses them).
"""

import curate
import kernels.kmeans
from benchmarks.measure import machine, record

# isort: split
import argparse
import importlib.util
import statistics
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch


def cpu(f):
    """(CPU seconds of all threads, result)."""
    begin = time.process_time()
    out = f()
    return time.process_time() - begin, out


def instruction_set():
    """The widest of the sets that k-means gains from, by /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    known = {"amx_tile": "amx", "avx512_bf16": "avx512_bf16", "avx512f": "avx512", "avx2": "avx2"}
    return next((name for its_flag, name in known.items() if its_flag in flags), "unknown")


def inertia(x, c):
    """Mean squared distance to the nearest centroid, in float64 by differences."""
    _, label = curate.kmeans(x, init_KD=c, n_iter=0)
    return float(np.mean([((x[i].astype(np.float64) - c[label[i]]) ** 2).sum() for i in range(len(x))]))


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
        module = module.SuperKMeans(
            k, x.shape[1], hierarchical=False, iters=n_iter, sampling_fraction=1.0, max_points_per_cluster=10**9,
            n_threads=torch.get_num_threads(), early_termination=False, tol=0.0,
        )  # fmt: skip
        return module.train(x)
    if name == "scikit-learn":
        kmeans = module.KMeans(k, init=init, n_init=1, max_iter=n_iter, tol=0, algorithm="lloyd")
        return kmeans.fit(x).cluster_centers_
    product = "float32" if name.endswith("only") else kernels.kmeans.product_for(torch.device("cpu"))
    with mock.patch.object(kernels.kmeans, "product_for", lambda device: product):
        return curate.kmeans(x, init_KD=init, n_iter=n_iter)[0]


def speed(n, d, k, kind, n_iter=10, repeats=3):
    """CPU seconds of n_iter iterations over those of n_iter bare products x @ c.T; inertia from one start."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, d), dtype=np.float32)
    if kind == "mixture":
        x += rng.standard_normal((50, d), dtype=np.float32)[rng.integers(0, 50, n)]
    if kind == "Zipf":
        p = 1 / np.arange(1, 2001)
        x += rng.standard_normal((2000, d), dtype=np.float32)[rng.choice(2000, n, p=p / p.sum())]
    init = x[rng.choice(n, k, replace=False)]
    x_ND, c_KD = torch.from_numpy(x), torch.from_numpy(init)
    centroids, times, products = {}, {}, []
    found = [name for name in WAYS if importlib.util.find_spec(WAYS[name].split(".")[0])]
    for name in WAYS.keys() - found:
        print(f"{name}: not installed, left out")
    for name in found * repeats:
        products.append(min(cpu(lambda: x_ND @ c_KD.T)[0] for _ in range(2)))
        seconds, centroids[name] = cpu(lambda name=name: centroids_by(name, x, init, n_iter))
        times.setdefault(name, []).append(seconds / n_iter / products[-1])
        print(f"{n} x {d}, K = {k}, {kind}: {name} {times[name][-1]:.3f} of the GEMM", flush=True)
    gemm = statistics.median(products)
    return {
        "data": f"{n // 1000}k x {d}, K = {k}, {kind}",
        "iterations": n_iter,
        "instruction_set": instruction_set(),
        "gemm_cpu_s": gemm,
        "seeding_over_gemm": cpu(lambda: curate.kmeans(x, k=k, n_iter=0))[0] / gemm,
        "ratio_to_gemm": {
            name: {"median": statistics.median(t), "all": t, "inertia": inertia(x, centroids[name])}
            for name, t in times.items()
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


def balance(distance, seeds):
    """Normalised entropy of 2000 kept points over the 50 true clusters, and CPU seconds."""
    ways = {"curate": ([1000, 100], 10), "no resampling": ([1000, 100], 0), "flat k-means, 1000 clusters": ([1000], 0)}
    out = {name: {"entropy": [], "cpu_s": []} for name in (*ways, "random")}

    def choose(name, x, seed):
        if name == "random":
            return np.random.default_rng(seed).choice(len(x), 2000, replace=False)
        config = curate.Config(levels=ways[name][0], resamplings=ways[name][1], seed=seed)
        return curate.sample(curate.build_tree(curate.Points(x), config), 2000, seed)

    for seed in seeds:
        x, y = zipf(distance, seed)
        for name, row in out.items():
            seconds, kept = cpu(lambda name=name, x=x, seed=seed: choose(name, x, seed))
            row["entropy"].append(curate.entropy(np.bincount(y[kept], minlength=50)))
            row["cpu_s"].append(seconds)
            print(f"centres {distance} apart, seed {seed}: {name} {row['entropy'][-1]:.3f}, {seconds:.1f} CPU-s")
    return {"distance": distance, "seeds": list(seeds), "ways": out}


# ---- a billion images ----


def kmeans_cost(n, k, iterations):
    """(products of a point and a centroid, readings of a point) of one k-means with its seeding."""
    rounds = np.log2(k) + k / 1024
    return n * k * (iterations + 2), n * (iterations + 1 + rounds)


def plan(n, d, levels, split_above, rates, machines=1, cores=1, iterations=10, resamplings=10, r=32, share=0.3):
    """What every level costs, from rates = (CPU-s per product and channel, CPU-s per reading and channel, B/s of disk).

    Memory a machine, in bytes: labels of all points and their order (8 B each), of its own points the bounds, norms and
    label (4 GROUPS + 20 B), of the largest pool or cell the rows, and a core's temporaries: scores in float32 and
    bfloat16, and some twenty blocks of rows (float64 counts twice, and the allocator keeps what threads have freed).
    """
    out = []
    for depth, k in enumerate(levels):
        if k > split_above:
            coarse = round(k**0.5)
            cost = 2 * np.array(kmeans_cost(n, coarse, iterations)) + (0, n)
            rows = 2 * n / coarse
        else:
            rows = k * max(2, min(r, int(share * n / k)))
            again = np.add(kmeans_cost(rows, k, iterations), (n * k, 2 * n))
            cost = np.add(kmeans_cost(n, k, iterations), resamplings * again + (0, n))
        products, readings = cost * d
        from_disk = readings * 2 / rates[2] if depth == 0 else 0  # float16
        cpu_s = products * rates[0] + readings * rates[1]
        block = min(n, curate.BLOCK)
        temporaries = min(cores, -(-n // curate.BLOCK)) * (80 * block * d + 1.5 * kernels.kmeans.TILE_BYTES)
        held = 16 * n + (20 + 4 * kernels.kmeans.GROUPS) * n / machines + 4 * d * rows
        level = {"points": n, "clusters": k, "flop": 2 * products, "core_hours": cpu_s / 3600}
        level |= {"hours": (cpu_s / cores + from_disk) / machines / 3600, "bytes_a_machine": held + temporaries}
        out.append(level)
        n = k
    return out


def billion(n=100_000, d=128, disk=2e9):
    """Rates from two flat k-means, and what a tree over 1e9 summaries costs by them."""
    rng = np.random.default_rng(0)
    centre = rng.standard_normal((2000, d), dtype=np.float32)
    x = (centre[rng.integers(0, 2000, n)] + rng.standard_normal((n, d), dtype=np.float32)).astype(np.float16)
    seconds = [cpu(lambda k=k: curate.kmeans(x, k=k))[0] for k in (32, 1000)]
    costs = [[d * cost for cost in kmeans_cost(n, k, 10)] for k in (32, 1000)]
    rates = (*np.linalg.solve(costs, seconds).tolist(), disk)
    return {
        **dict(zip(("cpu_s_per_product", "cpu_s_per_reading", "disk_assumed"), rates, strict=True)),
        "planned": plan(1e9, 1152, (10**7, 500_000, 50_000, 10_000), 50_000, rates, machines=8, cores=64),
    }


# ---- command line ----


PARTS = {
    "speed, K = 1000, Gaussian": lambda: speed(100_000, 384, 1000, "Gaussian"),
    "speed, K = 1000, mixture": lambda: speed(100_000, 384, 1000, "mixture"),
    "speed, K = 4096, Gaussian": lambda: speed(200_000, 256, 4096, "Gaussian", repeats=2),
    "speed, K = 4096, mixture": lambda: speed(200_000, 256, 4096, "mixture", repeats=2),
    "speed, K = 1000, Zipf": lambda: speed(100_000, 384, 1000, "Zipf", repeats=2),
    "speed, K = 4096, Zipf": lambda: speed(100_000, 384, 4096, "Zipf", repeats=2),
    "balance 1.0": lambda: balance(1.0, range(5)),
    "balance 0.5": lambda: balance(0.5, range(5)),
    "billion": billion,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART", help=", ".join(PARTS))
    for name in parser.parse_args().only:
        record(Path(__file__).parent, "curation.json", name, PARTS[name]() | machine())


if __name__ == "__main__":
    main()
