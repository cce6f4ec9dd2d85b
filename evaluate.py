"""How good frozen features are, on plain folders: kNN, zero-shot, retrieval, segmentation, PCA maps, speed.

    python evaluate.py knn --model runs/NAME --train IMAGES     (or zeroshot, retrieval, segment, pca, speed)

Here a model is a function from a Batch to {head: {"patch": [T, C], "summary": [M, C]}} in the teachers' own spaces:
`of_student`, `of_teacher` and `of_targets` make one of a student (AMoE or SigLino), a teacher, or the features in
a cache, so the same code measures all of them. By default the protocol is strict: ties count against the model, void
pixels do not count, no epoch is chosen on the test set. `--protocol published` does what SigLino's own evaluation does,
for figures that can be compared with theirs (docs/evaluate.md).

Shape letters: T tokens and M images of a pack, N images or rows, Q queries, K classes or texts, C channels, h x w
patches, H x W pixels.
"""

import amoe
from amoe import PATCH, pack, split_by_tokens, to_rows
from common.commands import Parser, choose_device, in_range, one_line_errors, run_command
from common.order import held_out
from common.pictures import pca_sheet, require_finite
from common.process import single_threaded_pool
from common.sources import find_sources, upright, with_image
from common.store import write_atomically, write_json
from images import Images, or_reason, resized
from teachers import embed_text, load_teachers, make_targets, run_teachers

# isort: split
import functools
import itertools
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

VOID = 255  # mask value of pixels that belong to no class


# ---- features of any model ----


def of_student(model):
    """A student's features: a head per teacher, and "amoe", the trunk's own."""

    @torch.inference_mode()
    def answer(batch):
        features, _ = model(batch.to(model.device))
        for name, head in model.heads.items():
            features[name]["patch"] = head.to_own_space(features[name]["patch"].float())
        return features

    answer.name, answer.registers, answer.heads = "the student", model.registers, [*model.heads, "amoe"]
    return answer


def of_teacher(teacher, device="cpu"):
    """The features of a teacher, under its name."""

    def answer(batch):
        return run_teachers([teacher], batch.to(device))

    answer.name, answer.heads, answer.teacher = f"teacher '{teacher.name}'", [teacher.name], teacher
    return answer


def of_targets(spaces, teachers=(), device="cpu"):
    """The teachers' features as a student is taught them: a cached Batch's targets, or computed where it has none."""

    def answer(batch):
        found = batch.targets or make_targets(teachers, spaces, batch.to(device))
        both = ((space, found[space.name]) for space in spaces)  # a cache may hold summaries alone
        return {s.name: f | {"patch": s.to_own_space(f["patch"])} if "patch" in f else f for s, f in both}

    return answer


def split(dataset, most=None):
    """(trained on, held out): images as [(shard number, index)], in order; `most`: stop once so many are held out.

    With `most`, shards are visited in a seeded random order, so that a part of a large dataset represents the whole.
    """
    numbers = dataset.numbers if most is None else np.random.default_rng(0).permutation(dataset.numbers).tolist()
    parts = ([], [])
    for number in numbers:
        shard = dataset.shard(number)
        for i, out in enumerate(held_out(shard.ids)):
            if shard.shapes[i].prod():
                parts[int(out)].append((number, i))
        if most is not None and len(parts[1]) >= most:
            break
    return sorted(parts[0]), sorted(parts[1][:most])


def stream(model, dataset, entries, n_tokens=4096, stored=False, progress=None, heads=None):
    """(entry, (h, w), {head: {"summary": [C], "patch": [n, C]}}) of image after image, float32 on the CPU.

    The next pack is read while the model runs on this one. `stored`: read a cache's targets too. `progress`: a label
    for a bar. `heads`: see `of_head`, by default all. Images that cannot be decoded after all are left out.
    """
    registers = getattr(model, "registers", 4)
    length = {(number, i): 1 + registers + int(dataset.shard(number).shapes[i].prod()) for number, i in entries}
    parts = [entries[part] for part in split_by_tokens([length[entry] for entry in entries], n_tokens)]
    # Equally long images side by side: attention runs them as one batch.
    packs = [sorted(part, key=length.get) for part in parts]
    read = functools.partial(dataset.read, registers=registers, with_targets=stored)
    bar = tqdm(total=len(entries), unit="image", desc=progress, disable=progress is None, leave=False)
    with bar, single_threaded_pool(1) as reader:
        ahead = [reader.submit(read, images) for images in packs[:1]]
        for n, part in enumerate(parts):
            ahead += [reader.submit(read, images) for images in packs[n + 1 : n + 2]]
            if (batch := ahead.pop(0).result()) is None:
                continue
            answer, kinds = model(batch), ("summary", "patch")
            features = {h: {kind: f[kind].float().cpu() for kind in kinds if kind in f} for h, f in answer.items()}
            finite = all(torch.isfinite(x).all() for f in features.values() for x in f.values())
            images, place = iter(packs[n]), {}
            for i, image_id in enumerate(batch.ids.tolist()):  # without those that could not be read
                place[next(e for e in images if dataset.shard(e[0]).ids[e[1]] == image_id)] = i
            for entry, i in ((entry, place[entry]) for entry in part if entry in place):
                at = {"summary": i, "patch": batch.patch_rows(i)}
                of_image = {h: {kind: x[at[kind]] for kind, x in f.items()} for h, f in features.items()}
                for head, f in () if finite else of_image.items():
                    if not all(torch.isfinite(x).all() for x in f.values()):
                        who, image = getattr(model, "name", "the model"), dataset.meta(entry)["source"]
                        raise ValueError(f"{who}, head '{head}': features of {image} that are not finite")
                yield entry, tuple(batch.shapes[i].tolist()), {h: of_head(of_image, h) for h in heads or of_image}
            bar.update(len(part))


def of_head(features, head):
    """The features of one head, or of an ensemble "a+b".

    Summaries of an ensemble are concatenated unit vectors, so that its cosine is the mean of its heads' cosines; its
    patches are concatenated as they are, for a linear probe standardises every channel.
    """
    names = head.split("+")
    if len(names) == 1:
        return features[head]
    summary = torch.cat([F.normalize(features[name]["summary"], dim=-1) for name in names], dim=-1)
    return {"summary": summary, "patch": torch.cat([features[name]["patch"] for name in names], dim=-1)}


def gather(streamed, kept=None, kinds=None):
    """A stream as {head: {"summary": [N, C], "patch": list of [n, C]}}; `kept` gains the entries found."""
    out = {}
    for entry, _, features in streamed:
        if kept is not None:
            kept.append(entry)
        for head, f in features.items():
            for kind in kinds or f:  # clones: a view would keep the whole pack alive
                out.setdefault(head, {}).setdefault(kind, []).append(f[kind].clone())
    if not out:
        raise ValueError("no image that is to be measured can be decoded")
    return {head: f | {"summary": torch.stack(f["summary"])} for head, f in out.items()}


def summaries_by_head(model, dataset, entries, heads, label=None, stored=False):
    """({head: [N, C]}, the entries that could be read); heads: by default all."""
    kept, streamed = [], stream(model, dataset, entries, stored=stored, progress=label, heads=heads)
    return {head: f["summary"] for head, f in gather(streamed, kept, ["summary"]).items()}, kept


# ---- measures ----


def unit(x_NC, published=False):
    """Rows of length one; published: in bfloat16, as SigLino is evaluated, where many cosines are equal."""
    return F.normalize(require_finite(x_NC.bfloat16() if published else x_NC), dim=1)


def knn(bank_NC, labels_N, query_QC, truth_Q, k=20, temperature=0.07, published=False):
    """Share of queries whose class wins the vote of the k nearest by cosine s, weighted by exp(s / temperature)."""
    bank_NC, k = unit(bank_NC, published), min(k, len(bank_NC))
    won = 0.0
    for query, truth in zip(query_QC.split(1024), truth_Q.split(1024), strict=True):  # never Q x N
        similarity, nearest = (unit(query, published) @ bank_NC.T).topk(k, dim=1)
        votes = similarity.new_zeros(len(query), int(max(labels_N.max(), truth_Q.max())) + 1)
        # minus the nearest's cosine: it changes no winner and avoids infinity
        weight = similarity if published else similarity - similarity[:, :1]
        votes.scatter_add_(1, labels_N[nearest], (weight / temperature).exp())
        won += wins(votes, truth, published) * len(query)
    return won / len(query_QC)


def zeroshot(image_NC, text_KC, truth_N, published=False):
    """Share of images nearest, by cosine, to the text of their class."""
    return wins(unit(image_NC, published) @ unit(text_KC, published).T, truth_N, published)


def wins(score_NK, truth_N, published=False):
    """Share of rows whose true column beats every other; a tie is a loss (published: the first of equals wins)."""
    best = score_NK >= score_NK.gather(1, truth_N[:, None])
    return float((score_NK.argmax(1) == truth_N if published else best.sum(1) == 1).double().mean())


def recall(query_QC, gallery_NC, truth_Q, labels_N=None, at=(1, 5, 10), ties="lose", published=False):
    """{k: share of queries with one of their own among the k nearest of the gallery by cosine}.

    A gallery row is a query's own where its label (by default its index) is the query's truth. Among rows of equal
    cosine the query's own come last (ties="lose"), first ("win"), or wherever topk puts them ("topk").
    """
    gallery_NC = unit(gallery_NC, published)
    labels_N = torch.arange(len(gallery_NC)) if labels_N is None else labels_N
    hits = dict.fromkeys(at, 0)
    for query, truth in zip(query_QC.split(1024), truth_Q.split(1024), strict=True):  # never Q x N
        score = unit(query, published) @ gallery_NC.T
        own = labels_N == truth[:, None]
        best = score.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        rank = (((score > best) if ties == "win" else (score >= best)) & ~own).sum(1)
        if ties == "topk":
            near = own.gather(1, score.topk(min(max(at), len(labels_N)), dim=1).indices)
            rank = torch.where(near.any(1), near.int().argmax(1), max(at))
        hits = {n: hit + int((rank < n).sum()) for n, hit in hits.items()}
    return {n: hit / len(query_QC) for n, hit in hits.items()}


def caption_recalls(image_NC, text_KC, truth_N, published=False):
    """Recall of texts by images and of images by texts, text truth_N[n] being image n's. published: see `recall`."""
    ties = ("topk", "win") if published else ("lose", "lose")
    text = recall(image_NC, text_KC, truth_N, ties=ties[0], published=published)
    image = recall(text_KC, image_NC, torch.arange(len(text_KC)), truth_N, ties=ties[1], published=published)
    return {f"text_recall_at_{k}": v for k, v in text.items()} | {f"image_recall_at_{k}": v for k, v in image.items()}


def patch_labels(mask_HW, h, w, classes, void=VOID):
    """Share of each class in every patch, [h * w, classes] float32; a pixel counts in the patch that has its centre.

    Void pixels, and those of classes beyond `classes`, count for no class.
    """
    H, W = mask_HW.shape
    patch_HW = ((2 * torch.arange(H) + 1) * h // (2 * H))[:, None] * w + (2 * torch.arange(W) + 1) * w // (2 * W)
    label_HW = mask_HW.long().masked_fill((mask_HW >= classes) | (mask_HW == void), classes)
    count = torch.bincount((patch_HW * (classes + 1) + label_HW).flatten(), minlength=h * w * (classes + 1))
    count = count.view(h * w, classes + 1)  # the last: of no class
    return count[:, :classes] / count.sum(1, keepdim=True).clamp(min=1)


def linear_probe(x_NC, share_NK, iterations=40, decay=1e-4):
    """Softmax regression of patch features onto class shares: (weight [K, C], bias [K]) for the features as they are.

    Full-batch L-BFGS from zero on features with each channel standardised: nothing random. It stops before it has
    converged, and more iterations may give less.
    """
    mean, std = require_finite(x_NC).mean(0), x_NC.std(0, correction=min(1, len(x_NC) - 1)).clamp(min=1e-6)
    x, total_N1 = (x_NC - mean) / std, share_NK.sum(1, keepdim=True)
    weight, bias = torch.zeros(share_NK.shape[1], x.shape[1]), torch.zeros(share_NK.shape[1])
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe")

    def closure():
        """The loss; sets its gradient, by hand: that of a patch's logits is total * softmax(logits) - shares."""
        logits = F.linear(x, weight, bias)
        said = (share_NK * logits).sum()
        largest = logits.amax(1, keepdim=True)
        sum_N1 = logits.sub_(largest).exp_().sum(1, keepdim=True)
        loss = ((sum_N1.log() + largest) * total_N1).sum() - said
        gradient_NK = logits.mul_(total_N1 / sum_N1).sub_(share_NK).div_(len(x))
        weight.grad, bias.grad = (gradient_NK.T @ x).add_(weight, alpha=2 * decay), gradient_NK.sum(0)
        return loss / len(x) + decay * weight.square().sum()

    optimizer.step(closure)
    weight = weight.detach() / std
    return weight, bias.detach() - weight @ mean


def confusion(probe, patch_NC, shape, mask_HW, classes, void=VOID):
    """Pixels by [true class, predicted class]; logits in the probe's dtype, channels last (5x faster), upsampled."""
    logits = F.linear(require_finite(patch_NC).to(probe[0].dtype), *probe).view(1, *shape, classes)
    logits = F.interpolate(logits.permute(0, 3, 1, 2), mask_HW.shape, mode="bilinear", align_corners=False)
    guess = logits[0].max(0).indices  # the first of equals, as argmax, in less than half of its time
    known = (mask_HW != void) & (mask_HW < classes)
    pair = mask_HW[known].long() * classes + guess[known]
    return torch.bincount(pair, minlength=classes**2).view(classes, classes)


def class_ious(confusion_KK, published_void=None):
    """Intersection over union [K] float64 of each class; NaN where a class does not occur.

    With published_void, as in SigLino's evaluation: pixels predicted as that void class are dropped, and a class that
    does not occur but is predicted counts 0.
    """
    published = published_void is not None
    if published:
        confusion_KK = confusion_KK * (torch.arange(len(confusion_KK)) != published_void)
    union = confusion_KK.sum(0) + confusion_KK.sum(1) - confusion_KK.diag()
    return (confusion_KK.diag() / union).double().where((union if published else confusion_KK.sum(1)) > 0, torch.nan)


def mean_iou(confusion_KK, published_void=None):
    """Mean intersection over union of the classes that occur."""
    return float(class_ious(confusion_KK, published_void).nanmean())


def cosine(a, b, mean):
    """Mean cosine of matching rows after subtracting the teacher's mean, which would make all cosines high."""
    return float(F.cosine_similarity(require_finite(a) - mean, require_finite(b) - mean, dim=1).double().mean())


# ---- reports at the end of a run ----


def run_sheet(dataset, entries, models):
    """Image, teachers' PCA maps, each beside the student's in the same basis, and the student's trunk in its own."""
    read = lambda who: gather(stream(models[who], dataset, entries, stored=who == "teacher"))  # noqa: E731
    features, columns = {who: read(who) for who in ("teacher", "student")}, []
    for head, teacher in features["teacher"].items():
        if "patch" in teacher:
            columns += [(f"{head}: {who}", f[head]["patch"], teacher["patch"]) for who, f in features.items()]
    trunk = features["student"]["amoe"]["patch"]
    batch = dataset.read(entries, with_targets=False)
    return pca_sheet(batch.images(), batch.shapes.tolist(), [*columns, ("student's trunk", trunk, trunk)])


def imitation_scores(dataset, spaces, models, texts, most=2000, neighbours=True, progress=True, entries=()):
    """Held-out images of any dataset: cosines to each teacher, centred; caption recall where a teacher embeds text;
    kNN where images have classes.

    models: {who: model}; "teacher" is the one that is imitated. texts(teacher's name, entries): embeddings of captions
    [N, C] (NaN where there is none), or None. `most`: how many images at most; their captions are the gallery. As many
    trained-on images serve `neighbours`. `entries`: measure these images instead of held-out ones.
    """
    trained, held = ([], list(entries)) if entries else split(dataset, most)
    if not held:
        return {}
    kept, features = {who: [] for who in models}, {}
    for who, model in models.items():
        streamed = stream(model, dataset, held, stored=who == "teacher", progress=who if progress else None)
        features[who] = gather(streamed, kept[who])
    held = kept["teacher"]
    result, captions = {who: {} for who in models}, [dataset.meta(entry)["caption"] for entry in held]
    captioned = [n for n, caption in enumerate(captions) if caption]
    truth, gallery = distinct(captions[n] for n in captioned)
    if neighbours:
        add_knn(result, dataset, models, trained[:: max(1, len(trained) // most)], held, features)
    for space in spaces:
        text, want = texts(space.name, held), features["teacher"][space.name]
        means = {"summary": space.summary_mean, "patch": space.target_phi_s.mean.cpu()}
        for who, f in features.items():
            got = f[space.name]
            for kind in () if who == "teacher" else want:
                pair = (torch.cat(x[kind]) if kind == "patch" else x[kind] for x in (got, want))
                result[who][f"{space.name}_{kind}_cosine"] = cosine(*pair, means[kind])
            if captioned and text is not None:
                text_KC = text[[captions.index(caption) for caption in gallery]]
                recalls = recall(got["summary"][captioned], text_KC, truth)
                result[who] |= {f"{space.name}_recall_at_{k}": v for k, v in recalls.items()}
    return result


def distinct(names):
    """(each name's number [N], the distinct names), numbered as they first occur."""
    numbers = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names]), list(numbers)


def add_knn(result, dataset, models, bank, held, features):
    """Add to result[who] the kNN, head by head, of `held` among `bank`, where images have classes."""
    try:
        class_numbers((dataset, [*bank, *held]))
    except ValueError:
        return
    for who, model in models.items():
        label = f"{who}, neighbours"
        known, kept = summaries_by_head(model, dataset, bank, list(features["teacher"]), label, who == "teacher")
        labels, truth = class_numbers((dataset, kept), (dataset, held))
        for head, x in known.items():
            result[who][f"{head}_knn"] = knn(x, labels, features[who][head]["summary"], truth)


def print_table(result, first="untrained"):
    """A row per measure: student, teacher, student before training (titled `first`), share of the teacher; if known."""
    titles = {"student": "student", "teacher": "teacher", "untrained": first}
    titles = {who: title for who, title in titles.items() if result.get(who)}
    width = max(map(len, result["student"])) + 2
    last = "   share" if "teacher" in titles else ""
    print(f"{'':{width}}" + "".join(f"{title:>14}" for title in titles.values()) + last)
    for measure, score in result["student"].items():
        cells = "".join(f"{result[who][measure]:14.3f}" if measure in result[who] else " " * 14 for who in titles)
        teacher = result["teacher"].get(measure)
        print(f"{measure:{width}}{cells}" + (f"{score / teacher:8.0%}" if teacher else ""))


# ---- measures of a folder, for the command line: each answers {head: {figure: value}} at one token budget ----

TEMPLATES = ("a photo of a {}.", "a picture of the {}.", "a close view of a {}.", "a {}.", "a photo of many {}.")


class PublishedImages(Images):
    """Images in the sizes of SigLino's evaluation: sides floored to the budget, 64 patches at least; or squares."""

    square = False

    def sizes(self, height, width):
        """(h, w) in patches; between 128 x 128 pixels and the budget an image keeps its size, to the nearest patch."""
        if self.square:
            return (math.isqrt(self.max_tokens),) * 2
        n, whole, area = round(height / PATCH) * round(width / PATCH), round, height * width
        if n > self.max_tokens:
            whole, area = math.floor, PATCH**2 * self.max_tokens
        elif n < 64:
            whole, area = math.ceil, 128**2
        return tuple(max(1, whole(side * (area / (height * width)) ** 0.5 / PATCH)) for side in (height, width))

    def decode(self, view):
        def use(image):
            height, width, orientation = upright(image)
            return torch.from_numpy(resized(image, *self.sizes(height, width), orientation, (0, 0, 1, 1), False, False))

        return or_reason(lambda: to_rows(with_image(view.source, use)))


def open_images(paths, args, budget, part=None):
    """(the Images of a folder, or of several; those "trained" on, or "held" out, or all, as [(shard number, index)]).

    All models share one dataset, so that bad files are named once.
    """
    paths = list(map(str, paths if isinstance(paths, list) else [paths]))
    if (*paths, budget) not in args.opened:
        sizes = {"min_tokens": budget if args.enlarge else args.min_tokens, "max_tokens": budget}
        kind = PublishedImages if args.published else Images
        dataset = kind(find_sources(paths), " ".join(paths), **sizes, draft=False, max_skipped=args.max_skipped)
        dataset.square = args.measure == "segment"
        args.opened[*paths, budget] = dataset, *split(dataset)
    dataset, trained, held = args.opened[*paths, budget]
    parts = {"trained": trained, "held": held, None: held if getattr(args, "held_out", False) else trained + held}
    if not parts[part]:
        counts = f"{len(trained)} to learn from and {len(held)} to test on{'' if part is None else ': give --test'}"
        raise ValueError(f"{dataset.path} holds no image that can be used here: {counts}")
    return dataset, sorted(parts[part])


def open_train_and_test(train, test, args, budget):
    """((dataset, entries) to learn from, (dataset, entries) to test on: those of `test`, or a tenth of train by id)."""
    if test:
        return open_images(train, args, budget), open_images(test, args, budget)
    return open_images(train, args, budget, "trained"), open_images(train, args, budget, "held")


def category(dataset, entry):
    """An image's class: from captions.json or a label file, or else the name of its folder."""
    meta = dataset.meta(entry)
    name = meta["category"] or Path(meta["source"]).parent.name
    if not name or name.endswith(".tar"):
        raise ValueError(f"{meta['source']} of {dataset.path} has no class: it needs a folder a class")
    return name


def class_numbers(*parts):
    """The class numbers of images, a tensor for each of the parts (dataset, entries)."""
    names = [[category(dataset, entry) for entry in entries] for dataset, entries in parts]
    index = {name: i for i, name in enumerate(sorted(set(itertools.chain.from_iterable(names))))}
    return [torch.tensor([index[name] for name in part]) for part in names]


def measure_knn(args, model, budget):
    """k nearest neighbours, a folder a class"""
    (train, trained), (test, held) = open_train_and_test(args.train, args.test, args, budget)
    bank, trained = summaries_by_head(model, train, trained, args.head, f"{budget}: bank")
    queries, held = summaries_by_head(model, test, held, args.head, f"{budget}: queries")
    labels, truth = class_numbers((train, trained), (test, held))
    how = args.k, args.temperature, args.published
    return {h: {"knn": knn(x, labels, queries[h], truth, *how), "images": len(held)} for h, x in bank.items()}


def check_widths(images, text_C, name):
    """ValueError where the images [N, C] of a head and the text of teacher `name` differ in width."""
    for head, x_NC in images.items():
        if x_NC.shape[1] != len(text_C):
            widths = f"head '{head}' has {x_NC.shape[1]} channels and text of teacher '{name}' {len(text_C)} channels"
            raise ValueError(f"{widths}: text is held against the head of its own teacher")


def read_words(args):
    """({folder: how to say it} of --classes, the lines of --templates); ValueError names the file that holds others."""
    with one_line_errors(args.classes):
        spoken = json.loads(Path(args.classes).read_bytes()) if args.classes else {}
        if not isinstance(spoken, dict) or not all(isinstance(said, str) for said in spoken.values()):
            raise ValueError("no object of {folder: how to say it}")
    with one_line_errors(args.templates):
        lines = Path(args.templates).read_bytes().decode().splitlines() if args.templates else TEMPLATES
        templates = [line for line in lines if line.strip()]
        if not templates or any(t.format("x") == t.format("y") for t in templates):
            raise ValueError("want a template a line, each with {} where the class stands")
    return spoken, templates


def measure_zeroshot(args, model, budget):
    """Images against their class's name, a folder a class"""
    dataset, entries = open_images(args.images, args, budget)
    spoken, templates = read_words(args)
    names, text = sorted({category(dataset, e) for e in entries}), []
    if spoken and spoken.keys().isdisjoint(names):
        raise ValueError(f"{args.classes} names none of the classes of {dataset.path}: {', '.join(names[:5])}")
    for name in names:
        words = spoken.get(name, name.replace("_", " "))
        words = words.lower() if args.published else words
        text.append(unit(args.encode_text([t.format(words) for t in templates]), args.published).mean(0))
    images, kept = summaries_by_head(model, dataset, entries, args.head or [args.text_head], f"{budget}: images")
    check_widths(images, text[0], args.text_head)
    truth, text = torch.tensor([names.index(category(dataset, e)) for e in kept]), torch.stack(text)
    return {h: {"zeroshot": zeroshot(x, text, truth, args.published), "images": len(kept)} for h, x in images.items()}


def measure_retrieval(args, model, budget):
    """Image to caption and caption to image"""
    dataset, entries = open_images(args.images, args, budget)
    entries = [e for e in entries if dataset.meta(e)["caption"]]
    if not entries:
        raise ValueError(f"{dataset.path} has no captions: it needs captions.json, or a .txt beside each image")
    images, kept = summaries_by_head(model, dataset, entries, args.head or [args.text_head], f"{budget}: images")
    # Two images may share a caption: both are then right; published: each caption has its own image alone
    truth, captions = distinct((dataset.meta(e)["caption"], args.published and e) for e in kept)
    text = args.encode_text([caption for caption, _ in captions])
    check_widths(images, text[0], args.text_head)
    count = {"images": len(kept), "captions": len(captions)}
    return {head: caption_recalls(x, text, truth, args.published) | count for head, x in images.items()}


def read_mask(root, dataset, entry, side=None):
    """An image's class indices [H, W] int64 from root/masks, or the nearest ones in a square of `side` pixels."""
    source = dataset.view(entry).source
    path = (root / "masks" / source.name).with_suffix(".png")
    with one_line_errors(path), Image.open(path) as image:
        if (image.width - image.height) * (int(source.row["width"]) - int(source.row["height"])) < 0:
            raise ValueError("it lies across its image, which EXIF may turn: store it as the image is seen")
        array = np.array(image.resize((side, side), Image.Resampling.NEAREST) if side else image)
        if array.ndim != 2:
            raise ValueError(f"no map of class indices: it has {array.shape[2]} channels")
        return torch.from_numpy(array.astype(np.int64))


def fit_probes(args, images, classes, n_patches):
    """{head: (weight, bias)}: linear probes of at most --probe-patches of the n_patches that the images have."""
    random = torch.Generator().manual_seed(0)
    rows, labels = {}, []
    for mask, shape, features in images:
        share = patch_labels(mask, *shape, classes, args.void)
        known = (share.sum(1) > 0) & (torch.rand(len(share), generator=random) < args.probe_patches / n_patches)
        labels.append(share[known])
        for head, f in features.items():
            rows.setdefault(head, []).append(f["patch"][known])
    if not any(map(len, labels)):
        raise ValueError(f"{args.train}/masks say nothing: every pixel is --void {args.void}")
    return {head: linear_probe(torch.cat(x), torch.cat(labels)) for head, x in rows.items()}


def published_probes(args, train, classes):
    """Yields {head: (weight, bias)} after each of ten epochs, as SigLino's evaluation trains them: bfloat16, AdamW, 16
    images a step, the cross-entropy of every pixel that is not void."""
    torch.manual_seed(0)
    layers = {}
    for _ in range(10):
        images = train()
        while part := list(itertools.islice(images, 16)):
            masks, shapes, features = zip(*part, strict=True)
            for head in features[0]:
                x_BNC = torch.stack([f[head]["patch"] for f in features]).bfloat16()
                if head not in layers:
                    layer = torch.nn.Linear(x_BNC.shape[-1], classes).bfloat16()
                    layers[head] = layer, torch.optim.AdamW(layer.parameters(), lr=args.lr, weight_decay=1e-3)
                layer, optimizer = layers[head]
                logits = layer(x_BNC).transpose(1, 2).unflatten(2, shapes[0])
                logits = F.interpolate(logits, masks[0].shape, mode="bilinear", align_corners=False)
                F.cross_entropy(logits, torch.stack(masks), ignore_index=args.void).backward()
                optimizer.step()
                optimizer.zero_grad()
        yield {head: (layer.weight.detach(), layer.bias.detach()) for head, (layer, _) in layers.items()}


def measure_segment(args, model, budget):
    """A linear head on frozen patches; folders with images/ and masks/

    Masks have their images' names (.png, a class index per pixel). Published: the best epoch on the test set counts.
    """
    roots = [Path(root) for root in (args.train, args.test or args.train)]
    images = roots[0] / "images", args.test and roots[1] / "images"
    (bank, trained), (test, held) = open_train_and_test(*images, args, budget)

    def seen(root, dataset, entries, label):
        """(mask, (h, w), features) of image after image."""
        for entry, shape, f in stream(model, dataset, entries, progress=f"{budget}: {label}", heads=args.head):
            yield read_mask(root, dataset, entry, 16 * shape[0] if args.published else None), shape, f

    def tested(probes):
        """{head: figures} of the probes."""
        pixels, count, found = dict.fromkeys(probes, 0), 0, {}
        for truth, shape, features in seen(roots[1], test, held, "to be tested on"):
            count += 1
            for head, probe in probes.items():
                pixels[head] += confusion(probe, features[head]["patch"], shape, truth, classes, args.void)
        for head, c_KK in pixels.items():
            if not c_KK.any():
                raise ValueError(f"{roots[1]}/masks say nothing of what is tested: every pixel is --void {args.void}")
            ious, accuracy = class_ious(c_KK, args.void if args.published else None), c_KK.diag().sum() / c_KK.sum()
            found[head] = {"miou": float(ious.nanmean()), "pixel_accuracy": float(accuracy), "images": count}
            found[head]["iou_by_class"] = {k: iou for k, iou in enumerate(ious.tolist()) if iou == iou}
        return found

    learn = functools.partial(seen, roots[0], bank, label="to learn from")
    largest = lambda mask: int(mask.where(mask != args.void, 0).max())  # noqa: E731
    both = (roots[0], bank, trained), (roots[1], test, held)  # a class that is only tested on scores 0
    classes = 1 + max(largest(read_mask(root, of, entry)) for root, of, entries in both for entry in entries)
    if not args.published:
        n_patches = sum(int(bank.shard(number).shapes[i].prod()) for number, i in trained)
        return tested(fit_probes(args, learn(trained), classes, n_patches))
    shuffled = lambda: learn([trained[i] for i in torch.randperm(len(trained)).tolist()])  # noqa: E731
    epochs = [tested(probes) for probes in published_probes(args, shuffled, classes)]
    return {head: max((found[head] for found in epochs), key=lambda some: some["miou"]) for head in epochs[0]}


def measure_pca(args, model, budget):
    """A sheet of the patches' principal components"""
    dataset, entries = open_images(args.images, args, budget)
    entries = entries[:: max(1, len(entries) // args.count)][: args.count]
    features = gather(stream(model, dataset, entries)).items()
    batch = dataset.read(entries)
    columns = [(h, f["patch"], f["patch"]) for h, f in features if not args.head or h.split(": ")[-1] in args.head]
    path = Path(args.out).with_suffix(".png")
    if len(args.max_tokens) > 1:
        path = path.with_stem(f"{path.stem}-{budget}")
    write_atomically(path, lambda file: pca_sheet(batch.images(), batch.shapes.tolist(), columns).save(file, "PNG"))
    return {"all": {"images": batch.n_images, "sheet": str(path)}}


def measure_speed(args, model, budget, repeats=10):
    """Images/s and tokens/s by resolution

    Square images at the budget, packed; bfloat16 on CUDA. The first two packs warm up; a minute is enough.
    """
    side, seconds = int(budget**0.5), []
    images = max(1, args.tokens // (side * side + 5))
    random = torch.Generator().manual_seed(0)
    rows = [torch.randint(256, (side * side, amoe.ROW), dtype=torch.uint8, generator=random) for _ in range(images)]
    batch = pack(rows, [(side, side)] * images, registers=getattr(model, "registers", 4)).to(args.device)
    for n in tqdm(range(repeats + 2), desc=f"{budget}", unit="pack", leave=False):
        if n >= 5 and sum(seconds) > 60:
            break
        began = time.perf_counter()
        with amoe.autocast(batch.rows.device):
            float(next(iter(model(batch).values()))["summary"].sum())  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    typical = statistics.median(seconds[2:])
    figures = {"images_per_s": images / typical, "tokens_per_s": batch.n_tokens / typical, "n": len(seconds) - 2}
    return {"all": figures | {"pixels": 16 * side, "pack_tokens": batch.n_tokens}}


MEASURES = measure_knn, measure_zeroshot, measure_retrieval, measure_segment, measure_pca, measure_speed
MEASURES = {measure.__name__.removeprefix("measure_"): measure for measure in MEASURES}


# ---- command line ----


def number(kind, low, high, default=None):
    """How argparse reads a number from low to high."""
    return {"type": in_range(kind, low, high), "default": default}


MODELS = "a run or its student/, a SigLino checkpoint, NAME=SPEC of a teacher, or an untrained "
MODELS += ", ".join(amoe.CONFIGS)
NEEDED, SEVERAL, SET = {"required": True}, {"nargs": "+"}, {"action": "store_true"}
PROTOCOLS = {"choices": ("strict", "published"), "default": "strict"}
TEST = "images to test on; by default every tenth of --train, by the hash of its name"
FLAGS = (  # (the measures that have it, its name, how it is read, its help)
    ("all", "--model", NEEDED | SEVERAL, f"what to measure, several in one table: {MODELS}"),
    ("all", "--top-k", number(int, 1, 1024, 6), "experts per token of a SigLino checkpoint (0.15B: 2)"),
    ("all", "--max-tokens", number(int, 1, 65536, [256]) | SEVERAL, "token budgets; the table has a line for each"),
    ("all", "--device", {"default": "auto"}, "where the model runs: auto, cpu, cuda or cuda:N"),
    ("images", "--head", SEVERAL, "heads by name, by default all; 'amoe' is the trunk, a+b an ensemble (not of pca)"),
    ("speed", "--tokens", number(int, 1, 2**20, 16384), "tokens in a pack, at most"),
    ("images", "--min-tokens", number(int, 1, 65536, 1), "patches below which an image is enlarged"),
    ("images", "--enlarge", SET, "enlarge smaller images to the budget"),
    ("images", "--max-skipped", number(float, 0, 1, 0.05), "share of unusable images that stops it"),
    ("scores", "--protocol", PROTOCOLS, "published: what SigLino's own evaluation does, its image sizes included"),
    ("knn", "--train", NEEDED | SEVERAL, "images to learn from"),
    ("segment", "--train", NEEDED, "images to learn from"),
    ("knn", "--test", SEVERAL, TEST),
    ("segment", "--test", {}, TEST),
    ("zeroshot retrieval pca", "--images", NEEDED | SEVERAL, "folders of images or tars, tars, lists of them"),
    ("zeroshot retrieval pca", "--held-out", SET, "only the tenth of them that training leaves out"),
    ("zeroshot retrieval", "--text", {"metavar": "NAME=SPEC"}, "teacher that embeds text, for the head of its name"),
    ("knn", "--k", number(int, 1, 10**6, 20), "neighbours that vote"),
    ("knn", "--temperature", number(float, 1e-4, 1e4, 0.07), "a vote weighs exp(cosine / temperature)"),
    ("zeroshot", "--classes", {}, "JSON of {folder: how to say it}"),
    ("zeroshot", "--templates", {}, "text file, a template per line, with {} for the class"),
    ("segment", "--void", number(int, 0, 65535, VOID), "mask value of no class (ADE20k: 0)"),
    ("segment", "--lr", number(float, 0, 10, 1e-3), "of the published protocol's linear head"),
    ("segment", "--probe-patches", number(int, 1, 10**9, 200_000), "patches that the linear head learns from, at most"),
    ("pca", "--count", number(int, 1, 1000, 8), "images on the sheet"),
)


def parse(argv):
    parser = Parser(prog="evaluate.py", description=__doc__.split("\n")[0])
    measures = parser.add_subparsers(dest="measure", required=True)
    for name, measure in MEASURES.items():
        text = measure.__doc__.split("\n")[0]
        words = measures.add_parser(name, help=text, description=text)
        groups = {"all": True, "images": name != "speed", "scores": name not in ("pca", "speed")}
        for having, flag, how, said in FLAGS:
            if groups.get(having, name in having.split()):
                words.add_argument(flag, help=said, **how)
        words.add_argument("--out", default=f"runs/evaluate/{name}.json", help="the result, as JSON")
    args = parser.parse_args(argv)
    args.device = choose_device(args.device)
    if args.measure == "pca":  # whose sheet lies beside the result
        args.out = str(Path(args.out).with_suffix(".json"))
    if Path(args.out).is_dir():
        raise ValueError(f"--out {args.out} is a folder: name the JSON file to write")
    args.published, args.opened = getattr(args, "protocol", "strict") == "published", {}
    first = getattr(args, "images", None) or getattr(args, "train", None) or "."
    args.folder = first[0] if isinstance(first, list) else first
    return args


def open_model(name, args):
    """The model, as a function of a Batch, that a --model names."""
    if "=" in name and not Path(name).exists():
        return of_teacher(load_teachers([name], args.folder, args.device)[0], args.device)
    torch.manual_seed(0)  # for an untrained one
    student = amoe.AMoE(amoe.CONFIGS[name], []).eval() if name in amoe.CONFIGS else amoe.load(name, args.top_k)
    return of_student(student.to(args.device))


def set_text(args, teacher):
    """Add the teacher's `encode_text` and its name, which is the head's, to args."""
    if teacher is None:
        raise ValueError("a student has no text tower: give --text NAME=SPEC, the teacher that its head imitates")
    if not hasattr(teacher, "encode_text"):
        raise ValueError(f"teacher '{teacher.name}' embeds no text")
    args.encode_text, args.text_head = functools.partial(embed_text, teacher), teacher.name


def main(argv=None):
    args = parse(argv)
    flags = {key: value for key, value in vars(args).items() if key not in ("measure", "opened", "folder")}
    began, scores = time.perf_counter(), []
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)  # before hours of work for it
    opened = {name: open_model(name, args) for name in args.model}
    text = getattr(args, "text", None) and load_teachers([args.text], args.folder, args.device)[0]
    for name, model in opened.items():
        heads = getattr(args, "head", None) or ([text.name] if text else ())
        for head in heads if args.measure == "pca" else itertools.chain.from_iterable(h.split("+") for h in heads):
            if head not in model.heads:
                raise ValueError(f"--head {head}: {name} has the heads {', '.join(model.heads)}")
    if args.measure == "pca" and len(opened) > 1:  # one sheet for all
        models = {f"{n} {Path(name).name}": model for n, (name, model) in enumerate(opened.items(), 1)}
        beside = lambda batch: {f"{label}: {head}": f for label, m in models.items() for head, f in m(batch).items()}  # noqa: E731
        opened = {"all": beside}
    for budget, (name, model) in itertools.product(args.max_tokens, opened.items()):
        if args.measure in ("zeroshot", "retrieval"):
            set_text(args, text or getattr(model, "teacher", None))
        for head, figures in MEASURES[args.measure](args, model, budget).items():
            scores.append({"model": name, "max_tokens": budget, "head": head, **figures})
    columns = [c for c in scores[0] if c != "iou_by_class" and (c != "model" or len(opened) > 1)]
    table = [columns, *([f"{s[c]:.3f}" if isinstance(s[c], float) else str(s[c]) for c in columns] for s in scores)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    for score in scores:
        if ious := score.get("iou_by_class"):
            shown = "  ".join(f"{k}: {iou:.3f}" for k, iou in ious.items())
            print(f"IoU by class, {score['model']}, head {score['head']}, {score['max_tokens']} tokens: {shown}")
    result = {"measure": args.measure, "flags": flags, "scores": scores, "torch": torch.__version__}
    write_json(args.out, result | {"seconds": time.perf_counter() - began})
    print(f"written to {args.out}")


if __name__ == "__main__":
    run_command("evaluate.py", main, "nothing was written")
