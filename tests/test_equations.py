"""The five equations (E1) to (E5), written as loops and compared with the code. Read this test first.

A loop visits images, patches, channels and pairs one by one, in float64. Its numbers are elements of tensors, so that
the loop has a gradient too. Every docstring names one-line mistakes that the test catches; each was tried.
"""

import pytest
import torch
import torch.nn.functional as F

import amoe
import train
from common.process import Process

SHAPES = [(1, 2), (3, 2), (1, 1)]  # patches (h, w) of three images: unequal, so that a wrong weight shows
SPACES = [
    amoe.Space("text", 8, summary_variance=0.5),
    amoe.Space("dense", 4, registers=2, summary_variance=3.0, register_variance=(2.0, 5.0)),
]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- (E1) PHI-S: y = H U^T (x - mu) / sigma ----


def test_e1_phi_s():
    """Catches: no Hadamard matrix (y = U^T (x - mu) / sigma, whose variances differ); sigma the mean of the square
    roots; whitening, a division by each eigenvalue's own root; a covariance over N - 1."""
    N, C = 30, 8
    scale = [4.0, 3.0, 1.0, 1.0, 0.5, 0.3, 0.2, 0.1]
    x = [[scale[c] * v + 2 * c + 0.3 * row[0] for c, v in enumerate(row)] for row in random(N, C).tolist()]

    mu = [sum(x[n][c] for n in range(N)) / N for c in range(C)]
    centred = [[x[n][c] - mu[c] for c in range(C)] for n in range(N)]
    covariance = [[sum(row[a] * row[b] for row in centred) / N for b in range(C)] for a in range(C)]
    l, U = (t.tolist() for t in torch.linalg.eigh(torch.tensor(covariance, dtype=torch.float64)))
    for k in range(C):  # either sign is an eigenvector: the code wants its largest entry positive
        largest = max((U[c][k] for c in range(C)), key=abs)
        for c in range(C):
            U[c][k] *= 1 if largest > 0 else -1
    sigma = (sum(l) / C) ** 0.5
    H = [[(-1) ** (a & b).bit_count() / C**0.5 for b in range(C)] for a in range(C)]  # Sylvester's, normalised

    phi_s = amoe.PhiS.fit(torch.tensor(x, dtype=torch.float64))
    got = phi_s.apply(torch.tensor(x, dtype=torch.float64))
    for n in range(N):
        turned = [sum(U[c][k] * centred[n][c] for c in range(C)) for k in range(C)]
        y = [sum(H[a][k] * turned[k] for k in range(C)) / sigma for a in range(C)]
        assert got[n].tolist() == pytest.approx(y, abs=1e-9)
        back = [mu[c] + sigma * sum(U[c][k] * H[a][k] * y[a] for a in range(C) for k in range(C)) for c in range(C)]
        assert back == pytest.approx(x[n], abs=1e-9)
        assert phi_s.invert(got[n]).tolist() == pytest.approx(x[n], abs=1e-9)
    for c in range(C):  # what it is for: every channel has mean 0 and variance 1
        assert sum(got[:, c].tolist()) / N == pytest.approx(0, abs=1e-9)
        assert sum(v * v for v in got[:, c].tolist()) / N == pytest.approx(1, abs=1e-9)


# ---- (E2) the loss of one image ----


def e(prediction_C, target_C, v=1.0):
    """The mean over channels of (prediction - target)^2, divided by v."""
    C = len(target_C)
    return sum((prediction_C[c] - target_C[c]) ** 2 for c in range(C)) / C / v


def image_loss(predicted, target, space):
    """L(q) of one image and teacher: "patch" [N, C], "summary" [C], "registers" [R, C] of prediction and target."""
    N, R = len(target["patch"]), space.registers
    loss = e(predicted["summary"], target["summary"], space.summary_variance)
    loss = loss + sum(e(predicted["patch"][n], target["patch"][n]) for n in range(N)) / N
    for r in range(R):
        loss = loss + e(predicted["registers"][r], target["registers"][r], space.register_variance[r]) / R
    return loss


def random_features(space, tokens, images, seed):
    """Features of a pack, "patch" [T, C], "summary" [M, C], "registers" [M, R, C], float64."""
    made = {"patch": random(tokens, space.dim, seed=seed), "summary": random(images, space.dim, seed=seed + 1)}
    if space.registers:
        made["registers"] = random(images, space.registers, space.dim, seed=seed + 2)
    return made


def of_image(features, batch, i):
    """Image i's part of a pack's features."""
    return {kind: x[batch.patch_rows(i)] if kind == "patch" else x[i] for kind, x in features.items()}


def test_e2_loss_of_one_image():
    """Catches: a sum over channels (1152 of them then outweigh 1024); a sum over patches or registers; no v, or one v
    for all registers; CLS, registers or padding counted as patches."""
    batch = amoe.pack([torch.zeros(6, 768, dtype=torch.uint8)], [(3, 2)], n_tokens=18)  # 5, 6 patches, 7 of padding
    predicted = {space.name: random_features(space, 18, 1, seed=1) for space in SPACES}
    batch.targets = {space.name: random_features(space, 18, 1, seed=5) for space in SPACES}
    got = amoe.distillation_loss(predicted, batch, SPACES)
    for space in SPACES:
        target = of_image(batch.targets[space.name], batch, 0)
        want = image_loss(of_image(predicted[space.name], batch, 0), target, space)
        assert float(sum(got[space.name].values())) == pytest.approx(float(want), rel=1e-6)


@torch.no_grad()
def test_e2_pooled_summary():
    """A teacher that pools by attention (SigLIP 2): PHI-S is undone on the tokens before its frozen head pools them.

    Catches: tokens pooled as they are, standardised; softmax over the whole pack; padding pooled with the rest."""
    C, heads = 4, 2
    pool = amoe.MapPool(C, 6, heads, eps=1e-6).double()
    for n, (name, p) in enumerate(pool.named_parameters()):
        p.data = random(*p.shape, seed=n) + (1 if name == "layernorm.weight" else 0)
    phi_s = amoe.PhiS.fit(3 * random(50, C, seed=20) + 5)
    head = amoe.Head(6, amoe.Space("a", C, phi_s=phi_s, pool=pool.state_dict(), pool_heads=heads)).double()
    head.pool.double()
    head.phi_s = phi_s
    batch = amoe.pack([torch.zeros(h * w, 768, dtype=torch.uint8) for h, w in SHAPES], SHAPES, n_tokens=26)
    h_TD = random(26, 6, seed=21)
    got = head(h_TD, batch)["summary"]

    a, d = pool.attention, C // heads
    for i in range(batch.n_images):
        tokens = range(int(batch.starts[i]), int(batch.starts[i + 1]))  # CLS, registers and patches
        x = [phi_s.invert(head.fc2(F.gelu(head.norm(head.fc1(h_TD[t]))))) for t in tokens]
        query, *_ = (a.in_proj_weight @ pool.probe[0, 0] + a.in_proj_bias).chunk(3)
        pooled = []
        for k in range(heads):
            part = slice(k * d, (k + 1) * d)
            keys, values = ([(a.in_proj_weight @ v + a.in_proj_bias).chunk(3)[j][part] for v in x] for j in (1, 2))
            weights = [sum(query[part] * key) / d**0.5 for key in keys]
            weights = torch.stack(weights).exp()
            pooled += [sum(w * v[c] for w, v in zip(weights, values, strict=True)) / sum(weights) for c in range(d)]
        out = a.out_proj(torch.stack(pooled))
        want = out + pool.mlp.fc2(F.gelu(pool.mlp.fc1(pool.layernorm(out)), approximate="tanh"))
        assert got[i].tolist() == pytest.approx(want.tolist(), rel=1e-5, abs=1e-5)


# ---- (E3) token balance: L = 1/B sum_q L(q), however the images are packed ----


def small_student():
    torch.manual_seed(0)
    config = amoe.Config(layers=1, dim=16, heads=2, head_dim=8, experts=3, top_k=2, expert_hidden=8)
    model = amoe.AMoE(config, SPACES)
    for p in model.parameters():  # away from its initial zeros, so that every gradient is alive
        torch.nn.init.normal_(p, std=0.3)
    return model.double()


def images_with_targets():
    """Three images, each a pack of its own with targets of both teachers."""
    images = []
    for i, (h, w) in enumerate(SHAPES):
        batch = amoe.pack([random(h * w, 768, seed=30 + i)], [(h, w)])
        batch.targets = {space.name: random_features(space, batch.n_tokens, 1, seed=40 + 3 * i) for space in SPACES}
        images.append(batch)
    return images


def in_one_pack(images):
    """The same images as one pack, with 7 tokens of padding."""
    T = sum(image.n_tokens for image in images) + 7
    batch = amoe.pack([image.rows[5:] for image in images], [tuple(image.shapes[0].tolist()) for image in images], T)
    for space in SPACES:
        targets = [image.targets[space.name] for image in images]
        batch.targets[space.name] = {kind: torch.cat([t[kind] for t in targets]) for kind in targets[0]}
        batch.targets[space.name]["patch"] = F.pad(batch.targets[space.name]["patch"], (0, 0, 0, 7), value=9.0)
    return batch


def gradient_of(model):
    out = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return out


def assert_code_agrees(loss, images, packings, arkd):
    """`loss(model)` in loops, and its gradient, against train.gradients over each of the packings of the images."""
    model = small_student()
    want = loss(model)
    want.backward()
    want_gradient = gradient_of(model)
    assert want_gradient.abs().max() > 0.1
    flags, process = train.parse(["--arkd", str(arkd)]), Process(0, 1, torch.device("cpu"))
    for packing in packings:
        packs = [(in_one_pack([images[i] for i in part]), None) for part in packing]
        measured, _ = train.gradients(model, packs, SPACES, flags, process)
        assert float(measured["loss"]) == pytest.approx(want.item(), rel=1e-5)
        assert (gradient_of(model) - want_gradient).abs().max() < 1e-5 * want_gradient.abs().max()


def test_e3_token_balance():
    """Catches: a mean over all patches of a pack, where the image of 6 patches weighs six times that of 1; a mean over
    packs, where an image alone weighs as much as two together; a sum in the place of the mean over B."""
    images = images_with_targets()

    def loss(model):
        total = 0
        for image in images:
            predicted, _ = model(image)
            for space in SPACES:
                target = of_image(image.targets[space.name], image, 0)
                total = total + image_loss(of_image(predicted[space.name], image, 0), target, space)
        return total / len(images)

    assert_code_agrees(loss, images, [[[0, 1, 2]], [[2], [1, 0]]], arkd=0)


# ---- (E4) asymmetric relational distillation ----


def distances(z):
    """{(i, j): ||z_i - z_j|| over its mean}, i != j."""
    B, C = len(z), len(z[0])
    pairs = [(i, j) for i in range(B) for j in range(B) if i != j]
    D = {(i, j): sum((z[i][c] - z[j][c]) ** 2 for c in range(C)) ** 0.5 for i, j in pairs}
    mean = sum(D.values()) / len(pairs)
    return {pair: d / mean for pair, d in D.items()}


def arkd(student, teacher, mode="arkd"):
    h = lambda x: x**2 / 2 if abs(x) < 1 else abs(x) - 0.5  # noqa: E731 (smooth L1 of beta 1)
    S, T = distances(student), distances(teacher)
    median = sorted(T.values())[(len(T) - 1) // 2]  # the lower one
    total = 0
    for pair in T:
        if mode == "rkd":
            total = total + h(S[pair] - T[pair])
        elif T[pair] < median:  # close for the teacher: further apart for the student is what costs
            total = total + h(max(S[pair] - T[pair], 0))
        else:  # far for the teacher: closer for the student is what costs
            total = total + h(max(T[pair] - S[pair], 0))
    return total / len(T)


@pytest.mark.parametrize("mode", ["arkd", "rkd"])
def test_e4_arkd(mode):
    """Catches: exchanged gates; the upper median; distances not divided by their mean, or by a mean without gradient;
    the diagonal counted among the pairs; a squared error in the place of the smooth L1."""
    student, teacher = random(5, 3, seed=50), random(5, 4, seed=51)
    student[0] *= 8  # an outlier for each, so that some differences pass beta = 1
    teacher[1] *= 8
    student.requires_grad_()
    want, got = arkd(student, teacher, mode), amoe.arkd_loss(student, teacher, mode)
    assert got.item() == pytest.approx(want.item(), rel=1e-9)
    by_loops, by_code = (torch.autograd.grad(loss, student)[0] for loss in (want, got))
    assert by_code.flatten().tolist() == pytest.approx(by_loops.flatten().tolist(), abs=1e-9)


# ---- (E5) the total: sum over teachers of L + w ARKD ----


def test_e5_total():
    """Catches: relations among the images of each pack alone; w left out or squared; a term that is logged and has no
    gradient; ARKD divided by the number of teachers or of packs."""
    images, w = images_with_targets(), 0.7

    def loss(model):
        total, predicted = 0, [model(image)[0] for image in images]
        for space in SPACES:
            t = space.name
            for image, out in zip(images, predicted, strict=True):
                target = of_image(image.targets[t], image, 0)
                total = total + image_loss(of_image(out[t], image, 0), target, space) / len(images)
            teacher = torch.cat([image.targets[t]["summary"] for image in images])
            total = total + w * arkd(torch.cat([out[t]["summary"] for out in predicted]), teacher)
        return total

    assert_code_agrees(loss, images, [[[0, 1, 2]], [[2], [1, 0]], [[1], [0], [2]]], arkd=w)
