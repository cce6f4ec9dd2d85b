"""Damaged image files: decoded, or refused with a reason; never a crash, a hang or memory without bound.

Run as a program it decodes mutants FIRST to LAST - 1 and prints what became of them as JSON.
"""

import collections
import io
import json
import os
import resource
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

ROOT = Path(__file__).resolve().parents[1]
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
    sys.path.insert(0, str(ROOT))
    import images

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
        slowest = max(slowest, (time.process_time() - began, number))
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


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
