"""Image files to rows: the token budget, conversions, and what bad files get."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

import images


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return io.BytesIO(file.getvalue())


@pytest.mark.parametrize("size", [(480, 640), (1000, 200), (333, 334), (4000, 3000), (17, 150)])
def test_large_images_shrink_to_the_largest_grid_of_their_aspect(size):
    """Catches floor on both sides, which wastes up to a third of the budget."""
    h, w = images.grid(*size, 1, 256)
    assert h * w <= 256
    exact = (256 * size[0] / size[1]) ** 0.5
    if size[0] * size[1] > 256 * 256:
        assert h * w > 0.85 * 256 and abs(h - exact) <= 1 and abs(w - 256 / exact) <= 1


def test_small_images_keep_their_native_grid_or_reach_the_least():
    """Catches upscaling to the maximum."""
    assert images.grid(96, 64, 1, 256) == (6, 4)
    h, w = images.grid(96, 64, 64, 256)
    assert 64 <= h * w <= 80 and h > w


def test_rows_are_row_column_channel():
    """Catches (channel, row, column) inside a patch, the order of raw images in the reference code."""
    image = torch.arange(32 * 48 * 3).reshape(32, 48, 3).to(torch.uint8)
    rows, shape = images.to_rows(image)
    assert shape == (2, 3) and torch.equal(rows[4], image[16:32, 16:32].reshape(-1))
    assert torch.equal(images.from_rows(rows, shape), image)
    with pytest.raises(ValueError, match="16 h"):
        images.to_rows(image[:30])


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


def test_sources_have_stable_ids_captions_and_categories(tmp_path):
    """Catches Python's salted hash(), and ids of absolute paths."""
    (tmp_path / "a").mkdir()
    for name in ("a/x.png", "a/y.PNG", "b.jpg"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    (tmp_path / "captions.json").write_text('[{"file": "a/x.png", "caption": "an x", "category": "letters"}]')
    (tmp_path / "b.txt").write_text("a b\n")
    found = images.find_sources(tmp_path)
    assert [s.name for s in found] == ["a/x.png", "a/y.PNG", "b.jpg"]
    assert found[0].id == 888412437924757584 and all(0 <= s.id < 2**63 for s in found)
    assert (found[0].caption, found[0].category, found[1].caption, found[2].caption) == ("an x", "letters", None, "a b")
    (tmp_path / "list.txt").write_text("b.jpg\na/x.png\n")
    assert [s.id for s in images.find_sources(tmp_path / "list.txt")] == [found[2].id, found[0].id]
    with pytest.raises(ValueError, match="nowhere"):
        images.find_sources(tmp_path / "nowhere")
