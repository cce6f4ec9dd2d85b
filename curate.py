"""Curation: choose a balanced subset of a long-tailed pool, by hierarchical k-means with resampling.

    python curate.py --features CACHE|FILE.npy --levels 20000 500 50 --keep 100000 --out DIR

After Vo et al., "Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach" (arXiv 2405.15613).
A random subset of web images repeats the head of the distribution. One k-means (kmeans.py) does too: its centroids
settle with a density that grows with the data's. The way out has two steps, and this file reads in their order.

1. A hierarchy (`grow`). Level 1 clusters the points, level 2 the centroids of level 1, and so on: centroids are spread
   more evenly than what they stand for, so every level is flatter. *Resampling* pushes on within a level: keep only the
   r points nearest to each centroid, cluster those afresh, assign all points again, repeat. A pool with r points a
   cluster has forgotten how large the clusters were.
2. Balanced sampling (`sample`): descend from the top, split the budget evenly among the children, and hand on what a
   small child cannot fill.

Under torchrun every rank works on its share of the points; the ids are those of one process.

Shape letters: N points, K centroids, D channels, M points of a selection.
"""

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from kernels.kmeans import PRODUCTS, product_for
from kmeans import Points, kmeans, lloyd, rank_in_group, start, uniform

__all__ = ["curate", "kmeans"]

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


def closest(points, c_KD, label_N, r):
    """Ids of the r points nearest to each centroid (all of a smaller cluster), sorted."""
    d2_N, label_N = points.own_distance2(c_KD, label_N), label_N.cpu().numpy()
    order = np.lexsort((d2_N, label_N))
    order = order[rank_in_group(label_N[order]) < r]
    ids, d2_M, of_M = (points.all_concat(a) for a in (order + points.lo, d2_N[order], label_N[order]))
    order = np.lexsort((ids, d2_M, of_M))
    return np.sort(ids[order[rank_in_group(of_M[order]) < r]])


def in_two_steps(points, k, config, seed):
    """k clusters by k-means into sqrt(k) coarse cells, then k-means inside each: 2 N sqrt(k) products, not N k.

    Returns centroids and labels as `lloyd` does, a point's centroid being the nearest of its cell. Every cell gets the
    same number of clusters as far as it has points for them, whatever its size, as the paper's first level does (100k
    cells of 100 clusters). Cells are shared out over ranks; one cell's points fit in memory.
    """
    coarse = round(k**0.5)
    _, label_N = lloyd(points, start(points, coarse, seed), config.iterations, seed)
    label_N = points.all_concat(label_N.cpu().numpy())
    order, size = np.argsort(label_N, kind="stable"), np.bincount(label_N, minlength=coarse)
    cells, quota = np.split(order, np.cumsum(size)[:-1]), even_shares(k, size, seed)
    mine = {}
    for cell in range(points.rank, coarse, points.ranks):
        if quota[cell]:  # none only where there are no points
            members = points.part(cells[cell], alone=True)
            c_MD, label_M = lloyd(members, start(members, int(quota[cell]), seed), config.iterations, seed)
            mine[cell] = members.uncentre(c_MD), label_M.cpu().numpy()
    split = {cell: result for part in points.all_gather(mine) for cell, result in part.items()}
    first = np.cumsum(quota) - quota
    for cell, (_, label_M) in split.items():
        label_N[cells[cell]] = first[cell] + label_M
    c_KD = points.centre(np.concatenate([split[cell][0] for cell in sorted(split)]))
    return c_KD, torch.from_numpy(label_N[points.lo : points.hi]).to(points.device)


def level(points, k, config, seed, log=lambda line: None):
    """One level of the hierarchy: k-means, then resampling. Returns centred centroids and this rank's labels.

    Each resampling starts afresh from D^2 seeds of the pool (warm or random starts lose most of the gain). A level made
    in two steps is not resampled: equal quotas for its cells take some of the density out already.
    """
    if k > config.split_above:
        return in_two_steps(points, k, config, seed)
    c_KD, label_N = lloyd(points, start(points, k, seed), config.iterations, seed)
    r = max(2, min(config.nearest, int(config.share * points.n / k)))
    for step in range(config.resamplings):
        ids = closest(points, c_KD, label_N, r)
        if len(ids) < k:  # duplicates left clusters empty: a pool this small cannot fill them either
            log(f"resampling {step}: {len(ids)} points for {k} clusters, stopped")
            break
        pool = points.part(ids)
        c_MD, _ = lloyd(pool, start(pool, k, seed + step + 1), config.iterations, seed)
        c_KD, label_N = lloyd(points, points.centre(pool.uncentre(c_MD)), 0)
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
            d2_N = here.all_concat(here.own_distance2(c_KD, label_N))  # summed in id order: the same for any ranks
            tree.append(
                {
                    "centroids": here.uncentre(c_KD),
                    "parent": here.all_concat(label_N.cpu().numpy()),
                    "inertia": np.float64(d2_N.mean(dtype=np.float64)),
                }
            )
            if path and points.rank == 0:
                write(path, lambda f, node=tree[-1]: np.savez(f, **node))
            seconds = time.perf_counter() - begin
            log(f"level {depth + 1}: {k} clusters of {here.n}, mean d^2 {tree[-1]['inertia']:.5g}, {seconds:.1f} s")
        if points.shared:
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
    points = Points(x_ND)
    check_levels(points.n, levels, keep)
    return sample(grow(points, Config(levels=list(levels), keep=keep, seed=seed)), keep, seed)


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
    """A PNG of the top level's largest and smallest clusters: a row each, kept images framed, then a few left out.

    The bars beside a row are the cluster's share of the pool (grey) and of the subset (green).
    """
    from PIL import Image, ImageDraw, ImageFont

    node_N = tree[0]["parent"]
    for node in tree[1:]:
        node_N = node["parent"][node_N]
    size = np.bincount(node_N, minlength=len(tree[-1]["centroids"]))
    n_kept = np.bincount(node_N[kept], minlength=len(size))
    order = np.argsort(-size, kind="stable")
    order = order[size[order] > 0]
    hidden = max(0, len(order) - 2 * clusters)
    shown = np.r_[order[:clusters], order[clusters + hidden :]]
    is_kept = np.isin(np.arange(len(node_N)), kept)
    margin, head, gap, grey, green = 190, 34, 26 * (hidden > 0), (150, 150, 150), (0, 130, 70)
    sheet = Image.new("RGB", (margin + across * side + 8, head + gap + len(shown) * side + 8), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    title = f"{len(kept)} of {len(node_N)} images kept (framed); {len(order)} clusters of the top level, by size"
    draw.text((8, 8), title, fill="black", font=font)
    if hidden:
        draw.text((8, head + clusters * side + 4), f"({hidden} clusters between)", fill=grey, font=font)
    most = max((size / size.sum()).max(), (n_kept / n_kept.sum()).max())
    for row, k in enumerate(shown):
        top = head + row * side + gap * (row >= clusters)
        members = np.flatnonzero(node_N == k)
        members = members[np.lexsort((uniform(members, 5), ~is_kept[members]))]
        in_, out = np.split(members, [n_kept[k]])
        pick = np.r_[in_[: max(across - min(len(out), across // 3), 0)], out][:across]
        draw.text((8, top + 10), f"{n_kept[k]} of {size[k]}", fill="black", font=font)
        for y, share, colour in ((32, size[k] / size.sum(), grey), (42, n_kept[k] / n_kept.sum(), green)):
            draw.rectangle((8, top + y, 8 + round(160 * share / most), top + y + 6), fill=colour)
        for column, (i, image) in enumerate(zip(pick, thumbnails(pick), strict=True)):
            image = Image.fromarray(np.asarray(image))
            image.thumbnail((side - 12, side - 12))
            x = margin + column * side
            if is_kept[i]:
                draw.rectangle((x + 2, top + 2, x + side - 3, top + side - 3), outline=green, width=2)
            sheet.paste(image, (x + (side - image.width) // 2, top + (side - image.height) // 2))
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
    points = Points(x_ND, device, config.features)
    how = PRODUCTS[product_for(points.device)]
    log = print if points.rank == 0 else lambda line: None
    log(f"{points.n} points of {points.d} channels, {points.ranks} rank(s), {device}: {how}")
    out = Path(config.out)
    # A tree belongs to its features and to the flags that change it; --keep may change, and reuses it.
    tree_of = {k: v for k, v in asdict(config).items() if k not in ("keep", "device", "images", "out", "features")}
    check = points.read(np.unique(np.linspace(0, points.n - 1, min(points.n, 64)).astype(np.int64)))
    tree_of |= {"points": points.n, "channels": points.d, "checksum": float(np.abs(check).sum(dtype=np.float64))}
    if points.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "tree.json").exists():
            write_json(out / "tree.json", tree_of)
    if points.shared:
        dist.barrier()
    before = json.loads((out / "tree.json").read_text())
    if before != tree_of:
        differ = {k: (before.get(k), tree_of.get(k)) for k in before | tree_of if before.get(k) != tree_of.get(k)}
        raise ValueError(f"--out {out} holds the tree of another run, (then, now): {differ}; choose another folder")
    tree = grow(points, config, out, log)
    kept = sample(tree, config.keep, config.seed)
    if points.rank == 0:
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
    config = Config(**vars(parser.parse_args(argv)))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")  # what travels are sums, counts and ids in CPU memory
    try:
        run(config)
    except ValueError as e:
        parser.exit(2, f"curate.py: error: {e}\n")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
