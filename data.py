"""Images to token rows, packs of whole images, the feature cache, and the loader that reads it back."""

from dataclasses import dataclass, field, fields, replace

import torch

from amoe import PATCH, ROW, grid_positions


@dataclass
class Batch:
    """A pack: images one after another, `[CLS, registers, patches in row-major order]` each, padding at the end.

    Shape letters: T tokens, M images, C channels of a teacher, R registers.
    """

    rows: torch.Tensor  # [T, 768] uint8 pixels; floats are taken as already normalised. 0 on CLS, registers, padding
    image: torch.Tensor  # [T] int32, the image a token belongs to; padding tokens form one last group, M
    yx: torch.Tensor  # [T, 2] float32 patch positions; 0 on CLS, registers and padding, so RoPE leaves them alone
    starts: torch.Tensor  # [M + 1] int32, the first token of each image (its CLS), and the end of the last
    shapes: torch.Tensor  # [M, 2] int32, (h, w) in patches
    ids: torch.Tensor  # [M] int64, stable image ids
    targets: dict = field(default_factory=dict)  # {teacher: {"patch" [T, C], "summary" [M, C], "registers" [M, R, C]}}

    @property
    def n_tokens(self):
        return self.rows.shape[0]

    @property
    def n_images(self):
        return self.shapes.shape[0]

    def patch_rows(self, i):
        """The slice of the sequence that holds image i's patches."""
        end = int(self.starts[i + 1])
        return slice(end - int(self.shapes[i].prod()), end)

    def images(self):
        """The M images, uint8 [16 h, 16 w, 3]."""
        return [from_rows(self.rows[self.patch_rows(i)], tuple(self.shapes[i].tolist())) for i in range(self.n_images)]

    def to(self, device):
        """The same pack on `device`; copies from pinned memory do not wait."""

        def move(value):
            if isinstance(value, dict):
                return {key: move(v) for key, v in value.items()}
            return value.to(device, non_blocking=True)

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})


def to_rows(image):
    """A uint8 image [16 h, 16 w, 3] to (rows [h * w, 768] in (row, col, channel) order inside a patch, (h, w))."""
    H, W, channels = image.shape
    if channels != 3 or H % PATCH or W % PATCH or not H or not W:
        raise ValueError(
            f"an image of shape {tuple(image.shape)} is not [16 h, 16 w, 3]; resize it with data.load_image"
        )
    h, w = H // PATCH, W // PATCH
    return image.reshape(h, PATCH, w, PATCH, 3).transpose(1, 2).reshape(h * w, ROW), (h, w)


def from_rows(rows, shape):
    """The inverse of to_rows: [h * w, 768] and (h, w) to [16 h, 16 w, 3]."""
    h, w = shape
    return rows.reshape(h, w, PATCH, PATCH, 3).transpose(1, 2).reshape(h * PATCH, w * PATCH, 3)


def pack(rows, shapes, n_tokens=None, registers=4, ids=None):
    """Concatenate images into one Batch of exactly n_tokens (by default just what they need).

    rows: tensors [n_i, 768] with n_i = h w of `shapes`. ids: int64 image ids, by default 0, 1, 2, ...
    ValueError where a shape does not fit its rows or the images do not fit n_tokens.
    """
    if len(rows) != len(shapes) or not rows:
        raise ValueError(
            f"pack takes as many shapes as images, at least one: got {len(rows)} images, {len(shapes)} shapes"
        )
    for i, (r, (h, w)) in enumerate(zip(rows, shapes, strict=True)):
        if r.shape != (h * w, ROW):
            raise ValueError(f"image {i} of shape {(h, w)} needs rows [{h * w}, {ROW}] and has {list(r.shape)}")
    special = 1 + registers
    lengths = torch.tensor([special + len(r) for r in rows])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    used = int(starts[-1])
    T = used if n_tokens is None else n_tokens
    if used > T:
        raise ValueError(f"{len(rows)} images need {used} tokens and the pack has {T}")
    packed = rows[0].new_zeros(T, ROW)
    yx = torch.zeros(T, 2)
    image = torch.full((T,), len(rows), dtype=torch.int32)
    image[:used] = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(lengths)
    for r, (h, w), start in zip(rows, shapes, starts.tolist(), strict=False):
        packed[start + special : start + special + h * w] = r
        yx[start + special : start + special + h * w] = grid_positions(h, w)
    return Batch(
        rows=packed,
        image=image,
        yx=yx,
        starts=starts.int(),
        shapes=torch.tensor([tuple(s) for s in shapes], dtype=torch.int32),
        ids=torch.arange(len(rows)) if ids is None else torch.as_tensor(ids, dtype=torch.int64),
    )
