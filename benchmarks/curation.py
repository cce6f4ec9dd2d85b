"""Measures curate.py beside its peers: `python curate.py --bench benchmarks/curation.json`.

CPU seconds (all threads), because the machine may be shared; every ratio is of runs that alternate in one process.
faiss-cpu and scikit-learn are measured if installed (`pip install faiss-cpu scikit-learn`; nothing else uses them).
"""

import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import curate


def cpu(f):
    """(CPU seconds of all threads, result)."""
    begin = time.process_time()
    out = f()
    return time.process_time() - begin, out


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names) or '?'} cores, {names[0] if names else platform.processor()}"


def inertia(x, c):
    """Mean squared distance to the nearest centroid, in float64 by differences."""
    _, label = curate.kmeans(x, init_KD=c, n_iter=0)
    return float(
        np.mean(
            [
                ((x[i : i + 4096].astype(np.float64) - c[label[i : i + 4096]]) ** 2).sum(1).mean()
                for i in range(0, len(x) // 4096 * 4096, 4096)
            ]
        )
    )


def peers(n_iter):
    """name -> run(x, init) -> centroids."""

    def ours(x, init):
        return curate.kmeans(x, init_KD=init, n_iter=n_iter)[0]

    def float32(x, init):
        fast, curate.cpu_has_fast_bf16 = curate.cpu_has_fast_bf16, lambda: False
        try:
            return ours(x, init)
        finally:
            curate.cpu_has_fast_bf16 = fast

    def plain_torch(x, init):
        x, c = torch.from_numpy(x), torch.from_numpy(init)
        for _ in range(n_iter):
            label = torch.cat([(b @ c.T - c.square().sum(1) / 2).argmax(1) for b in x.split(2048)])
            total = torch.zeros_like(c).index_add_(0, label, x)
            c = total / torch.bincount(label, minlength=len(c)).clamp(min=1)[:, None]
        return c.numpy()

    runs = {"curate.kmeans": ours, "curate.kmeans, float32 products only": float32, "plain torch": plain_torch}
    try:
        import faiss

        def by_faiss(x, init):
            k = faiss.Kmeans(x.shape[1], len(init), niter=n_iter, max_points_per_centroid=10**9)
            k.train(x, init_centroids=init)
            return k.centroids

        runs["faiss-cpu"] = by_faiss
    except ImportError:
        print("faiss is not installed: not measured")
    try:
        from sklearn.cluster import KMeans

        def by_sklearn(x, init):
            k = KMeans(len(init), init=init, n_init=1, max_iter=n_iter, tol=0, algorithm="lloyd")
            return k.fit(x).cluster_centers_

        runs["scikit-learn"] = by_sklearn
    except ImportError:
        print("scikit-learn is not installed: not measured")
    return runs


def speed(n, d, k, kind, n_iter, repeats):
    """CPU seconds of n_iter iterations over those of n_iter bare products x @ c.T, medians; inertia from one start."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, d), dtype=np.float32)
    if kind == "mixture":
        x += rng.standard_normal((50, d), dtype=np.float32)[rng.integers(0, 50, n)]
    init = x[rng.choice(n, k, replace=False)]
    x_ND, c_KD = torch.from_numpy(x), torch.from_numpy(init)
    rows, times, products = {}, {}, []
    for _ in range(repeats):
        for name, run in peers(n_iter).items():
            products.append(min(cpu(lambda: x_ND @ c_KD.T)[0] for _ in range(2)))
            seconds, c = cpu(lambda run=run: run(x, init))
            times.setdefault(name, []).append(seconds / n_iter / products[-1])
            rows[name] = c
            print(f"{n} x {d}, K = {k}, {kind}: {name} {times[name][-1]:.3f} of the GEMM", flush=True)
    seeding = cpu(lambda: curate.kmeans(x, k=k, n_iter=0))[0] / statistics.median(products)
    return {
        "n": n,
        "d": d,
        "k": k,
        "data": kind,
        "iterations": n_iter,
        "repeats": repeats,
        "gemm_cpu_s": statistics.median(products),
        "seeding_and_one_assignment_over_gemm": seeding,
        "ratio_to_gemm": {
            name: {"median": statistics.median(t), "min": min(t), "max": max(t), "inertia": inertia(x, rows[name])}
            for name, t in times.items()
        },
    }


def zipf(distance, seed, n=50_000, groups=50, d=64):
    """Gaussian clusters of unit variance, centres ~ N(0, distance^2), sizes ~ rank^-1.5."""
    rng = np.random.default_rng(seed)
    p = np.arange(1, groups + 1) ** -1.5
    y = rng.choice(groups, n, p=p / p.sum())
    centre = rng.standard_normal((groups, d)) * distance
    return (centre[y] + rng.standard_normal((n, d))).astype(np.float32), y


def balance(distance, seeds):
    """Normalised entropy of 2000 kept points over the 50 true clusters, and CPU seconds."""
    out = {}
    for seed in seeds:
        x, y = zipf(distance, seed)
        ways = {
            "curate": lambda x, seed: curate.curate(x, [1000, 100], 2000, seed),
            "no resampling": lambda x, seed: curate.sample(
                curate.grow(curate.Points(x), curate.Config(levels=[1000, 100], resamplings=0, seed=seed)), 2000, seed
            ),
            "flat k-means, 1000 clusters": lambda x, seed: curate.sample(
                curate.grow(curate.Points(x), curate.Config(levels=[1000], resamplings=0, seed=seed)), 2000, seed
            ),
            "random": lambda x, seed: np.random.default_rng(seed).choice(len(x), 2000, replace=False),
        }
        for name, way in ways.items():
            seconds, kept = cpu(lambda way=way, x=x, seed=seed: way(x, seed))
            entropy = curate.entropy(np.bincount(y[kept], minlength=50))
            row = out.setdefault(name, {"entropy": [], "cpu_s": []})
            row["entropy"].append(entropy)
            row["cpu_s"].append(seconds)
            print(f"centres {distance} apart, seed {seed}: {name} {entropy:.3f}, {seconds:.1f} CPU-s", flush=True)
    for row in out.values():
        row["entropy_mean"], row["entropy_min"] = statistics.mean(row["entropy"]), min(row["entropy"])
    return {"distance": distance, "seeds": list(seeds), "ways": out}


def unequal_widths():
    """Where balancing goes wrong: two equally frequent Gaussians in 8-d, one 3 times as wide; shares of the sample."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 20_000)
    x = rng.standard_normal((20_000, 8)) * np.where(y, 3.0, 1.0)[:, None]
    x[:, 0] += 40 * y
    kept = curate.curate(x.astype(np.float32), [400, 40], 1000)
    return {"share_of_the_wide_one": float(y[kept].mean()), "share_in_the_data": float(y.mean())}


def main(path):
    parts = {
        "balance": lambda: [balance(1.0, range(5)), balance(0.5, range(5))],
        "unequal_widths": unequal_widths,
        "speed": lambda: [
            speed(100_000, 384, 1000, "gaussian", 10, 3),
            speed(100_000, 384, 1000, "mixture", 10, 3),
            speed(200_000, 256, 4096, "gaussian", 10, 1),
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {
        "machine": processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "bfloat16_tiles": curate.cpu_has_fast_bf16(),
        "command": f"python curate.py --bench {path}",
    }
    for name, part in parts.items():
        results[name] = part()
        curate.write_json(path, results)
    return results
