"""Packs, the cache, and the loader's order."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import amoe
import data
import toy
from images import find_sources

ROOT = Path(__file__).resolve().parents[1]


# ---- packs ----


def test_a_pack_holds_its_images(random_images):
    """Catches starts that leave out the special tokens, and padding that belongs to the last image."""
    rows, shapes = random_images
    batch = data.pack(rows, shapes, n_tokens=120, ids=[5, 6, 7, 8, 9])
    assert (batch.n_tokens, batch.n_images) == (120, 5) and batch.ids.tolist() == [5, 6, 7, 8, 9]
    for i, (r, (h, w)) in enumerate(zip(rows, shapes, strict=True)):
        assert torch.equal(batch.rows[batch.patch_rows(i)], r)
        assert torch.equal(batch.yx[batch.patch_rows(i)], amoe.grid_positions(h, w))
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


def test_spreads_make_every_kind_of_error_comparable(cache, oracles):
    """Catches a variance over all numbers at once, which counts the means' spread between channels."""
    summaries = torch.cat([torch.from_numpy(s.all("summary.dense")) for s in cache.shards])
    registers = torch.cat([torch.from_numpy(s.all("registers.dense")) for s in cache.shards]).unflatten(1, (2, -1))
    space = cache.spaces[1]
    assert space.summary_variance == pytest.approx(summaries.var(0, correction=0).mean().item(), rel=1e-4)
    want = registers.var(0, correction=0).mean(1).tolist()
    assert space.register_variance == pytest.approx(want, rel=1e-4)


def test_bfloat16_features_come_back(world, oracles, tmp_path):
    """Catches reading bfloat16's bits as integers."""
    cache = data.cache(world.folder / "images", oracles, tmp_path / "c", max_tokens=64, dtype="bf16", progress=False)
    batch = cache.read([(0, 4)])
    said = oracles[1](batch)["patch"][batch.patch_rows(0)]
    got = batch.targets["dense"]["patch"]
    assert got.dtype == torch.bfloat16
    want = cache.spaces[1].phi_s.apply(said)
    assert (got[batch.patch_rows(0)].float() - want).abs().max() < 0.02 * want.abs().max()


def test_tensorstore_alone_opens_a_shard(cache):
    """Catches a format that needs this repository to be read."""
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{cache.path}/shards/00002/summary.text/"}}
    array = tensorstore.open(spec).result().read().result()
    assert array.shape == (20, 64) and np.isfinite(array).all()


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


def test_another_cache_in_the_way_is_an_error_naming_both(cache, world, oracles):
    """Catches a rerun with other teachers or settings that mixes two caches."""
    images = world.folder / "images"
    with pytest.raises(ValueError, match=r"dtype 'int8', not 'bf16'"):
        data.cache(images, oracles, cache.path, max_tokens=64, shard_images=20, dtype="bf16", progress=False)
    with pytest.raises(ValueError, match="teachers"):
        data.cache(images, oracles[:1], cache.path, max_tokens=64, shard_images=20, progress=False)
    about = cache.about | {"format": 99}
    other = Path(cache.path).with_name("other")
    other.mkdir(exist_ok=True)
    (other / "cache.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"format 99.*reads 1"):
        data.Cache(other)
    with pytest.raises(ValueError, match=r"no cache\.json"):
        data.Cache(world.folder)


def copy_of(cache, tmp_path):
    return Path(shutil.copytree(cache.path, tmp_path / "copy"))


def test_verify_names_shard_and_array_of_any_flipped_byte(cache, tmp_path):
    """Catches a check of counts in the place of contents."""
    path = copy_of(cache, tmp_path)
    assert data.verify(data.Cache(path)) == []
    random = np.random.default_rng(0)
    files = sorted(p for p in path.glob("shards/*/**/*") if p.is_file())
    for _ in range(30):
        file = files[random.integers(len(files))]
        raw = bytearray(file.read_bytes())
        at = random.integers(len(raw))
        raw[at] ^= 1 << random.integers(8)
        good = file.read_bytes()
        file.write_bytes(raw)
        (complaint,) = data.verify(data.Cache(path))
        parts = file.relative_to(path / "shards").parts
        assert parts[0] in complaint and parts[1] in complaint
        file.write_bytes(good)
    shutil.rmtree(path / "shards" / "00001")
    (complaint,) = data.verify(data.Cache(path))
    assert "00001" in complaint


def test_damage_is_never_trained_on(cache, tmp_path, capsys):
    """Catches fill_missing_data_reads, under which a deleted chunk reads as zeros."""
    path = copy_of(cache, tmp_path)
    pixels = path / "shards/00001/pixels/c/0/0"
    raw = bytearray(pixels.read_bytes())
    raw[2000] ^= 4
    pixels.write_bytes(raw)
    (path / "shards/00002/patch.dense/c/0/0").unlink()
    damaged = data.Cache(path)
    with pytest.raises(data.Damage, match="shard 00001, array pixels"):
        damaged.read([(1, 0)])
    with pytest.raises(data.Damage, match=r"shard 00002, array patch.dense"):
        damaged.read([(2, 5)])
    batch, _ = data.Packs(damaged, 400, on_corrupt="skip")[[(1, 0), (0, 3), (2, 5)], None]
    assert batch.ids.tolist() == [int(damaged.shard(0).ids[3])]
    assert "shard 00001" in capsys.readouterr().err


def test_a_killed_writer_leaves_nothing_half_read_and_a_rerun_finishes(cache, world, tmp_path):
    """Catches a commit record written before the data, and locks that a killed writer left."""
    out = tmp_path / "cache"
    script = (
        f"import toy, data\nworld = toy.World('.', 80)\nprint('begin', flush=True)\n"
        f"data.cache({str(world.folder / 'images')!r}, [toy.TextOracle(world), toy.DenseOracle(world)], {str(out)!r}, "
        f"max_tokens=64, shard_images=20, progress=False)\nprint('done')\n"
    )
    moments = np.random.default_rng(1).uniform(0.02, 0.3, 5)
    for moment in moments:
        process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"begin\n"
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for shard in data.Cache(out).shards if (out / "cache.json").exists() else ():
            assert len(shard.all("pixels")) == shard.record["rows"]
    (out / "shards/00003").mkdir(parents=True, exist_ok=True)
    (out / "shards/00003/pixels.__lock").write_bytes(b"stale")
    assert (
        b"done" in subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    )
    finished = data.Cache(out)
    assert data.verify(finished) == []
    for a, b in zip(cache.shards, finished.shards, strict=True):
        assert a.record == b.record


def test_a_missing_or_damaged_shard_is_not_passed_over_in_silence(cache, tmp_path, capsys):
    """Catches a cache that is whatever its folder happens to hold."""
    path = copy_of(cache, tmp_path)
    shutil.rmtree(path / "shards/00001")
    (path / "shards/00003/shard.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"shard 00001: missing.*--on-corrupt skip"):
        data.Cache(path).sound()
    assert data.Cache(path).sound("skip").numbers == [0, 2]
    said = capsys.readouterr().err
    assert "shard 00001" in said and "shard 00003" in said
    assert data.Cache(cache.path).sound().numbers == [0, 1, 2, 3]


# ---- the order ----


def walk(order, n, position=None):
    packs = order.packs(data.Position() if position is None else position)
    return [next(packs) for _ in range(n)]


def test_an_epoch_shows_every_trained_image_about_once(cache):
    """Catches images lost with the last, underfull pack, and held-out images that are trained on."""
    order = data.Order(cache, 300, seed=3)
    seen = [image for pack, position in walk(order, 60) if position.epoch < 2 for image in pack]
    trained = [(n, i) for n in cache.numbers for i in order.kept(n).tolist()]
    assert (
        set(seen) == set(trained)
        and len(trained) == 80 - data.held_out(np.concatenate([s.ids for s in cache.shards])).sum()
    )
    assert max(seen.count(image) for image in trained) <= 3


def test_packs_are_full(cache):
    """Catches a pack closed at the first image that does not fit."""
    order = data.Order(cache, 1000)
    fills = [sum(5 + int(cache.shard(n).shapes[i].prod()) for n, i in pack) / 1000 for pack, _ in walk(order, 40)]
    assert np.mean(fills) > 0.97 and max(fills) <= 1


def test_the_order_goes_on_from_any_position(cache):
    """Catches a sampler that begins anew on resume."""
    order = data.Order(cache, 300, seed=1)
    whole = walk(order, 40)
    for cut in (1, 7, 20):
        assert walk(order, 40 - cut, whole[cut - 1][1]) == whole[cut:]
    assert walk(data.Order(cache, 300, seed=2), 40) != whole


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_share_one_global_order(cache, workers):
    """Catches ranks that draw orders of their own, and workers that return packs out of turn."""
    order = data.Order(cache, 300, seed=1)
    whole = [[int(cache.shard(n).ids[i]) for n, i in pack] for pack, _ in walk(order, 8)]
    ranks = []
    for rank in range(2):
        batches = iter(data.loader(order, data.Position(), rank, 2, 2, workers))
        ranks.append([next(batches) for _ in range(4)])
    assert [ranks[n % 2][n // 2][0].ids.tolist() for n in range(8)] == whole
    after = walk(order, 8)[3][1]
    assert all(ranks[r][k][1] == after for r in range(2) for k in range(2))


def test_a_subset_is_all_that_is_trained_on(cache):
    """Catches a subset taken as indices."""
    ids = cache.shard(0).ids[:12]
    order = data.Order(cache, 300, subset=ids)
    seen = {int(cache.shard(n).ids[i]) for pack, _ in walk(order, 10) for n, i in pack}
    assert seen == {int(i) for i in ids if not data.held_out(i)}
    with pytest.raises(ValueError, match="no image to train on"):
        data.Order(cache, 300, subset=[1, 2])


def test_a_pack_smaller_than_an_image_is_an_error(cache):
    """Catches an endless loop over packs that nothing fits."""
    with pytest.raises(ValueError, match="--tokens 20"):
        walk(data.Order(cache, 20), 1)


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
