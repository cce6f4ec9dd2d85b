"""Rotary position embeddings: golden RoPE of the student, and the axial rotation of DINOv3.

A patch at (y, x) has an angle for every head and frequency, theta = yx . f, and each frequency turns one pair of
channels of its queries and keys by it, so that scores depend on how far apart two patches lie. Golden RoPE is Jerry
Xiong's "On N-dimensional rotary positional embeddings" (2025): every head and frequency has a direction of its own.

Plain torch, in float32 whatever comes in. Shape letters: T tokens, H heads, d head width, f frequencies of a head.
"""

import functools
import math

import torch
import torch.nn.functional as F


def golden_frequencies(heads, head_dim):
    """Rotation frequencies [heads, head_dim / 4, 2] in radians per unit of (y, x), float32.

    Magnitudes are geometric from 1 to 20 within a head; directions follow the plastic-number low-discrepancy
    sequence over all (head, frequency) pairs, mapped through erfinv to a Gaussian plane and normalised to the circle.
    """
    n = head_dim // 4
    plastic = 2.0  # the real root of x^3 = x + 1, by the fixed point x = (1 + x)^(1/3)
    for _ in range(10):  # ten steps, as the released buffers were made: the last digits of a direction depend on it
        plastic = (1 + plastic) ** (1 / 3)
    index = torch.arange(1, heads * n + 1, dtype=torch.float64)
    point = torch.stack([index / plastic, index / plastic**2], dim=1) % 1
    direction = F.normalize(torch.erfinv(2 * point - 1), dim=1)
    magnitude = 20.0 ** torch.linspace(0, 1, n, dtype=torch.float64)
    return (direction.view(heads, n, 2) * magnitude[:, None]).float()


def rotations(yx_T2, freqs_Hf2):
    """cos and sin of theta = yx . f, each [T, H, head_dim / 4], float32. Position 0 does not rotate."""
    # Not a matrix product: autocast would compute it in bfloat16, wrong by up to 0.13 radians.
    y_T11, x_T11 = yx_T2.float()[:, :, None, None].unbind(1)
    theta_THf = y_T11 * freqs_Hf2[..., 0] + x_T11 * freqs_Hf2[..., 1]
    return theta_THf.cos(), theta_THf.sin()


def rotate(x_THd, cos_THf, sin_THf):
    """Rotate the second half of each head in interleaved pairs; the first half carries no position. Same dtype out."""
    half = x_THd.shape[-1] // 2
    pairs = x_THd[..., half:].float().unflatten(-1, (-1, 2))
    if x_THd.device.type == "cpu" and not torch.compiler.is_compiling():  # one pass where the other form takes seven
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos_THf, sin_THf))
    else:  # the compiler knows no complex numbers, and makes one pass of this
        a, b = pairs.unbind(-1)
        turned = torch.stack([a * cos_THf - b * sin_THf, a * sin_THf + b * cos_THf], dim=-1)
    return torch.cat([x_THd[..., :half], turned.flatten(-2).to(x_THd.dtype)], dim=-1)


@functools.lru_cache(4096)  # shapes recur; making them anew was a third of packing
def positions(h, w):
    """Patch positions [h * w, 2] (y, x), row-major: y spans +-sqrt(h / w), x +-sqrt(w / h), ends included.

    An axis of a single patch sits at its minimum. The area spanned is the same for every shape.
    """
    sides = (h, math.sqrt(h / w)), (w, math.sqrt(w / h))
    axes = [-limit + 2 * limit * torch.arange(n) / max(n - 1, 1) for n, limit in sides]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(h * w, 2)


def rotate_half(x_SHd, cos_Sd, sin_Sd):
    """Rotate channel i of a head with channel i + d / 2, in float32; cos and sin [S, d / 2]. Same dtype out."""
    cos, sin = cos_Sd[:, None], sin_Sd[:, None]
    a, b = x_SHd.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_SHd.dtype)
