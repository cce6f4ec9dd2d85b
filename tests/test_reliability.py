"""What a cache does when it is killed, damaged, mixed up or out of disk."""

import filecmp
import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from common.order import Order, Position
from common.store import seal
from teachers import load_teachers

ROOT = Path(__file__).resolve().parents[1]


def copy_of(cache, tmp_path):
    return Path(shutil.copytree(cache.path, tmp_path / "copy"))


def files_of(folder):
    return sorted(p.relative_to(folder) for p in Path(folder).rglob("*") if p.is_file())


def same(a, b):
    """Whether two folders hold the same files, byte for byte, and no others."""
    return files_of(a) == files_of(b) and not filecmp.cmpfiles(a, b, files_of(a), shallow=False)[1]


def whole(cache):
    """Every image of the cache, pack by pack."""
    return [cache.read([(n, i) for i in range(len(cache.shard(n).ids))]) for n in cache.numbers]


def equal(a, b):
    targets = [(t, kind) for t in a.targets for kind in a.targets[t]]
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("rows", "starts", "shapes", "ids", "image")) and all(
        torch.equal(a.targets[t][kind], b.targets[t][kind]) for t, kind in targets
    )


# ---- damage ----


def test_a_flipped_byte_anywhere_is_named_and_never_trained_on(cache, tmp_path):
    """Catches counts checked in the place of contents, a cache.json without a hash, fill values for lost chunks."""
    path, good = copy_of(cache, tmp_path), whole(cache)
    assert data.verify(data.Cache(path)) == []
    random, files, caught, harmless = np.random.default_rng(0), [path / f for f in files_of(path)], 0, 0
    files = [f for f in files if f.stat().st_size]
    for _ in range(50):
        file = files[random.integers(len(files))]
        before = file.read_bytes()
        raw = bytearray(before)
        raw[random.integers(len(raw))] ^= 1 << random.integers(8)
        file.write_bytes(raw)
        parts = file.relative_to(path).parts
        try:
            opened = data.Cache(path)
        except ValueError as error:
            assert parts[0] == "teachers" or parts == ("cache.json",), error
            assert parts[-1] in str(error)
        else:
            (complaint,) = data.verify(opened)
            assert all(part in complaint for part in (parts[1:3] if parts[0] == "shards" else parts[:1]))
            try:
                assert all(equal(a, b) for a, b in zip(whole(opened), good, strict=True))
                # which training does not read; a damaged index is passed over
                assert parts[0] == "index" or parts[2].split(".")[0] in ("meta", "views", "text")
                harmless += 1
            except data.Damage as error:
                assert parts[0] in str(error) or (parts[1] in str(error) and parts[2] in str(error))
                caught += 1
        file.write_bytes(before)
    assert caught > 20 and harmless < 20 and same(path, cache.path)


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "longer"])
def test_a_lost_or_truncated_file_is_named_and_never_trained_on(cache, tmp_path, how):
    """Catches fill_missing_data_reads, under which a deleted chunk reads as zeros."""
    path = copy_of(cache, tmp_path)
    for file in [f for f in files_of(path) if f.parts[:2] == ("shards", "00002")]:
        before = (path / file).read_bytes()
        if how == "missing":
            (path / file).unlink()
        else:
            (path / file).write_bytes({"empty": b"", "cut": before[: len(before) // 2], "longer": before + b"x"}[how])
        opened = data.Cache(path)
        (complaint,) = data.verify(opened)
        assert "00002" in complaint and file.parts[2] in complaint.replace("not committed", "shard.json")
        if file.name == "shard.json":
            with pytest.raises(ValueError, match="shard 00002"):
                opened.drop_damaged()
        elif file.parts[2].split(".")[0] not in ("meta", "views", "text") and not (
            how == "longer" and "c" in file.parts
        ):
            with pytest.raises(data.Damage, match=f"shard 00002, array {file.parts[2]}"):
                whole(opened)
        (path / file).write_bytes(before)
    assert data.verify(data.Cache(path)) == []


def test_packs_leave_damage_out_only_when_told_to(cache, tmp_path, capsys, monkeypatch):
    """Catches a loader that drops damaged images by default, and one that drops the pack's sound ones with them."""
    path = copy_of(cache, tmp_path)
    pixels = path / "shards/00001/pixels/c/0/0"
    raw = bytearray(pixels.read_bytes())
    raw[2000] ^= 4
    pixels.write_bytes(raw)
    (path / "shards/00002/patch.dense/c/0/0").unlink()
    for memory in (data.MEMORY, 1000):  # whole arrays, rows
        monkeypatch.setattr(data, "MEMORY", memory)
        damaged = data.Cache(path)
        entries = [(1, 0), (0, 3), (2, 5)]
        with pytest.raises(ValueError, match=r"shard 00001, array pixels.*data\.py verify .*--on-corrupt skip"):
            data.read_pack(damaged, entries, 400, 4)
        with pytest.raises(data.Damage, match=r"shard 00002, array patch.dense"):
            damaged.read([(2, 5)])
        batch = data.read_pack(damaged, entries, 400, 4, on_corrupt="skip")
        assert batch.ids.tolist() == [int(damaged.shard(0).ids[3])]
        assert "shard 00001" in capsys.readouterr().err


def test_a_missing_or_damaged_shard_is_not_passed_over_in_silence(cache, tmp_path, capsys):
    """Catches a cache that is whatever its folder happens to hold."""
    path = copy_of(cache, tmp_path)
    shutil.rmtree(path / "shards/00001")
    (path / "shards/00003/shard.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"shard 00001: missing.*data.py verify .*--on-corrupt skip"):
        data.Cache(path).drop_damaged()
    with pytest.raises(ValueError, match="has 2 of its 4 shards: rerun"):  # for curate.py
        shutil.rmtree(path / "index")
        data.open_summaries(path, "dense")
    assert data.Cache(path).drop_damaged("skip").numbers == [0, 2]
    said = capsys.readouterr().err
    assert "shard 00001" in said and "shard 00003" in said
    assert data.Cache(cache.path).drop_damaged().numbers == [0, 1, 2, 3]


@pytest.mark.parametrize(("array", "at"), [("summary.text", (3, 5)), ("registers.dense", (3, 7))])
def test_nan_in_what_a_cache_holds_of_a_teacher_is_found_by_verify_and_by_reading(cache, tmp_path, array, at):
    """Catches sound hashes of values that no measure can use: whoever wrote them, they read as a score of 1.0."""
    path = copy_of(cache, tmp_path)
    shard = data.Cache(path).shard(1)
    arrays = {name: shard.all(name).copy() for name in shard.names}
    arrays[array][at] = np.nan
    record = {key: value for key, value in shard.record.items() if key not in ("files", "hash")}
    shutil.rmtree(path / "index")  # which is bound to the shards as they were
    data.write_shard(data.Cache(path), 1, arrays, record)
    (complaint,) = data.verify(data.Cache(path))
    assert "00001" in complaint and array in complaint and "not finite" in complaint
    with pytest.raises(data.Damage, match=f"shard 00001, array {array}.*not finite"):
        data.Cache(path).read([(1, 2), (1, 3)])
    assert data.Cache(path).read([(1, 2)]).n_images == 1


# ---- the wrong cache ----


def test_another_cache_in_the_way_is_an_error_naming_both(cache, world, oracles, tmp_path):
    """Catches a rerun with other teachers or settings that mixes two caches."""
    images = world.folder / "images"
    with pytest.raises(ValueError, match=r"dtype 'int8', not 'bf16'"):
        data.cache(images, oracles, cache.path, max_tokens=64, shard_images=20, dtype="bf16", progress=False)
    with pytest.raises(ValueError, match=r"teachers.*dense.*not.*text"):
        data.cache(images, oracles[:1], cache.path, max_tokens=64, shard_images=20, progress=False)
    for number in (2, 99):
        (tmp_path / "cache.json").write_text(json.dumps(cache.about | {"format": number}))
        with pytest.raises(ValueError, match=rf"format {number} and this code reads {data.FORMAT}: cache it anew"):
            data.Cache(tmp_path)
    with pytest.raises(ValueError, match=r"no cache\.json"):
        data.Cache(world.folder)


def test_other_weights_under_the_same_name_are_an_error(plug_in, tmp_path):
    """Catches teachers compared by name and size alone: half a cache would be of one, half of another."""
    for i in range(8):
        Image.effect_noise((32, 64), 90).convert("RGB").save(tmp_path / f"{i}.png")
    teachers = load_teachers([plug_in], tmp_path, "cpu")
    data.cache(tmp_path, teachers, tmp_path / "c", shard_images=4, progress=False)
    data.cache(tmp_path, teachers, tmp_path / "c", shard_images=4, progress=False)
    shutil.rmtree(tmp_path / "c/shards/00001")

    class Other(type(teachers[0])):
        def __call__(self, batch):
            return {kind: 255 - value for kind, value in super().__call__(batch).items()}

    with pytest.raises(ValueError, match=r"made with another teacher 't' or other images: summaries of .* differ by"):
        data.cache(tmp_path, [Other()], tmp_path / "c", shard_images=4, progress=False)
    (tmp_path / "c/teachers/t.safetensors").unlink()
    with pytest.raises(ValueError, match=r"t\.safetensors \(its PHI-S\) is missing or damaged"):
        data.cache(tmp_path, teachers, tmp_path / "c", shard_images=4, progress=False)


def test_a_teacher_is_recognised_though_the_image_it_is_known_by_is_gone(plug_in, tmp_path):
    """Catches a summary of one image that is held against that of another: the same teacher was refused."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (64, 64), (20 * i, 9, 0)).save(folder / f"{i:02d}.png")
    kind = {"shard_images": 4, "max_skipped": 0.5, "progress": False}
    data.cache(folder, load_teachers([plug_in], folder, "cpu"), tmp_path / "c", shard_range=(2, 3), **kind)
    raw = (folder / "00.png").read_bytes()
    (folder / "00.png").write_bytes(raw[:60] + bytes(len(raw) - 60))
    made = data.cache(folder, load_teachers([plug_in], folder, "cpu"), tmp_path / "c", **kind)
    assert len(made.all_ids()) == 11


def test_a_shard_of_another_cache_is_not_taken_for_ones_own(cache, world, oracles, tmp_path):
    """Catches shards whose features are in another cache's PHI-S space."""
    images = world.folder / "images"
    kind = {"max_tokens": 64, "shard_images": 20, "progress": False}
    data.cache(images, oracles, tmp_path / "c", seed=1, calibrate=20, **kind)
    shutil.rmtree(tmp_path / "c/shards/00001")
    shutil.copytree(Path(cache.path) / "shards/00001", tmp_path / "c/shards/00001")
    with pytest.raises(data.Damage, match=r"shard 00001.*another cache"):
        data.Cache(tmp_path / "c").read([(1, 0)])
    assert ["00001" in line for line in data.verify(data.Cache(tmp_path / "c"))] == [True]
    data.cache(images, oracles, tmp_path / "c", seed=1, calibrate=20, **kind)
    assert data.verify(data.Cache(tmp_path / "c")) == []


def test_opening_a_cache_with_an_index_reads_no_shard(cache, tmp_path):
    """Catches records read one after another; without the index, or with a damaged one, all is the same."""
    path = copy_of(cache, tmp_path)
    reads = lambda: [(n, s.ids.tolist(), s.shapes.tolist()) for n, s in enumerate(data.Cache(path).shards)]  # noqa: E731
    known = reads()
    opened = data.Cache(path)
    for number in range(4):
        (path / f"shards/{number:05d}/shard.json").rename(tmp_path / str(number))
    assert reads() == known and len(Order(data.Cache(path), 300).plan(Position())[0]) > 5
    with pytest.raises(data.Damage, match="shard 00002: missing"):
        opened.read([(2, 1)])
    for number in range(4):
        (tmp_path / str(number)).rename(path / f"shards/{number:05d}/shard.json")
    for file in ("shards/c/0/0", "images/c/0", "images/zarr.json", "shard.json"):
        raw = (path / "index" / file).read_bytes()
        for damaged in (raw[: len(raw) // 2], b"junk", b"", None):
            (path / "index" / file).unlink() if damaged is None else (path / "index" / file).write_bytes(damaged)
            assert reads() == known
        (path / "index" / file).write_bytes(raw)
    shutil.rmtree(path / "index")
    assert data.Cache(path).index is None and reads() == known and data.verify(data.Cache(path)) == []


def test_writers_that_end_together_leave_one_index(cache, tmp_path):
    """Catches a writer that clears the index's folder first: 19 and 24 of 60 times it took the other's files away."""
    path = copy_of(cache, tmp_path)
    for _ in range(8):
        shutil.rmtree(path / "index")
        opened = [data.Cache(path) for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(data.write_index, opened))
        assert same(path, cache.path)


def test_an_index_of_other_shards_is_an_error(cache, world, oracles, tmp_path):
    """Catches ids of one order of images beside the pixels of another."""
    path = copy_of(cache, tmp_path)
    made = Path(
        data.cache(
            world.folder / "images", oracles, tmp_path / "b", max_tokens=48, shard_images=20, progress=False
        ).path
    )
    shutil.rmtree(path / "index")
    shutil.copytree(made / "index", path / "index")
    assert data.Cache(path).index is None  # it is bound to its cache.json
    shutil.rmtree(path / "index")
    shutil.copytree(Path(cache.path) / "index", path / "index")
    record = path / "shards/00001/shard.json"
    record.write_bytes(seal({k: v for k, v in json.loads(record.read_bytes()).items() if k != "hash"} | {"power": {}}))
    with pytest.raises(data.Damage, match="shard 00001: it is not the one that the index was made of"):
        data.Cache(path).read([(1, 3)])


def test_a_shard_copied_over_another_or_linked_is_what_all_agree_on(cache, world, oracles, tmp_path):
    """Catches a record without its number (trained on twice), and a listing that sees no linked folder."""
    path = copy_of(cache, tmp_path)
    shutil.rmtree(path / "shards/00001")
    shutil.copytree(path / "shards/00002", path / "shards/00001")
    (path / "shards/00003").rename(tmp_path / "elsewhere")
    (path / "shards/00003").symlink_to(tmp_path / "elsewhere")
    (complaint,) = data.verify(data.Cache(path))
    assert "shard 00001" in complaint and "another cache or shard" in complaint
    with pytest.raises(data.Damage, match="shard 00001"):
        data.Cache(path).read([(1, 0)])
    shutil.rmtree(path / "index")
    assert data.Cache(path).numbers == [0, 2, 3]
    again = data.cache(world.folder / "images", oracles, path, max_tokens=64, shard_images=20, progress=False)
    assert data.verify(again) == [] and again.index is not None
    assert all(equal(a, b) for a, b in zip(whole(again), whole(cache), strict=True))


def test_images_or_captions_changed_between_two_runs_are_written_anew(plug_in, tmp_path, capsys):
    """Catches an old and a new half in one cache."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        Image.effect_noise((64, 64), 90).convert("RGB").save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"old {i}")
    teachers, kind = load_teachers([plug_in], folder, "cpu"), {"shard_images": 4, "progress": False}
    data.cache(folder, teachers, tmp_path / "c", **kind)
    Image.effect_noise((64, 64), 20).convert("RGB").save(folder / "05.png")
    (folder / "09.txt").write_text("new\u20289")
    made = data.cache(folder, teachers, tmp_path / "c", **kind)
    said = capsys.readouterr().err
    assert (
        "shard 00001: its images have changed" in said and "shard 00002: its" in said and "shard 00000: its" not in said
    )
    fresh = data.cache(folder, teachers, tmp_path / "d", **kind)
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(whole(made), whole(fresh), strict=True))
    assert [made.meta((2, i))["caption"] for i in range(4)] == ["old 8", "new\u20289", "old 10", "old 11"]
    assert data.verify(made) == []


def test_records_and_descriptions_of_other_kinds_are_refused(cache, tmp_path):
    """Catches a sealed file that is believed: counts that are lists, a hundred million million sources."""
    path = copy_of(cache, tmp_path)
    shutil.rmtree(path / "index")
    for file, wrong in (
        ("cache.json", {"sources": 10**14}),
        ("cache.json", {"shard_images": 0}),
        ("cache.json", {"teachers": []}),
        ("cache.json", {"views": True}),
        ("shards/00001/shard.json", {"files": []}),
        ("shards/00001/shard.json", {"images": -1}),
    ):
        before = (path / file).read_bytes()
        content = {k: v for k, v in json.loads(before).items() if k != "hash"}
        (path / file).write_bytes(seal(content | wrong))
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}|shard 00001"):
            data.Cache(path).drop_damaged()
        (path / file).write_bytes(b"[]")
        with pytest.raises(ValueError, match=r"cache\.json|shard 00001"):
            data.Cache(path).drop_damaged()
        (path / file).write_bytes(before)


# ---- writers ----


def noise(folder, sizes):
    folder.mkdir()
    for i, size in enumerate(sizes):
        Image.effect_noise((size, size), 90).convert("RGB").save(folder / f"{i:03d}.png", compress_level=0)
    (folder / "007.png").write_bytes(b"junk")
    return folder


def command(images, plug_in, out, *more):
    words = ["cache", "--images", str(images), "--teacher", plug_in, "--out", str(out), "--shard-images", "4"]
    return [sys.executable, "data.py", *words, "--max-skipped", "0.2", *more]


@pytest.mark.slow
def test_processes_that_share_the_shards_write_the_cache_that_one_does(plug_in, tmp_path):
    """Catches two that write one shard or leave one out, and spaces fitted by each."""
    images = noise(tmp_path / "images", [64] * 23)
    run = lambda out, *more: subprocess.run(  # noqa: E731
        command(images, plug_in, tmp_path / out, *more), cwd=ROOT, capture_output=True, text=True
    )
    assert run("one").returncode == 0
    both = [
        subprocess.Popen(command(images, plug_in, tmp_path / "two", "--shard-range", f"{i}/2"), cwd=ROOT)
        for i in (0, 1)
    ]
    assert [process.wait() for process in both] == [0, 0]
    assert same(tmp_path / "one", tmp_path / "two")
    first = run("parts", "--shard-range", "1/2")
    assert first.returncode == 0 and "3 of 6 shards" in first.stdout
    assert run("parts", "--shard-range", "0/2").returncode == 0
    assert same(tmp_path / "one", tmp_path / "parts")
    bad = run("x", "--shard-range", "2/2")
    assert bad.returncode and "0 <= I < N" in bad.stderr and "Traceback" not in bad.stderr
    (tmp_path / "plug.py").write_text((tmp_path / "plug.py").read_text().replace("x[batch", "x[0 * batch"))
    bad = run("y", "--calibrate", "4")
    assert bad.returncode and bad.stderr.strip().splitlines()[-1].startswith("data.py: ")


def test_a_full_disk_is_one_line_and_leaves_what_is_committed(plug_in, tmp_path):
    """Catches a traceback, and a commit record for a shard that was not written out."""
    images = noise(tmp_path / "images", [32] * 12 + [256] * 4)
    shell = lambda limit, out: subprocess.run(  # noqa: E731
        ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "-", *command(images, plug_in, tmp_path / out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    full = shell(64, "c")  # KiB; the last shard's pixels need 768
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert "cannot write shard 00003: " in full.stderr.splitlines()[-1]
    opened = data.Cache(tmp_path / "c")
    assert opened.numbers == [0, 1, 2] and len(whole(opened)) == 3
    assert all("00003" in complaint for complaint in data.verify(opened))
    assert shell("unlimited", "c").returncode == shell("unlimited", "undisturbed").returncode == 0
    assert same(tmp_path / "c", tmp_path / "undisturbed")


KILLED = """
import sys, time
import toy, data
world = toy.World('.', 80)
teachers = [toy.TextOracle(world), toy.DenseOracle(world)]
print('begin', flush=True)
data.cache(sys.argv[1], teachers, sys.argv[2], max_tokens=64, shard_images=8, progress=False)
print('done', flush=True)
"""


def writer(world, out):
    """A process that is about to write the cache `out`."""
    words = [sys.executable, "-c", KILLED, str(world.folder / "images"), str(out)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"begin\n"
    return process


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_writers_and_a_rerun_make_the_undisturbed_cache(world, tmp_path, kills):
    """Catches a commit record written before the data, and locks that a killed writer left, reused with what they held.

    A writer is killed at a random moment of the time that the whole takes, and the next goes on from there; a cache
    that was finished in spite of it is compared, and the next begun.
    """
    undisturbed = writer(world, tmp_path / "undisturbed")
    began = time.monotonic()
    assert undisturbed.stdout.read() == b"done\n"
    seconds = time.monotonic() - began
    random, n, shards = np.random.default_rng(kills), 0, []
    for _ in range(kills):
        out = tmp_path / f"killed{n}"
        process = writer(world, out)
        time.sleep(random.uniform(0, 0.9 * seconds))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (out / "cache.json").exists():
            opened = data.Cache(out)
            assert len(whole(opened)) == len(opened.numbers)  # what is committed is whole
            shards.append(len(opened.numbers))
            n += len(opened.numbers) == 10
    out = tmp_path / f"killed{n}"
    out.mkdir(exist_ok=True)
    (out / "skipped.jsonl.__lock").write_bytes(b"stale" * 100)
    (out / "shards/00003").mkdir(parents=True, exist_ok=True)
    (out / "shards/00003/pixels.__lock").write_bytes(b"stale")
    for k in range(n + 1):
        assert writer(world, tmp_path / f"killed{k}").stdout.read() == b"done\n"
        assert data.verify(data.Cache(tmp_path / f"killed{k}")) == []
        (tmp_path / f"killed{k}/shards/00003/pixels.__lock").unlink(missing_ok=True)  # in a shard committed before
        assert same(tmp_path / f"killed{k}", tmp_path / "undisturbed")
    print(f"{kills} kills in {seconds:.2f} s of writing each, shards committed at each: {shards}")


def test_verify_reads_what_teachers_said_once(cache):
    """Catches arrays that are read for their hash and again for their numbers; an object store charges for both."""
    opened, read = data.Cache(cache.path), []
    store = opened.store
    opened.store = SimpleNamespace(read=lambda key: read.append(key) or store.read(key))
    assert data.verify(opened) == []
    chunks = [key for key in read if "/c/" in key]
    assert len(chunks) == len(set(chunks)) and sum("patch." in key for key in chunks) == 2 * len(cache.numbers)
