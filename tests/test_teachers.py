"""DINOv3 and SigLIP 2 against the reference outputs, and against plain float64 code that knows nothing of packs."""

import json
import math
import os
import pickle
import resource
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import teachers
from amoe import MapPool, pack, to_rows
from benchmarks.speed import random_pack, time_padding
from recipes.cost import REAL

SHARED = Path(os.environ.get("AMOE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
SHAPES = [(3, 5), (1, 4), (6, 2), (3, 5), (4, 4)]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}  # float32 here, float64 in the references


def golden(name):
    """{"input": {...}, "output": {...}, "state": {...}, ...} of a reference file; skips where it is absent."""
    path = SHARED / "golden" / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"no reference vectors at {path}: set AMOE_SHARED to the folder that holds golden/")
    parts = {}
    for key, value in load_file(path).items():
        part, _, rest = key.partition("/")
        parts.setdefault(part, {})[rest] = value
    return parts


def close(a, b):
    torch.testing.assert_close(a.double(), b.double(), **TOLERANCE)


# ---- random checkpoints, their keys written out from the reference repositories ----


def rand(*shape):
    return torch.randn(shape) * 0.3


def linear(key, out, inside, bias=True):
    state = {f"{key}.weight": torch.randn(out, inside) / math.sqrt(inside)}
    return state | ({f"{key}.bias": rand(out)} if bias else {})


def norm(key, dim):
    return {f"{key}.weight": 1 + rand(dim), f"{key}.bias": rand(dim)}


def random_state(kind, sizes, vocabulary=256_000):
    """Normal weights under the transformers library's keys, SigLIP 2's with its text tower."""
    with torch.device("meta"):
        if kind == "dinov3":
            parts = {"huggingface": teachers.DINOv3(kind, sizes, 4)}
        else:
            text = teachers.Text(sizes, sizes.dim, vocabulary, 64)
            parts = {"vision": teachers.SigLIP2(kind, sizes, 256, sizes.hidden), "text": text}
    return {
        teachers.file_key(name, teachers.NAMES[names]): torch.empty(tensor.shape).normal_(std=0.02)
        for names, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def dinov3_state(dim=32, hidden=48, layers=2, swiglu=False, qkv_bias=True, registers=4):
    """The .pth keys of facebookresearch/dinov3, the key third of the bias not zero: it must count as zero."""
    state = {"cls_token": rand(1, 1, dim), "storage_tokens": rand(1, registers, dim), "mask_token": rand(1, dim)}
    state |= {"patch_embed.proj.weight": rand(dim, 3, 16, 16) / 8, "patch_embed.proj.bias": rand(dim)}
    for l in range(layers):
        b = f"blocks.{l}."
        state |= norm(b + "norm1", dim) | norm(b + "norm2", dim)
        state |= linear(b + "attn.qkv", 3 * dim, dim, qkv_bias) | linear(b + "attn.proj", dim, dim)
        if qkv_bias:
            state[b + "attn.qkv.bias_mask"] = torch.ones(3 * dim)
        state |= {b + "ls1.gamma": rand(dim), b + "ls2.gamma": rand(dim)}
        if swiglu:
            state |= linear(b + "mlp.w1", hidden, dim) | linear(b + "mlp.w2", hidden, dim)
            state |= linear(b + "mlp.w3", dim, hidden)
        else:
            state |= linear(b + "mlp.fc1", hidden, dim) | linear(b + "mlp.fc2", dim, hidden)
    return state | norm("norm", dim)


HUGGING = [
    ("patch_embed.proj", "embeddings.patch_embeddings"),
    ("storage_tokens", "embeddings.register_tokens"),
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("blocks.", "layer."),
    ("attn.proj", "attention.o_proj"),
    ("ls1.gamma", "layer_scale1.lambda1"),
    ("ls2.gamma", "layer_scale2.lambda1"),
    ("mlp.fc1", "mlp.up_proj"),
    ("mlp.fc2", "mlp.down_proj"),
    ("mlp.w1", "mlp.gate_proj"),
    ("mlp.w2", "mlp.up_proj"),
    ("mlp.w3", "mlp.down_proj"),
]


def to_hugging_face(official):
    state = {}
    for key, value in official.items():
        if key.endswith(("bias_mask", "rope_embed.periods")):
            continue
        for old, new in HUGGING:
            key = key.replace(old, new)
        if ".attn.qkv." in key:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                if part != "k" or key.endswith("weight"):
                    state[key.replace("attn.qkv", f"attention.{part}_proj")] = third
        else:
            state[key] = value
    return state


def encoder(prefix, layers, dim, hidden):
    state = {}
    for l in range(layers):
        b = f"{prefix}.encoder.layers.{l}."
        state |= norm(b + "layer_norm1", dim) | norm(b + "layer_norm2", dim)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            state |= linear(b + f"self_attn.{part}", dim, dim)
        state |= linear(b + "mlp.fc1", hidden, dim) | linear(b + "mlp.fc2", dim, hidden)
    return state


def siglip2_state(dim=32, hidden=48, layers=2, grid=4, conv=False, text_dim=24, vocabulary=50, length=8):
    v = "vision_model."
    state = {
        v + "embeddings.patch_embedding.weight": rand(dim, 768) / 8,
        v + "embeddings.patch_embedding.bias": rand(dim),
    }
    if conv:
        weight = state[v + "embeddings.patch_embedding.weight"]
        state[v + "embeddings.patch_embedding.weight"] = weight.view(dim, 16, 16, 3).permute(0, 3, 1, 2)
    state[v + "embeddings.position_embedding.weight"] = rand(grid * grid, dim)
    state |= encoder("vision_model", layers, dim, hidden) | norm(v + "post_layernorm", dim)
    state |= {v + "head.probe": rand(1, 1, dim)}
    state |= {v + "head.attention.in_proj_weight": rand(3 * dim, dim), v + "head.attention.in_proj_bias": rand(3 * dim)}
    state |= linear(v + "head.attention.out_proj", dim, dim) | norm(v + "head.layernorm", dim)
    state |= linear(v + "head.mlp.fc1", hidden, dim) | linear(v + "head.mlp.fc2", dim, hidden)
    if text_dim:
        t = "text_model."
        state[t + "embeddings.token_embedding.weight"] = rand(vocabulary, text_dim)
        state[t + "embeddings.position_embedding.weight"] = rand(length, text_dim)
        state |= encoder("text_model", layers, text_dim, hidden) | norm(t + "final_layer_norm", text_dim)
        state |= linear(t + "head", dim, text_dim) | {"logit_scale": rand(1), "logit_bias": rand(1)}
    return state


# ---- plain float64 references: one image, an [H, W, 3] picture or a list of ids, dense attention ----


def attention(q, k, v, heads):
    q, k, v = (t.view(len(t), heads, -1).transpose(0, 1) for t in (q, k, v))
    return ((q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(0, 1).flatten(1)


def dinov3_reference(state, image, heads):
    """(cls [D], registers [R, D], patches [n, D]) of one uint8 picture."""
    s = {key: value.double() for key, value in state.items()}
    mean, std = (torch.tensor(t, dtype=torch.float64) for t in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = ((image.double() / 255 - mean) / std).permute(2, 0, 1)[None]
    x = F.conv2d(x, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=16)[0]
    D, h, w = x.shape
    registers = s["storage_tokens"].shape[1]
    x = torch.cat([s["cls_token"][0], s["storage_tokens"][0], x.flatten(1).T])
    quarter = D // heads // 4
    angle = torch.zeros(len(x), 2 * quarter, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            for f in range(quarter):
                period = 100.0 ** (f / quarter)
                token = 1 + registers + i * w + j
                angle[token, f] = 2 * math.pi * (2 * (i + 0.5) / h - 1) / period
                angle[token, quarter + f] = 2 * math.pi * (2 * (j + 0.5) / w - 1) / period
    angle = torch.cat([angle, angle], 1)[:, None]

    def rope(t):
        t = t.view(len(t), heads, -1)
        a, b = t.chunk(2, -1)
        return (t * angle.cos() + torch.cat([-b, a], -1) * angle.sin()).flatten(1)

    lin = lambda t, key: F.linear(t, s[key + ".weight"], s.get(key + ".bias"))  # noqa: E731
    layer_norm = lambda t, key: F.layer_norm(t, (D,), s[key + ".weight"], s[key + ".bias"], 1e-5)  # noqa: E731
    for l in range(sum(key.endswith("norm1.weight") for key in s)):
        b = f"blocks.{l}."
        bias = s.get(b + "attn.qkv.bias", torch.zeros(3 * D, dtype=torch.float64)).clone()
        bias[D : 2 * D] = 0
        q, k, v = F.linear(layer_norm(x, b + "norm1"), s[b + "attn.qkv.weight"], bias).chunk(3, 1)
        x = x + s[b + "ls1.gamma"] * lin(attention(rope(q), rope(k), v, heads), b + "attn.proj")
        y = layer_norm(x, b + "norm2")
        if b + "mlp.w1.weight" in s:
            y = lin(F.silu(lin(y, b + "mlp.w1")) * lin(y, b + "mlp.w2"), b + "mlp.w3")
        else:
            y = lin(F.gelu(lin(y, b + "mlp.fc1")), b + "mlp.fc2")
        x = x + s[b + "ls2.gamma"] * y
    x = layer_norm(x, "norm")
    return x[0], x[1 : 1 + registers], x[1 + registers :]


def siglip2_tower(s, prefix, x, heads, last):
    D = x.shape[1]
    lin = lambda t, key: F.linear(t, s[key + ".weight"], s[key + ".bias"])  # noqa: E731
    layer_norm = lambda t, key: F.layer_norm(t, (D,), s[key + ".weight"], s[key + ".bias"], 1e-6)  # noqa: E731
    for l in range(sum(key.startswith(prefix) and key.endswith("layer_norm1.weight") for key in s)):
        b = f"{prefix}.encoder.layers.{l}."
        y = layer_norm(x, b + "layer_norm1")
        q, k, v = (lin(y, b + f"self_attn.{part}_proj") for part in "qkv")
        x = x + lin(attention(q, k, v, heads), b + "self_attn.out_proj")
        y = F.gelu(lin(layer_norm(x, b + "layer_norm2"), b + "mlp.fc1"), approximate="tanh")
        x = x + lin(y, b + "mlp.fc2")
    return layer_norm(x, f"{prefix}.{last}")


def siglip2_reference(state, image, heads):
    """(summary [D], patches [n, D]) of one uint8 picture."""
    s = {key: value.double() for key, value in state.items()}
    v = "vision_model."
    rows, (h, w) = to_rows(image)
    weight = s[v + "embeddings.patch_embedding.weight"]
    weight = weight.permute(0, 2, 3, 1).flatten(1) if weight.ndim == 4 else weight
    x = F.linear(rows.double() / 127.5 - 1, weight, s[v + "embeddings.patch_embedding.bias"])
    grid = s[v + "embeddings.position_embedding.weight"]
    side = math.isqrt(len(grid))
    grid = grid.view(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(h, w), mode="bilinear", align_corners=False, antialias=True)
    x = siglip2_tower(s, "vision_model", x + grid[0].flatten(1).T, heads, "post_layernorm")
    D, p = x.shape[1], v + "head."
    (q, k, val), bias = s[p + "attention.in_proj_weight"].chunk(3), s[p + "attention.in_proj_bias"].chunk(3)
    query, keys, values = F.linear(s[p + "probe"][0], q, bias[0]), F.linear(x, k, bias[1]), F.linear(x, val, bias[2])
    query, keys, values = (t.view(len(t), heads, -1).transpose(0, 1) for t in (query, keys, values))
    pooled = (query @ keys.transpose(1, 2) / math.sqrt(D // heads)).softmax(-1) @ values
    y = F.linear(pooled.flatten(), s[p + "attention.out_proj.weight"], s[p + "attention.out_proj.bias"])
    z = F.layer_norm(y, (D,), s[p + "layernorm.weight"], s[p + "layernorm.bias"], 1e-6)
    z = F.gelu(F.linear(z, s[p + "mlp.fc1.weight"], s[p + "mlp.fc1.bias"]), approximate="tanh")
    return y + F.linear(z, s[p + "mlp.fc2.weight"], s[p + "mlp.fc2.bias"]), x


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pictures(shapes=SHAPES):
    return [torch.randint(0, 256, (16 * h, 16 * w, 3), dtype=torch.uint8) for h, w in shapes]


def packed(images, **options):
    rows, shapes = zip(*(to_rows(image) for image in images), strict=True)
    return pack(list(rows), list(shapes), **options)


# ---- the reference outputs ----


@pytest.mark.parametrize("style", ["state", "state_hf"])
def test_dinov3_matches_the_reference_outputs(style):
    """Catches coordinates 2 i / n - 1 without the half, or the patch weight flattened as (channel, row, col)."""
    g = golden("dinov3")
    teacher = teachers.load_state("dinov3", g[style], n_heads=4)
    images = [image.permute(1, 2, 0) for image in g["input"]["image"]]  # already normalised floats
    stranger = torch.randn(32, 64, 3)
    batch = packed([images[0], stranger, images[1]], n_tokens=80)
    out = teacher(batch)
    worst = 0.0
    for i, place in enumerate((0, 2)):
        for mine, kind in (
            (out["summary"][place], "cls"),
            (out["registers"][place], "registers"),
            (out["patch"][batch.patch_rows(place)], "patches"),
        ):
            worst = max(worst, (mine - g["output"][kind][i]).abs().max().item())
    print(f"dinov3 {style}: largest difference {worst:.2e}")
    assert worst <= 1e-4


def test_siglip2_matches_the_reference_outputs():
    """Catches a position grid resized without antialias, or a LayerNorm eps of 1e-3."""
    g = golden("siglip2")
    teacher = teachers.load_state("siglip2", g["state"], n_heads=4)
    shapes = [tuple(shape) for shape in g["input"]["spatial_shapes"].tolist()]
    rows = [patches[: h * w] for patches, (h, w) in zip(g["input"]["patches"], shapes, strict=True)]
    batch = pack(rows, shapes, n_tokens=70)
    out = teacher(batch)
    worst = (out["summary"] - g["output"]["summary"]).abs().max().item()
    worst = max(worst, (teacher.text(g["input"]["input_ids"]) - g["output"]["text.summary"]).abs().max().item())
    for i, (h, w) in enumerate(shapes):
        difference = out["patch"][batch.patch_rows(i)] - g["output"]["patches"][i, : h * w]
        worst = max(worst, difference.abs().max().item())
    print(f"siglip2: largest difference {worst:.2e}")
    assert len(set(shapes)) > 1 and worst <= 1e-4


# ---- against plain float64 code ----


@pytest.mark.parametrize("swiglu, qkv_bias", [(False, True), (True, True), (True, False)])
def test_dinov3_equals_a_dense_float64_reference(swiglu, qkv_bias):
    """Catches keeping the key third of qkv.bias, swapping w1 and w2, or rotating the registers."""
    state = dinov3_state(swiglu=swiglu, qkv_bias=qkv_bias, registers=3)
    teacher, images = teachers.load_state("dinov3", state, n_heads=2), pictures()
    batch = packed(images)
    out = teacher(batch)
    assert (teacher.dim, teacher.registers, teacher.name) == (32, 3, "dinov3")
    for i, image in enumerate(images):
        cls, registers, patches = dinov3_reference(state, image, 2)
        close(out["summary"][i], cls)
        close(out["registers"][i], registers)
        close(out["patch"][batch.patch_rows(i)], patches)


@pytest.mark.parametrize("conv", [False, True])
def test_siglip2_equals_a_dense_float64_reference(conv):
    """Catches the summary pooled over the student's CLS rows too, or (h, w) swapped in the position grid."""
    state, images = siglip2_state(conv=conv), pictures([*SHAPES, (9, 2), (1, 1)])
    teacher = teachers.load_state("siglip2", state, n_heads=2)
    batch = packed(images)
    out = teacher(batch)
    for i, image in enumerate(images):
        summary, patches = siglip2_reference(state, image, 2)
        close(out["summary"][i], summary)
        close(out["patch"][batch.patch_rows(i)], patches)


def test_text_equals_a_dense_float64_reference():
    """Catches a causal mask, or the head applied to the first position."""
    state = siglip2_state()
    ids = torch.randint(0, 50, (3, 8))
    s = {key: value.double() for key, value in state.items()}
    answers = teachers.load_state("siglip2", state, n_heads=2).text(ids)
    for mine, row in zip(answers, ids, strict=True):
        x = s["text_model.embeddings.token_embedding.weight"][row]
        x = x + s["text_model.embeddings.position_embedding.weight"]
        x = siglip2_tower(s, "text_model", x, 2, "final_layer_norm")[-1]
        close(mine, F.linear(x, s["text_model.head.weight"], s["text_model.head.bias"]))


@pytest.mark.parametrize("grid, n", [(16, 16), (16, 5), (16, 40), (4, 1), (7, 13)])
def test_resize_weights_are_the_antialiased_bilinear_ones(grid, n):
    """Catches a triangle that does not widen when shrinking."""
    samples = torch.randn(1, 3, grid, grid, dtype=torch.float64)
    wanted = F.interpolate(samples, size=(n, grid), mode="bilinear", antialias=True)
    weight = teachers.resize_weights(torch.arange(n).double(), torch.full((n,), float(n), dtype=torch.float64), grid)
    torch.testing.assert_close(torch.einsum("ng,bcgx->bcnx", weight, samples), wanted, atol=1e-6, rtol=1e-6)
    if n == grid:
        assert torch.equal(weight, torch.eye(n, dtype=torch.float64))


# ---- packing ----


def random_teacher(kind):
    state = dinov3_state() if kind == "dinov3" else siglip2_state()
    return teachers.load_state(kind, state, n_heads=2)


@pytest.mark.parametrize("kind", ["dinov3", "siglip2"])
def test_packing_does_not_change_a_result(kind):
    """Catches a position table kept from the last image of as many patches (2 x 8 reusing 4 x 4's)."""
    teacher = random_teacher(kind)
    images = pictures([(4, 4), (2, 8), (8, 2), (1, 16), (3, 3), (4, 4)])
    alone = [(batch, teacher(batch)) for batch in (packed([image]) for image in images)]
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 4, 1, 0, 2], [2, 1]):
        for options in ({}, {"n_tokens": 200}, {"registers": 0}, {"registers": 7}):
            batch = packed([images[i] for i in order], **options)
            out = teacher(batch)
            for place, i in enumerate(order):
                single, expected = alone[i]
                close(out["patch"][batch.patch_rows(place)], expected["patch"][single.patch_rows(0)])
                for key in expected.keys() - {"patch"}:
                    close(out[key][place], expected[key][0])


@pytest.mark.parametrize("kind", ["dinov3", "siglip2"])
def test_rows_that_are_no_patches_answer_zero(kind):
    """Catches answering the teacher's own CLS on the student's CLS row."""
    teacher, batch = random_teacher(kind), packed(pictures(), n_tokens=120)
    out = teacher(batch)
    patch_T = torch.zeros(120, dtype=torch.bool)
    for i in range(batch.n_images):
        patch_T[batch.patch_rows(i)] = True
    assert out["patch"].shape == (120, 32) and out["summary"].shape == (len(SHAPES), 32)
    assert (out["patch"][~patch_T] == 0).all() and (out["patch"][patch_T] != 0).any(1).all()
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in out.values())
    with torch.inference_mode():
        assert torch.equal(teacher(batch)["patch"], out["patch"])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["dinov3", "siglip2"])
def test_flex_attention_and_runs_agree(kind):
    """Catches the block mask made from the student's starts."""
    teacher, batch = random_teacher(kind), packed(pictures(), n_tokens=150)
    expected = teacher(batch)
    teacher.flex = True  # uncompiled, FlexAttention's own slow reference: what compile() switches to on CUDA
    for key, value in teacher(batch).items():
        close(value, expected[key])


@pytest.mark.parametrize("kind", ["dinov3", "siglip2"])
def test_floats_are_taken_as_already_normalised(kind):
    """Catches SigLIP's [-1, 1] scaling for DINOv3, or normalising floats a second time."""
    teacher, batch = random_teacher(kind), packed(pictures())
    mean, std = (torch.tensor(t).repeat(256) for t in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = teacher(batch)
    batch.rows = (batch.rows / 255 - mean) / std if kind == "dinov3" else batch.rows / 127.5 - 1
    for key, value in teacher(batch).items():
        close(value, expected[key])


@pytest.mark.parametrize("kind", ["dinov3", "siglip2"])
def test_bfloat16_keeps_positions_in_float32(kind):
    """Catches RoPE periods or ImageNet statistics rounded by .to(bfloat16), answers left in bfloat16."""
    teacher, batch = random_teacher(kind), packed(pictures())
    expected = teacher(batch)
    with torch.autocast("cpu", torch.bfloat16):
        for key, value in teacher(batch).items():
            assert value.dtype == torch.float32
            assert (value - expected[key]).norm() < 0.02 * expected[key].norm()
    kept = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    out = teacher.to(torch.bfloat16)(batch)
    assert all(torch.equal(buffer, kept[name]) for name, buffer in teacher.named_buffers())
    for key, value in out.items():
        assert value.dtype == torch.float32
        assert (value - expected[key]).norm() < 0.05 * expected[key].norm()


def test_pool_is_the_map_head_in_the_students_key_names():
    """Catches `pool` with the checkpoint's vision_model.head prefix, or with eps 1e-5."""
    teacher, batch = random_teacher("siglip2"), packed(pictures())
    out = teacher(batch)
    pool = MapPool.from_state(teacher.pool, teacher.pool_heads, teacher.pool_eps)
    patch_P = torch.cat([torch.arange(batch.n_tokens)[batch.patch_rows(i)] for i in range(batch.n_images)])
    with torch.no_grad():
        close(pool(out["patch"][patch_P], batch.image[patch_P], batch.n_images), out["summary"])


# ---- checkpoints ----


@pytest.mark.parametrize("swiglu, qkv_bias", [(False, True), (True, True), (True, False)])
def test_hugging_face_keys_equal_the_official_ones(swiglu, qkv_bias):
    """Catches gate_proj and up_proj exchanged."""
    official = dinov3_state(swiglu=swiglu, qkv_bias=qkv_bias)
    official["rope_embed.periods"] = 100 ** (torch.arange(4) / 4)
    batch = packed(pictures())
    a = teachers.load_state("dinov3", official, n_heads=2)(batch)
    b = teachers.load_state("dinov3", to_hugging_face(official), n_heads=2)(batch)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_fixed_resolution_equals_naflex():
    """Catches a convolution's weight flattened as (channel, row, col)."""
    state, batch = siglip2_state(text_dim=0), packed(pictures())
    key = "vision_model.embeddings.patch_embedding.weight"
    conv = state | {key: state[key].view(32, 16, 16, 3).permute(0, 3, 1, 2)}
    conv["vision_model.embeddings.position_ids"] = torch.arange(16)[None]
    a, b = (teachers.load_state("siglip2", s, n_heads=2)(batch) for s in (state, conv))
    assert all(torch.equal(a[key], b[key]) for key in a)


def hollow(state):
    """The same shapes in next to no memory."""
    return {key: torch.zeros(1).expand(value.shape) for key, value in state.items()}


PUBLISHED = {  # facebookresearch/dinov3, hub/backbones.py: width, depth, heads, feed-forward, SwiGLU, qkv bias
    "S": (384, 12, 6, 1536, False, True),
    "S+": (384, 12, 6, 1536, True, True),
    "B": (768, 12, 12, 3072, False, True),
    "L": (1024, 24, 16, 4096, False, True),
    "H+": (1280, 32, 20, 5120, True, True),
    "7B": (4096, 40, 32, 8192, True, False),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_every_published_dinov3_is_read_off_its_shapes(size):
    """Catches heads of 64 channels at every width (the 7B has 128), or a bias expected where there is none."""
    dim, layers, heads, hidden, swiglu, qkv_bias = PUBLISHED[size]
    with torch.device("meta"):
        state = dinov3_state(dim, hidden, layers, swiglu, qkv_bias)
    state = hollow(state)
    state["rope_embed.periods"] = 100 ** (torch.arange(dim // heads // 4) / (dim // heads // 4))
    if size in ("L", "7B"):  # as the satellite L and every 7B are stored
        state |= {f"local_cls_norm.{part}": torch.zeros(dim) for part in ("weight", "bias")}
    for style in (state, to_hugging_face({k: v for k, v in state.items() if "local_cls_norm" not in k})):
        teacher = teachers.load_state("dinov3", style)
        blocks = teacher.trunk.blocks
        assert (teacher.dim, len(blocks), blocks[0].heads, teacher.registers) == (dim, layers, heads, 4)
        assert len(blocks[0].up.weight) == hidden and (blocks[0].gate is not None) == swiglu


@pytest.mark.parametrize(
    "dim, layers, heads, hidden, text_dim, text_heads",
    [
        (768, 12, 12, 3072, 768, 12),
        (1024, 24, 16, 4096, 1024, 16),
        (1152, 27, 16, 4304, 1152, 16),
        (1536, 40, 16, 6144, 1152, 16),
    ],
)
def test_every_published_siglip2_is_read_off_its_shapes(dim, layers, heads, hidden, text_dim, text_heads):
    """Catches the giant's text tower built as wide as its vision tower."""
    with torch.device("meta"):
        state = siglip2_state(dim, hidden, layers, 16, dim == 1536, text_dim, 256_000, 64)
    teacher = teachers.load_state("siglip2", hollow(state))
    blocks, text_blocks = teacher.trunk.blocks, teacher.text_tower.trunk.blocks
    assert (teacher.dim, len(blocks), blocks[0].heads, teacher.pool_heads) == (dim, layers, heads, heads)
    assert (text_blocks[0].heads, teacher.text_tower.head.weight.shape) == (text_heads, (dim, text_dim))


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize("kind", ["dinov3", "huggingface", "siglip2"])
def test_every_missing_key_is_named(kind):
    """Catches load_state_dict(strict=False)."""
    state = siglip2_state(layers=1) if kind == "siglip2" else dinov3_state(layers=1)
    state = to_hugging_face(state) if kind == "huggingface" else state
    for key in state:
        if teachers.UNUSED.fullmatch(key) or key.endswith(".attn.qkv.bias"):
            continue  # the 7B has no qkv.bias at all
        with pytest.raises(ValueError) as error:
            teachers.load_state("siglip2" if kind == "siglip2" else "dinov3", without(state, key), n_heads=2)
        assert f"'{key}'" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind, key", [("dinov3", "blocks.1.attn.qkv.weight"), ("siglip2", "text_model.head.bias")])
def test_extra_and_misshapen_keys_are_named_with_their_shape(kind, key):
    """Catches reading only the keys that are expected."""
    state = dinov3_state() if kind == "dinov3" else siglip2_state()
    with pytest.raises(ValueError, match=r"of these sizes has: 'cls_norm.weight'"):
        teachers.load_state(kind, state | {"cls_norm.weight": rand(32)}, n_heads=2)
    wanted = teachers.shape_text(state[key].shape)
    with pytest.raises(ValueError) as error:
        teachers.load_state(kind, state | {key: rand(5, 7)}, n_heads=2)
    assert str(error.value) == f"the state dict: '{key}' is [5, 7] and must be {wanted}"


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("dinov3", {}, "none of the published .*: give load_state n_heads"),
        ("siglip2", {}, "none of the published .*: give load_state n_heads"),
        ("dinov3", {"n_heads": 3}, "n_heads = 3 does not divide the width 32"),
        ("dinov3", {"n_heads": 4, "rope_embed.periods": torch.ones(4)}, "has 4 periods.*give load_state n_heads=2"),
        (
            "dinov3",
            {"patch_embed.proj.weight": torch.zeros(32, 3, 14, 14)},
            r"\[32, 3, 14, 14\] and must be \[\*, 3, 16",
        ),
        ("siglip2", {"vision_model.embeddings.position_embedding.weight": torch.zeros(15, 32)}, "no square grid"),
        ("dinov2", {}, "no teacher is called 'dinov2'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_gets_one_line(kind, change, message):
    """Catches guessing the number of heads as width / 64."""
    state = siglip2_state() if kind == "siglip2" else dinov3_state()
    n_heads = change.get("n_heads", 2 if change else None)
    change = {key: value for key, value in change.items() if key != "n_heads"}
    with pytest.raises(ValueError, match=message) as error:
        teachers.load_state(kind, state | change, n_heads=n_heads)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given, held", [("dinov3", "siglip2"), ("siglip2", "dinov3")])
def test_the_wrong_teacher_for_a_file_is_said(given, held, tmp_path):
    """Catches complaining of the first key that is missing."""
    state = siglip2_state() if held == "siglip2" else dinov3_state()
    with pytest.raises(ValueError, match=f"is a {held} checkpoint and was given as {given}"):
        teachers.load_state(given, state, n_heads=2)
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    with pytest.raises(ValueError, match=f"weights.pth is a {held} checkpoint and was given as {given}"):
        teachers.load_teacher(f"{given}={path}")


# ---- specs ----


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_load_reads_the_kind_off_the_keys_and_takes_the_name(suffix, tmp_path):
    """Catches the kind taken from NAME."""
    for kind, state in (
        ("dinov3", dinov3_state(384, 48, 1)),
        ("siglip2", siglip2_state(768, 24, 1, text_dim=0)),
    ):
        path = tmp_path / f"{kind}.{suffix}"
        torch.save(state, path) if suffix == "pth" else save_file(state, path)
        teacher, batch = teachers.load_teacher(f"big-one={path}"), packed(pictures())
        assert teacher.name == "big-one" and not teacher.training
        assert torch.equal(teacher(batch)["patch"], teachers.load_state(kind, state)(batch)["patch"])
    with pytest.raises(ValueError, match=r"dinov3.*lacks 'norm.bias' \[384\]"):
        state = dinov3_state(384, 48, 1)
        del state["norm.bias"]
        torch.save(state, tmp_path / "dinov3.pth")
        teachers.load_teacher(f"dinov3={tmp_path / 'dinov3.pth'}")


class Payload:
    def __reduce__(self):
        return (print, ("a pickle ran code",))


def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path, capsys):
    """Catches torch.load(weights_only=False)."""
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"blocks.0": Payload()}, protocol=2))
    with pytest.raises(ValueError, match=r"evil\.pth") as error:
        teachers.load_teacher(f"dinov3={path}")
    assert "ran code" not in capsys.readouterr().out and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("dinov3", "is no teacher: write NAME=FILE"),
        ("=weights.pth", "is no teacher: write NAME=FILE"),
        ("a.b=weights.pth", "is no teacher: write NAME=FILE"),
        ("amoe=weights.pth", "_ and -, and not 'amoe'"),
        ("dinov3=nowhere.pth", "no weights at nowhere.pth"),
        ("mine=plug.py", "plug.py:FACTORY"),
        ("mine=nowhere.py:make", "no plug-in teacher at nowhere.py"),
        ("mine={tmp}/plug.py:absent", "plug.py:absent made no teacher: AttributeError: it has no 'absent'"),
        ("mine={tmp}/plug.py:broken", "plug.py:broken made no teacher: RuntimeError: out of order"),
        ("mine={tmp}/plug.py:bare", "plug.py:bare returned a object without 'name'"),
        ("mine={tmp}/other.pth", "other.pth is no DINOv3 and no SigLIP 2"),
    ],
)
def test_a_spec_that_makes_no_teacher_is_a_one_line_error(spec, message, tmp_path):
    """Catches letting an ImportError or a KeyError through."""
    (tmp_path / "plug.py").write_text(PLUG_IN)
    torch.save({"encoder.weight": rand(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message) as error:
        teachers.load_teacher(spec.format(tmp=tmp_path))
    assert "\n" not in str(error.value)


PLUG_IN = """
from __future__ import annotations
from dataclasses import dataclass
import torch

@dataclass
class Mean:
    name: str
    device: str
    dim: int = 768
    registers: int = 0
    def __call__(self, batch):
        patch = batch.rows.float()
        images = [patch[batch.patch_rows(i)] for i in range(batch.n_images)]
        return {"patch": patch, "summary": torch.stack([image.mean(0) for image in images])}

def make(device):
    return Mean("unnamed", device)

def broken(device):
    raise RuntimeError("out of order\\non two lines")

def bare(device):
    return object()
"""


def test_a_plug_in_is_called_with_the_device_and_named(tmp_path):
    """Catches keeping the plug-in's own name, under which two of them would share one cache entry."""
    (tmp_path / "plug.py").write_text(PLUG_IN)
    teacher, batch = teachers.load_teacher(f"mine={tmp_path / 'plug.py'}:make", "cpu"), packed(pictures())
    assert (teacher.name, teacher.device, teacher.dim, teacher.registers) == ("mine", "cpu", 768, 0)
    assert teacher(batch)["summary"].shape == (len(SHAPES), 768)


def test_plug_ins_of_one_file_name_have_their_own_text_tables(tmp_path):
    """Catches modules named by the file alone: the first teacher would speak with the second one's captions; and an
    image without a caption."""
    more = "\nimport torch\ntext_aligned = make\ndef text_table(): return torch.full((2, 768), {}.0)\n"
    for number, folder in enumerate(("first", "second")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "plug.py").write_text(PLUG_IN + more.format(number))
    (tmp_path / "captions.json").write_text('[{"file": "a.png"}, {"file": "b.png", "caption": "b"}]')
    specs = [f"{folder}={tmp_path / folder / 'plug.py'}:text_aligned" for folder in ("first", "second")]
    for number, teacher in enumerate(teachers.load_teachers(specs, tmp_path, "cpu")):
        assert (teacher.encode_text(["b"]) == number).all()


@pytest.mark.parametrize("factory", ["text_aligned", "dense"])
def test_the_shared_plug_ins_load_and_answer(factory):
    """Catches importing the file under a name that hides its own folder from it."""
    path = SHARED / "teachers" / "real.py"
    if not path.is_file():
        pytest.skip(f"no plug-in teachers at {path}: set AMOE_SHARED to the folder that holds teachers/")
    teacher, batch = teachers.load_teacher(f"mine={path}:{factory}"), packed(pictures([(3, 4), (5, 2)]))
    out = teacher(batch)
    assert teacher.name == "mine" and out["summary"].shape == (2, teacher.dim)
    assert torch.isfinite(out["patch"]).all()


# ---- text ----


def test_encode_text_lower_cases_and_pads(tmp_path):
    """Catches padding to the longest text of the call, which moves the last position that answers."""
    tokenizers = pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 3, "a": 4, "red": 5, "fox": 6, "runs": 7}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    teacher = random_teacher("siglip2")
    teacher.tokenizer = tmp_path / "tokenizer.json"
    tokenizer.save(str(teacher.tokenizer))
    ids = torch.tensor([[4, 5, 6, 1, 0, 0, 0, 0], [6, 6, 6, 6, 6, 6, 6, 1]])
    close(teacher.encode_text(["A Red FOX", "fox " * 20]), teacher.text(ids))
    close(teacher.encode_text(["A Red FOX"]), teacher.text(ids[:1]))
    assert teacher.encode_text([]).shape == (0, 32)
    teacher.tokenizer.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is no tokenizer.json"):
        teacher.encode_text(["a"])


def test_encode_text_names_what_is_missing(tmp_path, monkeypatch):
    """Catches importing tokenizers at the top of the file."""
    teacher = random_teacher("siglip2")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        teacher.encode_text(["a fox"])
    monkeypatch.setitem(sys.modules, "tokenizers", type(sys)("tokenizers"))
    sys.modules["tokenizers"].Tokenizer = None
    teacher.tokenizer = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match=r"put the weights' tokenizer.json beside them"):
        teacher.encode_text(["a fox"])
    with pytest.raises(ValueError, match=r"take the tokenizer.json that came with the weights"):
        teacher.text(torch.full((1, 8), 50))
    blind = teachers.load_state("siglip2", siglip2_state(text_dim=0), n_heads=2)
    for call in (lambda: blind.encode_text(["a fox"]), lambda: blind.text(torch.zeros(1, 8, dtype=torch.long))):
        with pytest.raises(ValueError, match="has no text tower"):
            call()


@pytest.mark.slow
@pytest.mark.parametrize("kind", REAL)
def test_real_sizes_run_on_a_cpu_within_24_gib(kind):
    """Catches a position table [P, G, G, D], or every image padded to the largest."""
    teacher = teachers.load_state(kind, random_state(kind, REAL[kind]))
    batch = random_pack([(16, 16), (8, 12), (6, 6), (4, 8), (10, 10), (5, 5)], None, [])
    with torch.no_grad():
        speed = time_padding(teacher, [batch], None, repeats=1)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(kind, speed, f"{peak_gib:.1f} GiB")
    assert peak_gib < 24 and speed["packed_over_padded"] > 1


# ---- folders as the Hub lays them out ----


@pytest.mark.parametrize("parts", [1, 2])
def test_a_hub_folder_is_taken_as_it_is(shared, tmp_path, parts, random_images):
    """Catches a number of heads taken from the table where config.json says another, and parts that are left out."""
    tensors = load_file(shared / "golden" / "dinov3.safetensors")
    state = {key.removeprefix("state_hf/"): v for key, v in tensors.items() if key.startswith("state_hf/")}
    with safe_open(shared / "golden" / "dinov3.safetensors", "pt") as file:
        heads = json.loads(file.metadata()["meta"])["config"]["n_heads"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov3_vit", "num_attention_heads": heads}))
    keys = sorted(state)
    names = ["model.safetensors"] if parts == 1 else [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    for n, name in enumerate(names):
        save_file({key: state[key].contiguous() for key in keys[n::parts]}, tmp_path / name, {"format": "pt"})
    if parts == 2:
        weight_map = {key: names[i % 2] for i, key in enumerate(keys)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    [teacher] = teachers.load_teachers([f"dinov3={tmp_path}"], tmp_path, "cpu")
    want = teachers.load_state("dinov3", state, n_heads=heads)
    batch = pack(*random_images)
    assert torch.equal(teacher(batch)["patch"], want(batch)["patch"])


def test_a_hub_folder_of_siglip2_finds_its_tokenizer_and_its_heads(shared, tmp_path):
    """Catches a tokenizer looked for beside the folder, and two towers of other numbers of heads run with one."""
    tensors = load_file(shared / "golden" / "siglip2.safetensors")
    state = {k.removeprefix("state/"): v.contiguous() for k, v in tensors.items() if k.startswith("state/")}
    with safe_open(shared / "golden" / "siglip2.safetensors", "pt") as file:
        heads = json.loads(file.metadata()["meta"])["config"]["n_heads"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config = {"vision_config": {"num_attention_heads": heads}, "text_config": {"num_attention_heads": heads}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    teacher = teachers.load_teacher(f"siglip2={tmp_path}")
    assert teacher.tokenizer == tmp_path / "tokenizer.json" and teacher.pool_heads == heads
    config["text_config"]["num_attention_heads"] = 2 * heads
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="both have as many"):
        teachers.load_teacher(f"siglip2={tmp_path}")


def test_a_folder_that_is_not_clear_is_named(tmp_path):
    """Catches weights chosen by the order of a directory."""
    with pytest.raises(ValueError, match=r"no \.safetensors"):
        teachers.load_teacher(f"dinov3={tmp_path}")
    for name in "ab":
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors, b\.safetensors"):
        teachers.load_teacher(f"dinov3={tmp_path}")
