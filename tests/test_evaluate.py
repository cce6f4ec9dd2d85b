"""Measures against brute force, and an oracle that gets everything right."""

import argparse
import contextlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import amoe
import evaluate
import train
from common import pictures
from common.sources import find_sources


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


def test_recall_accepts_any_of_a_query_s_own():
    """Catches a caption of several images for which one of them alone counts, and own images that count as rivals."""
    gallery = torch.eye(4)
    labels = torch.tensor([0, 1, 0, 2])
    query = torch.tensor([[0.1, 0.5, 0.9, 0.0], [0.3, 0.2, 0.3, 0.0]])
    assert evaluate.recall(query, gallery, torch.tensor([0, 1]), labels, at=(1, 2, 3)) == {1: 0.5, 2: 0.5, 3: 1.0}


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


def test_a_linear_probe_of_one_patch_says_its_class():
    """Catches a spread over no degree of freedom, whose NaN would make every class the first."""
    probe = evaluate.linear_probe(torch.tensor([[3.0, -1.0]]), torch.tensor([[0.0, 1.0, 0.0]]))
    assert torch.nn.functional.linear(torch.tensor([[3.0, -1.0], [5.0, 2.0]]), *probe).argmax(1).tolist() == [1, 1]


def test_cosines_leave_the_mean_out():
    """Catches raw cosines, which a shared mean makes look alike."""
    mean = torch.full((4,), 100.0)
    a = torch.eye(4)[:2]
    assert evaluate.cosine(a + mean, a + mean, mean) == pytest.approx(1)
    assert evaluate.cosine(a + mean, -a + mean, mean) == pytest.approx(-1)


def test_student_features_come_back_in_the_order_asked_for(cache, oracles):
    """Catches features in cache order, and patches left in standardised space."""
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


# ---- the published protocol, written here from its description, in the authors' order of operations ----


def clustered(n, seed, dim=6):
    """Features in which bfloat16 makes many cosines equal."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=random).round() + 0.01 * torch.randn(n, dim, generator=random)


def test_published_knn_is_the_authors():
    """Catches float32 votes, ties that count against the model, and sums that are not rounded one by one."""
    bank, query, random = clustered(300, 0), clustered(200, 1), torch.Generator().manual_seed(2)
    labels, truth = (torch.randint(7, (n,), generator=random) for n in (300, 200))
    keys, asked = (x.bfloat16() / x.bfloat16().norm(p=2, dim=-1, keepdim=True) for x in (bank, query))
    right = 0
    for q, t in zip(asked, truth, strict=True):
        near, index = torch.topk(torch.matmul(q[None], keys.T), k=20, dim=1)
        votes = torch.zeros(1, 7, dtype=torch.bfloat16)
        votes.scatter_add_(1, labels[index], torch.exp(near / 0.07))
        right += int(votes.argmax(dim=1)[0] == t)
    assert evaluate.knn(bank, labels, query, truth, published=True) == pytest.approx(right / 200, abs=0.006)
    assert evaluate.knn(torch.ones(5, 3), torch.arange(5), torch.ones(2, 3), torch.tensor([0, 4]), 5, 0.07, True) == 0.5


def test_published_zeroshot_is_the_authors():
    """Catches cosines in float32, in which no two classes are equal."""
    images, text, random = clustered(500, 3), clustered(40, 4), torch.Generator().manual_seed(5)
    truth = torch.randint(40, (500,), generator=random)
    x, y = (z.bfloat16() / z.bfloat16().norm(p=2, dim=-1, keepdim=True) for z in (images, text))
    want = float(((x @ y.T).argmax(dim=1) == truth).double().mean())
    assert evaluate.zeroshot(images, text, truth, published=True) == want
    assert evaluate.zeroshot(torch.ones(3, 4), torch.ones(5, 4), torch.tensor([0, 1, 4]), published=True) == 1 / 3


def test_published_recall_is_the_authors():
    """Catches captions of several images that count for all of them, and ties that count against the model."""
    images, random = clustered(120, 6), torch.Generator().manual_seed(7)
    image = torch.cat([torch.arange(120), torch.randint(120, (80,), generator=random)])
    text = images[image] + torch.randn(200, 6, generator=random)
    text[:10] = text[10:20]  # of one wording
    x, y = (z.bfloat16() / z.bfloat16().norm(p=2, dim=-1, keepdim=True) for z in (images, text))
    similarity, want = x @ y.T, {}
    of_image = {i: [k for k in range(200) if image[k] == i] for i in range(120)}
    top = similarity.topk(10, dim=1).indices.tolist()
    for k in (1, 5, 10):
        ranks = [1 + int((similarity[:, t] > similarity[image[t], t]).sum()) for t in range(200)]
        want[f"image_recall_at_{k}"] = pytest.approx(np.mean([rank <= k for rank in ranks]))
        want[f"text_recall_at_{k}"] = pytest.approx(np.mean([bool({*top[i][:k]} & {*of_image[i]}) for i in of_image]))
    ranked = {"ties": "win", "published": True}
    got = {f"image_recall_at_{k}": v for k, v in evaluate.recall(text, images, image, **ranked).items()}
    ranked["ties"] = "topk"
    found = evaluate.recall(images, text, torch.arange(120), image, **ranked)
    assert got | {f"text_recall_at_{k}": v for k, v in found.items()} == want
    own = torch.arange(120)
    want = evaluate.recall(images, text[:120], own, **ranked)  # a caption an image: what --protocol published asks
    both = evaluate.caption_recalls(images, text[:120], own, published=True)
    assert {k: both[f"text_recall_at_{k}"] for k in want} == want


def authors_size(height, width, most=256 * 256, least=128 * 128):
    h, w = round(height / 16) * 16, round(width / 16) * 16
    if h * w > most:
        beta = np.sqrt((height * width) / most)
        return math.floor(height / beta / 16), math.floor(width / beta / 16)
    if h * w < least:
        beta = np.sqrt(least / (height * width))
        return math.ceil(height * beta / 16), math.ceil(width * beta / 16)
    return h // 16, w // 16


def test_published_sizes_are_the_authors(tmp_path):
    """Catches the largest grid of the same aspect in the place of one whose sides are floored."""
    Image.new("RGB", (400, 300)).save(tmp_path / "a.png")
    images = evaluate.PublishedImages(find_sources(tmp_path), max_tokens=256)
    random = np.random.default_rng(0)
    for height, width in [
        (300, 400),
        (512, 512),
        (128, 128),
        (480, 640),
        *random.integers(40, 1500, (300, 2)).tolist(),
    ]:
        want = authors_size(height, width)
        assert images.sizes(height, width) == (max(1, want[0]), max(1, want[1])), (height, width)
    assert images.read([(0, 0)]).shapes.tolist() == [[13, 18]] and images.sizes(300, 400) == (13, 18)
    images.square = True
    assert images.read([(0, 0)]).shapes.tolist() == [[16, 16]]


@pytest.mark.parametrize("void", [0, 255])
def test_published_segmentation_is_the_authors(void):
    """Catches shares for pixels, a rate or decay of its own, void guesses that count, and classes that are left out."""
    random = torch.Generator().manual_seed(8)
    masks = torch.randint(4, (40, 4, 4), generator=random).repeat_interleave(16, 1).repeat_interleave(16, 2)
    table = torch.randn(4, 12, generator=random)
    patch = table[masks[:, ::16, ::16].reshape(40, 16)] + 0.7 * torch.randn(40, 16, 12, generator=random)
    masks = masks if void == 0 else torch.where(masks == 3, 255, masks)
    items = [(m, (4, 4), {"t": {"patch": x, "summary": None}}) for m, x in zip(masks, patch, strict=True)]
    classes = 4 if void == 0 else 3

    torch.manual_seed(0)
    head = torch.nn.Conv2d(12, classes, kernel_size=1).to(torch.bfloat16)
    orders = [torch.randperm(32, generator=random) for _ in range(10)]
    optimizer, want = torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=1e-3), []

    def logits_of(which):
        x = patch[which].view(-1, 4, 4, 12).permute(0, 3, 1, 2).contiguous().bfloat16()
        return F.interpolate(head(x), size=(64, 64), mode="bilinear", align_corners=False)

    for order in orders:
        for which in order.split(16):
            optimizer.zero_grad(set_to_none=True)
            torch.nn.CrossEntropyLoss(ignore_index=void)(logits_of(which), masks[which]).backward()
            optimizer.step()
        with torch.no_grad():
            guess, truth = logits_of(torch.arange(32, 40)).argmax(1), masks[32:]
        known = (truth != void) & (guess != void)
        ious = []
        for k in range(classes):
            both = int(((guess == k) & (truth == k) & known).sum())
            either = int((((guess == k) | (truth == k)) & known).sum())
            ious += [both / either] if either else []
        want.append(np.mean(ious))

    args = argparse.Namespace(head=None, lr=0.1, void=void)
    shuffled = iter(orders)
    train_set = lambda: iter([items[i] for i in next(shuffled)])  # noqa: E731
    for probes, expected in zip(evaluate.published_probes(args, train_set, classes), want, strict=True):
        (weight, bias) = probes["t"]
        pixels = sum(
            evaluate.confusion((weight, bias), f["t"]["patch"], shape, m, classes, void) for m, shape, f in items[32:]
        )
        assert evaluate.mean_iou(pixels, void) == pytest.approx(expected, abs=0.02)
    assert max(want) > 0.4


# ---- the command line, on folders ----

COLOURS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230)}
ORACLE = """
import torch
COLOURS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230)}
class Oracle:
    name, dim, registers = "oracle", 3, 0
    def __call__(self, batch):
        x = batch.rows.float().view(-1, 256, 3).mean(1) - 90
        return {"patch": x, "summary": torch.stack([x[batch.patch_rows(i)].mean(0) for i in range(batch.n_images)])}
    def encode_text(self, texts):
        return torch.tensor([next(c for name, c in COLOURS.items() if name in text) for text in texts]).float() - 90
def make(device):
    return Oracle()
"""


@pytest.fixture
def colours(tmp_path):
    """Images of a colour each in a folder a class, captioned; masks; and a teacher that sees colours."""
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for kind in ("classes", "scenes/images", "scenes/masks"):
            (tmp_path / kind / name).mkdir(parents=True)
        for i in range(16):
            height, width = random.integers(3, 7, 2) * 16
            pixels = np.clip(random.normal(colour, 12, (height, width, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "classes" / name / f"{i}.png")
            (tmp_path / "classes" / name / f"{i}.txt").write_text(f"all {name}")
            pixels[:, 32:] = 240
            Image.fromarray(pixels).save(tmp_path / "scenes" / "images" / name / f"{i}.png")
            mask = np.full((height, width), 255, np.uint8)
            mask[:, :24], mask[:, 40:] = 1 + list(COLOURS).index(name), 0  # void where bilinear logits cross over
            Image.fromarray(mask).save(tmp_path / "scenes" / "masks" / name / f"{i}.png")
    (tmp_path / "oracle.py").write_text(ORACLE)
    return tmp_path


def scores_of(out):
    return json.loads(Path(out).read_text())["scores"]


def test_an_oracle_gets_everything_right_on_folders(colours, tmp_path, monkeypatch):
    """Catches classes mixed up between folders, text in another order, masks of other images, and void that counts."""
    monkeypatch.chdir(tmp_path)
    model, out = ["--model", f"oracle={colours}/oracle.py:make"], ["--out", "r.json"]
    for words, figures in (
        (["knn", "--train", "classes"], ["knn"]),
        (["knn", "--train", "classes", "--test", "classes", "--k", "3"], ["knn"]),
        (["zeroshot", "--images", "classes"], ["zeroshot"]),
        (["retrieval", "--images", "classes"], ["text_recall_at_1", "image_recall_at_1"]),
        (["segment", "--train", "scenes", "--test", "scenes"], ["miou", "pixel_accuracy"]),
    ):
        evaluate.main([*words, *model, *out])
        [score] = scores_of("r.json")
        assert score["head"] == "oracle" and all(score[figure] > 0.99 for figure in figures), (words, score)
        if (
            words[0] != "retrieval"
        ):  # there, sixteen images share a caption, and as published one of them alone is right
            more = ["--lr", "0.1"] if words[0] == "segment" else []
            evaluate.main([*words, *model, *out, "--protocol", "published", *more])
            [score] = scores_of("r.json")
            assert all(score[figure] > 0.9 for figure in figures), (words, score)
    for kind in ("images", "masks"):  # nothing blue to learn from: its pixels are wrong, not left out
        shutil.copytree(f"scenes/{kind}", f"fewer/{kind}", ignore=shutil.ignore_patterns("blue"))
    evaluate.main(["segment", "--train", "fewer", "--test", "scenes", *model, *out])
    [score] = scores_of("r.json")
    assert score["iou_by_class"]["3"] == 0 and score["miou"] < 0.75 and 0.5 < score["pixel_accuracy"] < 0.9
    evaluate.main(["pca", "--images", "classes", "--count", "3", *model, *out])
    assert Image.open(scores_of("r.json")[0]["sheet"]).width > 200
    Path("r.png").unlink()
    Path("r.png").mkdir()
    with pytest.raises(ValueError, match=r"cannot write r\.png"):
        evaluate.main(["pca", "--images", "classes", "--count", "3", *model, *out])


def test_a_mask_that_lies_across_its_image_is_refused(colours, tmp_path, monkeypatch):
    """Catches the mask of an image that EXIF turns, stretched over it: scores of other pixels, in silence."""
    monkeypatch.chdir(tmp_path)
    turned, name = Image.Exif(), "red/0"
    turned[0x0112] = 6
    Image.new("RGB", (96, 64)).save(f"scenes/images/{name}.png", exif=turned)
    words = ["segment", "--train", "scenes", "--test", "scenes", "--model", f"oracle={colours}/oracle.py:make"]
    for size, right in (((48, 32), False), ((40, 40), True), ((32, 48), True)):
        Image.new("L", size).save(f"scenes/masks/{name}.png")
        for protocol in ("strict", "published"):
            with contextlib.nullcontext() if right else pytest.raises(ValueError, match=r"red/0\.png: it lies across"):
                evaluate.main([*words, "--out", "r.json", "--max-tokens", "4", "--protocol", protocol])


def test_a_student_is_measured_head_by_head_at_every_budget(cache, colours, tmp_path, monkeypatch, capsys):
    """Catches a budget that changes nothing, an ensemble that is one of its parts, and a head that is not its own."""
    monkeypatch.chdir(tmp_path)
    flags = train.parse(["--cache", str(cache.path)])
    amoe.save(train.build(flags, cache.spaces, torch.device("cpu")), "student")
    words = ["--model", "student", "--out", "r.json", "--max-tokens", "4", "16"]
    evaluate.main(["knn", "--train", "classes", *words, "--head", "dense", "amoe", "text+dense"])
    found = scores_of("r.json")
    assert [(s["max_tokens"], s["head"]) for s in found] == [
        (b, h) for b in (4, 16) for h in ("dense", "amoe", "text+dense")
    ]
    both = ["--model", "student", "toy", f"oracle={colours}/oracle.py:make", "--out", "r.json"]
    evaluate.main(["knn", "--train", "classes", *both])
    assert [(s["model"], s["head"]) for s in scores_of("r.json")] == [
        *(("student", head) for head in ("text", "dense", "amoe")),
        ("toy", "amoe"),
        (both[3], "oracle"),
    ]
    evaluate.main(["segment", "--train", "scenes", "--test", "scenes", *both])
    table = capsys.readouterr().out
    assert "IoU by class, toy, head amoe, 256 tokens: 0: " in table and "model" in table.split("written")[1]
    perfect = scores_of("r.json")[-1]
    assert perfect["model"] == both[3] and min(perfect["iou_by_class"].values()) > 0.99
    evaluate.main(["pca", "--images", "classes", "--count", "2", *both[:-1], "r.png"])  # and not written over by JSON
    assert Image.open(scores_of("r.json")[0]["sheet"]).width > 6 * 100
    shutil.copytree("student", "b/student")  # of one name: both are on the sheet
    evaluate.main(["pca", "--images", "classes", "--count", "2", "--model", "student", "b/student", "--out", "r.png"])
    assert Image.open("r.png").width > 7 * 144
    evaluate.main(["speed", *words, "--tokens", "256"])
    slow, fast = scores_of("r.json")
    assert slow["pixels"] == 32 and fast["pixels"] == 64 and slow["images_per_s"] > fast["images_per_s"]
    text = ["--text", f"text={colours}/oracle.py:make"]
    with pytest.raises(ValueError, match=r"--head siglip: student has the heads text, dense, amoe"):
        evaluate.main(["knn", "--train", "classes", *words, "--head", "siglip"])
    with pytest.raises(ValueError, match="give --text"):
        evaluate.main(["zeroshot", "--images", "classes", *words])
    with pytest.raises(ValueError, match="3 channels"):
        evaluate.main(["zeroshot", "--images", "classes", *words, *text])
    Path("classes/red/bad.png").write_bytes(b"no image")
    evaluate.main(["knn", "--train", "classes/red", "classes/blue", "--test", "classes/red", "classes/green", *both])
    assert capsys.readouterr().err.count("bad.png") == 2  # once in each folder it is read from


def test_ensembles_average_cosines():
    """Catches raw concatenation, in which the head of the larger norm decides."""
    torch.manual_seed(0)
    a, b = torch.randn(5, 4) * 100, torch.randn(5, 6)
    got = evaluate.of_head({"a": {"summary": a, "patch": a}, "b": {"summary": b, "patch": b}}, "a+b")["summary"]
    cosine = lambda x: F.normalize(x, dim=1) @ F.normalize(x, dim=1).T  # noqa: E731
    assert torch.allclose(cosine(got), (cosine(a) + cosine(b)) / 2, atol=1e-6)


def test_wrong_flags_get_one_line(tmp_path):
    """Catches tracebacks."""
    (tmp_path / "empty").mkdir()
    for words, named in (
        (["knn", "--model", "none.safetensors", "--train", "x"], "none.safetensors"),
        (["retrieval", "--model", "t=none.py:make", "--images", "x"], "none.py"),
        (["speed"], "--model"),
    ):
        run = [sys.executable, "evaluate.py", *words]
        done = subprocess.run(run, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert done.returncode and named in done.stderr and "Traceback" not in done.stderr, done.stderr


NOT_FINITE = [math.nan, math.inf]


@pytest.mark.parametrize("value", NOT_FINITE)
def test_every_measure_refuses_features_that_are_not_finite(value):
    """Catches recall 1.0 of features that are NaN (`score >= NaN` is never true), and averages that become NaN."""
    torch.manual_seed(0)
    x, bad, labels = torch.randn(8, 4), torch.randn(8, 4), torch.arange(8) % 2
    bad[3, 1] = value
    share = F.one_hot(labels).float()
    probe = torch.zeros(2, 4), torch.zeros(2)
    for measure in (
        lambda: evaluate.recall(bad, x, torch.arange(8)),
        lambda: evaluate.recall(x, bad, torch.arange(8)),
        lambda: evaluate.knn(bad, labels, x, labels),
        lambda: evaluate.knn(x, labels, bad, labels),
        lambda: evaluate.zeroshot(bad, x[:2], labels),
        lambda: evaluate.zeroshot(x, bad[2:4], labels),
        lambda: evaluate.linear_probe(bad, share),
        lambda: evaluate.confusion(probe, bad, (2, 4), torch.zeros(4, 8, dtype=torch.long), 2),
        lambda: evaluate.cosine(bad, x, x.mean(0)),
        lambda: evaluate.cosine(x, bad, x.mean(0)),
        lambda: pictures.pca_basis(bad),
    ):
        with pytest.raises(ValueError, match="not finite"):
            measure()


@pytest.mark.parametrize(("patches", "channels"), [(1, 5), (2, 5), (20, 1), (20, 2)])
def test_fewer_than_three_principal_components_are_a_picture_too(patches, channels):
    """Catches colours for three components where there are fewer: two channels, an image of two patches."""
    x = torch.rand(patches, channels, generator=torch.Generator().manual_seed(0))
    colours = pictures.pca_map(x, (patches, 1), pictures.pca_basis(x))
    assert colours.shape == (patches, 1, 3) and not colours[..., min(patches, channels) :].any()
    assert patches == 1 or np.ptp(colours[..., 0]) == 255


@pytest.mark.parametrize("kind", ["summary", "patch"])
def test_a_model_that_answers_nan_is_named_with_the_image(cache, kind):
    """Catches features that are refused without a word of whose they are."""
    entries = [(0, i) for i in range(6)]
    wrong = int(cache.shard(0).ids[4])

    def model(batch):
        features = {"head": {"summary": torch.ones(batch.n_images, 3), "patch": torch.ones(batch.n_tokens, 3)}}
        for i in torch.where(batch.ids == wrong)[0].tolist():
            features["head"][kind][i if kind == "summary" else batch.patch_rows(i)] = math.nan
        return features

    model.name = "my model"
    with pytest.raises(ValueError, match=f"my model, head 'head'.*{cache.meta((0, 4))['source']}"):
        evaluate.gather(evaluate.stream(model, cache, entries))


def test_a_vote_at_a_low_temperature_is_that_of_the_nearest():
    """Catches exp(1 / temperature) beyond float32: infinite votes tie, and a tie is a loss."""
    torch.manual_seed(0)
    bank, labels = torch.randn(30, 6), torch.arange(30) % 3
    assert evaluate.knn(bank, labels, bank, labels, k=5, temperature=1e-4) == 1.0
