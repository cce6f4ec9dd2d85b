"""How good a student is: kNN, zero-shot, retrieval, linear segmentation and PCA maps on frozen features.

Every measure takes plain tensors, so student and teachers are measured by the same code. Where published protocols are
lenient this one is not: ties count against the model, no patch is dropped, void pixels count for nobody, and no epoch
is chosen on the test set.

Shape letters: N images or rows, Q queries, K classes or texts, C channels, h x w patches, H x W pixels.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import toy
from amoe import dequantise
from data import as_tensor, cut, held_out

VOID = 255  # mask value of pixels that belong to no class


# ---- features, of the cache's teachers and of a student ----


def split(cache):
    """(trained on, held out): images as [(shard number, index)], in cache order."""
    parts = ([], [])
    for shard in cache.shards:
        for i, out in enumerate(held_out(shard.ids)):
            parts[int(out)].append((shard.number, i))
    return parts


@torch.inference_mode()
def student_features(model, cache, entries, n_tokens=4096):
    """{head: {"summary": [N, C], "patch": list of [n, C]}}, float32 on the CPU, own spaces; "amoe" is the trunk."""
    device = model.cls_token.device
    out = {name: {"summary": [], "patch": []} for name in (*model.heads, "amoe")}
    registers = model.config.registers
    lengths = [1 + registers + int(cache.shard(number).shapes[i].prod()) for number, i in entries]
    for part in cut(lengths, n_tokens):
        batch = cache.read(entries[part], targets=False, registers=registers).to(device)
        features, _ = model(batch)
        for name, feature in features.items():
            patch = model.heads[name].own(feature["patch"].float()) if name in model.heads else feature["patch"].float()
            patch = patch.cpu()
            out[name]["patch"] += [patch[batch.patch_rows(i)] for i in range(batch.n_images)]
            out[name]["summary"].append(feature["summary"].float().cpu())
    return {name: {"summary": torch.cat(f["summary"]), "patch": f["patch"]} for name, f in out.items()}


def teacher_features(cache, entries):
    """The same of the cached teachers, with "text", the captions' embeddings [N, C], where a teacher embeds text."""
    shards = [cache.shard(number) for number in sorted({number for number, _ in entries})]
    out = {}
    for space in cache.spaces:
        summary, text, patch = {}, {}, {}
        for shard in shards:
            summary[shard.number] = torch.from_numpy(shard.all(f"summary.{space.name}"))
            if f"text.{space.name}/zarr.json" in shard.record["files"]:
                text[shard.number] = torch.from_numpy(shard.all(f"text.{space.name}"))
            stored = as_tensor(shard.all(f"patch.{space.name}"))
            for i in (i for number, i in entries if number == shard.number):
                rows = stored[int(shard.starts[i]) : int(shard.starts[i + 1])]
                patch[shard.number, i] = space.phi_s.invert(dequantise(rows))
        out[space.name] = {
            "summary": torch.stack([summary[number][i] for number, i in entries]),
            "patch": [patch[entry] for entry in entries],
        }
        if text:
            out[space.name]["text"] = torch.stack([text[number][i] for number, i in entries])
    return out


# ---- measures ----


def knn(bank_NC, labels_N, query_QC, truth_Q, k=20, temperature=0.07):
    """Share of queries whose class wins the vote of the k nearest by cosine s, weighted by exp(s / temperature)."""
    similarity, nearest = (F.normalize(query_QC, dim=1) @ F.normalize(bank_NC, dim=1).T).topk(
        min(k, len(bank_NC)), dim=1
    )
    votes = torch.zeros(len(query_QC), int(max(labels_N.max(), truth_Q.max())) + 1)
    votes.scatter_add_(1, labels_N[nearest], (similarity / temperature).exp())
    return wins(votes, truth_Q)


def zeroshot(image_NC, text_KC, truth_N):
    """Share of images nearest, by cosine, to the text of their class."""
    return wins(F.normalize(image_NC, dim=1) @ F.normalize(text_KC, dim=1).T, truth_N)


def wins(score_NK, truth_N):
    """Share of rows whose true column beats every other; a tie is a loss."""
    true = score_NK.gather(1, truth_N[:, None])
    others = score_NK.scatter(1, truth_N[:, None], -torch.inf).amax(1, keepdim=True)
    return float((true > others).double().mean())


def recall(query_QC, gallery_NC, truth_Q, at=(1, 5, 10)):
    """{k: share of queries whose truth is among the k nearest of the gallery by cosine}; ties rank before the truth."""
    score_QN = F.normalize(query_QC, dim=1) @ F.normalize(gallery_NC, dim=1).T
    true = score_QN.gather(1, truth_Q[:, None])
    rank_Q = (score_QN >= true).sum(1) - 1  # the truth itself is the one taken off
    return {k: float((rank_Q < k).double().mean()) for k in at}


def patch_labels(mask_HW, h, w, classes):
    """Share of each class in every patch, [h * w, classes] float32, a pixel counted where its centre lies.

    Void pixels count for no class.
    """
    H, W = mask_HW.shape
    patch_HW = ((2 * torch.arange(H) + 1) * h // (2 * H))[:, None] * w + (2 * torch.arange(W) + 1) * w // (2 * W)
    label_HW = mask_HW.long()
    known = label_HW < classes
    count = torch.bincount(patch_HW[known] * classes + label_HW[known], minlength=h * w * classes).view(h * w, classes)
    return count / torch.bincount(patch_HW.flatten(), minlength=h * w).clamp(min=1)[:, None]


def linear_probe(x_NC, share_NK, iterations=40, decay=1e-4):
    """Softmax regression of patch features onto class shares: (weight [K, C], bias [K]) for the features as they are.

    Full-batch L-BFGS from zero on standardised features: nothing to tune, nothing to draw.
    """
    mean, std = x_NC.mean(0), x_NC.std(0).clamp(min=1e-6)
    x = (x_NC - mean) / std
    weight = torch.zeros(share_NK.shape[1], x.shape[1], requires_grad=True)
    bias = torch.zeros(share_NK.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -(share_NK * F.linear(x, weight, bias).log_softmax(1)).sum(1).mean() + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = weight.detach() / std
    return weight, bias.detach() - weight @ mean


def mean_iou(probe, patches, shapes, masks, classes):
    """Mean intersection over union of the classes that occur, logits upsampled bilinearly to each mask.

    patches: [n, C] an image; shapes: (h, w); masks: [H, W] integers, VOID counts for nobody.
    """
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for x, (h, w), mask in zip(patches, shapes, masks, strict=True):
        logits = F.linear(x, *probe).T.reshape(1, classes, h, w)
        guess = F.interpolate(logits, mask.shape, mode="bilinear", align_corners=False)[0].argmax(0)
        known = mask != VOID
        pair = mask[known].long() * classes + guess[known]
        confusion += torch.bincount(pair, minlength=classes**2).view(classes, classes)
    union = confusion.sum(0) + confusion.sum(1) - confusion.diag()
    seen = confusion.sum(1) > 0
    return float((confusion.diag()[seen] / union[seen]).double().mean())


def cosine(a, b, mean):
    """Mean cosine of matching rows less the teacher's mean: a shared mean would flatter raw cosines."""
    return float(F.cosine_similarity(a - mean, b - mean, dim=1).double().mean())


# ---- pictures ----


def pca_basis(x_NC):
    """(mean [C], three principal directions [C, 3], ranges [2, 3] from the 2nd to the 98th percentile)."""
    mean = x_NC.mean(0)
    _, _, v = torch.linalg.svd((x_NC - mean)[:: max(1, len(x_NC) // 20000)], full_matrices=False)
    projected = (x_NC - mean) @ v[:3].T
    order = projected.sort(dim=0).values
    return mean, v[:3].T, torch.stack([order[int(0.02 * len(order))], order[int(0.98 * (len(order) - 1))]])


def pca_map(x_NC, shape, basis):
    """An image [h, w, 3] uint8 of the features' first three principal components in `basis`."""
    mean, directions, (low, high) = basis
    colour = (((x_NC - mean) @ directions - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return (colour * 255).byte().reshape(*shape, 3).numpy()


def sheet(rows, titles, cell=144):
    """A picture of rows of images (uint8 arrays, any size), scaled to fit cells, with a title over every column."""
    page = Image.new("RGB", (len(titles) * (cell + 4) + 4, len(rows) * (cell + 4) + 24), "white")
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(titles):
        draw.text((column * (cell + 4) + 6, 6), title, fill="black")
    for line, images in enumerate(rows):
        for column, array in enumerate(images):
            image = Image.fromarray(np.asarray(array))
            scale = cell / max(image.size)
            size = [max(1, round(n * scale)) for n in image.size]
            how = Image.Resampling.NEAREST if scale > 4 else Image.Resampling.BICUBIC
            page.paste(image.resize(size, how), (column * (cell + 4) + 4, line * (cell + 4) + 22))
    return page


def pca_sheet(cache, entries, teacher, student):
    """Image, teachers' PCA maps, each beside the student's in the same basis, and the student's trunk in its own."""
    names = [space.name for space in cache.spaces]
    columns = [(name, features, name) for name in names for features in (teacher, student)] + [("amoe", student, None)]
    basis = {name: pca_basis(torch.cat(teacher[name]["patch"])) for name in names}
    basis[None] = pca_basis(torch.cat(student["amoe"]["patch"]))
    rows = []
    for line, (number, i) in enumerate(entries):
        shape = tuple(cache.shard(number).shapes[i].tolist())
        image = cache.read([(number, i)], targets=False).images()[0].numpy()
        rows.append([image, *(pca_map(f[name]["patch"][line], shape, basis[b]) for name, f, b in columns)])
    titles = ["image", *(f"{name}: {who}" for name in names for who in ("teacher", "student")), "student's trunk"]
    return sheet(rows, titles)


# ---- whole reports ----


def toy_scores(world, cache, student, untrained):
    """The toy's table, {"student", "teacher", "untrained"}: {"zeroshot", "knn", "miou"} on held-out images."""
    trained, held = split(cache)
    bank = trained[:: max(1, len(trained) // 1500)]  # spread over the cache
    names = {e: cache.shard(e[0]).meta[e[1]]["source"] for e in [*bank, *held]}
    shapes = {e: tuple(cache.shard(e[0]).shapes[e[1]].tolist()) for e in names}
    label = {e: world.scenes[int(name[:6])].label for e, name in names.items()}
    masks = {e: torch.from_numpy(np.array(Image.open(world.folder / "masks" / name))) for e, name in names.items()}
    classes = len(toy.CLASSES) + 1
    share = torch.cat([patch_labels(masks[e], *shapes[e], classes) for e in bank])
    bank_labels, held_labels = (torch.tensor([label[e] for e in part]) for part in (bank, held))
    oracle = toy.TextOracle(world)
    text = torch.stack([oracle.encode_text([f"a {c} {s}" for s in toy.SHAPES]).mean(0) for c in toy.CLASSES])

    def scores(features):
        known, asked = features(bank), features(held)
        probe = linear_probe(torch.cat(known["dense"]["patch"]), share)
        dense_shapes, dense_masks = [shapes[e] for e in held], [masks[e] for e in held]
        return {
            "zeroshot": zeroshot(asked["text"]["summary"], text, held_labels),
            "knn": knn(known["dense"]["summary"], bank_labels, asked["dense"]["summary"], held_labels),
            "miou": mean_iou(probe, asked["dense"]["patch"], dense_shapes, dense_masks, classes),
        }

    return {
        "student": scores(lambda entries: student_features(student, cache, entries)),
        "teacher": scores(lambda entries: teacher_features(cache, entries)),
        "untrained": scores(lambda entries: student_features(untrained, cache, entries)),
    }


def cache_scores(cache, student, untrained):
    """Held-out images of any cache: cosines to each teacher, centred; caption recall where a teacher embeds text."""
    _, held = split(cache)
    if not held:
        return {}
    teacher = teacher_features(cache, held)
    students = {
        "student": student_features(student, cache, held),
        "untrained": student_features(untrained, cache, held),
    }
    result = {who: {} for who in ("student", "teacher", "untrained")}
    for space in cache.spaces:
        want = teacher[space.name]
        for who, features in students.items():
            got = features[space.name]
            summary = cosine(got["summary"], want["summary"], space.summary_mean)
            patch = cosine(torch.cat(got["patch"]), torch.cat(want["patch"]), space.phi_s.mean)
            result[who][f"{space.name}_summary_cosine"], result[who][f"{space.name}_patch_cosine"] = summary, patch
        if "text" in want:
            captions = {}  # distinct captions of the whole cache: the gallery
            texts = []
            for shard in cache.shards:
                for meta, row in zip(shard.meta, shard.all(f"text.{space.name}"), strict=True):
                    if meta["caption"] and meta["caption"] not in captions:
                        captions[meta["caption"]] = len(texts)
                        texts.append(torch.from_numpy(row))
            asked = [n for n, (number, i) in enumerate(held) if cache.shard(number).meta[i]["caption"]]
            truth = torch.tensor([captions[cache.shard(held[n][0]).meta[held[n][1]]["caption"]] for n in asked])
            for who, features in (*students.items(), ("teacher", teacher)):
                recalls = recall(features[space.name]["summary"][asked], torch.stack(texts), truth)
                result[who] |= {f"{space.name}_recall_at_{k}": v for k, v in recalls.items()}
    return result


def print_table(result):
    """A row a measure: student, teacher, untrained student, and the student's share of its teacher's score."""
    measures = list(result["student"])
    width = max(len(m) for m in measures) + 2
    print(f"{'':{width}}{'student':>10}{'teacher':>10}{'untrained':>11}{'share':>8}")
    for m in measures:
        cells = [result[who].get(m) for who in ("student", "teacher", "untrained")]
        share = f"{cells[0] / cells[1]:8.0%}" if cells[1] else ""
        student, teacher, untrained = (f"{c:.3f}" if c is not None else "" for c in cells)
        print(f"{m:{width}}{student:>10}{teacher:>10}{untrained:>11}{share}")
