"""The student: attention, routing, PHI-S, heads and losses against plain float64 definitions and reference outputs."""

import itertools
import json
import math
import re
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

import amoe
from amoe import pack
from kernels import rope
from kernels.attention import attend, image_runs, mask_of


def image_of_tokens(starts, T):
    return torch.searchsorted(torch.tensor(starts), torch.arange(T), right=True) - 1


def small(spaces=(), **changes):
    sizes = {
        "layers": 2,
        "dim": 32,
        "heads": 2,
        "head_dim": 16,
        "experts": 4,
        "top_k": 2,
        "expert_hidden": 24,
    } | changes
    torch.manual_seed(0)
    model = amoe.AMoE(amoe.Config(**sizes), list(spaces))
    for p in model.parameters():  # away from the initial zeros, which would hide a wrong block
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3 / math.sqrt(p.shape[-1]))
    return model


# ---- reference outputs ----


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_siglino_outputs_match_the_reference(shared, kind):
    """Catches any change of the forward pass, e.g. rotating the first half of a head, or eps 1e-5 in the q/k norm."""
    path = shared / "golden" / f"siglino_{kind}.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["meta"])["config"]
    state = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
    model = amoe.load_siglino(state, top_k=config["top_k"])
    shapes = [tuple(s) for s in tensors["input/spatial_shapes"].tolist()]
    rows = [tensors["input/patches"][i, : h * w] for i, (h, w) in enumerate(shapes)]
    answers = model.encode(rows, shapes)
    for ours, theirs in (("dinov3", "dinov3"), ("siglip2", "siglip2"), ("amoe", "siglino")):
        for i, (h, w) in enumerate(shapes):
            patch, summary = tensors[f"output/patch.{theirs}"][i, : h * w], tensors[f"output/summary.{theirs}"][i]
            assert (answers[i]["patch"][ours] - patch).abs().max() < 1e-4
            assert (answers[i]["summary"][ours] - summary).abs().max() < 1e-4
    fresh = amoe.golden_frequencies(config["n_heads"], config["head_dim"])
    assert (fresh - state["freqs_cis_golden"]).abs().max() < 1e-5


def plain_block(x, block, rotation):
    """A block over the tokens [L, D] of one image, token by token where the packed model sorts them by expert."""
    L, attention = len(x), block.attention
    h = block.attention_norm(x)
    q, k, v = (w(h).view(L, -1, attention.head_dim) for w in (attention.wq, attention.wk, attention.wv))
    q, k = (amoe.rotate(t / (t.square().mean(-1, keepdim=True) + amoe.QK_EPS).sqrt(), *rotation) for t in (q, k))
    score = torch.einsum("qhd,khd->hqk", q, k) / attention.head_dim**0.5
    weight = score.exp() / (score.exp().sum(-1, keepdim=True) + attention.sinks.exp()[:, None, None])
    x = x + attention.wo(torch.einsum("hqk,khd->qhd", weight, v).flatten(1))
    h = block.ffn_norm(x)
    if not hasattr(block, "moe"):
        return x + block.feed_forward(h)
    w, out = block.moe.experts, []
    for token in h:
        gate = torch.sigmoid(block.moe.router.gate.weight @ token)
        chosen = (gate + block.moe.expert_bias).topk(block.moe.router.top_k).indices.tolist()
        out.append(sum(gate[e] * (w.w2[e] @ (F.silu(w.w1[e] @ token) * (w.w3[e] @ token))) for e in chosen))
    return x + torch.stack(out)


@pytest.mark.parametrize("dense_layers", [0, 1, 2, 3])
def test_leading_dense_layers_are_read_off_a_checkpoint_and_run(dense_layers, random_images):
    """Catches a model dense or sparse as a whole, widths mixed up between the two, and expert loads of dense layers."""
    pool = amoe.MapPool(32, 28, 16, 1e-5).state_dict()
    spaces = [amoe.Space("dinov3", 12, registers=2), amoe.Space("siglip2", 32, pool=pool, pool_eps=1e-5)]
    experts = (
        {"experts": 4, "top_k": 2, "expert_hidden": 24}
        if dense_layers < 3
        else {"experts": 0, "top_k": 0, "expert_hidden": 0}
    )
    model = small(spaces, layers=3, dense_layers=dense_layers, dense_hidden=40, registers=2, **experts)
    official = {
        re.sub(r"^heads\.(\w+)\.(fc|norm)", r"\1_adapter.\2", key).replace(
            "heads.siglip2.pool.", "siglip2_multihead_attention_pooling_head."
        ): value
        for key, value in model.state_dict().items()
    }
    read = amoe.load_siglino(official, top_k=2)
    assert read.config == replace(model.config, dense_hidden=40 if dense_layers else 0)
    rows, shapes = random_images
    [first, *_], [want, *_] = read.encode(rows, shapes), model.encode(rows, shapes)
    assert all(torch.equal(first["patch"][name], want["patch"][name]) for name in ("dinov3", "siglip2", "amoe"))
    with torch.no_grad():
        out, expert_load = model(pack(rows, shapes, registers=2))
        assert expert_load.shape == ((3 - dense_layers, 4) if dense_layers < 3 else (0, 0))
        start = 0
        for r, (h, w) in zip(rows, shapes, strict=True):
            yx = torch.cat([torch.zeros(3, 2), rope.positions(h, w)])
            x = torch.cat([model.cls_token[0], model.storage_tokens[0], model.img_projector(amoe.normalise(r))])
            for block in model.layers:
                x = plain_block(x, block, amoe.rotations(yx, model.freqs_cis_golden))
            assert (model.norm(x) - out["amoe"]["patch"][start : start + len(x)]).abs().max() < 1e-4
            start += len(x)


def test_siglino_errors_name_the_key(shared):
    """Catches strict=False in the place of a check."""
    state = load_file(shared / "golden" / "siglino_moe.safetensors")
    state = {key.removeprefix("state/"): value for key, value in state.items() if key.startswith("state/")}
    for change, named in (
        (lambda s: s.pop("layers.1.attention.wq.weight"), "layers.1.attention.wq.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra"),
        (lambda s: s.update({"norm.weight": torch.zeros(3)}), "norm.weight"),
        (lambda s: s.pop("img_projector.weight"), "img_projector.weight"),
        (lambda s: s.pop("siglip2_multihead_attention_pooling_head.probe"), "probe"),
    ):
        wrong = dict(state)
        change(wrong)
        with pytest.raises(ValueError, match=named):
            amoe.load_siglino(wrong, top_k=2)


def test_a_file_that_is_no_state_dict_is_named(tmp_path):
    """Catches weights_only=False, and a traceback from torch's depths."""
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("broken.pth", "list.pth", "missing.safetensors"):
        with pytest.raises(ValueError, match=name):
            amoe.load_siglino(tmp_path / name)


def test_weights_in_parts_are_read_through_their_index(tmp_path):
    """Catches parts that are looked for in the working folder, and one of them alone being read."""
    state = {"a": torch.ones(2), "b": torch.zeros(3)}
    for n, key in enumerate(state):
        save_file({key: state[key]}, tmp_path / f"part-{n}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: f"part-{n}.safetensors" for n, key in enumerate(state)}}))
    read = amoe.read_state(index)
    assert set(read) == {"a", "b"} and torch.equal(read["b"], state["b"])
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(ValueError, match="part-1"):
        amoe.read_state(index)


# ---- attention and positions ----


def dense_attention(q, k, v, image, sinks):
    """The definition, float64 over T x T: out = softmax(scores within the image) v * sigmoid(lse - sink)."""
    score = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    score = score.masked_fill(image[:, None] != image, -math.inf)
    out = torch.einsum("hqk,khd->qhd", score.softmax(-1), v)
    return out * torch.sigmoid(score.logsumexp(-1) - sinks[:, None]).T[..., None]


def test_attention_and_its_gradient_match_the_dense_definition():
    """Catches a sink of value other than zero, attention across images, and scale 1 / d."""
    torch.manual_seed(0)
    starts, T = [0, 5, 12, 19, 20], 23
    image = image_of_tokens(starts, T)
    q, k, v = (torch.randn(T, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sinks = torch.randn(3, dtype=torch.float64, requires_grad=True)
    want = dense_attention(q, k, v, image, sinks)
    got = attend(*(t.float() for t in (q, k, v)), image_runs(torch.tensor(starts), T), sinks.float())
    assert (got - want).abs().max() < 1e-5
    weight = torch.randn(T, 3, 8, dtype=torch.float64)
    wanted = torch.autograd.grad((want * weight).sum(), (q, k, v, sinks))
    had = torch.autograd.grad((got.double() * weight).sum(), (q, k, v, sinks))
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(wanted, had, strict=True))


def test_flex_attention_equals_sdpa():
    """Catches a mask function over tokens in the place of images, and the sink applied to the raw lse of base 2."""
    torch.manual_seed(0)
    starts, T = [0, 40, 41, 170, 300], 310
    q, k, v, sinks = *(torch.randn(T, 2, 16) for _ in range(3)), torch.randn(2)
    mask = mask_of(torch.tensor(starts), T)
    out, aux = flex_attention(
        *(t.transpose(0, 1)[None] for t in (q, k, v)), block_mask=mask, return_aux=AuxRequest(lse=True)
    )
    out = (out * torch.sigmoid(aux.lse - sinks[:, None])[..., None])[0].transpose(0, 1)
    assert (attend(q, k, v, image_runs(torch.tensor(starts), T), sinks) - out).abs().max() < 1e-5
    with torch.no_grad():
        assert (attend(q, k, v, mask, sinks) - out).abs().max() < 1e-6


@pytest.mark.parametrize(
    "starts, T", [([0, 100, 230, 600], 700), ([0, 128, 256, 512], 512), ([0, 130], 130), ([0, 7], 2000)]
)
def test_block_mask_from_starts_equals_evaluating_the_rule(starts, T):
    """Catches an inclusive end taken as exclusive in the range of key blocks, and cut-short last blocks called full."""
    image = image_of_tokens(starts, T)
    want = create_block_mask(lambda b, h, q, k: image[q] == image[k], None, None, T, T, device="cpu")
    got = mask_of(torch.tensor(starts), T)
    assert torch.equal(got.to_dense(), want.to_dense())
    assert torch.equal(got.full_kv_num_blocks, want.full_kv_num_blocks)
    assert torch.equal(got.kv_num_blocks, want.kv_num_blocks)


def test_positions_span_the_aspect_with_ends_included():
    """Catches linspace without its ends, and h and w exchanged."""
    yx = rope.positions(2, 8)
    assert torch.allclose(yx[0], torch.tensor([-0.5, -2.0])) and torch.allclose(yx[-1], torch.tensor([0.5, 2.0]))
    assert torch.allclose(rope.positions(1, 4)[:, 0], torch.tensor(-0.5))


def test_half_precision_keeps_positions_and_routing_biases():
    """Catches plain register_buffer, which .to(bfloat16) rounds."""
    model = small().to(torch.bfloat16)
    assert model.freqs_cis_golden.dtype == torch.float32 and model.layers[0].moe.expert_bias.dtype == torch.float32
    assert model.norm.weight.dtype == torch.bfloat16
    assert torch.equal(model.freqs_cis_golden, amoe.golden_frequencies(2, 16))


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.02), (torch.float16, 0.002)])
def test_a_student_encodes_in_half_precision(random_images, dtype, error):
    """Catches float32 pixels for rounded weights, and float32 features for a rounded pooling head."""
    pool = amoe.MapPool(32, 48, 4, 1e-6).requires_grad_(False)
    for p in pool.parameters():
        torch.nn.init.normal_(p, std=0.2)
    spaces = amoe.Space("a", 24, registers=2), amoe.Space("b", 32, pool=pool.state_dict(), pool_heads=4)
    model = small(spaces, top_k=4)  # rounding chooses no other experts
    whole, half = model.encode(*random_images), model.to(dtype).encode(*random_images)
    for want, got in zip(whole, half, strict=True):
        for kind, name in itertools.product(("patch", "summary"), ("a", "b", "amoe")):
            assert (got[kind][name] - want[kind][name]).norm() < error * want[kind][name].norm()


# ---- packing ----


def test_packing_changes_no_feature(random_images):
    """Catches attention to neighbours in the pack, padding that is read, and positions cached without the shape."""
    rows, shapes = random_images
    model = small([amoe.Space("a", 24, registers=2)])
    together = model.encode(rows, shapes)
    backwards = model.encode(rows[::-1], shapes[::-1])[::-1]
    split = model.encode(rows, shapes, n_tokens=30)
    for i in range(len(rows)):
        (alone,) = model.encode(rows[i : i + 1], shapes[i : i + 1])
        for other in (together[i], backwards[i], split[i]):
            for kind in ("patch", "summary"):
                for name in ("a", "amoe"):
                    assert (other[kind][name] - alone[kind][name]).abs().max() < 1e-5


def test_padding_changes_no_feature(random_images):
    """Catches padding tokens that join the last image."""
    rows, shapes = random_images
    model = small([amoe.Space("a", 24, registers=2)])
    plain, _ = model(pack(rows, shapes))
    batch = pack(rows, shapes, n_tokens=200)
    padded, _ = model(batch)
    used = int(batch.starts[-1])
    assert (padded["a"]["patch"][:used] - plain["a"]["patch"]).abs().max() < 1e-5
    for kind in ("summary", "registers"):
        assert (padded["a"][kind] - plain["a"][kind]).abs().max() < 1e-5


def test_encode_refuses_shapes_of_other_images(random_images):
    """Catches fewer answers than images were given, and rows that are arrays."""
    model = amoe.AMoE(amoe.CONFIGS["toy"], []).eval()
    rows, shapes = random_images
    assert len(model.encode([row.numpy() for row in rows], shapes)) == 5
    for some in (shapes[:4], [*shapes, (1, 1)]):
        with pytest.raises(ValueError, match=f"5 images and {len(some)} shapes"):
            model.encode(rows, some)


def test_encode_takes_images_as_well_as_rows(random_images):
    """Catches (channel, row, col) order for images where rows are (row, col, channel)."""
    rows, shapes = random_images
    batch = pack(rows, shapes)
    model = small([amoe.Space("a", 24)])
    for from_rows, from_image in zip(model.encode(rows, shapes), model.encode(batch.images()), strict=True):
        assert torch.equal(from_rows["patch"]["a"], from_image["patch"]["a"])


# ---- experts ----


def test_router_with_one_expert_equals_dense():
    """Catches weighting before the expert, and routing weights that are normalised."""
    moe = small(experts=1, top_k=1).layers[0].moe
    x = torch.randn(7, 32)
    w1, w2, w3 = (w[0] for w in (moe.experts.w1, moe.experts.w2, moe.experts.w3))
    want = torch.sigmoid(moe.router.gate(x)) * F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)
    got, load = moe(x, torch.ones(7, dtype=torch.bool))
    assert (got - want).abs().max() < 1e-5 and load.tolist() == [7.0]


def test_experts_match_a_loop_over_tokens():
    """Catches a token's experts mixed up when rows come back from expert order."""
    moe = small(experts=5, top_k=2).layers[0].moe
    moe.expert_bias[:] = torch.tensor([0.3, -0.2, 0.0, 0.1, -9.0])  # the last expert stays empty
    x = torch.randn(11, 32)
    score = torch.sigmoid(moe.router.gate(x))
    want = torch.zeros_like(x)
    for t in range(11):
        for e in (score[t] + moe.expert_bias).topk(2).indices:
            w1, w2, w3 = moe.experts.w1[e], moe.experts.w2[e], moe.experts.w3[e]
            want[t] += score[t, e] * (w2 @ (F.silu(w1 @ x[t]) * (w3 @ x[t])))
    counted = torch.arange(11) < 9
    got, load = moe(x, counted)
    assert (got - want).abs().max() < 1e-5
    assert load.sum() == 18 and load[4] == 0


def test_the_balancing_bias_moves_towards_the_mean_load():
    """Catches the sign of the update, and a bias that leaks into the routing weights."""
    moe = small().layers[0].moe
    moe.balance(torch.tensor([9.0, 1.0, 5.0, 5.0]), 0.1)
    assert moe.expert_bias.tolist() == pytest.approx([-0.1, 0.1, 0.0, 0.0])
    x = torch.randn(6, 32)
    expert, weight = moe.router(x, torch.tensor([5.0, 5.0, 0.0, 0.0]))
    assert set(expert.flatten().tolist()) == {0, 1}
    assert torch.allclose(weight, torch.sigmoid(moe.router.gate(x)).gather(1, expert))


# ---- PHI-S ----


@pytest.mark.parametrize("n", [1, 2, 12, 20, 36, 48, 96, 384, 768, 1024, 1152, 1280])
def test_hadamard_rows_are_orthogonal(n):
    """Catches a wrong border of Paley's matrices."""
    H = amoe.hadamard(n)
    assert torch.equal(H @ H.T, n * torch.eye(n, dtype=torch.float64)) and H.abs().eq(1).all()


def test_phi_s_gives_every_channel_unit_variance_and_inverts():
    """Catches whitening (no isometry), the transposed rotation, and the mean of deviations for sigma."""
    torch.manual_seed(0)
    x = torch.randn(4000, 48, dtype=torch.float64) @ torch.randn(48, 48, dtype=torch.float64) * 3 + 7
    phi_s = amoe.PhiS.fit(x)
    y = phi_s.apply(x)
    assert (y.var(0, correction=0) - 1).abs().max() < 1e-9 and y.mean(0).abs().max() < 1e-9
    assert (phi_s.invert(y) - x).abs().max() < 1e-9
    assert torch.allclose(torch.pdist(y[:50]) * phi_s.sigma, torch.pdist(x[:50]))


@pytest.mark.parametrize("value", [0.0, 0.1, 3.3, 1234.567])
def test_constant_features_are_refused_whatever_their_rounding(value):
    """Catches a test for 0 alone: rounding left a sigma of 1e-17, by which all features of other images are divided."""
    x = torch.full((777, 12), value) + torch.arange(12) * value / 7
    with pytest.raises(ValueError, match="constant features"):
        amoe.PhiS.fit(x)
    if value:  # a spread that float32 can hold at this size is one
        spread = 1e-5 * value * torch.randn(777, 12, generator=torch.Generator().manual_seed(0))
        assert float(amoe.PhiS.fit(x + spread).sigma) == pytest.approx(1e-5 * value, rel=0.1)


def test_folding_phi_s_into_a_layer_is_exact():
    """Catches a bias that is not rotated, and weights folded on the wrong side."""
    torch.manual_seed(0)
    phi_s = amoe.PhiS.fit(torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) + 3)
    for bias in (True, False):
        linear = torch.nn.Linear(5, 12, bias=bias, dtype=torch.float64)
        z = torch.randn(9, 5, dtype=torch.float64)
        assert (phi_s.fold(linear)(z) - phi_s.invert(linear(z))).abs().max() < 1e-12


def test_unfolding_undoes_folding():
    """Catches a bias that forgets the mean, and a scale divided the wrong way."""
    torch.manual_seed(0)
    phi_s = amoe.PhiS.fit(torch.randn(200, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) * 3 + 5)
    linear, x = torch.nn.Linear(7, 12, bias=False).double(), torch.randn(9, 7, dtype=torch.float64)
    assert torch.allclose(phi_s.unfold(phi_s.fold(linear))(x), linear(x), atol=1e-10)
    assert torch.allclose(phi_s.unfold(linear)(x), phi_s.apply(linear(x)), atol=1e-10)


def test_phi_s_of_an_unreachable_order_says_so(capsys):
    """Catches a silent or unseeded fallback."""
    x = torch.randn(200, 6)
    a, b = amoe.PhiS.fit(x), amoe.PhiS.fit(x)
    assert "no Hadamard matrix of order 6" in capsys.readouterr().out
    assert torch.equal(a.rotation, b.rotation) and (a.invert(a.apply(x)) - x).abs().max() < 1e-5


def test_int8_rounding_is_half_a_step():
    """Catches truncation in the place of rounding, and overflow instead of clipping."""
    y = torch.linspace(-7.9, 7.9, 1001)
    assert (amoe.dequantise(amoe.quantise(y)) - y).abs().max() <= amoe.INT8_STEP / 2 + 1e-6
    assert amoe.quantise(torch.tensor([100.0, -100.0])).tolist() == [127, -127]


# ---- losses ----


def test_arkd_of_duplicates_and_of_one_image():
    """Catches sqrt at distance 0, whose gradient is NaN, and 0 / 0 for a single image."""
    s = torch.randn(6, 4)
    s[3] = s[2]
    s.requires_grad_()
    amoe.arkd_loss(s, torch.randn(6, 3).index_copy(0, torch.tensor([1]), torch.zeros(1, 3))).backward()
    assert s.grad.isfinite().all()
    same = torch.ones(3, 4, requires_grad=True)
    amoe.arkd_loss(same, torch.ones(3, 2)).backward()
    assert same.grad.isfinite().all()
    one = torch.randn(1, 4, requires_grad=True)
    loss = amoe.arkd_loss(one, torch.randn(1, 3))
    loss.backward()
    assert loss == 0 and one.grad.abs().sum() == 0


def test_a_folded_student_answers_the_same(random_images):
    """Catches a head that undoes PHI-S twice once folded."""
    rows, shapes = random_images
    phi_s = amoe.PhiS.fit(torch.randn(300, 24) * 4 + 2)
    model = small([amoe.Space("a", 24, phi_s=phi_s)])
    before = model.encode(rows, shapes)
    model.heads["a"].fold()
    for a, b in zip(before, model.encode(rows, shapes), strict=True):
        assert (a["patch"]["a"] - b["patch"]["a"]).abs().max() < 1e-4
        assert (a["summary"]["a"] - b["summary"]["a"]).abs().max() < 1e-4


def test_a_saved_student_comes_back_whole(random_images, tmp_path):
    """Catches a folded bias that is lost, a pool without its heads, and PHI-S applied after it was folded in."""
    rows, shapes = random_images
    phi_s = amoe.PhiS.fit(torch.randn(300, 24) * 4 + 2)
    pool = amoe.MapPool(24, 40, heads=4, eps=1e-5)
    torch.nn.init.normal_(pool.probe)
    spaces = [amoe.Space("a", 24, registers=2, phi_s=phi_s)]
    spaces += [amoe.Space("b", 24, phi_s=phi_s, pool=pool.state_dict(), pool_heads=4, pool_eps=1e-5)]
    model = small(spaces)
    amoe.save(model, tmp_path / "student")
    again = amoe.load(tmp_path / "student")
    assert model.heads["a"].phi_s is not None and again.heads["a"].phi_s is None
    for x, y in zip(model.encode(rows, shapes), again.encode(rows, shapes), strict=True):
        for name in ("a", "b", "amoe"):
            assert (x["patch"][name] - y["patch"][name]).abs().max() < 1e-4
            assert (x["summary"][name] - y["summary"][name]).abs().max() < 1e-4
    with pytest.raises(ValueError, match="no student"):
        safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
        amoe.load(tmp_path / "other.safetensors")


def test_a_teacher_with_too_many_registers_is_an_error():
    """Catches heads that silently read patches as registers."""
    with pytest.raises(ValueError, match="9 registers"):
        small([amoe.Space("a", 24, registers=9)])
