"""The student: a Mixture-of-Experts ViT over packed token rows, PHI-S teacher balancing, and the distillation losses.

After AMoE / SigLino (arXiv 2512.20157). PHI-S is arXiv 2410.01680; golden RoPE is Jerry Xiong's "On N-dimensional
rotary positional embeddings" (2025); aux-loss-free balancing is arXiv 2408.15664. A released SigLino checkpoint loads
with `load_siglino`. The equations (E1) to (E5) are written out at the functions that compute them.

A pack is a concatenation of images, `[CLS, registers, patches in row-major order]` each, with no padding between them
and no batch axis. Attention never crosses images, so packing changes no result.

Shape letters: T tokens in the pack, M images in it, S special tokens of an image, D model width, H heads, d head width,
L MoE layers, E experts, K experts a token, F hidden width of a feed-forward, C channels of a teacher, R registers,
N rows of anything, B images of the global batch (all packs and ranks of a step).
"""

# Our modules come first: importing kernels sets how OpenMP's threads wait, which torch reads when it is loaded
from common.commands import one_line_errors
from common.pixels import PATCH, grid, to_rgb
from common.plug_in import code_of, plug_in
from common.store import read_state, write_atomically
from hub.siglino import check_sizes, from_siglino, to_siglino
from kernels.arkd import arkd
from kernels.attention import attend, image_runs
from kernels.hadamard import hadamard
from kernels.moe import moe
from kernels.norm import RMSNorm, rms_norm
from kernels.rope import golden_frequencies, positions, rotate, rotations

# isort: split
import contextlib
import copy
import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

ROW = PATCH * PATCH * 3
QK_EPS = 1.1920928955078125e-07  # float32's machine epsilon, also under bfloat16, as the released weights were trained


# ---- an image is rows ----


def to_rows(image):
    """A uint8 image [16 h, 16 w, 3] to (rows [h * w, 768] in (row, col, channel) order inside a patch, (h, w))."""
    H, W, channels = image.shape
    if channels != 3 or H % PATCH or W % PATCH or not H or not W:
        raise ValueError(f"an image {list(image.shape)} is not [16 h, 16 w, 3]: images.load_image resizes one to it")
    h, w = H // PATCH, W // PATCH
    return image.reshape(h, PATCH, w, PATCH, 3).transpose(1, 2).reshape(h * w, ROW), (h, w)


def from_rows(rows, shape):
    """The inverse of to_rows: [h * w, 768] and (h, w) to [16 h, 16 w, 3]."""
    h, w = shape
    return rows.reshape(h, w, PATCH, PATCH, 3).transpose(1, 2).reshape(h * PATCH, w * PATCH, 3)


def any_to_rows(image, max_tokens):
    """(rows, (h, w)) of a path, a PIL image, or uint8 pixels [H, W, 3] as an array or a tensor.

    Pixels whose sides are multiples of 16 stay as they are; everything else is resized, see common.pixels.grid.
    """
    if isinstance(image, (str, os.PathLike)):
        with one_line_errors(f"cannot read {image}"), Image.open(image) as opened:
            return any_to_rows(opened, max_tokens)
    if isinstance(image, Image.Image):
        image = to_rgb(ImageOps.exif_transpose(image))
    else:
        pixels = torch.from_numpy(np.array(image)) if isinstance(image, np.ndarray) else image
        usable = isinstance(pixels, torch.Tensor) and pixels.dtype == torch.uint8 and pixels.shape[2:] == (3,)
        if not usable or not pixels.numel():
            given = f"{type(image).__name__} of {pixels.dtype} {[*pixels.shape]}" if hasattr(pixels, "dtype") else image
            raise ValueError(f"encode takes paths, PIL images and uint8 pixels [H, W, 3], and was given {given!r}")
        if pixels.shape[0] % PATCH == 0 == pixels.shape[1] % PATCH:
            return to_rows(pixels)
        image = Image.fromarray(pixels.numpy(force=True))
    h, w = grid(image.height, image.width, 1, max_tokens)
    return to_rows(torch.from_numpy(np.array(image.resize((w * PATCH, h * PATCH), Image.Resampling.BICUBIC))))


# ---- a pack of images ----


@dataclass
class Batch:
    """A pack: images one after another, `[CLS, registers, patches in row-major order]` each, padding at the end."""

    rows: torch.Tensor  # [T, 768] uint8 pixels; floats are taken as already normalised. 0 on CLS, registers, padding
    image: torch.Tensor  # [T] int32, the image a token belongs to; padding tokens form one last group, M
    yx: torch.Tensor  # [T, 2] float32 patch positions; 0 on CLS, registers and padding, so RoPE leaves them alone
    starts: torch.Tensor  # [M + 1] int32, the first token of each image (its CLS), and the end of the last
    shapes: torch.Tensor  # [M, 2] int32, (h, w) in patches
    ids: torch.Tensor  # [M] int64, stable image ids
    targets: dict = field(default_factory=dict)  # {teacher: {"patch" [T, C], "summary" [M, C], "registers" [M, R, C]}}
    mask_blocks: dict = field(default_factory=dict)  # FlexAttention's, by kernels.attention.mask_blocks

    @property
    def n_tokens(self):
        return self.rows.shape[0]

    @property
    def n_images(self):
        return self.shapes.shape[0]

    @property
    def offset(self):
        """[T] int64: a token's place in its image, 0 for CLS; in the padding, its place after the first of that."""
        return torch.arange(self.n_tokens, device=self.image.device) - self.starts.long()[self.image.long()]

    @property
    def is_patch(self):
        """[T] bool: which tokens are patches, not CLS, registers or padding."""
        special_M = self.starts.diff() - self.shapes.prod(1)
        special = F.pad(special_M, (0, 1), value=self.n_tokens)  # no padding token is a patch
        return self.offset >= special[self.image.long()]

    def patch_rows(self, i):
        """The slice of the sequence that holds image i's patches."""
        end = int(self.starts[i + 1])
        return slice(end - int(self.shapes[i].prod()), end)

    def images(self):
        """List of the M images, uint8 [16 h, 16 w, 3]."""
        return [from_rows(self.rows[self.patch_rows(i)], tuple(self.shapes[i].tolist())) for i in range(self.n_images)]

    def to(self, device):
        """The same pack on `device`; copies from pinned memory are asynchronous."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):
        """The same pack in pinned memory."""
        return self.map_tensors(torch.Tensor.pin_memory)

    def map_tensors(self, function):
        """The same pack with `function` applied to every tensor."""
        return replace(self, **tree_map(function, vars(self)))


def pack(rows, shapes, n_tokens=None, registers=4, ids=None):
    """Concatenate images into one Batch of exactly n_tokens (by default as many as the images need).

    rows: tensors [n_i, 768] with n_i = h w of `shapes`. ids: int64 image ids, by default 0, 1, 2, ...
    ValueError where a shape does not fit its rows, images do not fit n_tokens, or some are pixels and others floats.
    """
    if len(rows) != len(shapes) or not rows:
        raise ValueError(f"pack takes a shape an image, at least one: got {len(rows)} images, {len(shapes)} shapes")
    for i, (r, (h, w)) in enumerate(zip(rows, shapes, strict=True)):
        if r.shape != (h * w, ROW) or r.dtype != rows[0].dtype:  # a pack is of pixels, or of normalised floats
            needed = f"rows [{h * w}, {ROW}] of {rows[0].dtype}"
            raise ValueError(f"image {i} of shape {(h, w)} needs {needed} and has {list(r.shape)} of {r.dtype}")
    special = 1 + registers
    starts = np.cumsum([0, *(special + len(r) for r in rows)])
    T = int(starts[-1]) if n_tokens is None else n_tokens
    if starts[-1] > T:
        raise ValueError(f"{len(rows)} images need {starts[-1]} tokens and the pack has {T}")
    image = np.repeat(np.arange(len(rows) + 1, dtype=np.int32), np.diff(starts, append=T))
    packed, yx = rows[0].new_zeros(T, ROW), torch.zeros(T, 2)
    for r, (h, w), end in zip(rows, shapes, starts[1:].tolist(), strict=True):
        packed[end - h * w : end] = r
        yx[end - h * w : end] = positions(h, w)
    return Batch(
        rows=packed,
        image=torch.from_numpy(image),
        yx=yx,
        starts=torch.from_numpy(starts.astype(np.int32)),
        shapes=torch.tensor([tuple(s) for s in shapes], dtype=torch.int32),
        ids=torch.arange(len(rows)) if ids is None else torch.as_tensor(ids, dtype=torch.int64),
    )


def split_by_tokens(lengths, n_tokens):
    """Slices of consecutive images that have at most n_tokens together; a longer image gets a slice of its own.

    lengths: tokens of each image, special ones included.
    """
    first, used = 0, 0
    for i, length in enumerate(lengths):
        if i > first and used + length > n_tokens:
            yield slice(first, i)
            first, used = i, 0
        used += length
    if lengths:
        yield slice(first, len(lengths))


# ---- configs ----


@dataclass(frozen=True)
class Config:
    """Sizes of a student. The first `dense_layers` blocks have one feed-forward, the others `experts` of them."""

    layers: int
    dim: int
    heads: int
    head_dim: int
    experts: int = 0
    top_k: int = 0  # experts a token is sent to
    expert_hidden: int = 0
    dense_layers: int = 0  # `first_n_layers_dense` of the authors' config: 0 in their MoE models, all in the dense ones
    dense_hidden: int = 0
    norm_weight: bool = True  # False: the weightless block norms of the 30M and 70M models
    registers: int = 4


CONFIGS = {  # layers, dim, heads, head_dim
    "amoe-0.3b": Config(18, 768, 8, 128, experts=28, top_k=6, expert_hidden=384),
    "amoe-0.15b": Config(18, 768, 8, 128, experts=28, top_k=2, expert_hidden=384),
    "dense-0.6b": Config(18, 1280, 16, 80, dense_layers=18, dense_hidden=5120),
    "dense-70m": Config(12, 512, 8, 64, dense_layers=12, dense_hidden=2048, norm_weight=False),
    "dense-30m": Config(12, 384, 6, 64, dense_layers=12, dense_hidden=1536, norm_weight=False),
    "toy": Config(3, 128, 4, 32, experts=8, top_k=2, expert_hidden=128),
}


def autocast(device):
    """bfloat16 on CUDA, over float32 master weights; nothing elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


class Float32Buffers(nn.Module):
    """A module whose own buffers keep their dtype under `.to(bfloat16)`, which would round positions and biases."""

    def _apply(self, fn, recurse=True):
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


# ---- blocks ----


class Attention(nn.Module):
    """Attention within each image, [T, D] -> [T, D]; queries and keys are normalised, then rotated; one sink per head.

    rotation: (cos, sin) by kernels.rope.rotations. mask: which tokens share an image, a BlockMask or `image_runs`.
    """

    def __init__(self, config):
        super().__init__()
        self.head_dim, inner = config.head_dim, config.heads * config.head_dim
        self.wq, self.wk, self.wv = (nn.Linear(config.dim, inner, bias=False) for _ in range(3))
        self.wo = nn.Linear(inner, config.dim, bias=False)
        self.sinks = nn.Parameter(torch.empty(config.heads))

    def forward(self, x_TD, rotation, mask):
        q, k, v = (w(x_TD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = (rotate(rms_norm(t, None, QK_EPS), *rotation) for t in (q, k))
        return self.wo(attend(q, k, v, mask, self.sinks).flatten(1))


class FeedForward(nn.Module):
    """A SiLU GLU, w2(silu(w1 x) * w3 x), [T, D] -> [T, D]."""

    def __init__(self, config):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(config.dim, config.dense_hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(config.dense_hidden, config.dim, bias=False)

    def forward(self, x_TD):
        return self.w2(F.silu(self.w1(x_TD)) * self.w3(x_TD))


class Router(nn.Module):
    """Top-k of sigmoid scores + bias; the bias is no part of the chosen experts' weights (arXiv 2408.15664)."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.top_k
        self.gate = nn.Linear(config.dim, config.experts, bias=False)

    def forward(self, x_TD, bias_E):
        """Experts [T, K] int64 and their raw scores [T, K] float32."""
        # float32: in bfloat16 1.35% of tokens would get other experts. With the matmul precision "high", which train.py
        # sets on CUDA, it is TF32, which is faster: 0.09% of tokens (both simulated at D = 768, E = 28, K = 6).
        with torch.autocast(x_TD.device.type, enabled=False):
            score_TE = torch.sigmoid(F.linear(x_TD.float(), self.gate.weight.float()))
        expert_TK = (score_TE + bias_E).topk(self.top_k, dim=1).indices
        return expert_TK, score_TE.gather(1, expert_TK)


class MoE(Float32Buffers):
    """Experts, each a SiLU GLU like FeedForward; a token's output is the weighted sum over its K experts."""

    def __init__(self, config):
        super().__init__()
        E, D, F_ = config.experts, config.dim, config.expert_hidden
        self.router = Router(config)
        shapes = {"w1": (E, F_, D), "w2": (E, D, F_), "w3": (E, F_, D)}
        self.experts = nn.ParameterDict({name: torch.empty(shape) for name, shape in shapes.items()})
        self.register_buffer("expert_bias", torch.zeros(E))
        self.impl = "auto"  # of kernels.moe

    def forward(self, x_TD, real_T):
        """Returns [T, D] and the expert load [E]: how many real tokens (no padding) each expert was given."""
        expert_TK, weight_TK = self.router(x_TD, self.expert_bias)
        w = self.experts
        out = moe(x_TD, expert_TK, weight_TK, w.w1, w.w2, w.w3, self.impl)
        # A row per token, then a sum: adding all tokens into [E] at once would queue them at E addresses.
        real_TK = real_T[:, None].expand_as(expert_TK).to(self.expert_bias.dtype)
        load_TE = real_TK.new_zeros(len(x_TD), len(self.expert_bias)).scatter(1, expert_TK, real_TK)
        return out, load_TE.sum(0)

    def balance(self, load_E, rate):
        """After an optimizer step: raise the bias of experts that got less than the mean load, lower the others'."""
        self.expert_bias += rate * torch.sign(load_E.mean() - load_E)


class Block(nn.Module):
    """x += attention(norm(x)), then x += f(norm(x)), f a FeedForward or an MoE."""

    def __init__(self, config, layer):
        super().__init__()
        # The two epsilons are the released models': a weightless norm ran at float32's machine epsilon.
        eps = 1e-5 if config.norm_weight else QK_EPS
        norm = lambda: RMSNorm(config.dim, eps=eps, elementwise_affine=config.norm_weight)  # noqa: E731
        self.attention_norm, self.attention, self.ffn_norm = norm(), Attention(config), norm()
        if layer < config.dense_layers:
            self.feed_forward = FeedForward(config)
        else:
            self.moe = MoE(config)

    def forward(self, x_TD, rotation, mask, real_T):
        """Returns the residual stream [T, D] and the expert load [E], None from a dense block."""
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), rotation, mask)
        normed_TD = self.ffn_norm(x_TD)
        if hasattr(self, "moe"):
            out_TD, load_E = self.moe(normed_TD, real_T)
        else:
            out_TD, load_E = self.feed_forward(normed_TD), None
        return x_TD + out_TD, load_E


# ---- PHI-S ----


class PhiS(Float32Buffers):
    """PHI-S standardisation (E1; arXiv 2410.01680): y = H U^T (x - mean) / sigma, x = mean + sigma U H^T y.

    U holds the covariance's eigenvectors, sigma^2 is its mean eigenvalue, H a normalised Hadamard matrix. The rotation
    spreads variance evenly: in y's space, the *standardised* one, every channel has variance 1, by one divisor for all.
    """

    def __init__(self, mean_C, rotation_CC, sigma):
        """rotation_CC is H U^T. In ablations (`without_phi_s`) it is the identity, and sigma may be [C]."""
        super().__init__()
        self.register_buffer("mean", mean_C)
        self.register_buffer("rotation", rotation_CC)
        self.register_buffer("sigma", torch.as_tensor(sigma, dtype=mean_C.dtype))

    @classmethod
    def fit(cls, x_NC):
        """Fit to features [N, C], N >= 2, in float64; kept in float32 (float64 for float64 features)."""
        x = x_NC.double()
        return cls.from_moments(len(x), x.sum(0), x.T @ x, torch.promote_types(x_NC.dtype, torch.float32))

    @classmethod
    def from_moments(cls, count, sum_C, outer_CC, dtype=torch.float32):
        """Fit from float64 sums of x and x x^T over `count` rows: shards add their sums, features are not moved."""
        if count < 2:
            raise ValueError(f"PHI-S needs at least 2 feature rows to measure a covariance, and was given {count}")
        C = len(sum_C)
        mean = sum_C / count
        covariance = outer_CC / count - torch.outer(mean, mean)
        if not torch.isfinite(covariance).all():
            raise ValueError("PHI-S was given features that are not finite (NaN or infinity)")
        values, vectors = torch.linalg.eigh(covariance)
        largest = vectors.abs().argmax(0)  # an eigenvector may come with either sign: make that entry positive
        vectors = vectors * vectors[largest, torch.arange(C)].sign()
        sigma = values.clamp(min=0).mean().sqrt()
        if sigma <= 1e-7 * mean.square().mean().sqrt():  # float64 leaves up to 5e-8 of constant ones
            raise ValueError("PHI-S was given constant features: their variance is 0 in every channel")
        H = hadamard(C)
        if H is None:
            print(f"PHI-S: no Hadamard matrix of order {C} is known here; a seeded random rotation instead", flush=True)
            generator = torch.Generator().manual_seed(0)
            H = torch.linalg.qr(torch.randn(C, C, generator=generator, dtype=torch.float64))[0] * math.sqrt(C)
        return cls(*(t.to(dtype) for t in (mean, (H / math.sqrt(C)) @ vectors.T, sigma)))

    def apply(self, x):
        """Teacher's space to standardised space, [..., C] -> [..., C]."""
        return (x.to(self.mean.dtype) - self.mean) @ self.rotation.T / self.sigma

    def invert(self, y):
        """Standardised space to the teacher's own, [..., C] -> [..., C]."""
        return self.mean + self.sigma * (y.to(self.mean.dtype) @ self.rotation)

    def fold(self, linear):
        """A new nn.Linear, with bias, into the teacher's own space: fold(linear)(x) = invert(linear(x))."""
        back_CC = self.sigma.double()[..., None] * self.rotation.double().T
        return followed_by(linear, back_CC, self.mean.double())

    def unfold(self, linear):
        """The inverse of fold, as a new nn.Linear with bias: unfold(linear)(x) = apply(linear(x))."""
        forth_CC = self.rotation.double() / self.sigma.double()
        return followed_by(linear, forth_CC, -forth_CC @ self.mean.double())


@torch.no_grad()
def followed_by(linear, matrix_CC, shift_C):
    """A new nn.Linear, with bias, of matrix_CC linear(x) + shift_C, computed in float64."""
    weight, bias = linear.weight.double(), 0 if linear.bias is None else matrix_CC @ linear.bias.double()
    out = nn.Linear(linear.in_features, linear.out_features, dtype=linear.weight.dtype, device=weight.device)
    out.weight.copy_(matrix_CC @ weight)
    out.bias.copy_(bias + shift_C)
    return out


INT8_STEP = 1 / 16  # of a standard deviation: +-127 steps reach 7.9 sigma, rounding noise is 35 dB below unit variance


def quantise(y):
    """Standardised features to int8 steps; values beyond +-7.9 sigma are clipped."""
    return (y / INT8_STEP).round().clamp(-127, 127).to(torch.int8)


def dequantise(y):
    """Standardised features as stored (int8 steps or floats) to float32 (floats keep a wider dtype)."""
    return y.float() * INT8_STEP if y.dtype == torch.int8 else y.to(torch.promote_types(y.dtype, torch.float32))


# ---- teacher heads ----


@dataclass
class Space:
    """What the student must know of a teacher: its sizes, its PHI-S (E1), and the variances that (E2) divides by.

    `summary_variance` and `register_variance` are mean channel variances in the teacher's own space. `pool` holds the
    state of a frozen MAP head (see MapPool) where the teacher's summary is attention-pooled. `replaced_phi_s` is the
    teacher's PHI-S where an ablation puts another in its place (`without_phi_s`); None otherwise.
    """

    name: str
    dim: int
    registers: int = 0
    phi_s: PhiS | None = None
    summary_mean: torch.Tensor | None = None  # [C]
    summary_variance: float = 1.0
    register_variance: tuple[float, ...] = ()
    pool: dict | None = None
    pool_heads: int = 16
    pool_eps: float = 1e-6
    replaced_phi_s: PhiS | None = None

    @property
    def target_phi_s(self):
        """The PHI-S fitted to the teacher: patch targets are stored in its space."""
        return self.replaced_phi_s or self.phi_s

    def to_own_space(self, y):
        """Stored patch targets, taken to the teacher's own space."""
        return self.target_phi_s.invert(dequantise(y).to(self.target_phi_s.mean.device))

    def patch_target(self, y):
        """Stored patch targets, taken to the space in which the student learns."""
        return self.phi_s.to(y.device).apply(self.to_own_space(y)) if self.replaced_phi_s else dequantise(y)


STANDARDISATIONS = ("phi-s", "channels", "global", "none")


def without_phi_s(space, how, spread_C=None):
    """An ablation: the Space of a student that learns without PHI-S.

    how: "channels" gives every channel unit variance (spread_C, its standard deviation), "global" divides all by the
    one sigma of PHI-S and rotates nothing, "none" leaves features as they are.
    """
    mean, sigma, other = space.phi_s.mean, {"channels": spread_C, "global": space.phi_s.sigma, "none": 1.0}[how], {}
    if how == "none":
        mean = torch.zeros_like(mean)
        other = {"summary_variance": 1.0, "register_variance": (1.0,) * len(space.register_variance)}
    return replace(space, phi_s=PhiS(mean, torch.eye(space.dim), sigma), replaced_phi_s=space.phi_s, **other)


class MapPool(nn.Module):
    """SigLIP's attention pooling (MAP) head, for every image of a pack: one learned query attends to its tokens.

    Frozen: it belongs to the teacher. The softmax of each image runs over the packed tokens; nothing is padded.
    """

    def __init__(self, dim, hidden, heads, eps):
        super().__init__()
        self.heads = heads
        self.probe = nn.Parameter(torch.zeros(1, 1, dim))
        self.attention = nn.MultiheadAttention(dim, heads)  # never called: it gives weights the checkpoints' names
        self.layernorm = nn.LayerNorm(dim, eps=eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        self.requires_grad_(False)

    @classmethod
    def from_state(cls, state, heads, eps):
        if "mlp.fc1.weight" not in state:
            raise ValueError("the MAP head lacks 'mlp.fc1.weight'")
        hidden, dim = state["mlp.fc1.weight"].shape
        pool = cls(dim, hidden, heads, eps)
        load_exactly(pool, state, "the MAP head")
        return pool

    def forward(self, x_TC, image_T, n_images):
        """Summaries [M, C] of tokens [T, C]; tokens whose image_T is n_images (padding) are left out."""
        T, C = x_TC.shape
        a = self.attention
        query, key, value = a.in_proj_weight.chunk(3)
        bias_q, _, bias_v = a.in_proj_bias.chunk(3)
        q_Hd = F.linear(self.probe[0, 0], query, bias_q).view(self.heads, -1)
        # A token's score in head h is sum_d q[h, d] sum_c key[h, d, c] x[c]. With one query the sum over d comes first:
        # tokens are multiplied by [H, C] and not by [C, C]. A bias of the keys would not change the softmax.
        key_HC = torch.einsum("hd,hdc->hc", q_Hd, key.view(self.heads, -1, C))
        score_TH = F.linear(x_TC, key_HC).float() / math.sqrt(q_Hd.shape[1])
        v_THd = F.linear(x_TC, value, bias_v).view(T, self.heads, -1)
        index_TH = image_T.long()[:, None].expand_as(score_TH)
        # A softmax over each image's tokens; row M is the padding's.
        largest = score_TH.new_full((n_images + 1, self.heads), -math.inf)
        largest = largest.scatter_reduce(0, index_TH, score_TH.detach(), "amax")
        weight_TH = (score_TH - largest.gather(0, index_TH)).exp()
        weight_TH = weight_TH / torch.zeros_like(largest).scatter_add(0, index_TH, weight_TH).gather(0, index_TH)
        # float32: bfloat16 sums were off by 1.6% at 256 patches and by 8% at 1024
        weighted_TC = (v_THd.float() * weight_TH[..., None]).flatten(1)
        pooled = weighted_TC.new_zeros(n_images + 1, C).index_add(0, image_T.long(), weighted_TC)
        x_MC = F.linear(pooled[:n_images].to(x_TC.dtype), a.out_proj.weight, a.out_proj.bias)
        return x_MC + self.mlp.fc2(F.gelu(self.mlp.fc1(self.layernorm(x_MC)), approximate="tanh"))


class Head(Float32Buffers):
    """One teacher's features from the trunk's tokens: fc1 -> LayerNorm -> GELU -> fc2, one for all kinds of token."""

    def __init__(self, dim, space):
        super().__init__()
        self.registers = space.registers
        self.fc1 = nn.Linear(dim, space.dim)
        self.norm = nn.LayerNorm(space.dim)
        self.fc2 = nn.Linear(space.dim, space.dim, bias=False)
        self.phi_s = space.phi_s
        # The teacher's means over the training images, for encode(centre=True)
        has_means = space.target_phi_s is not None and space.summary_mean is not None
        self.register_buffer("patch_mean", space.target_phi_s.mean.clone() if has_means else None)
        self.register_buffer("summary_mean", space.summary_mean.clone() if has_means else None)
        self.pool = space.pool and MapPool.from_state(space.pool, space.pool_heads, space.pool_eps)

    def initialise(self):
        for linear in (self.fc1, self.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(self.fc1.bias)

    def to_own_space(self, z):
        """Standardised features to the teacher's own space; after `fold` they are there already."""
        return z if self.phi_s is None else self.phi_s.invert(z)

    def fold(self):
        """Put the inverse of PHI-S into fc2, for good: the head's output is then in the teacher's own space."""
        if self.phi_s is not None:
            self.fc2, self.phi_s = self.phi_s.fold(self.fc2), None

    def forward(self, h_TD, batch):
        """{"patch": [T, C] standardised, "summary": [M, C] own space, "registers": [M, R, C] own space}.

        "patch" has a row for every token; those of CLS, registers and padding are not patches.
        """
        z_TC = self.fc2(F.gelu(self.norm(self.fc1(h_TD))))
        first_M = batch.starts[:-1].long()
        with torch.autocast(h_TD.device.type, enabled=False):  # PHI-S is inverted in float32: summaries are few
            if self.pool is None:
                summary = self.to_own_space(z_TC[first_M].float())
            else:
                own_TC = self.to_own_space(z_TC.float()).to(self.pool.probe.dtype)
                summary = self.pool(own_TC, batch.image, batch.n_images)
            out = {"patch": z_TC, "summary": summary}
            if self.registers:
                registers = z_TC[first_M[:, None] + 1 + torch.arange(self.registers, device=h_TD.device)]
                out["registers"] = self.to_own_space(registers.float())
        return out


# ---- the student ----


class Student(Float32Buffers):
    """A trunk, and a Head per teacher on its tokens: like a teacher, a function from a packed Batch to features.

    Its subclasses, AMoE (its own trunk) and PlugIn (any other), define `tokens` and call `add_heads`.
    """

    code = None  # PlugIn has the bytes of its trunk's file here

    def add_heads(self, dim, registers, spaces):
        """Add a Head for each Space; registers: how many register tokens an image has in the student's packs."""
        for space in spaces:
            if space.registers > registers:
                counts = f"teacher '{space.name}' has {space.registers} registers and the student {registers}"
                raise ValueError(f"{counts}: each is matched by one of the student's")
        self.registers = registers
        self.heads = nn.ModuleDict({space.name: Head(dim, space) for space in spaces})
        self.recompute = False  # activations, in the backward pass: less memory, a third more time

    @property
    def device(self):
        return next(self.parameters()).device

    def forward(self, batch, mask=None):
        """Returns ({teacher: outputs of its Head, "amoe": the trunk's own}, expert load [MoE layers, E] float32).

        mask: attention's, see Attention; by default `image_runs`, made here on the host.
        """
        h_TD, expert_load = self.tokens(batch, mask)
        out = {name: head(h_TD, batch) for name, head in self.heads.items()}
        out["amoe"] = {"patch": h_TD, "summary": h_TD[batch.starts[:-1].long()]}
        return out, expert_load

    @torch.no_grad()
    def balance(self, load_LE, rate):
        """Aux-loss-free balancing, after an optimizer step; load_LE counted over all packs and ranks of the step."""
        layers = [block.moe for block in self.layers if hasattr(block, "moe")]
        for layer, load_E in zip(layers, load_LE, strict=True):
            layer.balance(load_E, rate)

    @torch.no_grad()
    def encode(self, images, shapes=None, n_tokens=16384, max_tokens=256, centre=False):
        """Features of images in the teachers' own spaces, one dict an image, on the model's device.

        images: paths, PIL images, or uint8 pixels [H, W, 3] as arrays or tensors. Sides in multiples of 16 stay, others
        are resized to at most `max_tokens` patches, as are paths and PIL images. With `shapes` [(h, w)], row tensors
        [n, 768] (uint8, or floats already normalised). Images are packed `n_tokens` at a time.

        A dict is {"patch": {teacher: [n, C]}, "summary": {teacher: [C]}, "shape": (h, w)}; under the name "amoe" it has
        the trunk's own features too. centre: subtract the teacher's mean over the training images, without which all
        cosines are high; "amoe" has no mean and stays. ValueError says what cannot be encoded.
        """
        if shapes is None:
            if isinstance(images, (str, os.PathLike, Image.Image)):
                raise ValueError(f"encode takes a list of images, and was given {images!r}")
            pairs = [any_to_rows(image, max_tokens) for image in images]
            rows, shapes = [rows for rows, _ in pairs], [shape for _, shape in pairs]
        else:
            rows = [torch.as_tensor(row) for row in images]
        if len(rows) != len(shapes):
            raise ValueError(f"encode was given {len(rows)} images and {len(shapes)} shapes")
        if centre and (lacking := [name for name, head in self.heads.items() if head.patch_mean is None]):
            raise ValueError(f"centre=True: this student holds no mean of the features of '{lacking[0]}'")
        out = []
        for part in split_by_tokens([1 + self.registers + len(r) for r in rows], n_tokens):
            batch = pack(rows[part], shapes[part], registers=self.registers).to(self.device)
            features, _ = self(batch)
            for name, head in self.heads.items():
                f = features[name]
                f["patch"] = head.to_own_space(f["patch"])
                if centre:
                    f["patch"], f["summary"] = f["patch"] - head.patch_mean, f["summary"] - head.summary_mean
            for i, shape in enumerate(shapes[part]):
                patch = {name: f["patch"][batch.patch_rows(i)] for name, f in features.items()}
                summary = {name: f["summary"][i] for name, f in features.items()}
                out.append({"patch": patch, "summary": summary, "shape": tuple(shape)})
        return out


class AMoE(Student):
    """The Mixture-of-Experts ViT. Weights are named as in the released checkpoints, but for `heads.<teacher>`."""

    def __init__(self, config, spaces):
        super().__init__()
        self.config = config
        self.img_projector = nn.Linear(ROW, config.dim, bias=False)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.storage_tokens = nn.Parameter(torch.empty(1, config.registers, config.dim))
        self.register_buffer("freqs_cis_golden", golden_frequencies(config.heads, config.head_dim))
        self.layers = nn.ModuleList(Block(config, l) for l in range(config.layers))
        self.norm = RMSNorm(config.dim, eps=1e-5)
        self.add_heads(config.dim, config.registers, spaces)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Normals of 0.02 / sqrt(2 (layer + 1)); wo and w2 zero, so blocks start as the identity; heads 0.01."""
        for p in (self.img_projector.weight, self.cls_token, self.storage_tokens):
            nn.init.trunc_normal_(p, std=0.02)
        for l, block in enumerate(self.layers):
            for name, p in block.named_parameters():
                if name.endswith(("wo.weight", "w2.weight", "experts.w2")):
                    nn.init.zeros_(p)
                elif "norm" not in name:
                    nn.init.trunc_normal_(p, std=0.02 / math.sqrt(2 * (l + 1)))
        for head in self.heads.values():
            head.initialise()

    def tokens(self, batch, mask=None):
        """The tokens [T, D] after the final norm, and the expert load [MoE layers, E]."""
        mask = image_runs(batch.starts, batch.n_tokens) if mask is None else mask
        n_special = 1 + self.config.registers
        offset_T, real_T = batch.offset, batch.image < batch.n_images
        # A one-hot product: its gradient is a small GEMM, where that of indexing would be a scatter onto five rows.
        special_TS = (offset_T[:, None] == torch.arange(n_special, device=offset_T.device)) & real_T[:, None]
        special_SD = torch.cat([self.cls_token[0], self.storage_tokens[0]])
        x_TD = self.img_projector(normalise(batch.rows).to(special_SD.dtype)) * batch.is_patch[:, None]
        x_TD = x_TD + special_TS.to(x_TD.dtype) @ special_SD.to(x_TD.dtype)
        rotation, loads = rotations(batch.yx, self.freqs_cis_golden), []
        for block in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x_TD, load_E = checkpoint(block, x_TD, rotation, mask, real_T, use_reentrant=False)
            else:
                x_TD, load_E = block(x_TD, rotation, mask, real_T)
            loads += [] if load_E is None else [load_E]
        return self.norm(x_TD), torch.stack(loads) if loads else x_TD.new_zeros(0, 0, dtype=torch.float32)


class PlugIn(Student):
    """A trunk of your own: a module with `dim` that, called with a Batch, returns [T, dim], a row per token.

    An image's rows are its summary, its registers (`trunk.registers`, by default 4) and its patches. factory: the
    FILE.py:FACTORY that makes the trunk, called with the device. code: run this in the place of what FILE.py holds.
    """

    layers = ()  # AMoE has its blocks here

    def __init__(self, factory, spaces, device="cpu", code=None):
        super().__init__()
        self.factory, self.code = factory, code or code_of(factory, "student")
        self.trunk = plug_in(factory, device, "student", ("dim", "parameters", "forward"), self.code)
        self.add_heads(self.trunk.dim, getattr(self.trunk, "registers", 4), spaces)
        for head in self.heads.values():
            head.initialise()

    def tokens(self, batch, mask=None):
        """The trunk's output [T, dim], and no expert load; only AMoE uses the mask."""
        h_TD = self.trunk(batch)
        if h_TD.shape != (batch.n_tokens, self.trunk.dim):
            raise ValueError(f"{self.factory} answered {list(h_TD.shape)} to a pack of {batch.n_tokens} tokens")
        return h_TD, h_TD.new_zeros(0, 0, dtype=torch.float32)


def normalise(rows):
    """Pixels, integers from 0 to 255, to [-1, 1]; floats are taken as already normalised."""
    return rows if rows.is_floating_point() else rows.float().div_(127.5).sub_(1)


# ---- checkpoints ----


def describe(model):
    """What the weights of a student do not tell (the config, the kind of every head), as values for JSON."""
    heads = {}
    for name, head in model.heads.items():
        has = {"bias": head.fc2.bias is not None, "means": head.patch_mean is not None}
        p = head.pool
        pool = p and {"hidden": p.mlp["fc1"].out_features, "heads": p.heads, "eps": p.layernorm.eps}
        heads[name] = {"dim": head.fc2.out_features, "registers": head.registers, **has, "pool": pool}
    return {"trunk": asdict(model.config) if isinstance(model, AMoE) else {"factory": model.factory}, "heads": heads}


def rebuild(about, state, source, code=None):
    """The student that `describe` described, with the weights `state`, in eval mode; errors name `source`.

    code: of a trunk of your own, where its FILE.py may have changed.
    """
    check_sizes(about, state, source)
    spaces, trunk = [], about["trunk"]
    for name, sizes in about["heads"].items():
        C, pool = sizes["dim"], sizes["pool"] or {"heads": 0, "eps": 0}
        standardised = f"heads.{name}.phi_s.mean" in state  # so it is in step-*.pt, not in student/
        phi_s = PhiS(torch.zeros(C), torch.zeros(C, C), state[f"heads.{name}.phi_s.sigma"]) if standardised else None
        weights = without_prefix(f"heads.{name}.pool.", state) or None
        pooled = {"pool": weights, "pool_heads": pool["heads"], "pool_eps": pool["eps"]}
        spaces.append(Space(name, C, sizes["registers"], phi_s, **pooled))
    own = "factory" in trunk
    model = PlugIn(trunk["factory"], spaces, code=code) if own else AMoE(Config(**trunk), spaces)
    for head, sizes in zip(model.heads.values(), about["heads"].values(), strict=True):
        C = sizes["dim"]
        head.fc2 = nn.Linear(C, C, bias=sizes["bias"])
        head.patch_mean, head.summary_mean = (torch.zeros(C) if sizes["means"] else None for _ in range(2))
    load_exactly(model, state, source)
    return model.eval()


def without_prefix(prefix, state):
    """The entries of a state dict whose keys begin with the prefix, which is taken off."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def folded(model):
    """A copy of a student on the CPU with PHI-S in its heads' weights: they answer in the teachers' own spaces."""
    copied = copy.deepcopy(model).cpu()
    for head in copied.heads.values():
        head.fold()
    return copied


def save(model, folder):
    """Write a student as the folder that `load` reads: config.json, model.safetensors with PHI-S folded in, and code.

    The code is modeling_amoe.py, the same model in plain torch, or the FILE.py of a trunk of your own.
    """
    folder, student = Path(folder), folded(model)
    about = {"model_type": "amoe", **describe(student)}
    if isinstance(model, AMoE):
        about["auto_map"] = {"AutoConfig": "modeling_amoe.AMoEConfig", "AutoModel": "modeling_amoe.AMoEModel"}
        code = {"modeling_amoe.py": (Path(__file__).parent / "hub" / "modeling_amoe.py").read_bytes()}
    else:
        about["trunk"]["factory"] = Path(model.factory).name
        code = {Path(model.factory.rpartition(":")[0]).name: model.code}
    state = {key: value.clone().contiguous() for key, value in student.state_dict().items()}  # unties weights
    files = code | {
        "model.safetensors": safetensors.torch.save(state, {"format": "pt"}),
        "config.json": (json.dumps(about, indent=1) + "\n").encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, lambda file, content=content: file.write(content))


def read_config(folder):
    """config.json of a folder; {} where it is missing or cannot be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        about = json.loads((Path(folder) / "config.json").read_text())
        return about if isinstance(about, dict) else {}
    return {}


def load(path, top_k=6):
    """A student in eval mode, its heads in the teachers' own spaces; ValueError says why there is none at `path`.

    path: a run's folder, its student/ or the model.safetensors in it, or a released SigLino checkpoint (top_k is for
    this one alone). A trunk of your own is made by the FILE.py in the folder: its code runs.
    """
    path = Path(path)
    for folder in (path, path / "student", *([path.parent] if path.name == "model.safetensors" else [])):
        about = read_config(folder)
        if {"trunk", "heads"} <= about.keys():
            if isinstance(about.get("trunk"), dict) and isinstance(about["trunk"].get("factory"), str):
                about["trunk"]["factory"] = str(folder / about["trunk"]["factory"])
            return rebuild(about, read_state(folder / "model.safetensors"), folder)
    if next(path.glob("step-*.pt"), None):
        raise ValueError(f"{path} has no student/ yet: python train.py --export {path} makes it")
    return load_siglino(path, top_k)


def load_siglino(weights, top_k=6):
    """An AMoE from a released SigLino checkpoint (a path or a state dict); shapes tell every size but top_k.

    top_k: 6 for AMoE-0.3B, 2 for 0.15B, whose shapes are the same. The heads answer in the teachers' own spaces.
    ValueError names a key that is missing, left over or misshapen.
    """
    state = dict(weights if isinstance(weights, dict) else read_state(weights))
    source = "the state dict" if isinstance(weights, dict) else str(weights)
    return rebuild(*from_siglino(state, top_k, source), source)


def save_siglino(model, path, centred=False):
    """Write a student as one .safetensors in the layout of the released checkpoints: the inverse of load_siglino.

    centred: leave out the teachers' means, which the layout cannot hold (siglip2's pooled summary keeps its own).
    ValueError where the layout cannot hold a head, or a mean unless `centred`.
    """
    student = folded(model)
    state = to_siglino(describe(student), student.state_dict(), centred)
    write_atomically(path, lambda file: file.write(safetensors.torch.save(state, {"format": "pt"})))


@torch.no_grad()
def inherit(model, parent):
    """Copy another student's weights into a new one; returns the teachers whose heads keep their fresh start.

    The trunks must have the same sizes. A head is copied where both have a teacher of that name and width, and taken
    from the teacher's own space to this model's standardised one, which gives its last layer a bias.
    """
    trunk = {key: value for key, value in parent.state_dict().items() if not key.startswith("heads.")}
    load_exactly(model, model.state_dict() | trunk, "the student to begin with")
    fresh = []
    for name, head in model.heads.items():
        if name not in parent.heads or parent.heads[name].fc2.out_features != head.fc2.out_features:
            fresh.append(name)
            continue
        old = parent.heads[name]
        head.fc1.load_state_dict(old.fc1.state_dict())
        head.norm.load_state_dict(old.norm.state_dict())
        head.fc2 = head.phi_s.unfold(old.fc2)
    return fresh


def load_exactly(model, state, source):
    """load_state_dict, but its error is a ValueError of one line: the source, and what does not fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # torch's first line names the class, the second what does not fit
        raise ValueError(f"{source}: {str(error).splitlines()[1].strip()[:500]}") from error


# ---- losses ----


def distillation_loss(out, batch, spaces, loss_per="image"):
    """(E2) summed over the pack's images: {teacher: {"patch", "summary", "registers"}}, float32 scalars.

        L(q) = e(summary) + mean over patches of e(patch) + mean over registers of e(register)
        e(kind) = mean over channels of (prediction - target)^2 / v_kind

    Divide the sum by the images of the global batch for (E3): every image then weighs the same at every resolution, in
    whatever pack and on whichever rank. v is 1 for patches, which are compared in standardised space; summaries and
    registers are compared in the teacher's own space, where an L2 distance over v is the same number. Targets without
    patches give no "patch". loss_per="patch" is an ablation: all patches of the pack weigh alike.
    """
    patches_M = batch.shapes.prod(1).float()
    share_M = 1 / patches_M if loss_per == "image" else (len(patches_M) / patches_M.sum()).expand_as(patches_M)
    weight_T = torch.where(batch.is_patch, F.pad(share_M, (0, 1))[batch.image.long()], 0.0)
    losses = {}
    for space in spaces:
        predicted, target, terms = out[space.name], batch.targets[space.name], {}
        if "patch" in target:  # a cache of summaries alone has none
            error_T = (predicted["patch"].float() - space.patch_target(target["patch"])).square().mean(1)
            terms["patch"] = (weight_T * error_T).sum()
        error_M = (predicted["summary"] - target["summary"]).square().mean(1)
        terms["summary"] = error_M.sum() / space.summary_variance
        if space.registers:
            error_R = (predicted["registers"] - target["registers"]).square().mean(2).sum(0)
            # Python numbers, one by one: a tensor made of them would be a copy that the device waits for.
            parts = [error / v for error, v in zip(error_R.unbind(), space.register_variance, strict=True)]
            terms["registers"] = sum(parts) / space.registers
        losses[space.name] = terms
    return losses


def arkd_loss(student_BD, teacher_BD, mode="arkd", rows=None, group=None):
    """Asymmetric relational distillation on the summaries of the global batch (E4); gradients reach the student only.

    D_ij = ||z_i - z_j|| over its mean for i != j; m is the lower median of the teacher's D_ij.
        L = 1 / (B (B - 1)) sum_{i != j} [D^T < m] h(max(D^S - D^T, 0)) + [D^T >= m] h(max(D^T - D^S, 0))
    with h the smooth L1 of beta 1.
    mode "rkd" is the symmetric baseline h(D^S - D^T). Duplicate images give no NaN; B < 2 gives 0.
    rows (start, stop) and group: this rank's share of the sum over i, see kernels.arkd.arkd.
    """
    return arkd(student_BD, teacher_BD, mode, rows=rows, group=group)
