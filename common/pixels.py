"""Pixels before they are rows: the token budget of an image, and any image as RGB."""

import numpy as np
from PIL import Image

PATCH = 16  # pixels on a side


def grid(height, width, min_tokens, max_tokens):
    """Patches (h, w) for images of height x width pixels: native resolution, shrunk or enlarged to the token budget.

    The native grid is rounded to whole patches. Above max_tokens it is the largest grid of the same aspect that fits;
    below min_tokens the smallest that reaches it, or the largest that fits where there is none between the two.
    Numbers give ints, arrays give arrays.
    """
    a, b = np.float64(height) / PATCH, np.float64(width) / PATCH

    def grown(h, w):
        """The next grid as the scale grows: h rounds up at scale (h + 1/2) / a, w at (w + 1/2) / b."""
        tall, wide = (h + 0.5) * b, (w + 0.5) * a  # both scales times a b: the lesser comes first
        return h + (tall <= wide), w + (wide <= tall)

    def largest(n):
        """The last grid of at most n patches as the scale grows.

        It starts where (a scale + 1/2) (b scale + 1/2) = n, where no rounding passes n, and steps on from there.
        """
        scale = (np.sqrt((a + b) ** 2 / 4 + 4 * a * b * (n - 0.25)) - (a + b) / 2) / (2 * a * b)
        scale = np.minimum(scale, n / np.maximum(a, b))
        h, w = np.maximum(1, np.rint(a * scale)), np.maximum(1, np.rint(b * scale))
        while True:
            above = grown(h, w)
            fits = above[0] * above[1] <= n
            if not np.any(fits):
                return h, w
            h, w = np.where(fits, above[0], h), np.where(fits, above[1], w)

    h, w = np.maximum(1, np.rint(a)), np.maximum(1, np.rint(b))
    if np.any(low := h * w < min_tokens):
        h, w = (np.where(low, new, old) for new, old in zip(grown(*largest(min_tokens - 1)), (h, w), strict=True))
    if np.any(high := h * w > max_tokens):
        h, w = (np.where(high, new, old) for new, old in zip(largest(max_tokens), (h, w), strict=True))
    return (h.astype(np.int32), w.astype(np.int32)) if np.ndim(h) else (int(h), int(w))


def to_rgb(image):
    """A PIL image in 8-bit RGB, transparency over white; ValueError for one of floats."""
    if image.mode == "F":  # Pillow would cut them off at 0 and 255: an image from 0 to 1 would be black
        raise ValueError("an image of floats, whose range nobody knows: make its pixels uint8")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
