"""What a run can leave out or replace: --standardise, --loss-per, --sizes, --optimizer; and how runs are compared."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

import amoe
import evaluate
import train
from benchmarks import claims
from common.muon import Muon, orthogonalise

CPU = torch.device("cpu")


def words(cache, out, *more):
    fixed = ["--tokens", "400", "--device", "cpu", "--threads", "1", "--no-evaluate", "--log-every", "1"]
    return ["--cache", str(cache.path), *fixed, "--steps", "3", "--warmup", "0", "--out", str(out), *more]


def entries_of(cache):
    return [(number, i) for number in cache.numbers for i in range(len(cache.shard(number).ids))]


@pytest.mark.parametrize("how", ["channels", "global", "none"])
def test_a_standardisation_is_what_its_name_says_and_the_way_back_is_exact(cache, how):
    """Catches a spread taken in the wrong space, targets that stay in PHI-S, a folded head that is off."""
    flags = train.parse(words(cache, "x", "--standardise", how))
    (space, *_) = train.spaces_to_learn(flags, cache, cache.spaces, [], CPU)
    batch = cache.read(entries_of(cache))
    stored, rows = batch.targets[space.name]["patch"], batch.is_patch
    own, learnt = cache.spaces[0].to_own_space(stored)[rows], space.patch_target(stored)[rows]
    assert torch.allclose(own, space.to_own_space(stored)[rows]) and torch.allclose(
        space.phi_s.invert(learnt), own, atol=1e-4
    )
    if how == "none":
        assert torch.allclose(learnt, own, atol=1e-4) and space.summary_variance == 1
    if how == "global":
        assert torch.allclose(learnt.var(0), own.var(0) / space.phi_s.sigma**2, rtol=1e-3)
    if how == "channels":
        assert (learnt.std(0) - 1).abs().max() < 0.35 < (own.std(0) / own.std(0).mean() - 1).abs().max()
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(5, space.dim, bias=False), torch.randn(7, 5)
    assert torch.allclose(space.phi_s.fold(linear)(x), space.phi_s.invert(linear(x)), atol=1e-4)
    assert torch.allclose(space.phi_s.unfold(space.phi_s.fold(linear))(x), linear(x), atol=1e-4)


@pytest.mark.parametrize("how", ["channels", "none"])
def test_a_run_without_phi_s_saves_what_it_learnt(cache, tmp_path, how):
    """Catches a checkpoint that forgets the space its heads speak, and targets measured in another than they are in."""
    train.main(words(cache, tmp_path, "--standardise", how))
    saved = torch.load(train.checkpoints(tmp_path)[-1])
    kept, folder = train.student_of(saved), amoe.load(tmp_path / "student")
    batch = cache.read(entries_of(cache)[:5], with_targets=False)
    a, b = (evaluate.of_student(model)(batch) for model in (kept, folder))
    assert all(torch.allclose(a[s.name][kind], b[s.name][kind], atol=1e-4) for s in cache.spaces for kind in a[s.name])


def test_patches_weigh_alike_only_when_asked(cache):
    """Catches a weight by image under both names, and padding that counts."""
    batch = cache.read(entries_of(cache)[:6], n_tokens=400)
    out = {s.name: {kind: torch.zeros(t.shape) for kind, t in batch.targets[s.name].items()} for s in cache.spaces}
    space, rows = cache.spaces[0], [batch.patch_rows(i) for i in range(6)]
    error_T = amoe.dequantise(batch.targets[space.name]["patch"]).square().mean(1)
    by_image = sum(error_T[r].mean() for r in rows)
    by_patch = 6 * torch.cat([error_T[r] for r in rows]).mean()
    got = [amoe.distillation_loss(out, batch, [space], per)[space.name]["patch"] for per in ("image", "patch")]
    assert torch.allclose(torch.stack(got), torch.stack([by_image, by_patch])) and abs(by_image - by_patch) > 1e-3


def test_sizes_take_the_place_of_the_models(cache, tmp_path):
    """Catches a size that is parsed and not built, or lost in student/."""
    train.main(words(cache, tmp_path, "--sizes", "layers=2", "top_k=1", "dense_layers=1", "dense_hidden=64"))
    config = amoe.load(tmp_path / "student").config
    assert (config.layers, config.top_k, config.dense_layers, config.dense_hidden, config.dim) == (2, 1, 1, 64, 128)
    for bad in (
        "layers",
        "layers=x",
        "size=3",
        "top_k=9",
        "dense_layers=5",
        "layers=0",
        "dense_layers=1",
        "head_dim=6",
    ):
        with pytest.raises(ValueError, match="--sizes"):
            train.with_sizes(amoe.CONFIGS["toy"], (bad,))
    assert train.with_sizes(amoe.CONFIGS["toy"], ("dense_hidden=256",)) == amoe.CONFIGS["toy"]  # no layer has them


def test_muon_makes_steps_orthogonal():
    """Catches coefficients in another order, a transposed tall matrix, and stacks taken for one matrix."""
    torch.manual_seed(0)
    for shape in ((1, 12, 40), (1, 40, 12), (3, 16, 16)):
        x = torch.randn(shape)
        before = torch.linalg.svdvals(x) / x.norm(dim=(1, 2))[:, None]
        after = torch.linalg.svdvals(orthogonalise(x))[before > 0.01]
        assert after.min() > 0.73 and after.max() < 1.28
    stack = torch.randn(3, 16, 16)
    assert torch.allclose(orthogonalise(stack)[1:2], orthogonalise(stack[1:2]), atol=1e-5)


def test_muon_learns_matrices_leaves_the_rest_to_adamw_and_skips_what_is_not_finite():
    """Catches a step that is lost or taken twice, moments that a skipped step spoils."""
    torch.manual_seed(0)
    matrix, vector = (torch.nn.Parameter(torch.randn(s)) for s in ((8, 6), (6,)))
    plain = torch.nn.Parameter(vector.detach().clone())
    groups = [{"params": [matrix], "muon": True}, {"params": [vector]}]
    optimizer = Muon(groups, lr=0.01, weight_decay=0.1, fused=True)
    adamw = torch.optim.AdamW([plain], lr=0.01, weight_decay=0.1, fused=True)
    for spoilt in (0, 1, 0):
        before = matrix.detach().clone()
        for p in (matrix, vector, plain):
            p.grad = torch.full_like(p, math.nan if spoilt else 0.3)
        optimizer.found_inf = adamw.found_inf = torch.tensor(float(spoilt))
        optimizer.step(), adamw.step()
        assert torch.equal(vector, plain) and torch.isfinite(matrix).all()
        step = (before * (1 - 0.001) - matrix).norm()
        assert torch.equal(matrix, before) if spoilt else 0.5 < step / (0.01 * 0.2 * 8**0.5) < 1.5


def test_muon_takes_matrices_and_experts_of_layers_and_no_convolution(cache):
    """Catches kernels of a convolution in a trunk of one's own, each made orthogonal by itself."""
    model = train.build(train.parse(words(cache, "x")), cache.spaces, CPU)
    model.layers.append(torch.nn.ModuleDict({"mix": torch.nn.Conv2d(6, 8, 3), "row": torch.nn.Conv1d(6, 8, 3)}))
    names = {p: name for name, p in model.named_parameters()}
    first, decayed, _ = train.make_optimizer(model, train.parse(words(cache, "x"))).param_groups
    assert first["muon"] and not decayed["muon"]
    stepped, others = ({names[p] for p in group["params"]} for group in (first, decayed))
    assert {"layers.0.attention.wq.weight", "layers.0.moe.experts.w2"} <= stepped and len(stepped) == 3 * 7
    assert {"layers.0.moe.router.gate.weight", "layers.3.mix.weight", "layers.3.row.weight"} <= others


def test_a_run_with_muon_resumes_bit_for_bit(cache, tmp_path):
    """Catches a momentum that a checkpoint does not hold."""
    more = "--optimizer", "muon", "--steps", "6", "--save-every", "3"
    train.main(words(cache, tmp_path, *more))
    half, last = train.checkpoints(tmp_path)
    whole, before = torch.load(last), torch.load(half)
    last.unlink()
    train.main(words(cache, tmp_path, *more, "--resume"))
    again = torch.load(train.checkpoints(tmp_path)[-1])
    assert all(torch.equal(v, again["model"][k]) for k, v in whole["model"].items())
    assert not torch.equal(
        before["model"]["layers.0.attention.wq.weight"], whole["model"]["layers.0.attention.wq.weight"]
    )


def test_geometry_knows_a_rotation_from_noise():
    """Catches measures that are not blind to rotation and scale, and neighbours that count the image itself."""
    torch.manual_seed(0)
    x = torch.randn(80, 12)
    turned = 3 * x @ torch.linalg.qr(torch.randn(12, 12))[0] + 5
    assert all(v == pytest.approx(1, abs=1e-3) for v in claims.geometry(turned, x).values())
    other = claims.geometry(torch.randn(80, 12), x)
    assert abs(other["distances"]) < 0.1 and other["cka"] < 0.4 and other["neighbours"] < 0.3


def test_arms_are_compared_seed_by_seed():
    """Catches an unpaired test, in which a spread that both arms share hides a difference."""
    random = np.random.default_rng(0)
    base = {str(s): dict.fromkeys(claims.MEASURES, float(random.normal(0, 5))) | {"losses": {}} for s in range(5)}
    more = lambda r, by: {m: v + by if m != "losses" else v for m, v in r.items()}  # noqa: E731
    arm = {s: more(r, 0.1 + 0.01 * int(s)) for s, r in base.items()} | {"9": base["0"]}
    found = claims.compared({"as it is": base, "an arm": arm, "one seed": {"0": base["0"]}})
    assert set(found) == {"an arm"} and found["an arm"]["n"] == 5
    mean, half, p = found["an arm"]["knn"]
    spread = np.std([0.1, 0.11, 0.12, 0.13, 0.14], ddof=1) / 5**0.5 * scipy.stats.t.ppf(0.975, 4)
    assert mean == pytest.approx(0.12) and half == pytest.approx(spread) and p < 0.001


def test_every_arm_is_flags_that_train_takes():
    """Catches an arm whose flag was renamed."""
    arms = [*claims.ARMS.values()]
    flags = [train.parse(claims.words_of(arm)[0]) for arm in arms]
    configs = [train.with_sizes(amoe.CONFIGS[f.model], f.sizes) for f in flags]
    assert len({(str(f), claims.words_of(arm)[1:]) for f, arm in zip(flags, arms, strict=True)}) == len(arms)
    assert [config.layers for config in configs] == [3 if arm.startswith("long") else 2 for arm in arms]
