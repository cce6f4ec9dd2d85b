"""Damaged image files: decoded, or refused with a reason; never a crash, a hang or memory without bound.

Run as a program it decodes mutants FIRST to LAST - 1 and prints what became of them as JSON.
"""

import collections
import contextlib
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import amoe  # noqa: E402
import data  # noqa: E402
import images  # noqa: E402
from common.sources import find_sources  # noqa: E402
from common.tars import tar_members  # noqa: E402

SECONDS, GIB = 5, 3


def corpus():
    """Small whole files of every kind, as bytes."""
    random = np.random.default_rng(0)
    noisy = random.integers(0, 256, (70, 90, 4), dtype=np.uint8)
    rgb, rgba = Image.fromarray(noisy[..., :3]), Image.fromarray(noisy, "RGBA")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "turned"
    frames = {"save_all": True, "append_images": [rgb.rotate(90).resize(rgb.size)]}
    made = [
        (rgb, "JPEG", {"quality": 90, "exif": exif}),
        (rgb, "JPEG", {"progressive": True, "subsampling": 2}),
        (rgb.convert("L"), "JPEG", {"restart_marker_blocks": 1}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgb, "PNG", {"exif": exif}),
        (rgba, "PNG", {}),
        (rgb.quantize(40), "PNG", {"transparency": 3}),
        (Image.fromarray(noisy[..., :2].copy().view(np.uint16)[..., 0]), "PNG", {}),
        (rgb, "PNG", frames),
    ]
    if features.check("webp"):
        made += [
            (rgb, "WEBP", {"quality": 80}),
            (rgba, "WEBP", {"lossless": True, "exif": exif}),
            (rgb, "WEBP", frames),
        ]
    files = []
    for image, kind, options in made:
        file = io.BytesIO()
        image.save(file, kind, **options)
        files.append(file.getvalue())
    return files


def chunks(raw):
    """A file as its chunks: PNG chunks, JPEG segments, or equal parts where it is neither."""
    parts, at = [], 0
    if raw[:4] == b"\x89PNG":
        parts, at = [raw[:8]], 8
        while at < len(raw):
            size = 12 + struct.unpack(">I", raw[at : at + 4])[0]
            parts.append(raw[at : at + size])
            at += size
    elif raw[:2] == b"\xff\xd8":
        parts, at = [raw[:2]], 2
        while raw[at + 1] != 0xDA:
            size = 2 + struct.unpack(">H", raw[at + 2 : at + 4])[0]
            parts.append(raw[at : at + size])
            at += size
        parts.append(raw[at:])
    else:
        parts = [raw[i : i + 1 + len(raw) // 8] for i in range(0, len(raw), 1 + len(raw) // 8)]
    return parts


def edit_header(raw, random):
    """Other sizes, depths and kinds in an otherwise whole file; a PNG's checksum is made to fit."""
    value = int(random.choice([0, 1, 255, 4097, 13000, 65535, 2**31 - 1, random.integers(1, 2**16)]))
    if raw[:4] == b"\x89PNG":
        body = bytearray(raw[16:29])
        at = int(random.choice([0, 4, 8, 9, 10, 11, 12]))
        if random.integers(4) == 0:
            body[:8] = struct.pack(">II", 13000, 13000)  # as large as is let through
        elif at < 8:
            body[at : at + 4] = struct.pack(">I", value)
        else:
            body[at] = int(random.integers(256) if random.integers(2) else random.choice([1, 2, 3, 4, 6, 8, 16]))
        return raw[:16] + bytes(body) + struct.pack(">I", zlib.crc32(b"IHDR" + body)) + raw[33:]
    raw = bytearray(raw)
    if raw[:2] == b"\xff\xd8":
        parts = chunks(bytes(raw))
        at = sum(len(p) for p in parts[: next(i for i, p in enumerate(parts) if p[1] in (0xC0, 0xC2))])
        if random.integers(4) == 0:
            raw[at + 5 : at + 9] = struct.pack(">HH", 13000, 13000)
            return bytes(raw)
        at += int(random.choice([4, 5, 7, 9, 11]))  # precision, height, width, components, sampling
    else:
        at = int(random.choice([4, 16, 20, 24, 26, 28]))  # RIFF sizes, VP8X and VP8 dimensions
    raw[at : at + 2] = struct.pack(">H", value % 65536)
    return bytes(raw)


def mutant(files, number):
    """Mutant `number`, fixed by it: (kind of mutation, bytes)."""
    random = np.random.default_rng([7, number])
    raw = files[random.integers(len(files))]
    kind = ("flip", "cut", "shuffle", "header")[number % 4]
    if kind == "flip":
        raw = bytearray(raw)
        for at in random.integers(len(raw) if random.integers(2) else min(len(raw), 600), size=random.integers(1, 40)):
            raw[at] = random.integers(256)
    elif kind == "cut":
        first, last = sorted(random.integers(len(raw) + 1, size=2))
        raw = raw[:last] if random.integers(2) else raw[:first] + raw[last:]
    elif kind == "shuffle":
        parts = chunks(raw)
        order = random.permutation(len(parts)) if random.integers(2) else random.integers(len(parts), size=len(parts))
        raw = b"".join([parts[0], *(parts[i] for i in order if i)])
    else:
        raw = edit_header(raw, random)
    return kind, bytes(raw)


def main(first, last):
    files = corpus()
    for raw in files:
        images.load_image(io.BytesIO(raw))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome, slowest = collections.Counter(), (0.0, None)
    for number in range(first, last):
        kind, raw = mutant(files, number)
        began = time.process_time()
        try:
            image = images.load_image(io.BytesIO(raw), draft=bool(number % 3))
            assert image.ndim == 3 and image.shape[2] == 3 and image.shape[0] % 16 == image.shape[1] % 16 == 0
            outcome[f"{kind} decoded"] += 1
        except ValueError as error:
            assert str(error) and "\n" not in str(error) and " at 0x" not in str(error), error
            outcome[f"{kind} refused"] += 1
        took = time.process_time() - began
        if took > SECONDS:  # a host that is busy for a moment is no hang: the second try counts
            began = time.process_time()
            with contextlib.suppress(ValueError):
                images.load_image(io.BytesIO(raw), draft=bool(number % 3))
            took = time.process_time() - began
        slowest = max(slowest, (took, number))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({**outcome, "slowest": slowest, "gib": peak / 2**20, "gib_before": before / 2**20}))


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_images_are_decoded_or_refused(count):
    """Catches decoder errors that are no ValueError, a reason with an address in it, hangs, and sizes believed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "0", str(count)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    print(said)
    assert sum(n for key, n in said.items() if key.endswith(("decoded", "refused"))) == count
    for kind in ("flip", "cut", "shuffle", "header"):
        assert said[f"{kind} decoded"] and said[f"{kind} refused"], "mutations too weak or too strong to say anything"
    assert said["slowest"][0] < SECONDS and said["gib"] < GIB


# ---- records: JSON that others wrote ----

ODD = [None, True, [], {}, "", "x", -1, 0, 1.5, 10**12, 1e400, float("nan"), [[[]]], "\ud800", "\u2028", {"a": 1}]


def places_of(value, path=()):
    """Every place in a JSON value, by its path of keys and indices."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places_of(inner, (*path, key))


def forged(value, random):
    """The value with one place of it changed, dropped or added to."""
    paths = list(places_of(value))
    at = paths[random.integers(len(paths))]
    if not at:
        return ODD[random.integers(len(ODD))]
    *path, last = at
    value = inner = json.loads(json.dumps(value))
    for key in path:
        inner = inner[key]
    how = random.integers(4)
    if how == 0:
        del inner[last]
    elif how == 1 and isinstance(inner, dict):
        inner["another"] = ODD[random.integers(len(ODD))]
    else:
        inner[last] = ODD[random.integers(len(ODD))]
    return value


def spoilt(raw, random):
    """JSON bytes forged, or with a few bytes changed, or cut short."""
    how = random.integers(4)
    if how < 2:
        return json.dumps(forged(json.loads(raw), random)).encode()
    if how == 2:
        return raw[: random.integers(len(raw))]
    raw = bytearray(raw)
    for at in random.integers(len(raw), size=random.integers(1, 4)):
        raw[at] = random.integers(256)
    return bytes(raw)


def test_mutated_sizes_of_a_student_are_refused_or_are_those_of_its_weights(tmp_path):
    """Catches config.json believed: sizes to allocate, heads that are not there, experts beyond those there are."""
    torch.manual_seed(0)
    spaces = [amoe.Space("a", 8, registers=1), amoe.Space("b", 12)]
    model = amoe.AMoE(
        amoe.Config(2, 16, 2, 8, experts=3, top_k=2, expert_hidden=8, dense_layers=1, dense_hidden=8), spaces
    )
    for head in model.heads.values():
        head.phi_s = amoe.PhiS.fit(torch.randn(50, head.fc2.out_features))
    amoe.save(model, tmp_path)
    raw, accepted = (tmp_path / "config.json").read_bytes(), 0
    whole = amoe.describe(amoe.load(tmp_path))
    del whole["trunk"]["top_k"], whole["heads"]["a"]["registers"], whole["heads"]["b"]["registers"]
    for number in range(1500):
        (tmp_path / "config.json").write_bytes(spoilt(raw, np.random.default_rng([3, number])))
        try:
            said = amoe.describe(amoe.load(tmp_path))
        except ValueError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error), (number, error)
        else:
            assert said["trunk"].pop("top_k") in (1, 2, 3)  # what no weight bears out: any that fit are taken
            assert all(head.pop("registers") in range(5) for head in said["heads"].values())
            assert said == whole, number
            accepted += 1
    assert 20 < accepted < 700, accepted


def test_mutated_captions_are_refused_or_give_words(tmp_path):
    """Catches entries without a file, of odd types and of bytes that are no text."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "b.png")
    raw, accepted = json.dumps(
        [{"file": f"{name}.png", "caption": f"caption {name}", "category": "c"} for name in "ab"]
    ).encode(), 0  # fmt: skip
    for number in range(400):
        (tmp_path / "captions.json").write_bytes(spoilt(raw, np.random.default_rng([4, number])))
        try:
            sources = find_sources(tmp_path)
        except ValueError as error:
            assert "\n" not in str(error) and "captions.json" in str(error), (number, error)
        else:
            assert [source.name for source in sources] == ["a.png", "b.png"]
            for source in sources:
                assert all(word is None or isinstance(word, str) for word in (source.caption, source.category))
                json.dumps([source.caption, source.category], ensure_ascii=False).encode()
            accepted += 1
    assert 40 < accepted < 360, accepted


def test_mutated_tars_are_refused_or_give_images_that_are_there(tmp_path):
    """Catches a header taken at its word: sizes beyond the file, names that are no text, endless empty members."""
    whole, path = io.BytesIO(), tmp_path / "x.tar"
    with tarfile.open(fileobj=whole, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, raw in (("a.png", png()), ("a.txt", b"words"), ("long" * 40 + ".png", png()), ("b.json", b"{}")):
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    raw, accepted = whole.getvalue(), 0
    headers = [at // 512 for at in range(0, len(raw), 512) if raw[at + 257 : at + 262] == b"ustar"]
    for number in range(600):
        random, bad = np.random.default_rng([6, number]), bytearray(raw)
        for at in random.integers(len(raw), size=random.integers(1, 4)):
            bad[at % 512 + 512 * int(random.choice(headers)) if random.integers(2) else at] = random.integers(256)
        path.write_bytes(bad[: random.integers(len(raw))] if random.integers(4) == 0 else bad)
        try:
            sources = find_sources(path)
            for source in sources:
                assert 0 <= source.span[0] <= source.span[0] + source.span[1] <= path.stat().st_size, number
                json.dumps(source.meta, ensure_ascii=False).encode()
                with contextlib.suppress(ValueError):
                    images.load_image(source)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, (number, error)
        else:
            accepted += 1
    assert 20 < accepted < 580, accepted


@pytest.mark.parametrize("kind", ["USTAR_FORMAT", "GNU_FORMAT", "PAX_FORMAT"])
def test_headers_read_together_are_those_read_one_by_one(kind, monkeypatch):
    """Catches a header that is found in a member's bytes, links and folders taken for files, lost long names."""
    random, whole, small = np.random.default_rng(7), io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=small, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("inside.png"))
    with tarfile.open(fileobj=whole, mode="w", format=getattr(tarfile, kind)) as tar:
        for k in range(400):
            info = tarfile.TarInfo(("./" if k % 7 == 0 else "d\xe9/" * (60 if k % 50 == 1 else 1)) + f"{k}.png")
            if k % 40 == 3:
                info.type, info.linkname = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE)[k % 3], "0.png"
            raw = small.getvalue() if k % 60 == 2 else bytes(int(random.integers(40_000 if k % 100 > 80 else 900)))
            info.size = 0 if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE) else len(raw)
            with contextlib.suppress(ValueError):  # a name too long for the oldest format
                tar.addfile(info, io.BytesIO(raw[: info.size]))
    raw, outcomes = whole.getvalue(), set()
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        known = [(m.name.removeprefix("./"), (m.offset_data, m.size)) for m in tar if m.isreg()]
    assert list(tar_members(raw, len(raw))) == known and len(known) > 350
    headers = [at for at in range(0, len(raw), 512) if raw[at + 257 : at + 262] == b"ustar"]

    def outcome(bad):
        try:
            return list(tar_members(bytes(bad), len(bad)))
        except ValueError as error:
            return str(error)

    for number in range(60):
        random, bad = np.random.default_rng([8, number]), bytearray(raw)
        for at in random.choice(headers, size=3).tolist():
            bad[at + random.choice([5, 130, 156, 260, 345, 400])] = random.integers(256)
            if number % 3:  # as if it had been written so
                bad[at + 148 : at + 156] = b" " * 8
                bad[at + 148 : at + 155] = b"%06o\0" % sum(bad[at : at + 512])
        bad = bad[: random.integers(len(raw))] if number % 4 == 0 else bad
        together = outcome(bad)
        with monkeypatch.context() as patch:
            patch.setattr("common.tars.plain_files", lambda raw, at: ([], [], 0))
            assert outcome(bad) == together, number
        outcomes.add(type(together))
    assert outcomes == {list, str}


def png():
    file = io.BytesIO()
    Image.effect_noise((40, 40), 90).convert("RGB").save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("file", ["cache.json", "shards/00001/shard.json"])
def test_mutated_records_of_a_cache_are_refused(cache, tmp_path, file):
    """Catches records that are read before their hash is."""
    shutil.copytree(cache.path, tmp_path / "c")
    raw, good = (tmp_path / "c" / file).read_bytes(), cache.read([(1, 2), (1, 5)])
    for number in range(300):
        (tmp_path / "c" / file).write_bytes(spoilt(raw, np.random.default_rng([5, number])))
        try:
            opened = data.Cache(tmp_path / "c")
            batch = opened.drop_damaged().read([(1, 2), (1, 5)])
        except ValueError as error:
            assert "\n" not in str(error), (number, error)
            with contextlib.suppress(ValueError):
                assert data.verify(data.Cache(tmp_path / "c")), number
        else:  # other bytes of the same words
            assert torch.equal(batch.rows, good.rows) and data.verify(opened) == [], number


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
