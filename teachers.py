"""The teachers: DINOv3 and SigLIP 2 in plain torch, run packed like the student, and plug-in teachers.

A teacher is any object with `name`, `dim`, `registers` (0 if none) that, called with a Batch, returns

    {"patch": [T, D], "summary": [M, D], "registers": [M, R, D]}      (float32; "registers" only where it has some)

in its own space, with zeros in "patch" on rows that are not patches. It may offer `encode_text(list of str) -> [N, D]`.
The two teachers written here return it on their own device. They re-pack a batch into a sequence of their own, with
their special tokens before each image's patches and no padding, so every image runs at its native shape under the same
attention as the student.

DINOv3 is arXiv 2508.10104 (github.com/facebookresearch/dinov3), SigLIP 2 is arXiv 2502.14786 (google-research/
big_vision); both also as the transformers library stores them. The weights carry licences of their own.

Shape letters: T tokens in the student's pack, P patches of all its images, S tokens in a teacher's own sequence,
M images, R registers, D teacher width, H heads, d head width, f = d / 4 frequencies, G side of a position grid,
N texts, L tokens of a text.
"""

from amoe import (
    ROW,
    Float32Buffers,
    MapPool,
    PhiS,
    Space,
    autocast,
    normalise,
    pack,
    read_config,
    split_by_tokens,
    without_prefix,
)
from common.commands import one_line_errors
from common.pixels import PATCH
from common.plug_in import plug_in
from common.store import read_state
from kernels.attention import attend, image_runs, mask_of
from kernels.rope import rotate_half

# isort: split
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# Heads cannot be read off shapes. These are the published widths: DINOv3 S and S+, B, L, H+, 7B; SigLIP 2 B, L, So, g.
HEADS = {
    "dinov3": {384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32},
    "siglip2": {768: 12, 1024: 16, 1152: 16, 1536: 16},
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ROPE_BASE = 100.0  # of every published DINOv3


@dataclass(frozen=True)
class Sizes:
    """Of a transformer trunk. The defaults are SigLIP's; DINOv3 differs in every one of them."""

    layers: int
    dim: int
    heads: int
    hidden: int
    eps: float = 1e-6
    gelu: str = "tanh"
    gated: bool = False  # SwiGLU
    bias: bool = True  # of query and value: the 7B has none
    key_bias: bool = True
    layer_scale: bool = False


# ---- a teacher's own sequence ----


@dataclass
class Layout:
    """A batch re-packed: for each image `special` tokens of the teacher's own, then the image's patches.

    Everything per patch is computed from `shapes` for this batch; nothing is cached under a key that lacks the shape.
    """

    image_P: torch.Tensor  # int64
    yx_P2: torch.Tensor  # float32, row and column of a patch
    shape_P2: torch.Tensor  # float32, (h, w) in patches of the image it belongs to
    batch_P: torch.Tensor  # int64, the patch's row in the batch
    own_P: torch.Tensor  # int64, the patch's row in the teacher's sequence
    starts: torch.Tensor  # [M + 1] int64, in the teacher's sequence, on the host
    length: int  # S

    @classmethod
    def of(cls, batch, special, device, length=0):
        """`length`: pad the teacher's sequence to at least this, for compiled code that wants one shape."""
        shape_M2, end_M = batch.shapes.cpu().long(), batch.starts[1:].cpu().long()
        patches_M = shape_M2.prod(1)
        image_P = torch.repeat_interleave(patches_M)
        place_P = torch.arange(len(image_P)) - (patches_M.cumsum(0) - patches_M)[image_P]
        starts = F.pad((patches_M + special).cumsum(0), (1, 0))
        width_P = shape_M2[image_P, 1]
        per_patch = (  # in the order of the fields
            image_P,
            torch.stack([place_P // width_P, place_P % width_P], dim=1).float(),
            shape_M2[image_P].float(),
            (end_M - patches_M)[image_P] + place_P,
            starts[image_P] + special + place_P,
        )
        length = max(length, int(starts[-1]))
        return cls(*(t.to(device, non_blocking=True) for t in per_patch), starts, length)

    def to_sequence(self, x_PC):
        """Values per patch to the teacher's sequence [S, C], zeros elsewhere."""
        return x_PC.new_zeros(self.length, x_PC.shape[1]).index_copy(0, self.own_P, x_PC)

    def to_batch(self, x_PC, n_tokens):
        """Values per patch to the rows of the batch [T, C], zeros elsewhere."""
        return x_PC.new_zeros(n_tokens, x_PC.shape[1]).index_copy(0, self.batch_P, x_PC)


# ---- the transformer both families share ----


class Block(nn.Module):
    """x += scale1 * attention(norm1(x)), x += scale2 * feed_forward(norm2(x)); the scales only in DINOv3."""

    def __init__(self, sizes):
        super().__init__()
        D = sizes.dim
        self.heads, self.gelu = sizes.heads, sizes.gelu
        self.norm1, self.norm2 = (nn.LayerNorm(D, eps=sizes.eps) for _ in range(2))
        self.query, self.value = (nn.Linear(D, D, bias=sizes.bias) for _ in range(2))
        self.key = nn.Linear(D, D, bias=sizes.key_bias)
        self.out = nn.Linear(D, D)
        self.gate = nn.Linear(D, sizes.hidden) if sizes.gated else None
        self.up, self.down = nn.Linear(D, sizes.hidden), nn.Linear(sizes.hidden, D)
        self.scale1, self.scale2 = (nn.Parameter(torch.ones(D)) if sizes.layer_scale else None for _ in range(2))

    def forward(self, x_SD, mask, rotation=None):
        h_SD = self.norm1(x_SD)
        q, k, v = (w(h_SD).unflatten(-1, (self.heads, -1)) for w in (self.query, self.key, self.value))
        if rotation is not None:
            q, k = rotate_half(q, *rotation), rotate_half(k, *rotation)
        h_SD = self.out(attend(q, k, v, mask).flatten(1))
        x_SD = x_SD + (h_SD if self.scale1 is None else h_SD * self.scale1)
        h_SD = self.norm2(x_SD)
        if self.gate is None:
            h_SD = F.gelu(self.up(h_SD), approximate=self.gelu)
        else:
            h_SD = F.silu(self.gate(h_SD)) * self.up(h_SD)
        h_SD = self.down(h_SD)
        return x_SD + (h_SD if self.scale2 is None else h_SD * self.scale2)


class Trunk(nn.Module):
    """The blocks and the final norm, over tokens [S, D] of images by `mask` (see kernels.attention.attend)."""

    def __init__(self, sizes):
        super().__init__()
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.dim, eps=sizes.eps)

    def forward(self, x_SD, mask, rotation=None):
        for block in self.blocks:
            x_SD = block(x_SD, mask, rotation)
        return self.norm(x_SD)


class Teacher(Float32Buffers):
    """What DINOv3 and SigLIP 2 share: sizes, and the way from a batch into their own sequence."""

    registers = 0

    def __init__(self, name, sizes):
        super().__init__()
        self.name, self.dim = name, sizes.dim
        self.patch = nn.Linear(ROW, sizes.dim)
        self.trunk = Trunk(sizes)
        self.flex = False

    def compile(self, **options):
        """On CUDA, compile the trunk (torch.compile's options): FlexAttention, at a length that packs share."""
        if not self.patch.weight.is_cuda:
            print(f"teacher '{self.name}': eager, since off CUDA every mix of shapes would compile anew", flush=True)
            return
        self.trunk.compile(**options)
        self.flex = True

    def embed(self, rows_PC):
        """Patch embeddings in the weights' dtype, also under autocast: the residual stream starts with them."""
        dtype = self.patch.weight.dtype
        return self.patch(rows_PC.to(dtype)).to(dtype)

    def lay_out(self, batch, special):
        """The batch's Layout, and the mask for `attend`."""
        device = self.patch.weight.device
        layout = Layout.of(batch, special, device, batch.n_tokens if self.flex else 0)
        starts, length = layout.starts, layout.length
        return layout, mask_of(starts, length, device) if self.flex else image_runs(starts, length)


# ---- DINOv3 ----


class DINOv3(Teacher):
    """`registers` is read off the checkpoint. The summary is CLS; all outputs are after the final norm."""

    def __init__(self, name, sizes, registers):
        super().__init__(name, sizes)
        self.registers = registers
        self.cls_token = nn.Parameter(torch.empty(1, 1, sizes.dim))
        self.register_tokens = nn.Parameter(torch.empty(1, registers, sizes.dim))
        quarter = sizes.dim // sizes.heads // 4
        periods_f = ROPE_BASE ** (torch.arange(quarter, device="cpu") / quarter)
        # Not persistent (no checkpoint has them), and on a real device: the rest is built on `meta` and filled later.
        self.register_buffer("periods", periods_f, persistent=False)
        pixel = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device="cpu").repeat(1, PATCH * PATCH)
        self.register_buffer("pixel", pixel, persistent=False)

    def rotation(self, layout):
        """cos and sin [S, d / 2] of 2 pi c / period, c = 2 (i + .5) / n - 1: f for the row, then f for the column.

        Special tokens have angle 0: CLS and registers do not rotate.
        """
        c_P2 = 2 * (layout.yx_P2 + 0.5) / layout.shape_P2 - 1
        angle_S = layout.to_sequence((2 * math.pi * c_P2[:, :, None] / self.periods).flatten(1))
        return angle_S.cos(), angle_S.sin()

    @torch.no_grad()  # not inference_mode: a training step could not use the targets
    def forward(self, batch):
        special = 1 + self.registers
        layout, mask = self.lay_out(batch, special)
        rows_PC = batch.rows.to(self.patch.weight.device)[layout.batch_P]
        if not rows_PC.is_floating_point():  # floats are taken as already normalised
            rows_PC = (rows_PC.float() / 255 - self.pixel[0]) / self.pixel[1]
        x_SD = layout.to_sequence(self.embed(rows_PC))
        special_MS = layout.starts[:-1, None].to(x_SD.device) + torch.arange(special, device=x_SD.device)
        x_SD[special_MS] = torch.cat([self.cls_token[0], self.register_tokens[0]]).to(x_SD.dtype)
        x_SD = self.trunk(x_SD, mask, self.rotation(layout)).float()
        tokens_MSD = x_SD[special_MS]
        out = {"patch": layout.to_batch(x_SD[layout.own_P], batch.n_tokens), "summary": tokens_MSD[:, 0]}
        return out | ({"registers": tokens_MSD[:, 1:]} if self.registers else {})


# ---- SigLIP 2 ----


def resize_weights(place_P, n_P, grid):
    """Weights [P, grid] of an antialiased bilinear resize of `grid` samples to n: the row of sample `place` of the n.

    A triangle, widened to one output sample when shrinking, over half-pixel centres: row by row what F.interpolate
    computes with antialias=True, align_corners=False.
    """
    reach_P = (grid / n_P).clamp(min=1)
    centre_P = (place_P + 0.5) * grid / n_P
    distance_PG = (torch.arange(grid, device=place_P.device) + 0.5 - centre_P[:, None]).abs()
    weight_PG = (1 - distance_PG / reach_P[:, None]).clamp(min=0)
    return weight_PG / weight_PG.sum(1, keepdim=True)


class Text(nn.Module):
    """SigLIP 2's text tower: every token attends to every other, padding too; the last position gives the output."""

    def __init__(self, sizes, dim, vocabulary, length):
        super().__init__()
        self.token = nn.Parameter(torch.empty(vocabulary, sizes.dim))
        self.position = nn.Parameter(torch.empty(length, sizes.dim))
        self.trunk = Trunk(sizes)
        self.head = nn.Linear(sizes.dim, dim)

    def forward(self, ids_NL):
        N, L = ids_NL.shape
        x_SD = (self.token[ids_NL] + self.position[:L]).flatten(0, 1)
        x_SD = self.trunk(x_SD, [(0, N, L)])  # N images of L tokens each, to the attention
        return self.head(x_SD.unflatten(0, (N, L))[:, -1]).float()


class SigLIP2(Teacher):
    """NaFlex and fixed-resolution vision towers: the position grid is resized to each image's (h, w).

    At a fixed-resolution checkpoint's own shape that resize is the identity. `pool`, `pool_heads` and `pool_eps` hold
    the frozen MAP head, in amoe.MapPool's key names, for a cache to keep. `tokenizer` is the path of tokenizer.json.
    """

    def __init__(self, name, sizes, positions, pool_hidden):
        super().__init__(name, sizes)
        self.position = nn.Parameter(torch.empty(positions, sizes.dim))
        self.head = MapPool(sizes.dim, pool_hidden, sizes.heads, sizes.eps)
        self.pool_heads, self.pool_eps = sizes.heads, sizes.eps
        self.text_tower, self.tokenizer = None, None

    @property
    def pool(self):
        return self.head.state_dict()

    def positions(self, layout):
        """Position embeddings of the patches [P, D] float32: one GEMM over the grid, whatever the mix of shapes."""
        side = math.isqrt(len(self.position))
        y_PG, x_PG = (resize_weights(layout.yx_P2[:, a], layout.shape_P2[:, a], side) for a in (0, 1))
        with torch.autocast(y_PG.device.type, enabled=False):
            return (y_PG[:, :, None] * x_PG[:, None]).flatten(1) @ self.position.float()

    @torch.no_grad()
    def forward(self, batch):
        layout, mask = self.lay_out(batch, 0)
        rows_PC = normalise(batch.rows.to(self.patch.weight.device)[layout.batch_P])
        x_PD = self.embed(rows_PC)
        x_SD = self.trunk(layout.to_sequence(x_PD + self.positions(layout).to(x_PD.dtype)), mask)
        x_PD = x_SD[layout.own_P]
        with torch.autocast(x_PD.device.type, enabled=False):  # the pooled summary in the weights' own dtype
            summary_MD = self.head(x_PD.to(self.patch.weight.dtype), layout.image_P, batch.n_images).float()
        return {"patch": layout.to_batch(x_PD.float(), batch.n_tokens), "summary": summary_MD}

    @torch.no_grad()
    def text(self, ids_NL):
        """Token ids [N, L] to text features [N, D] float32, in the space of the summaries and not normalised."""
        tower, device = self.tower(), self.patch.weight.device
        vocabulary, length = len(tower.token), len(tower.position)
        if not len(ids_NL):
            return torch.zeros(0, self.dim, device=device)
        if ids_NL.shape[1] > length or not 0 <= ids_NL.min() <= ids_NL.max() < vocabulary:
            misfit = f"{list(ids_NL.shape)} do not fit '{self.name}', {length} tokens of {vocabulary} words"
            raise ValueError(f"input_ids {misfit}: take the tokenizer.json that came with the weights")
        return tower(ids_NL.long().to(device))

    def encode_text(self, texts):
        """Strings to text features [N, D] float32; lower-cased, cut and padded to the tower's length (64 tokens).

        Reads `tokenizer`, the tokenizer.json beside the weights. ValueError where that file, the optional package
        `tokenizers` or the text tower is missing.
        """
        length = len(self.tower().position)
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ValueError("encode_text needs the optional package: pip install tokenizers") from error
        if self.tokenizer is None or not Path(self.tokenizer).is_file():
            missing = f"teacher '{self.name}' has no tokenizer at {self.tokenizer}"
            raise ValueError(f"{missing}: put the weights' tokenizer.json beside them, or set teacher.tokenizer to it")
        with one_line_errors(f"{self.tokenizer} is no tokenizer.json"):
            tokenizer = Tokenizer.from_file(str(self.tokenizer))
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=tokenizer.token_to_id("<pad>") or 0, pad_token="<pad>")
        ids_NL = [encoding.ids for encoding in tokenizer.encode_batch([text.lower() for text in texts])]
        ids_NL = torch.tensor(ids_NL, dtype=torch.long).view(-1, length)
        return torch.cat([self.text(part) for part in ids_NL.split(256)])  # 16k tokens at a time

    def tower(self):
        """The text tower; ValueError where the checkpoint had none."""
        if self.text_tower is None:
            raise ValueError(f"teacher '{self.name}' has no text tower: load a checkpoint with text_model.* keys")
        return self.text_tower


# ---- checkpoints ----

# A parameter's name here becomes its key in a file by replacing each dotted part that is listed. In DINOv3's own
# files query, key, value are the thirds of one `qkv`, and the feed-forward is fc1, fc2, or in SwiGLU w1 (gate), w2, w3.
NAMES = {
    "official": {
        "trunk": "", "patch": "patch_embed.proj", "register_tokens": "storage_tokens",
        "query": "attn.qkv", "key": "attn.qkv", "value": "attn.qkv", "out": "attn.proj",
        "scale1": "ls1.gamma", "scale2": "ls2.gamma", "up": "mlp.fc1", "down": "mlp.fc2",
    },
    "huggingface": {
        "trunk": "", "patch": "embeddings.patch_embeddings", "cls_token": "embeddings.cls_token",
        "register_tokens": "embeddings.register_tokens", "blocks": "layer",
        "query": "attention.q_proj", "key": "attention.k_proj", "value": "attention.v_proj", "out": "attention.o_proj",
        "scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    },
    "vision": {
        "trunk": "vision_model", "patch": "vision_model.embeddings.patch_embedding",
        "position": "vision_model.embeddings.position_embedding.weight", "head": "vision_model.head",
        "blocks": "encoder.layers", "norm": "post_layernorm", "norm1": "layer_norm1", "norm2": "layer_norm2",
        "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
        "out": "self_attn.out_proj", "up": "mlp.fc1", "down": "mlp.fc2",
    },
}  # fmt: skip
NAMES["swiglu"] = NAMES["official"] | {"gate": "mlp.w1", "up": "mlp.w2", "down": "mlp.w3"}
NAMES["text"] = NAMES["vision"] | {
    "trunk": "text_model",
    "token": "text_model.embeddings.token_embedding.weight",
    "position": "text_model.embeddings.position_embedding.weight",
    "head": "text_model.head",
    "norm": "final_layer_norm",
}
# What a checkpoint may hold that running it does not use: the mask token of training; the mask that zeroes the key
# third of qkv.bias, which is never read here; the norm of DINOv3's local crops (7B and satellite files); SigLIP's
# temperature and bias, which a ranking by cosine does not need; index buffers.
UNUSED = re.compile(r"(embeddings\.)?mask_token|.*\.bias_mask|local_cls_norm\..*|logit_(scale|bias)|.*\.position_ids")
PREFIXES = {"dinov3": ("blocks.", "layer."), "siglip2": ("vision_model.",)}  # how the keys of a kind begin


def kind_of(state):
    """Which kind of checkpoint it is, by how the keys begin; None where neither."""
    return next((kind for kind, start in PREFIXES.items() if any(key.startswith(start) for key in state)), None)


def file_key(name, names):
    """The key in a file of a parameter that is called `name` here; names: one of NAMES."""
    return ".".join(filter(None, (names.get(part, part) for part in name.split("."))))


class Reader:
    """A state dict that is read key by key; no key may be left over. Errors name the file, the key and the shape."""

    def __init__(self, state, source):
        self.state, self.source, self.used = state, source, set()

    def get(self, key, *shape):
        """The tensor at `key`, in float32 and of that shape, None standing for any size."""
        if key not in self.state:
            wanted = f"'{key}' {shape_text(shape)}"
            raise ValueError(f"{self.source} lacks {wanted}: half a download, or another model's file")
        value = self.state[key]
        if len(shape) != value.ndim or any(n not in (None, m) for n, m in zip(shape, value.shape, strict=True)):
            raise ValueError(f"{self.source}: '{key}' is {shape_text(value.shape)} and must be {shape_text(shape)}")
        self.used.add(key)
        return value.float()

    def count_layers(self, prefix):
        """How many blocks there are under `prefix`."""
        found = [re.match(re.escape(prefix) + r"\.(\d+)\.", key) for key in self.state]
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    def patch(self, key):
        """The patch embedding [D, 768] over (row, col, channel) pixels, from a convolution's or a linear layer's."""
        if key in self.state and self.state[key].ndim == 2:
            return self.get(key, None, ROW)
        return self.get(key, None, 3, PATCH, PATCH).permute(0, 2, 3, 1).flatten(1)

    def fill(self, module, names):
        """Give `module`, built on the meta device, its parameters: tensors of the state dict itself, not copies."""
        parameters = {}
        for name, wanted in module.state_dict().items():
            key = file_key(name, names)
            if name == "patch.weight":
                parameters[name] = self.patch(key)
            elif ".attn.qkv." in key:
                third = ("query", "key", "value").index(name.split(".")[-2])
                parameters[name] = self.get(key, 3 * wanted.shape[0], *wanted.shape[1:]).chunk(3)[third]
            else:
                parameters[name] = self.get(key, *wanted.shape)
        module.load_state_dict(parameters, assign=True)
        return module

    def check_used_up(self, kind):
        """ValueError where a key is left over that no teacher of this kind has."""
        extra = [key for key in self.state if key not in self.used and not UNUSED.fullmatch(key)]
        if extra:
            raise ValueError(f"{self.source} has {len(extra)} keys that no {kind} of these sizes has: '{extra[0]}'")


def shape_text(shape):
    return "[" + ", ".join("*" if n is None else str(n) for n in shape) + "]"


def heads_of(kind, dim, n_heads, source):
    """The given number of heads, or the published one for the width."""
    heads = n_heads or HEADS[kind].get(dim)
    if heads is None:
        known = ", ".join(map(str, HEADS[kind]))
        raise ValueError(f"{source}: width {dim} is none of the published ({known}): give load_state n_heads")
    if dim % heads or (kind == "dinov3" and dim // heads % 4):
        raise ValueError(f"{source}: n_heads = {heads} does not divide the width {dim} into heads that fit a {kind}")
    return heads


def load_state(kind, state_dict, n_heads=None, source="the state dict"):
    """A frozen teacher from a checkpoint's state dict, in float32; shapes tell every size but the number of heads.

    kind: "dinov3" (the .pth keys of its repository or the transformers library's; MLP or SwiGLU) or "siglip2" (the
    transformers library's keys; NaFlex or fixed resolution, with or without the text tower). n_heads: by default that
    of the published models of the same width. The teacher shares the state dict's memory where it is float32.
    ValueError names `source` and the key that is missing, left over or misshapen.
    """
    if kind not in PREFIXES:
        raise ValueError(f"no teacher is called '{kind}': the kinds are {', '.join(PREFIXES)}")
    if (found := kind_of(state_dict)) not in (kind, None):
        raise ValueError(f"{source} is a {found} checkpoint and was given as {kind}: write {found}={source}")
    reader = Reader(state_dict, source)
    with torch.device("meta"):
        teacher = (read_dinov3 if kind == "dinov3" else read_siglip2)(reader, n_heads)
    reader.check_used_up(kind)
    return teacher.eval().requires_grad_(False)


def read_dinov3(reader, n_heads):
    huggingface = any(key.startswith(("layer.", "embeddings.")) for key in reader.state)
    gated = any(".mlp.w1." in key or ".mlp.gate_proj." in key for key in reader.state)
    names = NAMES["huggingface" if huggingface else "swiglu" if gated else "official"]
    blocks, up = names.get("blocks", "blocks"), names["up"]
    dim = len(reader.patch(names["patch"] + ".weight"))
    sizes = Sizes(
        layers=reader.count_layers(blocks),
        dim=dim,
        heads=heads_of("dinov3", dim, n_heads, reader.source),
        hidden=len(reader.get(f"{blocks}.0.{up}.weight", None, dim)),
        eps=1e-5,
        gelu="none",
        gated=gated,
        bias=any(key.endswith((".attn.qkv.bias", ".q_proj.bias", ".v_proj.bias")) for key in reader.state),
        key_bias=False,  # trained with the key third of the bias masked to zero
        layer_scale=True,
    )
    registers = reader.get(names["register_tokens"], 1, None, dim).shape[1]
    teacher = reader.fill(DINOv3("dinov3", sizes, registers), names)
    if (key := "rope_embed.periods") in reader.state:
        periods_f = reader.get(key, None)
        if len(periods_f) != len(teacher.periods):
            counts = f"'{key}' has {len(periods_f)} periods, {sizes.heads} heads of {dim} want {len(teacher.periods)}"
            raise ValueError(f"{reader.source}: {counts}: give load_state n_heads={dim // (4 * len(periods_f))}")
        if not torch.allclose(periods_f, teacher.periods, rtol=0.01):  # bfloat16 rounds by 0.4%
            print(f"{reader.source}: '{key}' is not of base {ROPE_BASE:g}, which runs instead", flush=True)
    return teacher


def read_siglip2(reader, n_heads):
    def sizes(tower, dim):
        blocks = f"{tower}_model.encoder.layers"
        hidden = len(reader.get(f"{blocks}.0.mlp.fc1.weight", None, dim))
        return Sizes(reader.count_layers(blocks), dim, heads_of("siglip2", dim, n_heads, reader.source), hidden)

    names = NAMES["vision"]
    dim = len(reader.patch(names["patch"] + ".weight"))
    positions = len(reader.get(names["position"], None, dim))
    if math.isqrt(positions) ** 2 != positions:
        raise ValueError(f"{reader.source}: '{names['position']}' has {positions} rows, which make no square grid")
    pool_hidden = len(reader.get("vision_model.head.mlp.fc1.weight", None, dim))
    teacher = reader.fill(SigLIP2("siglip2", sizes("vision", dim), positions, pool_hidden), names)
    if any(key.startswith("text_model.") for key in reader.state):
        vocabulary, width = reader.get(NAMES["text"]["token"], None, None).shape
        length = len(reader.get(NAMES["text"]["position"], None, width))
        teacher.text_tower = reader.fill(Text(sizes("text", width), dim, vocabulary, length), NAMES["text"])
    return teacher


def load_teacher(spec, device="cpu"):
    """A teacher from NAME=FILE (.safetensors, the .index.json of several, or .pth; its keys say what it is) or
    NAME=FILE.py:FACTORY.

    FILE may be a folder as the Hub lays it out, whose config.json says the number of heads. A plug-in's factory is
    called with the device; what it returns needs `name`, `dim` and `registers`, and is called NAME from then on.
    tokenizer.json is looked for beside the weights. Every error is a ValueError of one line.
    """
    name, _, where = spec.partition("=")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not where or name == "amoe" or hasattr(torch.nn.ModuleDict(), name):
        forms, free = "NAME=FILE.safetensors, NAME=FILE.pth or NAME=FILE.py:FACTORY", "and not 'amoe' or 'train'"
        raise ValueError(f"'{spec}' is no teacher: write {forms}, NAME of letters, digits, _ and -, {free}")
    if re.fullmatch(r".*\.py(:\w*)?", where):
        teacher = plug_in(where, device, "teacher", ("name", "dim", "registers", "__call__"))
    else:
        teacher = load_weights(name, Path(where)).to(device)
    teacher.name = name
    return teacher


def load_weights(name, path):
    """The DINOv3 or SigLIP 2 in a file or a folder; its keys say which."""
    state, config = read_state(path), read_config(path)
    kind = kind_of(state)
    if kind is None:
        starts = ", ".join(start for group in PREFIXES.values() for start in group)
        raise ValueError(f"{path} is no DINOv3 and no SigLIP 2: none of its keys begins with one of {starts}")
    towers = [config, config.get("vision_config", {}), config.get("text_config", {})]
    heads = {tower["num_attention_heads"] for tower in towers if "num_attention_heads" in tower}
    if len(heads) > 1:
        raise ValueError(f"{path}/config.json: towers of {heads} heads, and here both have as many")
    teacher = load_state(name if name in PREFIXES else kind, state, min(heads, default=None), source=path)
    if kind == "siglip2":
        teacher.tokenizer = (path if path.is_dir() else path.parent) / "tokenizer.json"
    return teacher


# ---- running teachers on a pack ----


def load_teachers(specs, images, device):
    """Teachers from NAME=SPEC.

    A plug-in file may define `text_table()`, [N, C]: the embeddings of the images' captions.json, in its order, for
    the teacher of its factory `text_aligned`, which then need not embed text itself.
    """
    loaded = [load_teacher(spec, device) for spec in specs]
    if len({t.name for t in loaded}) < len(loaded):
        raise ValueError(f"two teachers of one name: {', '.join(t.name for t in loaded)}")
    captions = Path(images) / "captions.json"
    for spec, teacher in zip(specs, loaded, strict=True):
        table = getattr(sys.modules[type(teacher).__module__], "text_table", None)
        if table and spec.endswith(":text_aligned") and captions.is_file() and not hasattr(teacher, "encode_text"):
            with one_line_errors(captions):
                entries, rows_NC = json.loads(captions.read_bytes()), table()
                row = {entry.get("caption"): i for i, entry in enumerate(entries)}
            if len(entries) != len(rows_NC):
                raise ValueError(f"{captions} has {len(entries)} entries, text_table() of {spec} {len(rows_NC)} rows")
            teacher.encode_text = lambda texts, row=row, rows_NC=rows_NC: rows_NC[[row[text] for text in texts]]
    return loaded


@torch.no_grad()
def run_teachers(teachers, batch):
    """{teacher: {"patch" [T, C], "summary" [M, C], "registers" [M, R, C]}}, float32 copies on the batch's device.

    On CUDA teachers run under bfloat16. ValueError where an answer is not finite or not of the shapes announced.
    """
    device, answers = batch.rows.device, {}
    for t in teachers:
        with one_line_errors(f"teacher '{t.name}' failed"), autocast(device):
            answer = t(batch)
        want = {"patch": (batch.n_tokens, t.dim), "summary": (batch.n_images, t.dim)}
        if t.registers:
            want["registers"] = (batch.n_images, t.registers, t.dim)
        for kind, shape in want.items():
            got = answer.get(kind) if isinstance(answer, dict) else None
            what = f"teacher '{t.name}' answered {kind}"
            if not isinstance(got, torch.Tensor) or got.shape != shape:
                got = list(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
                raise ValueError(f"{what} {got} where its dim and registers mean a tensor {list(shape)}")
            if not torch.isfinite(got).all():
                raise ValueError(f"{what} with NaN or infinity for images {batch.ids[:8].tolist()}")
        # Copies: what a plug-in computed under inference_mode could not be used where gradients are taken.
        answers[t.name] = {kind: answer[kind].to(device, torch.float32, copy=True) for kind in want}
    return answers


def make_targets(teachers, spaces, batch):
    """The `targets` of a Batch, unquantised: patches in standardised space, the rest in the teacher's own."""
    device, answers = batch.rows.device, run_teachers(teachers, batch)
    phi_s = {s.name: s.target_phi_s.to(device) for s in spaces}
    return {n: answers[n] | {"patch": phi_s[n].apply(answers[n]["patch"])} for n in phi_s}


def embed_text(teacher, texts):
    """A teacher's embeddings of texts, [N, C] float32 on the CPU; ValueError where it does not return such."""
    with one_line_errors(f"teacher '{teacher.name}' embeds no text"):
        rows_NC = teacher.encode_text(texts).float().cpu()
        if tuple(rows_NC.shape) != (len(texts), teacher.dim) or not torch.isfinite(rows_NC).all():
            raise ValueError(f"its answer to {len(texts)} texts is {list(rows_NC.shape)}, or not finite")
    return rows_NC


def embed_captions(teacher, captions):
    """Text embeddings [N, C] float32 of captions (None gives NaN), or None where the teacher embeds no text."""
    if not hasattr(teacher, "encode_text"):
        return None
    out = np.full((len(captions), teacher.dim), np.nan, np.float32)
    known = [i for i, caption in enumerate(captions) if caption]
    if known:
        try:
            out[known] = embed_text(teacher, [captions[i] for i in known]).numpy()
        except ValueError as error:  # without its text tower or tokenizer, SigLIP 2 still teaches images
            print(f"captions are not embedded: {error}", file=sys.stderr, flush=True)
            return None
    return out


def in_packs(decoded, device):
    """(slice, Batch) of decoded images [(rows, shape, id)], in packs that take a second or a few."""
    n_tokens = 16384 if torch.device(device).type == "cuda" else 2048
    for part in split_by_tokens([5 + len(rows) for rows, _, _ in decoded], n_tokens):  # pack's CLS and four registers
        rows, shapes, ids = zip(*decoded[part], strict=True)
        yield part, pack(rows, shapes, ids=ids).to(device)


def fit_spaces(teachers, decoded, device):
    """A Space for every teacher from a sample [(rows, shape, id)]: PHI-S from moments of its patches, and variances."""
    moments = {t.name: [0, 0.0, 0.0] for t in teachers}  # of patches: count, sum [C], sum of outer products [C, C]
    answers = {t.name: [] for t in teachers}  # summaries and registers, which are few
    with tqdm(total=len(decoded), desc="fitting PHI-S", unit="image", disable=len(decoded) < 64) as bar:
        for _, batch in in_packs(decoded, device):
            for name, answer in run_teachers(teachers, batch).items():
                x_NC = answer.pop("patch")[batch.is_patch].double()
                count, sum_C, outer_CC = moments[name]
                moments[name] = [count + len(x_NC), sum_C + x_NC.sum(0).cpu(), outer_CC + (x_NC.T @ x_NC).cpu()]
                answers[name].append({kind: x.double().cpu() for kind, x in answer.items()})
            bar.update(batch.n_images)
    return [fit_space(t, moments[t.name], answers[t.name]) for t in teachers]


def fit_space(teacher, moments, answers):
    """A teacher's Space from the moments of its patches and its answers [{"summary" [M, C], "registers" [M, R, C]}]."""
    x = {kind: torch.cat([answer[kind] for answer in answers]) for kind in answers[0]}
    variance = {kind: x[kind].var(0, correction=0).mean(-1) for kind in x}
    for kind in x:
        if (variance[kind] <= 0).any():
            raise ValueError(f"teacher '{teacher.name}' gave all {len(x[kind])} calibration images the same {kind}")
    pool = getattr(teacher, "pool", None)
    return Space(
        teacher.name,
        teacher.dim,
        teacher.registers,
        phi_s=PhiS.from_moments(*moments),
        summary_mean=x["summary"].mean(0).float(),
        summary_variance=float(variance["summary"]),
        register_variance=tuple(variance["registers"].tolist()) if teacher.registers else (),
        pool=pool and {key: value.detach().cpu() for key, value in pool.items()},
        pool_heads=getattr(teacher, "pool_heads", 16),
        pool_eps=getattr(teacher, "pool_eps", 1e-6),
    )


def probes(teachers, decoded, device):
    """{name: its summary [C] of one image (rows, shape, id)}, on the CPU: by this a rerun recognises a teacher."""
    ((_, batch),) = in_packs([decoded], device)
    return {name: answer["summary"][0].cpu() for name, answer in run_teachers(teachers, batch).items()}


def space_bytes(space, probe_C, probe_id):
    """A Space as a .safetensors file, with every scalar and the teacher's summary of one image (see `probes`)."""
    tensors = {f"phi_s.{k}": v for k, v in space.phi_s.state_dict().items()}
    tensors |= {"summary_mean": space.summary_mean, "probe": probe_C, "probe_id": torch.tensor(probe_id)}
    for key in ("summary_variance", "register_variance"):
        tensors[key] = torch.tensor(getattr(space, key), dtype=torch.float64)
    tensors |= {f"pool.{k}": v.contiguous() for k, v in (space.pool or {}).items()}
    scalars = {key: getattr(space, key) for key in ("name", "dim", "registers", "pool_heads", "pool_eps")}
    return safetensors.torch.save(tensors, metadata={"space": json.dumps(scalars)})


def space_from(raw):
    """The inverse of space_bytes."""
    tensors = safetensors.torch.load(raw)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return Space(
        **json.loads(header["__metadata__"]["space"]),
        phi_s=PhiS(*(tensors[f"phi_s.{key}"] for key in ("mean", "rotation", "sigma"))),
        summary_mean=tensors["summary_mean"],
        summary_variance=float(tensors["summary_variance"]),
        register_variance=tuple(tensors["register_variance"].tolist()),
        pool=without_prefix("pool.", tensors) or None,
    )
