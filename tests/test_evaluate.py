"""Measures against brute force, and an oracle that gets everything right."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate


def test_knn_votes_by_weighted_cosine():
    """Catches unweighted votes, distances for similarities, and k larger than the bank."""
    torch.manual_seed(0)
    bank, query = torch.randn(40, 6), torch.randn(15, 6)
    labels, truth = torch.randint(4, (40,)), torch.randint(4, (15,))
    right = 0
    for q, t in zip(query, truth, strict=True):
        cosine = [float(q @ b / (q.norm() * b.norm())) for b in bank]
        votes = [0.0] * 4
        for i in sorted(range(40), key=lambda i: -cosine[i])[:7]:
            votes[labels[i]] += math.exp(cosine[i] / 0.07)
        right += max(range(4), key=lambda c: votes[c]) == t
    assert evaluate.knn(bank, labels, query, truth, k=7) == pytest.approx(right / 15)
    assert evaluate.knn(bank, labels, bank, labels, k=1) == 1
    assert 0 <= evaluate.knn(bank, labels, query, truth, k=100) <= 1


def test_ties_count_against_the_model():
    """Catches argmax, which gives the first of equals the benefit of the doubt."""
    same = torch.ones(3, 4)
    assert evaluate.zeroshot(same, torch.ones(5, 4), torch.tensor([0, 1, 4])) == 0
    assert evaluate.recall(same, torch.ones(5, 4), torch.tensor([0, 1, 4]), at=(1, 4, 5)) == {1: 0.0, 4: 0.0, 5: 1.0}


def test_recall_ranks_the_truth():
    """Catches ranks that begin at one."""
    torch.manual_seed(0)
    gallery, truth = torch.randn(30, 5), torch.randint(30, (20,))
    query = gallery[truth] + 0.8 * torch.randn(20, 5)
    score = F.normalize(query, dim=1) @ F.normalize(gallery, dim=1).T
    got = evaluate.recall(query, gallery, truth, at=(1, 3))
    for k in (1, 3):
        want = np.mean([int(t) in s.topk(k).indices.tolist() for s, t in zip(score, truth, strict=True)])
        assert got[k] == pytest.approx(want)
    assert evaluate.recall(gallery, gallery, torch.arange(30), at=(1,))[1] == 1


def test_patch_labels_are_shares_of_area():
    """Catches h and w exchanged, void that counts, and majority labels."""
    mask = torch.zeros(8, 12, dtype=torch.uint8)
    mask[:4, :4] = 2
    mask[4:, 8:] = evaluate.VOID
    mask[0, 4] = 1
    share = evaluate.patch_labels(mask, 2, 3, 3)
    assert share.shape == (6, 3) and share[0].tolist() == [0, 0, 1] and share[5].tolist() == [0, 0, 0]
    assert share[1].tolist() == pytest.approx([15 / 16, 1 / 16, 0])
    uneven = evaluate.patch_labels(torch.ones(7, 10, dtype=torch.uint8), 2, 3, 3)
    assert torch.equal(uneven, torch.tensor([[0.0, 1.0, 0.0]]).expand(6, 3))


def test_a_linear_probe_finds_a_linear_rule_and_an_oracle_is_perfect():
    """Catches a probe applied to unstandardised features, and unions counted over images one by one."""
    torch.manual_seed(0)
    masks = [torch.randint(3, (4, 6)).repeat_interleave(16, 0).repeat_interleave(16, 1) for _ in range(12)]
    patches = [
        evaluate.patch_labels(m, 4, 6, 3) @ torch.randn(3, 8, generator=torch.Generator().manual_seed(1)) * 9 + 4
        for m in masks
    ]
    share = torch.cat([evaluate.patch_labels(m, 4, 6, 3) for m in masks])
    probe = evaluate.linear_probe(torch.cat(patches), share)
    assert (F.linear(torch.cat(patches), *probe).argmax(1) == share.argmax(1)).all()
    small = [m[8::16, 8::16] for m in masks]  # at the patches' own resolution nothing is interpolated

    def miou(masks):
        return evaluate.mean_iou(
            sum(evaluate.confusion(probe, x, (4, 6), m, 3) for x, m in zip(patches, masks, strict=True))
        )

    assert miou(small) == 1
    wrong = [torch.where(m == 0, 1, m) for m in small]
    want = []
    guess, truth = torch.cat([m.flatten() for m in small]), torch.cat([m.flatten() for m in wrong])
    for c in (1, 2):
        want.append(float(((guess == c) & (truth == c)).sum() / ((guess == c) | (truth == c)).sum()))
    assert miou(wrong) == pytest.approx(np.mean(want))
    void = [torch.where(m == 0, evaluate.VOID, m) for m in small]
    assert miou(void) == 1


def test_cosines_leave_the_mean_out():
    """Catches raw cosines, which a shared mean makes look alike."""
    mean = torch.full((4,), 100.0)
    a = torch.eye(4)[:2]
    assert evaluate.cosine(a + mean, a + mean, mean) == pytest.approx(1)
    assert evaluate.cosine(a + mean, -a + mean, mean) == pytest.approx(-1)


def test_student_features_come_back_in_the_order_asked_for(cache, oracles):
    """Catches features in cache order, and patches left in balanced space."""
    import train

    flags = train.parse(["--cache", str(cache.path)])
    model = train.build(flags, cache.spaces, torch.device("cpu"))
    entries = [(2, 5), (0, 1), (3, 19), (1, 0)]
    got = evaluate.gather(evaluate.stream(evaluate.of_student(model), cache, entries, n_tokens=100))
    images = [cache.read([e]).images()[0] for e in entries]
    for i, answer in enumerate(model.encode(images)):
        assert torch.allclose(got["dense"]["patch"][i], answer["patch"]["dense"], atol=1e-4)
        assert torch.allclose(got["text"]["summary"][i], answer["summary"]["text"], atol=1e-4)
    teacher = evaluate.gather(evaluate.stream(evaluate.of_targets(cache.spaces), cache, entries, stored=True))
    batch = cache.read(entries)
    said = oracles[1](batch)
    error = teacher["dense"]["patch"][2] - said["patch"][batch.patch_rows(2)]
    assert error.abs().max() < 0.2 * said["patch"].std()
    assert torch.allclose(teacher["dense"]["summary"], said["summary"], atol=1e-4)
    assert cache.text("text", entries).shape == (4, 64)
