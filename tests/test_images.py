"""Image files to rows: the token budget, conversions, and what bad files get."""

import functools
import http.server
import io
import json
import os
import re
import resource
import struct
import tarfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

import amoe
import images
from common import sources as sources_file
from common.order import held_out
from common.pixels import grid


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return io.BytesIO(file.getvalue())


@pytest.mark.parametrize("size", [(480, 640), (1000, 200), (333, 334), (4000, 3000), (17, 150)])
def test_large_images_shrink_to_the_largest_grid_of_their_aspect(size):
    """Catches floor on both sides, which wastes up to a third of the budget."""
    h, w = grid(*size, 1, 256)
    assert h * w <= 256
    exact = (256 * size[0] / size[1]) ** 0.5
    if size[0] * size[1] > 256 * 256:
        assert h * w > 0.85 * 256 and abs(h - exact) <= 1 and abs(w - 256 / exact) <= 1


def test_small_images_keep_their_native_grid_or_reach_the_least():
    """Catches upscaling to the maximum."""
    assert grid(96, 64, 1, 256) == (6, 4)
    h, w = grid(96, 64, 64, 256)
    assert 64 <= h * w <= 80 and h > w


def test_rows_are_row_column_channel():
    """Catches (channel, row, column) inside a patch, the order of raw images in the reference code."""
    image = torch.arange(32 * 48 * 3).reshape(32, 48, 3).to(torch.uint8)
    rows, shape = amoe.to_rows(image)
    assert shape == (2, 3) and torch.equal(rows[4], image[16:32, 16:32].reshape(-1))
    assert torch.equal(amoe.from_rows(rows, shape), image)
    with pytest.raises(ValueError, match="16 h"):
        amoe.to_rows(image[:30])


def test_alpha_lies_over_white():
    """Catches convert("RGB"), which keeps the colour that transparency hides."""
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert images.load_image(encoded(clear)).min() == 255
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 200, 10, 10])
    assert images.load_image(encoded(palette, transparency=1)).min() == 255
    assert images.load_image(encoded(palette))[0, 0].tolist() == [200, 10, 10]


def test_other_modes_are_converted():
    """Catches 16-bit grey clipped to white."""
    grey = Image.fromarray(np.full((32, 32), 32896, np.uint16))
    assert images.load_image(encoded(grey)).unique().tolist() == [128]
    cmyk = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    assert images.load_image(encoded(cmyk, "JPEG"))[16, 16, 0] > 200
    assert images.load_image(encoded(Image.new("L", (32, 32), 77))).unique().tolist() == [77]
    assert images.load_image(encoded(Image.new("1", (32, 32), 1))).min() == 255
    frames = [Image.new("RGB", (32, 32), c) for c in ("red", "blue")]
    moving = encoded(frames[0], save_all=True, append_images=frames[1:])
    assert images.load_image(moving)[0, 0].tolist() == [255, 0, 0]


def test_exif_orientation_is_applied_before_the_grid():
    """Catches a grid made from the stored, not the seen, width and height."""
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    seen = images.load_image(encoded(image, "JPEG", exif=exif, quality=95))
    assert seen.shape == (64, 32, 3)
    assert seen[8, 16, 2] > 200 and seen[56, 16, 0] > 200
    drafted = images.load_image(encoded(image.resize((1024, 512)), "JPEG", exif=exif), max_tokens=8, draft=True)
    assert drafted.shape == (64, 32, 3) and drafted[8, 16, 2] > 200


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow(orientation):
    """Catches two orientations swapped, and a shape from the header that is not the decoded one."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)
    file = encoded(Image.fromarray(pixels), exif=exif)
    seen = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue()))))
    assert np.array_equal(images.load_image(file), seen)
    assert images.image_shape(file) == (seen.shape[0] // 16, seen.shape[1] // 16)


def test_bad_images_are_counted_once_whatever_their_views(tmp_path):
    """Catches a share of views, of which twenty hide any number of bad images."""
    folder = tmp_path / "a"
    folder.mkdir()
    for i in range(120):
        Image.effect_noise((48, 48), 90).save(folder / f"{i:03d}.png")
    for path in sorted(folder.glob("*.png"))[::6]:
        path.write_bytes(path.read_bytes()[:-400])
    dataset = images.Images(
        sources_file.find_sources(folder), folder, views=20, max_tokens=4, shard_images=30, quiet=True
    )
    with pytest.raises(ValueError, match="10 of the first 120 images"):
        for _ in range(3):
            for number in dataset.numbers:
                dataset.read([(number, i) for i in range(len(dataset.shard(number).ids))])


def test_a_crop_below_a_patch_makes_no_bad_image(tmp_path, capsys):
    """Catches small images that are refused, whole, for one of their crops."""
    folder = tmp_path / "a"
    folder.mkdir()
    for i in range(40):
        Image.new("RGB", (24, 24), (i, 0, 0)).save(folder / f"{i}.png")
    dataset = images.Images(sources_file.find_sources(folder), folder, views=4)
    shapes = dataset.shard(0).shapes.prod(1).reshape(40, 4)
    assert (shapes[:, 0] > 0).all() and (shapes[:, 1:] == 0).any() and not dataset.bad
    assert not capsys.readouterr().err


def test_views_are_fixed_and_crop_what_they_say():
    """Catches a generator shared between views, and boxes in pixels of another size."""
    assert images.choose_view(0, 7, 0) == ((0.0, 0.0, 1.0, 1.0), False)
    assert images.choose_view(0, 7, 3) == images.choose_view(0, 7, 3) != images.choose_view(0, 7, 2)
    image = Image.new("RGB", (128, 64), "red")
    image.paste("blue", (64, 0, 128, 64))
    right = images.load_image(encoded(image), box=(0.5, 0.0, 1.0, 1.0))
    assert right.shape == (64, 64, 3) and right[..., 0].max() == 0
    flipped = images.load_image(encoded(image), flip=True)
    assert flipped[0, 0].tolist() == [0, 0, 255]


def bomb():
    """A PNG of a few bytes that claims 20,000 x 20,000 pixels."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))  # noqa: E731
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def bad_files():
    whole = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG").getvalue()
    return {
        "zero.jpg": b"",
        "text.png": b"this is no image",
        "cut.jpg": whole[: len(whole) // 2],
        "bomb.png": bomb(),
        "dot.png": encoded(Image.new("RGB", (1, 1))).getvalue(),
        "line.png": encoded(Image.new("RGB", (2000, 20))).getvalue(),
    }


@pytest.mark.parametrize("name", bad_files())
def test_bad_files_are_one_clear_error(name):
    """Catches LOAD_TRUNCATED_IMAGES, and decoder errors that are no ValueError."""
    with pytest.raises(ValueError) as error:
        images.load_image(io.BytesIO(bad_files()[name]))
    assert str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(not features.check("webp"), reason="this Pillow was built without libwebp-dev")
def test_webp_is_read():
    """Catches a list of formats without it."""
    assert images.load_image(encoded(Image.new("RGB", (32, 48), "red"), "WEBP", lossless=True))[0, 0, 0] == 255


def test_sources_have_stable_ids_captions_and_categories(tmp_path, capsys):
    """Catches Python's salted hash(), ids of absolute paths or of other spellings, and captions that name no image."""
    (tmp_path / "a").mkdir()
    for name in ("a/x.png", "a/y.PNG", "b.jpg"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    (tmp_path / "captions.json").write_text('[{"file": "a/x.png", "caption": "an x", "category": "letters"}]')
    (tmp_path / "b.txt").write_text("a b\n")
    found = sources_file.find_sources(tmp_path)
    assert [s.name for s in found] == ["a/x.png", "a/y.PNG", "b.jpg"]
    assert found[0].id == 888412437924757584 and all(0 <= s.id < 2**63 for s in found)
    assert (found[0].caption, found[0].category, found[1].caption, found[2].caption) == ("an x", "letters", None, "a b")
    for lines in ("b.jpg\na/x.png\n", "./b.jpg\r\n./a//x.png\r\n", "\ufeffb.jpg\na/x.png"):
        (tmp_path / "list.txt").write_text(lines)
        listed = sources_file.find_sources(tmp_path / "list.txt")
        assert [(s.id, s.caption) for s in listed] == [(found[2].id, "a b"), (found[0].id, "an x")]
    for name, silent in (("./a/x.png", True), ("x.png", False)):
        (tmp_path / "captions.json").write_text(f'\ufeff[{{"file": "{name}", "caption": "an x"}}]')
        assert (sources_file.find_sources(tmp_path, anew=True)[0].caption == "an x") == silent
        assert ("captions.json speaks of no image of" in capsys.readouterr().err) != silent
    with pytest.raises(ValueError, match="nowhere"):
        sources_file.find_sources(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"b\.jpg is neither a folder of images"):
        sources_file.find_sources(tmp_path / "b.jpg")
    (tmp_path / "list.txt").write_text("b.jpg\nb.jpg\n")
    with pytest.raises(ValueError, match=r"b\.jpg twice"):
        sources_file.find_sources(tmp_path / "list.txt")


def test_captions_that_do_not_count_are_said(tmp_path, capsys):
    """Catches all but the last of an image's captions, and lists of them, left out in silence."""
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "y.png")
    entries = [{"file": "x.png", "caption": "an x"}, {"file": "./x.png", "caption": "the x"}]
    for more, silent in ((["a y", "the y"], False), ("a y", True), (None, True)):
        (tmp_path / "captions.json").write_text(json.dumps([*entries, {"file": "y.png", "caption": more}]))
        found, said = sources_file.find_sources(tmp_path, anew=True), capsys.readouterr().err
        assert [s.caption for s in found] == ["the x", more if silent else None]
        assert "1 of 3 entries name an image again" in said and ("1 captions are no strings" in said) != silent
    (tmp_path / "captions.json").write_text(json.dumps(entries[:1]))
    assert sources_file.find_sources(tmp_path)[0].caption == "an x" and not capsys.readouterr().err


def test_sources_of_two_tables_are_not_taken_for_those_of_the_first(tmp_path):
    """Catches rows of one table by their numbers in another: other images, in silence."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (16, 16)).save(tmp_path / name / f"{name}{i}.png")
    a, b = (sources_file.find_sources(tmp_path / name) for name in ("a", "b"))
    assert [s.name for s in sources_file.Sources.of([a[1], a.only(np.array([0]))[0]])] == ["a1.png", "a0.png"]
    with pytest.raises(ValueError, match="several tables"):
        sources_file.Sources.of([a[1], b[0]])


def test_a_category_may_be_the_number_0(tmp_path):
    """Catches `or`, for which 0 is nothing: the first class got the name of its folder."""
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    (tmp_path / "x.json").write_text('{"category": 0, "caption": ""}')
    (tmp_path / "x.txt").write_text("an x")
    (tmp_path / "x.cls").write_text("7")
    assert sources_file.find_sources(tmp_path)[0].labels == ("an x", "0")


def make_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, raw in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(raw)
            tar.addfile(header, io.BytesIO(raw))


def test_tars_are_read_by_member_with_their_captions_and_labels(tmp_path):
    """Catches offsets of headers in the place of contents, captions of a neighbour, and ids with a path in them."""
    colour = lambda c, kind="PNG": encoded(Image.new("RGB", (32, 16), c), kind).getvalue()  # noqa: E731
    (tmp_path / "web").mkdir()
    first, second = tmp_path / "web/0.tar", tmp_path / "web/1.tar"
    deep = "d" * 120 + "/7.jpg"  # longer than a plain header holds
    make_tar(
        first,
        {
            "./a.png": colour("red"),
            "a.txt": b" a red \n",
            "a.cls": b"3",
            "b.left.PNG": colour("blue"),
            "b.json": b'{"caption": "a blue", "category": "cold"}',
            "b.txt": b"not this one",
            "readme.md": b"",
        },
    )
    make_tar(second, {deep: colour("lime", "JPEG"), "broken.jpg": b"junk", "broken.json": b"junk"})
    found = sources_file.find_sources(tmp_path / "web")
    assert [s.name for s in found] == ["0.tar/a.png", "0.tar/b.left.PNG", f"1.tar/{deep}", "1.tar/broken.jpg"]
    known = [(s.caption, s.category) for s in found]
    assert known == [("a red", "3"), ("a blue", "cold"), (None, None), (None, None)]
    shown = [images.load_image(s)[8, 16].tolist() for s in found[:3]]
    assert shown[:2] == [[255, 0, 0], [0, 0, 255]] and shown[2][1] > 240
    with pytest.raises(ValueError, match="no JPEG"):
        images.load_image(found[3])
    with ThreadPoolExecutor(4) as pool:  # decoders share no file position
        assert all(image[8, 16, 0] == 255 for image in pool.map(images.load_image, [found[0]] * 50))
    (tmp_path / "web/list.txt").write_text("1.tar\n0.tar\n")
    listed = sources_file.find_sources(tmp_path / "web/list.txt")
    assert [s.id for s in listed] == [s.id for s in found[2:] + found[:2]]
    assert [s.id for s in sources_file.find_sources(first)] == [s.id for s in found[:2]]


def test_a_damaged_tar_is_an_error_that_names_it(tmp_path):
    """Catches tarfile's habit of taking a damaged header for the end: the rest of the images would be lost silently."""
    image = encoded(Image.new("RGB", (32, 16))).getvalue()
    make_tar(tmp_path / "x.tar", {f"{i}.png": image for i in range(4)})
    raw = (tmp_path / "x.tar").read_bytes()
    spans = [s.span for s in sources_file.find_sources(tmp_path / "x.tar")]
    for damaged in (raw[: spans[2][0] + 5], raw[: spans[2][0] - 200], b"junk" * 300, b""):
        (tmp_path / "x.tar").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.tar is no whole"):
            sources_file.find_sources(tmp_path / "x.tar")
    flipped = bytearray(raw)
    flipped[spans[2][0] - 512] ^= 1  # a letter of the third header
    (tmp_path / "x.tar").write_bytes(flipped)
    with pytest.raises(ValueError, match="damaged at byte"):
        sources_file.find_sources(tmp_path / "x.tar")


def test_reasons_name_no_path_and_no_address(tmp_path):
    """Catches commit records that differ between machines and runs."""
    (tmp_path / "x.png").write_bytes(b"junk")
    for file in (tmp_path / "x.png", tmp_path / "gone.png", io.BytesIO(b"junk")):
        with pytest.raises(ValueError) as error:
            images.load_image(file)
        assert str(tmp_path) not in str(error.value) and "0x" not in str(error.value)


# ---- the table of sources ----


def photos(folder, n=6):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.new("RGB", (32 + 16 * i, 48), (40 * i, 0, 0)).save(folder / f"{i}.png")
    os.utime(folder, (1, 1))  # older than the clock's tick
    return folder


def test_a_table_is_made_once_and_again_when_images_change(tmp_path, monkeypatch):
    """Catches a table that outlives its images, and headers read again where nothing changed."""
    folder, scanned = photos(tmp_path / "a"), []
    monkeypatch.setenv("AMOE_INDEX", str(tmp_path / "index"))
    monkeypatch.setattr(sources_file, "scan", lambda job, scan=sources_file.scan: scanned.append(job) or scan(job))
    first = sources_file.find_sources(folder)
    assert [s.id for s in sources_file.find_sources(folder)] == [s.id for s in first] and len(scanned) == 1
    (folder / "3.txt").write_text("a caption")
    os.utime(folder, (2, 2))
    assert sources_file.find_sources(folder)[3].caption == "a caption" and len(scanned) == 2
    Image.new("RGB", (160, 160)).save(folder / "2.png")
    os.utime(folder, (2, 2))  # as if nothing but the file had changed
    assert sources_file.find_sources(folder)[2].row["width"] == 160 and len(scanned) == 3
    (folder / "3.txt").write_text("another caption")
    assert sources_file.find_sources(folder)[3].caption == "another caption" and len(scanned) == 4


def test_a_table_is_made_again_for_captions_beside_a_list_and_for_tars_that_were_empty(tmp_path, monkeypatch):
    """Catches what was absent when the table was made, and is never looked for again."""
    monkeypatch.setenv("AMOE_INDEX", str(tmp_path / "index"))
    folder, listed = photos(tmp_path / "a"), tmp_path / "list.txt"
    listed.write_text("a/1.png\n")
    make_tar(folder / "empty.tar", {})
    for path in (tmp_path, folder, listed, folder / "empty.tar"):
        os.utime(path, (2, 2))
    assert sources_file.find_sources(listed)[0].caption is None
    before = len(sources_file.find_sources(folder))
    (tmp_path / "captions.json").write_text('[{"file": "a/1.png", "caption": "red"}]')
    make_tar(folder / "empty.tar", {"x.png": (folder / "1.png").read_bytes()})
    os.utime(folder, (2, 2))
    assert sources_file.find_sources(listed)[0].caption == "red"
    assert len(sources_file.find_sources(folder)) == before + 1


def test_a_folder_without_room_for_the_table_is_named(tmp_path, monkeypatch):
    """Catches "No space left on device" that does not say which."""
    folder = photos(tmp_path / "a")
    monkeypatch.setenv("AMOE_INDEX", str(tmp_path / "index"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"index cannot hold the table of sources: File too large; .* AMOE_INDEX"):
            sources_file.find_sources(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.suffix for path in (tmp_path / "index").iterdir()] == [".lock"]


def test_an_image_changed_after_its_table_is_an_error(tmp_path, monkeypatch):
    """Catches a wrong image under an id: other bytes at a known place, in a file and in a tar."""
    folder = photos(tmp_path / "a")
    make_tar(tmp_path / "x.tar", {p.name: p.read_bytes() for p in sorted(folder.iterdir())})
    for found in (sources_file.find_sources(folder), sources_file.find_sources(tmp_path / "x.tar")):
        assert images.load_image(found[1])[0, 0, 0] == 40
        time.sleep(0.02)
        raw = found[1].path.encode() if found[1].in_tar else (folder / "5.png").read_bytes()
        with open(found[1].path, "r+b") as file:
            file.write(raw[:1] if found[1].in_tar else raw)
        with pytest.raises(ValueError, match="has changed since it was indexed"):
            images.load_image(found[1])


@pytest.mark.parametrize("name", ["rows", "names", "about.json"])
def test_a_damaged_table_is_an_error_or_made_anew(tmp_path, monkeypatch, name):
    """Catches offsets that are believed: a flipped byte would show one image under the id of another."""
    monkeypatch.setenv("AMOE_INDEX", str(tmp_path / "index"))
    folder = photos(tmp_path / "a")
    (folder / "captions.json").write_text(json.dumps([{"file": f"{i}.png", "caption": f"no {i}"} for i in range(6)]))
    os.utime(folder, (1, 1))
    os.utime(folder / "captions.json", (1, 1))
    file = sources_file.find_sources(folder).folder / Path(name)
    whole, random = file.read_bytes(), np.random.default_rng(0)
    for k in range(40):
        raw = bytearray(whole)
        at = int(random.integers(len(raw)))
        raw[at] ^= 1 << int(random.integers(8))
        file.write_bytes(raw if k else raw[:-1])
        try:
            found = sources_file.find_sources(folder)
            said = [(s.name, s.caption, images.load_image(s).shape[1] // 16) for s in found]
            assert said == [(f"{i}.png", f"no {i}", 2 + i) for i in range(6)]
        except ValueError as error:
            assert "table of sources" in str(error) and name != "about.json"
    file.write_bytes(whole)


def test_shapes_come_from_the_table_and_images_are_opened_once(tmp_path, monkeypatch):
    """Catches headers read while training."""
    found = sources_file.find_sources(photos(tmp_path / "a"))
    opened = []
    read = sources_file.read_bytes
    monkeypatch.setattr(sources_file, "read_bytes", lambda *a: opened.append(a[0]) or read(*a))
    dataset = images.Images(found, views=2)
    assert dataset.shard(0).shapes[::2].tolist() == [[3, 2 + i] for i in range(6)] and not opened
    batch = dataset.read([(0, i) for i in range(0, 12, 2)])
    assert batch.shapes.tolist() == [[3, 2 + i] for i in range(6)] and len(opened) == 6
    views = dataset.read([(0, i) for i in range(1, 12, 2)])
    assert views.shapes.tolist() == dataset.shard(0).shapes[1::2].tolist()


def test_processes_make_the_same_table(tmp_path):
    """Catches results out of order, and offsets that begin anew in each job."""
    folder = photos(tmp_path / "a", 5)
    for k in range(3):
        make_tar(folder / f"{k}.tar", {f"{i}.png": (folder / f"{i}.png").read_bytes() for i in range(k + 1)})
    one = sources_file.find_sources(folder)
    many = sources_file.find_sources(folder, workers=2, anew=True)
    assert [s.name for s in one] == sorted(s.name for s in one) and len(one) == 11
    assert one.rows.tobytes() == many.rows.tobytes() and one.names_hash() == many.names_hash()


def test_several_folders_links_and_lists_of_folders(tmp_path):
    """Catches rglob, which follows no link, a loop that is walked for ever, an image that a link names twice, and two
    images of one name."""
    a, b = photos(tmp_path / "a", 2), photos(tmp_path / "b/deep", 2).parent
    (a / "link").symlink_to(b)
    (b / "loop").symlink_to(b)
    (b / "up").symlink_to(a)
    for name in ("self", "self.png"):  # links that no system call follows
        (a / name).symlink_to(name)
    (a / "nothing.png").symlink_to("nowhere")
    assert [s.name for s in sources_file.find_sources(a)] == ["0.png", "1.png", "link/deep/0.png", "link/deep/1.png"]
    both = sources_file.find_sources([a, b / "deep"])
    linked = ["a/link/deep/0.png", "a/link/deep/1.png"]
    assert [s.name for s in both] == ["a/0.png", "a/1.png", *linked]
    apart = [s.name for s in sources_file.find_sources([b / "deep", a])]
    assert apart == ["deep/0.png", "deep/1.png", "a/0.png", "a/1.png"]
    (tmp_path / "list.txt").write_text("a\nb/deep/1.png\n")
    assert [s.name for s in sources_file.find_sources(tmp_path / "list.txt")][2:] == [*linked, "b/deep/1.png"]
    assert [s.name for s in sources_file.find_sources([a, a])] == ["a/0.png", "a/1.png", *linked]
    (tmp_path / "twice.txt").write_text("a/0.png\na/0.png\n")
    with pytest.raises(ValueError, match="twice"):
        sources_file.find_sources(tmp_path / "twice.txt")
    alike = [photos(tmp_path / name / "images", 1) for name in "xy"]  # folders of one name go by the folder above too
    (alike[1] / "captions.json").write_text('[{"file": "0.png", "caption": "of y"}]')
    found = [(s.name, s.caption) for s in sources_file.find_sources(alike)]
    assert found == [("x/images/0.png", None), ("y/images/0.png", "of y")]


def test_pipes_devices_and_foreign_names_are_skipped(tmp_path):
    """Catches a wait for a pipe, a read of /dev/zero, and a name that is no UTF-8 which stops everything."""
    folder = photos(tmp_path / "a", 2)
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:
        file.write((folder / "0.png").read_bytes())
    os.mkfifo(folder / "0.txt")
    (folder / "1.txt").write_bytes(b"caf\xe9 \xe2\x80\xa8 here")
    (tmp_path / "list.txt").write_text("a/pipe.png\na/gone.png\na/1.png\n")
    found = sources_file.find_sources(folder)
    assert [s.name for s in found] == ["0.png", "1.png", "caf\\xe9.png"] and found[0].caption is None
    assert found[1].caption == "caf\ufffd \u2028 here"
    with pytest.raises(ValueError, match="No such file"):
        images.load_image(found[2])
    for source in sources_file.find_sources(tmp_path / "list.txt")[:2]:
        with pytest.raises(ValueError, match=r"no regular file|No such file"):
            images.load_image(source)


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A plain server that knows byte ranges."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = Path(self.directory + self.path)
        raw = path.read_bytes() if path.is_file() else None
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(wanted[1]) if wanted else 0
        if raw is None or first >= len(raw):
            self.send_error(404 if raw is None else 416)
            return
        part = raw[first : int(wanted[2]) + 1 if wanted and wanted[2] else None]
        self.server.sent.append(len(part))
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(raw)}")
        self.send_header("ETag", f'"{hash(raw)}"')
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture
def web(tmp_path):
    (tmp_path / "web").mkdir()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Ranges, directory=str(tmp_path / "web"))
    )
    server.sent = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, tmp_path / "web", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_tars_and_lists_are_read_over_http(web):
    """Catches a URL taken for a path, whole tars fetched for one image, and a tar that changed in between."""
    server, folder, url = web
    noise = Image.effect_noise((900, 900), 90)
    members = {"a.png": encoded(noise.convert("RGB")).getvalue(), "a.txt": b"a noise"}
    members |= {f"{i}.png": encoded(Image.new("RGB", (32 + 16 * i, 32), (i, 0, 0))).getvalue() for i in range(40)}
    make_tar(folder / "x.tar", members)
    (folder / "0.png").write_bytes(members["7.png"])
    (folder / "list.txt").write_text("x.tar\n0.png\ngone.png\n")
    found, local = sources_file.find_sources(f"{url}/list.txt"), sources_file.find_sources(folder / "x.tar")
    assert [s.name for s in found] == [*(s.name for s in local), "0.png", "gone.png"] and found[0].caption == "a noise"
    assert all((a.row["height"], a.span) == (b.row["height"], b.span) for a, b in zip(found, local, strict=False))
    server.sent.clear()
    assert torch.equal(images.load_image(found[8]), images.load_image(local[8]))
    assert server.sent == [local[8].span[1]] and images.load_image(found[41])[0, 0, 0] == 7
    with pytest.raises(ValueError, match="No such file"):
        images.load_image(found[42])
    make_tar(folder / "x.tar", dict(reversed(members.items())))
    with pytest.raises(ValueError, match="has changed"):
        images.load_image(found[8])
    make_tar(folder / "x.tar", members)
    (folder / "x.tar").write_bytes((folder / "x.tar").read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match=r"x\.tar is no whole"):
        sources_file.find_sources(f"{url}/x.tar")
    with pytest.raises(ValueError, match="cannot be listed"):
        sources_file.find_sources(f"{url}/")


def test_budgets_are_drawn_by_seed_and_id_in_training_and_held_out_images_alike(tmp_path):
    """Catches a budget by the remainder of the id, which decides as well what is held out, and one that a decoder does
    not share with the table of shapes."""
    ids = np.random.default_rng(0).integers(2**63, size=60_000)
    for part in (ids[held_out(ids)], ids[~held_out(ids)]):
        drawn = images.choose_budget(0, part, [256, 1024, 2304])
        assert all(abs((drawn == b).mean() - 1 / 3) < 0.02 for b in (256, 1024, 2304))
    both = [images.choose_budget(seed, ids, [256, 1024]) == 256 for seed in (0, 1)]
    assert abs((both[0] & both[1]).mean() - 1 / 4) < 0.02
    for i in range(40):
        Image.new("RGB", (300, 300)).save(tmp_path / f"{i}.png")
    found = images.Images(sources_file.find_sources(tmp_path), max_tokens=(16, 64, 144), shard_images=40)
    batch, entries = found.read([(0, i) for i in range(40)]), found.shard(0)
    assert np.array_equal(batch.shapes.numpy(), entries.shapes)
    assert sorted(set(entries.shapes.prod(1).tolist())) == [16, 64, 144]
    assert images.Images(sources_file.find_sources(tmp_path), max_tokens=[64]).max_tokens == 64
