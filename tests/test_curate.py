"""Curation: k-means against float64, the properties of its sums and seeds, the hierarchy, the command, ranks, kills."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import curate
import data
from benchmarks.curation import clusters
from common.commands import run_command
from common.order import Order
from kernels import kmeans as km
from kernels import seeds

ROOT = Path(curate.__file__).parent


def blobs(n=3000, d=16, groups=20, scale=4.0, seed=0):
    """n float32 points around `groups` centres, and which."""
    rng = np.random.default_rng(seed)
    y = rng.integers(groups, size=n)
    x = rng.standard_normal((groups, d))[y] * scale + rng.standard_normal((n, d))
    return x.astype(np.float32), y


def distances64(x, c):
    """All squared distances, by differences in float64."""
    return ((x[:, None].astype(np.float64) - c[None].astype(np.float64)) ** 2).sum(2)


def lloyd64(x, c, n_iter):
    """Textbook Lloyd in float64 (no empty clusters expected)."""
    x, c = x.astype(np.float64), c.astype(np.float64)
    for _ in range(n_iter):
        label = distances64(x, c).argmin(1)
        c = np.stack([x[label == k].mean(0) for k in range(len(c))])
    return c, distances64(x, c).argmin(1)


@pytest.fixture(params=["bfloat16", "float32", "fused"])
def product(request, monkeypatch):
    """Both cascades; the bfloat16 one is as exact where the CPU has no fast products, only slower."""
    monkeypatch.setattr(km, "product_for", lambda device: request.param)


# ---- k-means ----


@pytest.mark.parametrize("offset", [0, 1000])
def test_kmeans_equals_lloyd_in_float64(product, offset):
    """Catches points skipped though they could move (a gap not shrunk), sums that forget to take a point out, and, at
    the offset, |x|^2 - 2 x.c + |c|^2 without centring: wrong labels by the hundred."""
    x, _ = blobs(5000, 24, scale=1.0)  # wide blobs: no cluster runs empty
    x += np.float32(offset)
    init = x[np.random.default_rng(1).choice(len(x), 60, replace=False)]
    want_c, want_label = lloyd64(x, init, 8)
    c, label = curate.kmeans(x, init_KD=init, n_iter=8)
    assert c.dtype == np.float32 and label.dtype == np.int64
    np.testing.assert_allclose(c, want_c, atol=1e-5 + 2e-7 * offset)
    assert (label != want_label).sum() <= (0 if offset == 0 else 2)  # returned centroids are rounded at 1000
    np.testing.assert_array_equal(label, distances64(x, c).argmin(1))


def test_assignment_belongs_to_the_returned_centroids():
    """Catches returning the labels of before the last update, as a loop without a closing assignment does."""
    x, _ = blobs()
    c, label = curate.kmeans(x, k=50, n_iter=1)
    np.testing.assert_array_equal(label, distances64(x, c).argmin(1))


def test_no_iteration_only_assigns():
    """Catches an update at n_iter=0."""
    x, _ = blobs()
    c, label = curate.kmeans(x, init_KD=x[:30], n_iter=0)
    np.testing.assert_allclose(c, x[:30], atol=1e-6)
    np.testing.assert_array_equal(label[:30], np.arange(30))


def test_products_of_low_precision_never_show(product):
    """Catches an error bound too small: tight pairs of centroids, 1e-4 apart at norm 10, fool bfloat16 every time."""
    rng = np.random.default_rng(0)
    c = rng.standard_normal((100, 32)).astype(np.float32) * 10
    c = np.concatenate([c, c + 1e-4 * rng.standard_normal(c.shape).astype(np.float32)])
    x = (c[rng.integers(200, size=4000)] + rng.standard_normal((4000, 32)) * 1e-4).astype(np.float32)
    _, label = curate.kmeans(x, init_KD=c, n_iter=0)
    d2 = distances64(x, c)
    chosen = d2[np.arange(len(x)), label]
    assert (np.sqrt(chosen) - np.sqrt(d2.min(1))).max() < 3e-6  # float32 of x - mean, at 10


def hard_pairs(n=60, d=70):
    """(x, c) float32 for which the error bounds are nearly reached: see `test_bounds_of_every_sieve_hold`."""
    rng = np.random.default_rng(0)
    x, c = (torch.from_numpy(rng.standard_normal((n, d)) * rng.lognormal(0, 2, (n, 1))).float() for _ in "xc")
    grid = torch.from_numpy(rng.choice([-64.0, 64.0], (n, d))).float()  # bfloat16's neighbours are 0.25 away or more
    yield "lengths of all sizes", x, c
    yield "what bfloat16 leaves of c, as x", 1e4 * (c - c.bfloat16().float()), c
    yield "x whose rest lies along c", grid + 0.1 * c / c.abs().amax(1, keepdim=True), c
    c = torch.from_numpy(rng.standard_normal((n, d))).bfloat16().float()
    yield "values bfloat16 holds: only the product itself is rounded", (3 * c).bfloat16().float(), c
    c = 10 * torch.eye(d)[:n]
    yield "ties", (c + c.flip(0)) / 2, c


@pytest.mark.parametrize("name", ["bfloat16", "float32", "fused"])
def test_bounds_of_every_sieve_hold(name):
    """Catches a term missing from h or from an error: near must lie above the own distance, far below the others'."""
    for case, x, c in hard_pairs():
        groups = km.split_into_groups(c, 1 if name == "fused" else 4)
        search = km.NearestSearch(c, groups, name)
        true = (x[:, None].double() - c.double()).norm(dim=2)
        norm, rest = x.norm(dim=1), (x - x.bfloat16().float()).norm(dim=1)
        everywhere = torch.ones(len(x), len(groups), dtype=torch.bool)
        nothing = torch.full((len(x),), -1), torch.full((len(x),), torch.inf), torch.full(everywhere.shape, -torch.inf)
        screened = search.screen(x, norm, rest, nothing[0])
        compared = search.compare(x, everywhere, torch.arange(len(x)))
        for label, near, far in (screened, search.find(x, norm, rest, *nothing), compared):
            own = true.gather(1, label[:, None])[:, 0]
            assert (near >= own).all(), case
            others = true.scatter(1, label[:, None], torch.inf)
            for g, ids in enumerate(groups):
                assert (far[:, g] <= others[:, ids[ids >= 0]].amin(1)).all(), case
        if name != "fused":
            given, fresh = torch.arange(len(x)).flip(0), torch.tensor([7, 0, 1, 12])[: len(groups)]
            some = km.NearestSearch(c, groups, name, fresh)
            part, near_part, far = some.screen(x, norm, rest, given)
            assert torch.equal(part, given) and (near_part >= true.gather(1, given[:, None])[:, 0]).all(), case
            assert near_part.isinf().tolist() == (~torch.isin(given, some.slot_P)).tolist(), case
            others = true.scatter(1, given[:, None], torch.inf)
            for g, (ids, n) in enumerate(zip(groups, fresh.tolist(), strict=True)):
                assert (
                    far[:, g] <= torch.cat([others[:, ids[:n]], torch.full((len(x), 1), torch.inf)], 1).amin(1)
                ).all(), case
        extent = norm + c.norm(dim=1).max()
        assert (near.square() <= own.square() + 3e-5 * extent.square()).all(), case  # the second sieve's: not idly far


def test_bounds_outlive_a_pass():
    """Catches a bound that forgets a step: of the point's own centroid, of a group, or of one it nearly tied with. In
    one dimension nearly every point is skipped, and many tie."""
    for seed in range(150):
        rng = np.random.default_rng(seed)
        x = rng.integers(0, 100, (150, 1)).astype(np.float32)
        c, label = curate.kmeans(x, init_KD=rng.choice(np.unique(x), 40, replace=False)[:, None], n_iter=2 + seed % 6)
        d = np.abs(x - c.T)
        assert (d[np.arange(150), label] <= d.min(1) + 1e-4).all(), seed


@pytest.mark.parametrize("k, n_groups", [(1, 1), (7, 3), (33, 4), (100, 12), (1000, 32)])
def test_groups_partition_the_centroids(k, n_groups):
    """Catches a centroid in two groups or none: its points would never be compared with it."""
    groups = km.split_into_groups(torch.randn(k, 5, generator=torch.Generator().manual_seed(k)), n_groups)
    assert groups[groups >= 0].sort().values.tolist() == list(range(k)) and len(groups) <= n_groups
    assert (groups >= 0).any(1).all()


def test_points_that_cannot_move_are_skipped(monkeypatch):
    """Catches bounds that are never carried from one pass to the next; too large ones fail against float64, above."""
    x, _ = blobs(4000, 16, groups=30, scale=10.0)
    points, read, assign = curate.Points(x), [], curate.assign

    def counting(*arguments):
        counts = assign(*arguments)
        read.append(counts[0] / len(x))
        return counts

    monkeypatch.setattr(curate, "assign", counting)
    curate.lloyd(points, curate.seed_centroids(points, 30, 0), 6)
    assert read[0] == 1 and min(read) < 0.5


@pytest.mark.parametrize("offset", [0, 100])
def test_features_are_only_read(offset):
    """Catches writing to rows that were read in place (no offset), and torch's warning of a read-only array."""
    x, _ = blobs()
    x += np.float32(offset)
    kept = x.copy()
    tree = curate.build_tree(curate.Points(x), curate.Config(levels=(60, 6), resamplings=1))
    np.testing.assert_array_equal(x, kept)
    x.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = curate.build_tree(curate.Points(x), curate.Config(levels=(60, 6), resamplings=1))
    np.testing.assert_array_equal(again[0]["parent"], tree[0]["parent"])


def test_empty_clusters_restart_in_the_largest():
    """Catches empty clusters left where they were: 39 of these 40 centroids start far from everything."""
    x, _ = blobs()
    init = np.full((40, 16), 1e4, np.float32) + np.arange(40, dtype=np.float32)[:, None]
    init[0] = x.mean(0)
    _, label = curate.kmeans(x, init_KD=init, n_iter=6)
    assert np.bincount(label, minlength=40).min() > 0


def test_duplicates_and_as_many_clusters_as_points():
    """Catches a division by an empty cluster's count (NaN), seeds drawn twice, and k > distinct points failing."""
    x, _ = blobs(50)
    c, label = curate.kmeans(x, k=50, n_iter=3)
    assert sorted(label) == list(range(50))
    np.testing.assert_allclose(c[label], x, atol=1e-6)
    five = np.repeat(x[:5], 100, 0)
    c, label = curate.kmeans(five, k=12, n_iter=3)
    assert np.isfinite(c).all()
    np.testing.assert_allclose(c[label], five, atol=1e-6)
    c, label = curate.kmeans(np.ones((8, 3)), k=3)
    assert (c == 1).all() and (label == 0).all()


def test_torch_in_torch_out_and_every_dtype_alike():
    """Catches numpy coming back for torch, and a dtype handled apart (small integers are exact in all of them)."""
    x = np.random.default_rng(0).integers(-20, 20, (400, 6))
    want = curate.kmeans(x.astype(np.float32), k=9, seed=3)
    for other in (x, x.astype(np.float64), x.astype(np.float16), x.astype(np.int8)):
        for a, b in zip(curate.kmeans(other, k=9, seed=3), want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    c, label = curate.kmeans(torch.from_numpy(x).bfloat16(), k=9, seed=3)
    assert c.dtype == torch.float32 and label.dtype == torch.int64
    np.testing.assert_array_equal(label.numpy(), want[1])


def test_same_seed_same_bits_whatever_the_threads():
    """Catches sums whose order shows: threads finish their blocks in any order."""
    x, _ = blobs(20000, 8)
    a = curate.kmeans(x, k=300, n_iter=4, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(3 if before == 1 else 1)
    try:
        b = curate.kmeans(x, k=300, n_iter=4, seed=1)
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(i, j) for i, j in zip(a, b, strict=True))
    assert not np.array_equal(a[1], curate.kmeans(x, k=300, n_iter=4, seed=2)[1])


def test_sums_are_exact_in_any_order():
    """Catches plain float64 sums: their last bits depend on the order."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((30000, 3)) * rng.lognormal(0, 3, (30000, 1))).astype(np.float32)
    points = curate.Points(x)
    exact = points.round_to_grid(points.rows(slice(0, len(x))))
    total = exact.sum(0)
    for seed in range(5):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(exact[order].cumsum(0)[-1], total)
    assert (exact - points.rows(slice(0, len(x))).double()).abs().max() < 2.0**-30 * np.abs(x).max()


def test_seeds_follow_d2():
    """Catches seeding at random: two far outliers in 4000 points are always among 3 seeds ~ D^2, hardly ever at random.
    Also candidates accepted unseen: with these many duplicates, seeds of one round would coincide."""
    x = np.zeros((400_000, 3), np.float32)  # large enough for the batched drawing
    x[7], x[1234] = (1e3, 0, 0), (0, 1e3, 0)
    for seed in range(3):
        ids = seeds.draw_seeds(curate.Points(x), 3, seed)
        assert {7, 1234} < set(ids.tolist())


def test_batched_seeds_are_distributed_as_one_by_one(monkeypatch):
    """Catches rejection left out or inverted: the second of 3 seeds of 4 points has known probabilities."""
    x = np.array([[0.0], [1.0], [3.0], [3.5]], np.float32)
    monkeypatch.setattr(seeds, "draw_seeds_greedily", None)
    points = curate.Points(np.repeat(x, 100_000, 0)[:: 100_000 // 300])  # 300 copies each: no greedy, few collisions
    monkeypatch.setattr(seeds, "GREEDY_UP_TO", 0)
    value = points.read(slice(0, points.n))[:, 0]
    n = 400
    third = np.zeros(4)
    for seed in range(n):
        v = value[seeds.draw_seeds(points, 3, seed)]
        third[np.abs(x[:, 0] - v[2]).argmin()] += 1
    want = np.zeros(4)
    d2 = (x - x.T) ** 2
    for i in range(4):
        for j in range(4):
            p = d2[i, j] / d2[i].sum() / 4
            now = np.minimum(d2[i], d2[j])
            want += p * now / now.sum()
    assert np.abs(third / n - want).max() < 4 * 0.5 / n**0.5, (third / n, want)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(k=11), "k=11"),
        (dict(k=0), "k=0"),
        (dict(), "give k"),
        (dict(init_KD=np.zeros((2, 3))), "init_KD"),
        (dict(init_KD=np.zeros((2, 4)), k=3), "init_KD"),
        (dict(init_KD=np.full((2, 4), np.nan)), "NaN"),
        (dict(k=2, n_iter=-1), "n_iter"),
    ],
)
def test_kmeans_names_bad_input(arguments, words):
    """Catches a check dropped: an IndexError of numpy's, or NaN centroids, would come instead."""
    with pytest.raises(ValueError, match=words):
        curate.kmeans(np.random.default_rng(0).standard_normal((10, 4)), **arguments)


def test_nan_rows_are_named():
    """Catches NaN let through: a NaN distance compares false with everything and the point joins cluster 0."""
    x, _ = blobs(5000)
    for bad in (np.nan, np.inf):
        x[4321, 3] = bad
        with pytest.raises(ValueError, match="row 4321"):
            curate.kmeans(x, k=4)
    with pytest.raises(ValueError, match="shape"):
        curate.kmeans(x[0], k=4)


# ---- hierarchy ----


def test_even_shares_fill_the_small_and_hand_on():
    """Catches a budget lost in rounding, and a small group's rest not handed on."""
    assert curate.even_shares(10, [1, 100, 100, 2]).tolist()[::3] == [1, 2]
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = rng.integers(0, 30, rng.integers(1, 9))
        budget = int(rng.integers(0, size.sum() + 5))
        share = curate.even_shares(budget, size, seed=1)
        assert share.sum() == min(budget, size.sum()) and (share <= size).all() and (share >= 0).all()
        short = share[share < size]  # whoever could take more has as much as anybody, but one
        assert len(short) == 0 or short.min() >= share.max() - 1


def test_curate_returns_sorted_unique_ids_and_is_deterministic():
    """Catches a leaf drawn twice, and any use of global random state."""
    x, _ = blobs()
    kept = curate.curate(x, [200, 20], 500, seed=0)
    assert kept.dtype == np.int64 and len(kept) == 500 and (np.diff(kept) > 0).all() and kept[-1] < len(x)
    np.random.seed(5)
    np.testing.assert_array_equal(kept, curate.curate(torch.from_numpy(x), [200, 20], 500, seed=0))
    assert not np.array_equal(kept, curate.curate(x, [200, 20], 500, seed=1))
    np.testing.assert_array_equal(curate.curate(x, [200, 20], len(x)), np.arange(len(x)))


def test_balance_beats_random_and_needs_resampling():
    """Catches a resampling that changes nothing (its pool not the nearest r) and a sampling proportional to size."""
    x, y = clusters(8000, 16, groups=20, power=1.5, distance=1.0, seed=0)
    config = curate.Config(levels=[300, 40], keep=400)
    spread = [curate.entropy(np.bincount(y[curate.curate(x, [300, 40], 400)], minlength=20))]
    config.resamplings = 0
    kept = curate.sample(curate.build_tree(curate.Points(x), config), 400)
    spread.append(curate.entropy(np.bincount(y[kept], minlength=20)))
    spread.append(curate.entropy(np.bincount(y[:400], minlength=20)))
    assert spread[0] > spread[1] + 0.03 > spread[2] + 0.06, spread


@pytest.mark.slow
@pytest.mark.parametrize("distance, goal", [(1.0, 0.99), (0.5, 0.89)])
def test_a_long_tailed_pool_is_balanced_to_its_goal(distance, goal):
    """Catches anything that costs balance: see `draw_seeds_greedily` for what one choice is worth."""
    x, y = clusters(50_000, 64, groups=50, power=1.5, distance=distance, seed=0)
    assert curate.entropy(np.bincount(y[curate.curate(x, [1000, 100], 2000)], minlength=50)) >= goal


def test_two_step_split_makes_k_clusters():
    """Catches cells whose centroids come back in the wrong place (two centrings are undone on the way), labels that
    point into another cell, and a last pass over all k, which would cost the N k products that the split is for."""
    x, _ = blobs(6000, offset := 8)
    x += np.float32(50 * offset)
    points = curate.Points(x)
    c, label = curate.cluster_points(points, 200, curate.Config(split_above=100), 0)
    d2 = distances64(x, points.uncentre(c))
    assert len(c) == 200 and len(label.unique()) == 200
    assert (label.numpy() == d2.argmin(1)).mean() > 0.8  # the others' nearest lies across the border of a cell
    own = d2[np.arange(6000), label]
    assert own.mean() < 1.15 * kmeans_inertia(x, 200) and (own < d2.min(1) + 30).all()


def kmeans_inertia(x, k):
    c, label = curate.kmeans(x, k=k)
    return ((x - c[label]) ** 2).sum(1).mean()


def test_levels_and_keep_are_checked():
    """Catches a check dropped: levels of the wrong order would build a tree of nonsense."""
    x, _ = blobs(100)
    for levels, keep, words in [
        ([10, 20], 5, "decreasing"),
        ([10, 10], 5, "decreasing"),
        ([], 5, "decreasing"),
        ([5, 0], 5, "decreasing"),
        ([101], 5, "101"),
        ([10], 101, "keep=101"),
        ([10], 0, "keep=0"),
    ]:
        with pytest.raises(ValueError, match=words):
            curate.curate(x, levels, keep)
    assert len(curate.curate(x, np.array([10, 5]), 5)) == 5  # any sequence of numbers


# ---- command ----


def command(tmp_path, out, *more, before=()):
    arguments = ["--features", str(tmp_path / "x.npy"), "--levels", "60", "12", "--keep", "150", "--out", str(out)]
    return [sys.executable, *before, str(ROOT / "curate.py"), *arguments, *more]


@pytest.fixture
def features(tmp_path):
    x, y = blobs(2000, 8)
    np.save(tmp_path / "x.npy", x)
    return x, y


def test_command_writes_the_subset_tree_report_and_sheet(tmp_path, features):
    """Catches a field left out, a sheet without pictures, and a result that differs from the function's."""
    (tmp_path / "images").mkdir()
    for i in range(2000):
        Image.new("RGB", (80, 80), (i % 256, 0, 200)).save(tmp_path / "images" / f"{i:05d}.png")
    out = tmp_path / "out"
    curate.main([*command(tmp_path, out)[2:], "--images", str(tmp_path / "images")])
    kept = np.load(out / "kept.npy")
    np.testing.assert_array_equal(kept, curate.curate(features[0], [60, 12], 150))
    report = json.loads((out / "report.json").read_text())
    assert [level["clusters"] for level in report["levels"]] == [60, 12]
    assert all(level["entropy_after"] >= level["entropy_before"] for level in report["levels"])
    with np.load(out / "level1.npz") as tree:
        assert tree["centroids"].shape == (60, 8) and tree["parent"].shape == (2000,)
        want = distances64(features[0], tree["centroids"]).min(1).mean()
        np.testing.assert_allclose(tree["inertia"], want, rtol=1e-5)
    sheet = np.asarray(Image.open(out / "clusters.png"))
    assert (sheet[:, :, 2] == 200).mean() > 0.2  # the pictures' blue
    assert not list(out.glob(".*"))


def test_pictures_of_an_npy_are_upright_sorted_and_may_be_broken(tmp_path):
    """Catches EXIF ignored, the folder's order lost, and a broken picture that ends a run of hours at its last step."""
    folder = tmp_path / "images"
    folder.mkdir()
    np.save(tmp_path / "x.npy", np.zeros((3, 4)))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter
    Image.new("RGB", (160, 80), "red").save(folder / "b.png", exif=exif)
    Image.new("RGB", (160, 80), "lime").save(folder / "a.png")
    (folder / "c.png").write_bytes(b"no picture")
    config = curate.Config(features=str(tmp_path / "x.npy"), images=str(folder))
    ids, _, read_images = curate.load_features(config)
    green, red, broken = read_images(ids)
    assert green.shape == (80, 160, 3) and (green == (0, 255, 0)).all()
    assert red.shape == (160, 80, 3) and (red == (255, 0, 0)).all() and broken is None
    tree = [{"centroids": np.zeros((1, 4)), "parent": np.zeros(3, np.int64)}]
    assert curate.contact_sheet(tree, np.array([0]), read_images, tmp_path / "sheet.png") == 1
    assert np.asarray(Image.open(tmp_path / "sheet.png")).shape[0] > 72


KILLED = """
import os, signal, sys
import curate
write = curate.write_atomically
def killed_within_level_2(path, save):
    if path.name == "level2.npz":
        path.with_name(".level2.npz.partial").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, save)
curate.write_atomically = killed_within_level_2
curate.main(sys.argv[1:])
"""


def test_killed_run_continues_with_the_same_result(tmp_path, features, monkeypatch):
    """Catches a level made again after a SIGKILL, and a half-written file read as a level."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    curate.main(command(tmp_path, whole)[2:])
    done = subprocess.run([sys.executable, "-c", KILLED, *command(tmp_path, cut)[2:]], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert (cut / "level1.npz").exists() and not (cut / "level2.npz").exists()
    real, made = curate.cluster_points, []
    monkeypatch.setattr(curate, "cluster_points", lambda points, k, *rest: made.append(k) or real(points, k, *rest))
    curate.main(command(tmp_path, cut)[2:])
    assert made == [12]
    np.testing.assert_array_equal(np.load(cut / "kept.npy"), np.load(whole / "kept.npy"))
    for name in ("level1.npz", "level2.npz"):
        with np.load(cut / name) as one, np.load(whole / name) as two:
            assert all(np.array_equal(one[key], two[key]) for key in two)


def test_command_takes_a_cache(cache, world, tmp_path):
    """Catches rows handed out for image ids, another teacher's summaries, and pictures that are not the rows'."""
    ids, x = data.open_summaries(cache.path, "dense")
    arguments = ["--levels", "12", "4", "--keep", "30", "--out", str(tmp_path / "out")]
    curate.main(["--features", str(cache.path), "--teacher", "dense", *arguments])
    kept = np.load(tmp_path / "out" / "kept.npy")
    np.testing.assert_array_equal(kept, np.sort(ids[curate.curate(x, [12, 4], 30)]))
    assert set(kept) <= set(world.index) and kept.max() > len(ids)  # ids are hashes, rows are small
    sheet = np.asarray(Image.open(tmp_path / "out" / "clusters.png"))
    assert (sheet != 255).any(2).mean() > 0.2
    order = Order(cache, 512, subset=kept)  # what train.py --subset makes of it
    trained = {int(i) for number in cache.numbers for i in np.array(cache.shard(number).ids)[order.kept(number)]}
    assert trained and trained <= set(kept)


def test_an_image_counts_once_whatever_its_views(world, oracles, tmp_path):
    """Catches views that are kept like images: a subset of fewer images than asked for, some named twice."""
    views, plain = (
        data.cache(world.folder / "images", oracles, tmp_path / f"{n}", max_tokens=64, views=n, shard_images=20)
        for n in (3, 1)
    )
    (ids, x), (ids_1, x_1) = (data.open_summaries(cache.path, "dense") for cache in (views, plain))
    assert len(views.all_ids()) > 2 * len(ids) and np.array_equal(ids, ids_1)
    np.testing.assert_allclose(x[30:50], x_1[30:50], atol=1e-4)
    curate.main(["--features", str(views.path), "--levels", "12", "4", "--keep", "30", "--out", str(tmp_path / "out")])
    kept = np.load(tmp_path / "out/kept.npy")
    assert len(set(kept)) == 30
    order = Order(views, 512, subset=kept)  # training sees every view of what is kept
    trained = [int(i) for n in views.numbers for i in np.array(views.shard(n).ids)[order.kept(n)]]
    assert len(trained) > 2 * len(set(trained))


def test_a_cache_without_pixels_has_pictures_where_images_are_given(world, oracles, tmp_path, capsys):
    """Catches a run of hours that ends in an error at its last step, the pictures."""
    kind = {"max_tokens": 64, "patches": False, "pixels": False, "shard_images": 20, "progress": False}
    lean = data.cache(world.folder / "images", oracles, tmp_path / "c", **kind)
    words = ["--features", str(lean.path), "--levels", "12", "4", "--keep", "30", "--out", str(tmp_path / "out")]
    curate.main(words)
    assert "no contact sheet" in capsys.readouterr().out and len(np.load(tmp_path / "out/kept.npy")) == 30
    with pytest.raises(ValueError, match="was made of other images than"):  # before the work, not after it
        curate.main([*words[:-1], str(tmp_path / "none"), "--images", str(world.folder)])
    assert not (tmp_path / "none").exists()
    photos = Path(shutil.copytree(world.folder / "images", tmp_path / "photos"))
    curate.main([*words, "--images", str(photos)])
    sheet = (tmp_path / "out/clusters.png").read_bytes()
    os.utime(photos / "000003.png", (1, 1))  # of its shard no picture is believed, and the others are shown
    capsys.readouterr()
    curate.main([*words, "--images", str(photos)])
    assert "cannot be read" in capsys.readouterr().out and (tmp_path / "out/clusters.png").read_bytes() != sheet
    assert (np.asarray(Image.open(tmp_path / "out/clusters.png")) != 255).any(2).mean() > 0.2


def test_a_tree_of_other_flags_is_refused_but_keep_may_change(tmp_path, features):
    """Catches a stale tree reused in silence."""
    out = tmp_path / "out"
    curate.main(command(tmp_path, out)[2:])
    with pytest.raises(ValueError, match=r"tree of another run.*seed"):
        curate.main(command(tmp_path, out, "--seed", "1")[2:])
    curate.main(command(tmp_path, out, "--keep", "99")[2:])
    assert len(np.load(out / "kept.npy")) == 99


@pytest.mark.parametrize(
    "change, words",
    [
        (["--features", "nothing.npy"], "nothing.npy"),
        (["--levels", "5", "50"], "decreasing"),
        (["--keep", "5000"], "keep=5000"),
        (["--keeps", "5"], "--keeps"),
        (["--images", "."], "images for 2000 rows"),
    ],
)
def test_command_gives_one_line_for_bad_input(tmp_path, features, capsys, change, words, monkeypatch):
    """Catches a traceback, and abbreviated or unknown flags taken."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("one.png")
    with pytest.raises(SystemExit) as stop:
        run_command("c", lambda: curate.main([*command(tmp_path, tmp_path / "out")[2:], *change]), "")
    assert stop.value.code == (2 if words == "--keeps" else 1)
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("split", [(), ("--split-above", "50")])
def test_two_ranks_keep_the_same_ids(tmp_path, split):
    """Catches whatever depends on which rank holds a point: local seeds, local refills, float sums in rank order, and
    in the two-step split a cell's labels lost on the other rank."""
    x, _ = blobs(40_000, 8)  # five blocks: two on one rank, three on the other
    np.save(tmp_path / "x.npy", x)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    two_ranks = command(tmp_path, tmp_path / "two", *split, before=launch)
    done = subprocess.run(two_ranks, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    curate.main(command(tmp_path, tmp_path / "one", *split)[2:])
    np.testing.assert_array_equal(np.load(tmp_path / "one" / "kept.npy"), np.load(tmp_path / "two" / "kept.npy"))
    for level in ("level1.npz", "level2.npz"):
        with np.load(tmp_path / "one" / level) as one, np.load(tmp_path / "two" / level) as two:
            assert all(np.array_equal(one[name], two[name]) for name in one)


def test_features_larger_than_memory_are_read_in_blocks(tmp_path):
    """Catches a whole matrix read at once, or an N x K one made: no read may exceed 8192 rows, a block (the
    sample for the mean is 4096, the pool of these 100 clusters 3200)."""
    x, _ = blobs(20000, 8)
    np.save(tmp_path / "x.npy", x)

    class Counting:
        shape, largest = x.shape, 0

        def __init__(self):
            self.x = np.load(tmp_path / "x.npy", mmap_mode="r")

        def __getitem__(self, index):
            rows = self.x[index]
            Counting.largest = max(Counting.largest, len(rows))
            return rows

        def __len__(self):
            return len(self.x)

    kept = curate.curate(Counting(), [100, 10], 50)
    assert Counting.largest <= curate.BLOCK
    np.testing.assert_array_equal(kept, curate.curate(x, [100, 10], 50))


def test_tensorstore_is_read_like_numpy(tmp_path):
    """Catches a lazy slice taken for an array."""
    tensorstore = pytest.importorskip("tensorstore")
    x, _ = blobs(3000, 8)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "z")}}
    store = tensorstore.open(spec, create=True, dtype=tensorstore.float32, shape=x.shape).result()
    store.write(x).result()
    np.testing.assert_array_equal(curate.kmeans(store, k=20)[1], curate.kmeans(x, k=20)[1])


def test_a_tree_belongs_to_all_of_its_features_and_a_level_to_its_tree(tmp_path):
    """Catches a tree reused after one row changed (64 were looked at), and a level file of another tree."""
    x = np.random.default_rng(0).normal(size=(500, 6)).astype(np.float32)
    words = ["--features", str(tmp_path / "x.npy"), "--levels", "20", "5", "--keep", "30", "--device", "cpu"]
    np.save(tmp_path / "x.npy", x)
    curate.main([*words, "--out", str(tmp_path / "a")])
    kept = np.load(tmp_path / "a/kept.npy")
    curate.main([*words, "--out", str(tmp_path / "a")])
    assert np.array_equal(kept, np.load(tmp_path / "a/kept.npy"))
    x[[201, 202]] = x[[202, 201]]  # sums stay as they are
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match=r"tree of another run.*hash"):
        curate.main([*words, "--out", str(tmp_path / "a")])
    curate.main([*words, "--out", str(tmp_path / "b")])
    for name, raw in (
        ("level1.npz", (tmp_path / "a/level1.npz").read_bytes()),
        ("level2.npz", (tmp_path / "a/level2.npz").read_bytes()),
        ("level1.npz", (tmp_path / "b/level1.npz").read_bytes()[:-40]),
        ("level1.npz", b""),
        ("tree.json", b"[]"),
        ("tree.json", b"{"),
    ):
        whole = (tmp_path / "b" / name).read_bytes()
        (tmp_path / "b" / name).write_bytes(raw)
        with pytest.raises(ValueError, match=name if raw[:1] != b"[" else "tree"):
            curate.main([*words, "--out", str(tmp_path / "b")])
        (tmp_path / "b" / name).write_bytes(whole)
    curate.main([*words, "--out", str(tmp_path / "b")])


def test_the_hash_of_features_is_that_of_their_bytes_for_any_threads():
    """Catches a hash of a sample, and one that depends on how the rows were read."""
    x = np.random.default_rng(0).normal(size=(20000, 3)).astype(np.float32)
    hashes = {curate.Points(x).hash_rows(), curate.Points(torch.from_numpy(x)).hash_rows()}
    points = curate.Points(x)
    points.threads = 1
    assert hashes == {points.hash_rows()}
    for at in (0, 8191, 8192, 19999):
        changed = x.copy()
        changed[at, 2] = np.nextafter(changed[at, 2], np.float32(9))
        assert curate.Points(changed).hash_rows() not in hashes
