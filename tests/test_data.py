"""Packs, the cache, and the loader's order."""

import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import amoe
import data
import evaluate
import toy
from common.order import FULL, OPEN_PACKS, WINDOW, Order, Position, held_out
from common.sources import find_sources
from images import Images, load_image
from kernels import rope
from teachers import load_teachers

ROOT = Path(__file__).resolve().parents[1]


# ---- packs ----


def test_a_pack_holds_its_images(random_images):
    """Catches starts that leave out the special tokens, and padding that belongs to the last image."""
    rows, shapes = random_images
    batch = data.pack(rows, shapes, n_tokens=120, ids=[5, 6, 7, 8, 9])
    assert (batch.n_tokens, batch.n_images) == (120, 5) and batch.ids.tolist() == [5, 6, 7, 8, 9]
    for i, (r, (h, w)) in enumerate(zip(rows, shapes, strict=True)):
        assert torch.equal(batch.rows[batch.patch_rows(i)], r)
        assert torch.equal(batch.yx[batch.patch_rows(i)], rope.positions(h, w))
        assert batch.images()[i].shape == (16 * h, 16 * w, 3)
        assert (batch.image[int(batch.starts[i]) : int(batch.starts[i + 1])] == i).all()
    used = int(batch.starts[-1])
    assert (batch.image[used:] == 5).all() and batch.rows[used:].sum() == 0 and batch.yx[used:].abs().sum() == 0
    assert batch.rows[:5].sum() == 0
    types = [batch.rows, batch.image, batch.yx, batch.starts, batch.shapes, batch.ids]
    assert [t.dtype for t in types] == [torch.uint8, torch.int32, torch.float32, torch.int32, torch.int32, torch.int64]


def test_what_does_not_fit_a_pack_is_an_error(random_images):
    """Catches silent truncation."""
    rows, shapes = random_images
    with pytest.raises(ValueError, match="need 94 tokens"):
        data.pack(rows, shapes, n_tokens=90)
    with pytest.raises(ValueError, match="image 1"):
        data.pack(rows, [shapes[0], (9, 9), *shapes[2:]])
    with pytest.raises(ValueError, match=r"image 1 .* of torch\.uint8 and has .* of torch\.float32"):
        data.pack([rows[0], amoe.normalise(rows[1]), *rows[2:]], shapes)
    with pytest.raises(ValueError, match="at least one"):
        data.pack([], [])


# ---- the cache ----


def test_the_cache_holds_what_the_teachers_said(cache, world, oracles):
    """Catches features zipped to the wrong images, and a PHI-S of one teacher used for the other."""
    assert [s.name for s in cache.spaces] == ["text", "dense"] and len(cache.shards) == 4
    entries = [(3, 7), (0, 2), (1, 19)]
    batch = cache.read(entries)
    for teacher, space in zip(oracles, cache.spaces, strict=True):
        said = teacher(batch)
        target = batch.targets[space.name]
        assert torch.allclose(target["summary"], said["summary"], atol=1e-5)
        if space.registers:
            assert torch.allclose(target["registers"], said["registers"], atol=1e-5)
        for i in range(3):
            y = amoe.dequantise(target["patch"][batch.patch_rows(i)])
            error = y - space.phi_s.apply(said["patch"][batch.patch_rows(i)])
            assert error.abs().max() <= amoe.INT8_STEP / 2 + 1e-4
    names = [cache.shard(n).meta[i]["source"] for n, i in entries]
    assert names == ["000067.png", "000002.png", "000039.png"]
    assert [world.index[i] for i in batch.ids.tolist()] == [67, 2, 39]


def test_variances_make_errors_of_summaries_and_registers_comparable(cache, oracles):
    """Catches a variance over all numbers at once, which counts the means' spread between channels."""
    summaries = torch.cat([torch.from_numpy(s.all("summary.dense")) for s in cache.shards])
    registers = torch.cat([torch.from_numpy(s.all("registers.dense")) for s in cache.shards]).unflatten(1, (2, -1))
    space = cache.spaces[1]
    assert space.summary_variance == pytest.approx(summaries.var(0, correction=0).mean().item(), rel=1e-4)
    want = registers.var(0, correction=0).mean(1).tolist()
    assert space.register_variance == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(("dtype", "kind", "error"), [("bf16", torch.bfloat16, 0.02), ("float32", torch.float32, 1e-6)])
def test_features_stored_as_floats_come_back(world, oracles, tmp_path, dtype, kind, error):
    """Catches reading bfloat16's bits as integers, and float32 rounded on its way."""
    cache = data.cache(world.folder / "images", oracles, tmp_path / "c", max_tokens=64, dtype=dtype, progress=False)
    batch = cache.read([(0, 4)])
    said = oracles[1](batch)["patch"][batch.patch_rows(0)]
    got = batch.targets["dense"]["patch"]
    assert got.dtype == kind
    want = cache.spaces[1].phi_s.apply(said)
    assert (got[batch.patch_rows(0)].float() - want).abs().max() < error * want.abs().max()
    assert not data.complaints_of(cache, 0)


def test_signal_to_noise_counts_clipping_and_rounding(cache, oracles):
    """Catches noise reckoned from the stored integers alone, which hold neither clipping nor what was rounded away."""
    said, (_, dense) = data.signal_to_noise(cache), cache.spaces
    signal = noise = 0.0
    for number in cache.numbers:
        batch = cache.read([(number, i) for i in range(20)])
        y = dense.phi_s.apply(oracles[1](batch)["patch"])[batch.is_patch].double()
        stored = amoe.dequantise(batch.targets["dense"]["patch"])[batch.is_patch]
        signal, noise = signal + y.square().sum(), noise + (y - stored).square().sum()
    assert said["dense"] == pytest.approx(10 * float((signal / noise).log10()), abs=1e-3)
    assert 30 < said["dense"] < 50


def test_signal_to_noise_is_each_teacher_s_own_however_they_are_listed(world, oracles, tmp_path):
    """Catches a rerun that lists the teachers in another order, whose shards counted for the other teacher."""
    how = {"max_tokens": 64, "shard_images": 40, "dtype": "bf16", "progress": False}
    said = data.signal_to_noise(data.cache(world.folder / "images", oracles, tmp_path, **how))
    shutil.rmtree(tmp_path / "shards" / "00001")
    again = data.signal_to_noise(data.cache(world.folder / "images", oracles[::-1], tmp_path, **how))
    assert again == said and abs(said["text"] - said["dense"]) > 1e-3


def test_tensorstore_alone_opens_a_shard(cache):
    """Catches a format that needs this repository to be read."""
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{cache.path}/shards/00002/patch.text/"}}
    array = tensorstore.open(spec).result().read().result()
    assert array.shape == (cache.shard(2).starts[-1], 64) and array.any()
    spec["kvstore"]["path"] = f"{cache.path}/summary.text/"
    array = tensorstore.open(spec).result().read().result()
    assert array.shape == (80, 64) and np.array_equal(array[40:60], cache.shard(2).all("summary.text"))


def test_bad_images_are_skipped_counted_and_named(world, oracles, tmp_path):
    """Catches a skip that shifts the features of later images, and a silent one."""
    folder = tmp_path / "images"
    shutil.copytree(world.folder / "images", folder)
    (folder / "000010.png").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(folder / "000030.png")
    cache = data.cache(folder, oracles, tmp_path / "c", max_tokens=64, shard_images=20, progress=False)
    skipped = [json.loads(line) for line in (tmp_path / "c" / "skipped.jsonl").read_text().splitlines()]
    assert [s["source"] for s in skipped] == ["000010.png", "000030.png"] and all(s["reason"] for s in skipped)
    batch = cache.read([(0, 10)])
    assert cache.shard(0).meta[10]["source"] == "000011.png"
    assert torch.allclose(batch.targets["text"]["summary"], oracles[0](batch)["summary"], atol=1e-5)
    for i in range(20, 28):
        (folder / f"0000{i}.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"of 80 images are unusable.*skipped.jsonl"):
        data.cache(folder, oracles, tmp_path / "d", max_tokens=64, shard_images=20, progress=False)


def test_views_are_what_teachers_saw(world, oracles, tmp_path):
    """Catches a view drawn anew for the teacher, or stored other than it was cut: the stored box gives the pixels."""
    images = world.folder / "images"
    cache = data.cache(images, oracles, tmp_path, max_tokens=64, views=3, shard_images=20, progress=False)
    shard = cache.shard(1)
    assert len(shard.ids) == 60 and len(set(shard.ids.tolist())) == 20
    views = shard.all("views")
    assert views[:6, 0].tolist() == [0, 1, 2, 0, 1, 2] and 0 < views[:, 5].sum() < 40
    sources = {s.id: s for s in find_sources(images)}
    for i in range(60):
        box, flip = tuple(views[i, 1:5].tolist()), bool(views[i, 5])
        seen = load_image(sources[int(shard.ids[i])], max_tokens=64, box=box, flip=flip, draft=True)
        batch = cache.read([(1, i)])
        assert torch.equal(seen, batch.images()[0])
        said = oracles[0](batch)  # the oracles read scenes by id and shape
        assert torch.allclose(batch.targets["text"]["summary"], said["summary"], atol=1e-5)


def test_a_plug_in_sees_the_stored_pixels(plug_in, tmp_path):
    """Catches features of one view beside the pixels of another: this teacher's features are its pixels."""
    for i in range(6):
        Image.effect_noise((60 + 9 * i, 64), 90).convert("RGB").save(tmp_path / f"{i}.jpg")
    run = load_teachers([plug_in], tmp_path, "cpu")
    cache = data.cache(tmp_path, run, tmp_path / "c", views=4, dtype="bf16", progress=False)
    batch = cache.read([(0, i) for i in range(24)])
    for i in range(24):
        at = batch.patch_rows(i)
        patch = cache.spaces[0].phi_s.invert(batch.targets["t"]["patch"][at].float())
        assert (patch - batch.rows[at, :12].float()).abs().max() < 3  # bfloat16's rounding, of 255
        assert torch.equal(batch.targets["t"]["summary"][i], batch.rows[at][0, :12].float())


def test_tars_captions_and_labels_go_into_the_cache(plug_in, tmp_path):
    """Catches a tar whose members all decode as its first, and captions that stay behind."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(8):
            Image.effect_noise((32 + 16 * i, 64), 90).convert("RGB").save(tmp_path / "x.png")
            (tmp_path / "x.txt").write_text(f"the {i}th")
            (tmp_path / "x.cls").write_text(str(i % 3))
            for suffix in ("png", "txt", "cls"):
                tar.add(tmp_path / f"x.{suffix}", f"{i}.{suffix}")
    cache = data.cache(tmp_path / "a.tar", load_teachers([plug_in], tmp_path, "cpu"), tmp_path / "c", progress=False)
    want = [{"source": f"a.tar/{i}.png", "caption": f"the {i}th", "category": str(i % 3)} for i in range(8)]
    assert [cache.meta((0, i)) for i in range(8)] == want
    assert cache.shard(0).shapes.tolist() == [[4, 2 + i] for i in range(8)]


def test_a_subset_is_cached_alone(world, oracles, tmp_path, capsys):
    """Catches a subset taken as indices, one that changes the ids, and ids of other images left out in silence."""
    ids = [s.id for s in find_sources(world.folder / "images")][10:15]
    for more, said in (([], ""), ([5, 6, 6], "2 of the 7 ids of --subset are of other images")):
        cache = data.cache(world.folder / "images", oracles, tmp_path, max_tokens=64, subset=ids + more, progress=False)
        assert cache.shard(0).ids.tolist() == ids and said in [*capsys.readouterr().err.splitlines(), ""]
    with pytest.raises(ValueError, match="--subset"):
        data.cache(world.folder / "images", oracles, tmp_path / "b", subset=[5], progress=False)


def test_an_unfinished_subset_without_pixels_is_not_said_to_be_of_other_images(world, oracles, tmp_path):
    """Catches an error that sends the user to look for other images, where the cache lacks shards."""
    ids = [s.id for s in find_sources(world.folder / "images")][10:30]
    kind = {"max_tokens": 64, "pixels": False, "shard_images": 7, "shard_range": (0, 2), "progress": False}
    data.cache(world.folder / "images", oracles, tmp_path / "c", subset=ids, **kind)
    with pytest.raises(ValueError, match="lacks shards, so the images of its --subset are not known"):
        data.Cache(tmp_path / "c", world.folder / "images")


def test_a_cache_without_a_shard_is_described(cache, tmp_path, capsys):
    """Catches a sum over no shards: a writer that was killed early left a cache whose info was a traceback."""
    shutil.copytree(cache.path, tmp_path / "cache", ignore=lambda folder, names: {"shards", "index"} & set(names))
    assert not data.main(["info", str(tmp_path / "cache")])
    said = capsys.readouterr().out
    assert "0 of 4 shards" in said and "text: 64 channels" in said and "noise" not in said


def test_a_table_of_sources_that_is_not_kept_is_described(world, tmp_path, monkeypatch, capsys):
    """Catches sizes asked of files that are gone: where nothing can be kept, or a folder changed a moment ago."""
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("AMOE_INDEX", str(tmp_path / "file" / "index"))
    data.main(["index", "--images", str(world.folder / "images")])
    assert "80 images" in capsys.readouterr().out


def test_a_relative_path_and_a_link_are_what_they_name_now(cache, tmp_path, monkeypatch):
    """Catches stores that are remembered by a path as it was given: another folder's cache was read in silence."""
    for name in ("whole", "part"):
        shutil.copytree(cache.path, tmp_path / name / "cache")
    for left_out in ("index", "shards/00003"):
        shutil.rmtree(tmp_path / "part/cache" / left_out)
    found = []
    for name in ("whole", "part"):
        monkeypatch.chdir(tmp_path / name)
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / name / "cache")
        found += [len(data.Cache(path).all_ids()) for path in ("cache", tmp_path / "link")]
    assert found == [80, 80, 60, 60]


def test_a_cache_in_memory_is_read_back(cache, world, oracles):
    """Catches a store that every open begins anew, and paths that are taken for folders."""
    url = "memory://bucket/cache"
    made = data.cache(world.folder / "images", oracles, url, max_tokens=64, shard_images=20, progress=False)
    assert data.verify(data.Cache(url)) == []
    entries = [(3, 7), (0, 2)]
    a, b = made.read(entries), cache.read(entries)
    assert torch.equal(a.rows, b.rows) and torch.equal(a.targets["dense"]["patch"], b.targets["dense"]["patch"])
    assert [s.record for s in made.shards] == [s.record for s in cache.shards]


def test_large_shards_are_read_by_image(cache, monkeypatch):
    """Catches the two ways of reading, whole arrays and rows, that disagree."""
    entries = [(3, 7), (0, 2), (0, 3)]
    whole = data.Cache(cache.path).read(entries, 400)
    monkeypatch.setattr(data, "MEMORY", 1000)
    by_image = data.Cache(cache.path)
    read = by_image.read(entries, 400)
    assert sum(a.nbytes for a in by_image.in_memory.values()) <= 1000
    assert torch.equal(whole.rows, read.rows) and torch.equal(whole.yx, read.yx)
    for name, target in whole.targets.items():
        assert all(torch.equal(value, read.targets[name][kind]) for kind, value in target.items())


def test_summaries_are_read_when_sliced(world, oracles, tmp_path):
    """Catches rows shifted by images that were left out, whose places in the one array stay empty."""
    folder = tmp_path / "images"
    shutil.copytree(world.folder / "images", folder)
    for i in (10, 30, 31, 79):
        (folder / f"0000{i}.png").write_bytes(b"junk")
    cache = data.cache(folder, oracles, tmp_path / "c", max_tokens=64, shard_images=20, progress=False)
    ids, features = data.open_summaries(tmp_path / "c", "dense")
    want = np.concatenate([shard.all("summary.dense") for shard in cache.shards])
    assert ids.tolist() == [int(i) for shard in cache.shards for i in shard.ids] and features.shape == want.shape == (
        76,
        96,
    )
    assert np.array_equal(features[:], want) and np.array_equal(features[7:33], want[7:33])
    at = np.random.default_rng(0).integers(76, size=30)
    assert np.array_equal(features[at], want[at]) and features[5:5].shape == (0, 96)
    shutil.rmtree(tmp_path / "c/index")
    again, rows = data.open_summaries(tmp_path / "c", "dense")
    assert np.array_equal(again, ids) and np.array_equal(rows[:], want)
    shown = data.thumbnails(tmp_path / "c", ids[[50, 3]])
    assert np.array_equal(shown[1], cache.read([(0, 3)]).images()[0].numpy())
    (tmp_path / "c/summary.dense/c/1/0").unlink()
    with pytest.raises(ValueError, match=r"summary\.dense"):
        data.open_summaries(tmp_path / "c", "dense")[1][15:25]


def test_a_cache_of_summaries_alone(world, oracles, cache, tmp_path):
    """Catches patches that are stored all the same, and other summaries than those of a cache with patches."""
    kind = {"max_tokens": 64, "shard_images": 20, "progress": False}
    alone = data.cache(world.folder / "images", oracles, tmp_path / "c", patches=False, **kind)
    assert not list((tmp_path / "c").glob("shards/*/patch*")) and data.verify(alone) == []
    assert data.open_summaries(tmp_path / "c", "text")[1].shape == (80, 64)
    assert len(data.thumbnails(tmp_path / "c", alone.all_ids()[:2])) == 2
    said, want = alone.read([(0, 0), (3, 4)]), cache.read([(0, 0), (3, 4)])
    assert torch.equal(said.rows, want.rows) and set(said.targets["dense"]) == {"summary", "registers"}
    assert all(torch.equal(x, want.targets[t][kind]) for t, kinds in said.targets.items() for kind, x in kinds.items())
    data.info(alone)


def alike(a, b):
    """Whether two Batches are equal, bit for bit, targets included."""
    fields = ("rows", "image", "yx", "starts", "shapes", "ids")
    kinds = [(t, kind) for t in b.targets for kind in b.targets[t]]
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields) and all(
        torch.equal(a.targets[t][kind], b.targets[t][kind]) for t, kind in kinds
    )


def test_a_cache_without_pixels_gives_the_batches_of_one_with_them(plug_in, tmp_path):
    """Catches a view drawn anew, indices shifted by an image that was left out, and a subset taken for all."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(24):
        Image.effect_noise((60 + 9 * i, 64), 90).convert("RGB").save(folder / f"{i:02d}.jpg")
    (folder / "05.jpg").write_bytes(b"junk")
    (folder / "14.jpg").write_bytes((folder / "13.jpg").read_bytes()[:1500])  # its header is sound
    teachers, ids = load_teachers([plug_in], folder, "cpu"), [s.id for s in find_sources(folder)][2:]
    kind = {"views": 3, "shard_images": 8, "max_tokens": [20, 40], "max_skipped": 0.2, "progress": False}
    for subset in (None, ids):
        kept, lean = (
            data.cache(folder, teachers, tmp_path / f"{pixels}{subset is None}", subset=subset, pixels=pixels, **kind)
            for pixels in (True, False)
        )
        assert not list(Path(lean.path).glob("shards/*/pixels")) and data.verify(lean) == []
        for opened in (lean, data.Cache(lean.path, folder)):
            for number in kept.numbers:
                entries = [(number, i) for i in range(len(kept.shard(number).ids))][::-2]
                assert alike(opened.read(entries), kept.read(entries))
        steps = [data.loader(Order(c, 300), Position()) for c in (lean, kept)]
        assert all(alike(next(steps[0])[0], next(steps[1])[0]) for _ in range(12))
        pictures = [data.thumbnails(c.path, kept.all_ids()[3:30:3], folder) for c in (lean, kept)]
        assert all(np.array_equal(a, b) for a, b in zip(*pictures, strict=True))


def test_a_cache_without_pixels_refuses_other_and_changed_images(plug_in, tmp_path):
    """Catches a wrong image under an id: other images, one more, one changed before or after the table was made."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (64, 64), (20 * i, 0, 0)).save(folder / f"{i:02d}.png")
    path = tmp_path / "c"
    teachers = load_teachers([plug_in], folder, "cpu")
    lean = data.cache(folder, teachers, path, pixels=False, shard_images=4, progress=False)
    with pytest.raises(ValueError, match="holds no pixels: give --images"):
        data.Cache(path).read([(0, 0)])
    shutil.copytree(folder, tmp_path / "fewer")
    (tmp_path / "fewer/03.png").unlink()
    with pytest.raises(ValueError, match="made of other images than"):
        data.Cache(path, tmp_path / "fewer")
    Image.new("RGB", (64, 64), "blue").save(folder / "05.png")
    with pytest.raises(data.Damage, match=r"shard 00001, image 05\.png: has changed"):
        lean.read([(1, 0), (1, 1)])
    with pytest.raises(data.Damage, match="shard 00001: its images are not those"):
        data.Cache(path, folder).read([(1, 0)])
    Image.new("RGB", (64, 64)).save(folder / "04b.png")
    more = data.Cache(path, folder)  # as of a larger folder, a subset
    assert int(more.read([(2, 3)]).rows[5:].max()) == 220
    with pytest.raises(data.Damage, match="shard 00001"):
        more.read([(1, 0)])
    batch = data.read_pack(more, [(1, 0), (2, 1)], 100, 4, on_corrupt="skip")
    assert batch.ids.tolist() == [int(more.shard(2).ids[1])]


def test_a_cache_of_summaries_without_pixels_is_trained_on_and_its_student_measured(cache, world, oracles, tmp_path):
    """Catches a loss or a measure that needs patches or pixels: the summaries' terms are those of a full cache."""
    images, kind = world.folder / "images", {"max_tokens": 64, "shard_images": 20, "progress": False}
    data.cache(images, oracles, tmp_path / "c", patches=False, pixels=False, **kind)
    runs = []
    for path, more in ((tmp_path / "c", ["--images", images]), (cache.path, [])):
        words = ["--steps", 2, "--tokens", 400, "--log-every", 1, "--save-every", 1, "--cache"]
        out = tmp_path / f"run{len(runs)}"
        command = [sys.executable, "train.py", *map(str, [*words, path, *more, "--out", out])]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        runs.append(([x for x in lines if "loss" in x], json.loads((out / "result.json").read_text())))
    (lean, scores), (full, wanted) = runs
    assert len(lean) == 2 and all(np.isfinite(x["loss"]) for x in lean)
    first = [key for key in full[0] if key.endswith(("_summary", "_registers", "_arkd"))]
    assert len(first) == 5 and all(lean[0][key] == pytest.approx(full[0][key], rel=1e-5) for key in first)
    patches = [key for key in wanted["student"] if "patch" in key]
    assert len(patches) == 2 and set(wanted["student"]) - set(scores["student"]) == set(patches)
    assert (tmp_path / "run0/pca.png").exists()


def test_the_size_is_said_before_and_a_disk_without_room_is_an_error(world, oracles, tmp_path, monkeypatch, capsys):
    """Catches a cache that fills the disk after a day, and an estimate that is off."""
    kind = {"max_tokens": 64, "shard_images": 20}
    data.cache(world.folder / "images", oracles, tmp_path / "c", **kind)
    said = float(re.search(r"the whole cache: ([\d.]+) MiB", capsys.readouterr().out)[1]) * 2**20
    size = sum(p.stat().st_size for p in (tmp_path / "c").rglob("*") if p.is_file() and p.parent.name != "teachers")
    assert 0.7 < said / size < 1.1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(ValueError, match="free and what is left to write takes"):
        data.cache(world.folder / "images", oracles, tmp_path / "d", **kind)
    assert not (tmp_path / "d/shards").exists()


# ---- the order ----


def walk(order, n, position=None):
    packs = order.packs(Position() if position is None else position)
    return [next(packs) for _ in range(n)]


def test_an_epoch_shows_every_trained_image_about_once(cache):
    """Catches images lost with the last, underfull pack, and held-out images that are trained on."""
    order = Order(cache, 300, seed=3)
    seen = [image for pack, position in walk(order, 60) if position.epoch < 2 for image in pack]
    trained = [(n, i) for n in cache.numbers for i in order.kept(n).tolist()]
    assert (
        set(seen) == set(trained) and len(trained) == 80 - held_out(np.concatenate([s.ids for s in cache.shards])).sum()
    )
    assert max(seen.count(image) for image in trained) <= 3


def test_packs_are_full(cache):
    """Catches a pack closed at the first image that does not fit."""
    order = Order(cache, 1000)
    fills = [sum(5 + int(cache.shard(n).shapes[i].prod()) for n, i in pack) / 1000 for pack, _ in walk(order, 40)]
    assert np.mean(fills) > 0.97 and max(fills) <= 1


class Synthetic:
    """A dataset of shapes alone."""

    path, numbers, n_shards = "synthetic", list(range(40)), 40

    def shard(self, number):
        random = np.random.default_rng(number)
        shapes = random.integers(8, 33, (256, 2)).astype(np.int32)  # 64 to 1024 patches
        return SimpleNamespace(ids=np.arange(256) * 10 + 1, shapes=shapes)


@pytest.mark.parametrize("n_tokens", [4096, 16384])
def test_packs_of_mixed_resolutions_are_full(n_tokens):
    """Catches next-fit, which leaves a tenth of a pack of 4096 tokens empty."""
    dataset = Synthetic()
    dataset.shard = functools.cache(dataset.shard)
    order = Order(dataset, n_tokens)
    fills = [sum(map(order.length, pack)) / n_tokens for pack, _ in walk(order, 500)]
    assert np.mean(fills) > 0.97 and max(fills) <= 1


def planned_by_asking_every_pack(order, position):
    """The rule, as plainly as it can be said: every image into the first pack with room for it."""
    numbers = np.random.default_rng([order.seed, position.epoch]).permutation(order.dataset.numbers)
    numbers = numbers[position.window * WINDOW : (position.window + 1) * WINDOW].tolist()
    images = [(number, int(i)) for number in numbers for i in order.kept(number)]
    shuffle = np.random.default_rng([order.seed, position.epoch, position.window + 1]).permutation(len(images))
    room, packs = [], []
    for image in [*position.carried, *(images[j] for j in shuffle)]:
        length = order.length(image)
        p = next((p for p in range(len(packs)) if room[p] >= length), len(packs))
        if p == len(packs):
            packs.append([])
            room.append(order.n_tokens)
        packs[p].append(image)
        room[p] -= length
    late = [p for p in range(len(packs))[-OPEN_PACKS:] if room[p] > (1 - FULL) * order.n_tokens]
    carried = tuple(image for p in late for image in packs[p])
    return [sorted(packs[p], key=order.length) for p in range(len(packs)) if p not in late], carried


@pytest.mark.parametrize(
    "low, high, n_tokens", [(8, 33, 2048), (8, 33, 16384), (15, 17, 512), (1, 23, 600), (16, 17, 300)]
)
def test_packs_are_those_of_first_fit(low, high, n_tokens):
    """Catches a pack taken for full while a later image fits it, and a sort that is not stable."""

    def shard(number):
        shapes = np.random.default_rng(number).integers(low, high, (40, 2)).astype(np.int32)
        return SimpleNamespace(ids=np.arange(40) + 40 * number, shapes=shapes)

    n, shard = 2 * WINDOW + 3, functools.cache(shard)
    dataset = SimpleNamespace(path="synthetic", numbers=list(range(n)), n_shards=n, shard=shard)
    order, position = Order(dataset, n_tokens, seed=5, subset=np.arange(0, 1400, 3)), Position()
    for epoch, window in ((0, 0), (0, 1), (0, 2), (1, 0)):
        position = Position(epoch, window, 0, position.carried)
        packs, carried = order.plan(position)
        assert (packs, carried) == planned_by_asking_every_pack(order, position)
        assert all(i in order.subset for p in packs for i in (dataset.shard(n).ids[j] for n, j in p))
        position = Position(carried=carried)


def test_the_order_goes_on_from_any_position(cache):
    """Catches a sampler that begins anew on resume."""
    order = Order(cache, 300, seed=1)
    whole = walk(order, 40)
    for cut in (1, 7, 20):
        assert walk(order, 40 - cut, whole[cut - 1][1]) == whole[cut:]
    assert walk(Order(cache, 300, seed=2), 40) != whole


def test_images_carried_over_from_a_shard_written_anew_are_asked_for_again(cache):
    """Catches held-out images that are trained on, and numbers beyond a shard, after a resume."""
    order = data.Order(cache, 400, seed=0)
    out = next((number, i) for number in cache.numbers for i in range(20) if i not in order.kept(number))
    into = next((number, int(i)) for number in cache.numbers for i in order.kept(number))
    carried = (out, into, (cache.numbers[0], 20), (cache.numbers[0], 10**6))
    images, _ = order.in_window(Position(0, 1, 0, carried))
    assert tuple(images[0].tolist()) == into and out not in map(tuple, images.tolist()) and images[:, 1].max() < 20


@pytest.mark.parametrize("threads", [0, 2])
def test_ranks_and_threads_share_one_global_order(cache, threads):
    """Catches ranks that draw orders of their own, and threads that return packs out of turn."""
    order = Order(cache, 300, seed=1)
    whole = [[int(cache.shard(n).ids[i]) for n, i in pack] for pack, _ in walk(order, 8)]
    ranks = []
    for rank in range(2):
        batches = iter(data.loader(order, Position(), rank, 2, 2, threads))
        ranks.append([next(batches) for _ in range(4)])
    assert [ranks[n % 2][n // 2][0].ids.tolist() for n in range(8)] == whole
    after = walk(order, 8)[3][1]
    assert all(ranks[r][k][1] == after for r in range(2) for k in range(2))


def test_a_pack_without_a_readable_image_gives_way_to_the_next(cache, world, tmp_path, capsys):
    """Catches a run, or a measure, that one image ends which does not decode and is alone in its pack; other packs for
    one rank than for two; and an endless search where nothing can be read."""
    for path in sorted((world.folder / "images").iterdir())[:12]:
        shutil.copy(path, tmp_path)
    dataset = Images(find_sources(tmp_path), max_tokens=64, min_tokens=60)
    packs = walk(Order(dataset, 69), 8)
    (number, i), position = packs[3][0][0], packs[3][1]
    name = Path(dataset.meta((number, i))["source"])
    raw = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(raw[: len(raw) // 2])  # a sound header: only decoding finds out
    dataset = Images(find_sources(tmp_path), max_tokens=64, min_tokens=60)
    order = Order(dataset, 69)
    for rank, world_size in ((0, 1), (1, 2)):
        batches = itertools.islice(data.loader(order, Position(), rank, world_size), 8 // world_size)
        found = [(batch.ids.tolist(), at) for batch, at in batches][3 // world_size]
        assert found == (dataset.read(packs[4][0]).ids.tolist(), position)
    features = evaluate.stream(lambda batch: {"x": {"summary": batch.shapes}}, dataset, evaluate.split(dataset)[0], 69)
    measured = [entry for entry, _, _ in features]
    assert len(measured) == len(evaluate.split(dataset)[0]) - 1 and (number, i) not in measured
    assert capsys.readouterr().err.count(f"skipped: {name}") == 1
    with pytest.raises(ValueError, match="no image that is to be measured can be decoded"):
        evaluate.gather(evaluate.stream(None, dataset, [(number, i)]))
    copy = data.Cache(shutil.copytree(cache.path, tmp_path / "cache"))
    shutil.rmtree(copy.path / "shards")
    with pytest.raises(ValueError, match="no image of a hundred packs in a row can be read"):
        next(data.loader(Order(copy, 69), Position(), on_corrupt="skip"))


def test_a_subset_is_all_that_is_trained_on(cache):
    """Catches a subset taken as indices."""
    ids = cache.shard(0).ids[:12]
    order = Order(cache, 300, subset=ids)
    seen = {int(cache.shard(n).ids[i]) for pack, _ in walk(order, 10) for n, i in pack}
    assert seen == {int(i) for i in ids if not held_out(i)}
    with pytest.raises(ValueError, match="no image to train on"):
        Order(cache, 300, subset=[1, 2])


def test_a_run_says_what_it_trains_on(cache):
    """Catches counts that include what is held out or unusable, and a large dataset whose every shard is opened."""
    held = sum(int(held_out(shard.ids).sum()) for shard in cache.shards)
    assert Order(cache, 300).counts_text() == f"images: {80 - held} to train on, {held} held out"
    ids = cache.shard(0).ids[:12]
    kept = int((~held_out(ids)).sum())
    said = Order(cache, 300, subset=ids).counts_text()
    assert said == f"images: {kept} to train on, {held} held out, {80 - held - kept} left out by --subset"
    said = Order(cache, 300, subset=[*ids, *ids, 1, 2]).counts_text()
    assert said.endswith(f"{80 - held - kept} left out by --subset; 2 ids of --subset are of other images")
    few = held_out(cache.shard(0).ids).sum() + held_out(cache.shard(2).ids).sum()
    said = Order(data.Cache(cache.path), 300).counts_text(2)
    assert said == f"images: about {80 - 2 * few} to train on, about {2 * few} held out"
    shard = SimpleNamespace(ids=np.arange(1, 8), shapes=np.ones((7, 2), np.int32))
    tiny = SimpleNamespace(path="", numbers=[0], n_shards=1, shard=lambda number: shard)
    assert Order(tiny, 300).counts_text().startswith("images: 7 to train on; none is held out")


def test_a_pack_smaller_than_an_image_is_an_error(cache):
    """Catches an endless loop over packs that nothing fits."""
    with pytest.raises(ValueError, match="--tokens 20"):
        walk(Order(cache, 20), 1)


# ---- the toy world and the command line ----


def test_toy_captions_are_understood_and_masks_fit(world, oracles):
    """Catches class names that the text oracle cannot read, and masks of another scene."""
    images = find_sources(world.folder / "images")
    assert images[5].caption == world.scenes[5].caption and images[5].category in toy.CLASSES
    text = oracles[0].encode_text([f"a {name} disc" for name in toy.CLASSES])
    assert len({tuple(row) for row in text.tolist()}) == len(toy.CLASSES)
    mask = np.array(Image.open(world.folder / "masks" / world.name(5)))
    assert mask.shape == (world.scenes[5].height, world.scenes[5].width)
    assert world.scenes[5].label + 1 in np.unique(mask)


def test_the_command_line_caches_informs_and_verifies(plug_in, tmp_path):
    """Catches a traceback where a line would do."""
    for i in range(12):
        Image.effect_noise((40 + 8 * i, 64), 90).convert("RGB").save(tmp_path / f"{i}.png")
    run = lambda *a: subprocess.run([sys.executable, "data.py", *a], cwd=ROOT, capture_output=True, text=True)  # noqa: E731
    made = run("cache", "--images", str(tmp_path), "--teacher", plug_in, "--out", str(tmp_path / "c"))
    assert made.returncode == 0 and "12 images" in made.stdout and "dB" in made.stdout
    assert run("verify", str(tmp_path / "c")).returncode == 0
    for words, named in (
        (("info", str(tmp_path)), "cache.json"),
        (("cache", "--images", "nowhere", "--teacher", plug_in, "--out", "x"), "nowhere"),
        (("cache", "--images", str(tmp_path), "--teacher", "t=gone.py:make", "--out", str(tmp_path / "e")), "gone.py"),
    ):
        bad = run(*words)
        assert bad.returncode != 0 and named in bad.stderr and "Traceback" not in bad.stderr
    assert not os.path.exists(ROOT / "x")
