"""What each difference between SigLino's evaluation and the strict one is worth, on a teacher measured both ways.

    python -m benchmarks.protocols --photos DIR --teachers REAL.py:text_aligned REAL.py:dense
        --captions REAL.py:text_table --classes TEST.tar CIFAR.py:text_aligned

`--photos`: images with alpha masks, and captions.json with captions and categories. Differences are added one by one,
from the strict protocol to the published one. kNN is over ten folds, every photo asked once; zero-shot is on 1,000
images of TEST.tar, a folder a class.
"""

# isort: split
import argparse
import json
import runpy
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import evaluate
from common.sources import find_sources
from data import held_out
from images import Images


def read_function(spec):
    path, name = spec.rsplit(":", 1)
    return runpy.run_path(path)[name]


def dataset_of(path, kind=Images, square=False, budget=256):
    dataset = kind(find_sources(path), path, max_tokens=budget, draft=False)
    dataset.square = square
    return dataset


def seen(teacher, dataset, most=None):
    """[(entry, shape, features of the one head)] of all images of a dataset, or of `most` drawn from them."""
    entries = sorted(e for part in evaluate.split(dataset) for e in part)
    entries = [entries[i] for i in sorted(np.random.default_rng(0).permutation(len(entries))[:most])]
    streamed = evaluate.stream(evaluate.of_teacher(teacher), dataset, entries, progress=teacher.name)
    return [(e, shape, {k: v.clone() for k, v in f[teacher.name].items()}) for e, shape, f in streamed]


def folds_knn(dataset, items, published, folds=10):
    """kNN of every image among those of the other folds; folds by the image's place in the list."""
    x = torch.stack([f["summary"] for _, _, f in items])
    [labels] = evaluate.class_numbers((dataset, [e for e, _, _ in items]))
    fold, score = torch.arange(len(x)) % folds, 0.0
    for n in range(folds):
        known, asked = fold != n, fold == n
        score += evaluate.knn(x[known], labels[known], x[asked], labels[asked], published=published) * int(asked.sum())
    return score / len(x)


def retrieval_rows(photos, native, resized, table):
    """Recall at 10 both ways, each difference added: sizes, captions each for itself, bfloat16 and ties."""
    order = {entry["file"]: n for n, entry in enumerate(json.loads((Path(photos) / "captions.json").read_text()))}

    def recalls(dataset, items, alone, published=False):
        meta = [dataset.meta(e) for e, _, _ in items]
        truth, captions = evaluate.distinct((m["caption"], alone and n) for n, m in enumerate(meta))
        text = table[[order[meta[truth.tolist().index(k)]["source"]] for k in range(len(captions))]]
        found = evaluate.caption_recalls(torch.stack([f["summary"] for _, _, f in items]), text, truth, published)
        return {"image to text": found["text_recall_at_10"], "text to image": found["image_recall_at_10"]}

    return {
        "strict": recalls(*native, False),
        "+ its sizes of images": recalls(*resized, False),
        "+ every caption its own image's alone": recalls(*resized, True),
        "+ bfloat16, ties for the model: published": recalls(*resized, True, published=True),
    }


def mask_of(photos, dataset, entry, side=None):
    """0 for background, 1 for the object, of an image's alpha."""
    alpha = Image.open(Path(photos) / dataset.meta(entry)["source"]).convert("RGBA").getchannel("A")
    alpha = alpha.resize((side, side), Image.Resampling.NEAREST) if side else alpha
    return torch.from_numpy((np.array(alpha) > 127).astype(np.int64))


def segmentation_rows(photos, native, square, rates):
    """mIoU of object and background, a tenth of the photos held out."""

    def parts(dataset, items, sided):
        out = held_out(np.array([dataset.view(e).source.id for e, _, _ in items]))
        sides = [16 * shape[0] if sided else None for _, shape, _ in items]
        masks = [mask_of(photos, dataset, e, side) for (e, _, _), side in zip(items, sides, strict=True)]
        rows = [(mask, shape, {"t": f}) for mask, (_, shape, f) in zip(masks, items, strict=True)]
        return [[row for row, o in zip(rows, out, strict=True) if o == part] for part in (False, True)]

    def score(probe, test, void=None):
        pixels = sum(evaluate.confusion(probe, f["t"]["patch"], shape, m, 2) for m, shape, f in test)
        return evaluate.mean_iou(pixels, void)

    args = argparse.Namespace(head=["t"], void=255, probe_patches=200_000)
    rows, epochs = {}, {}
    for name, (train, test) in (("strict", parts(*native, False)), ("+ images as squares", parts(*square, True))):
        total = sum(len(f["t"]["patch"]) for _, _, f in train)
        [probes] = evaluate.fit_probes(args, lambda train=train: iter(train), 2, total)
        rows[name] = score(probes["t"], test)
    for args.lr in rates:
        shuffled = lambda: (train[i] for i in torch.randperm(len(train)))  # noqa: E731
        epochs[args.lr] = [score(p["t"], test, args.void) for p in evaluate.published_probes(args, shuffled, 2)]
    rows["+ its head: bfloat16, AdamW 1e-3, the tenth epoch"] = epochs[1e-3][-1]
    rows["+ the best epoch on the test set: published"] = max(epochs[1e-3])
    rows["+ the best of eight rates on the test set (its search_lr.sh)"] = max(map(max, epochs.values()))
    return rows


def zeroshot_rows(test, spec):
    """(the teacher's name, its zero-shot on 1,000 images, each difference added)."""
    teacher = read_function(spec)("cpu")
    names = sorted({Path(s.name).parts[-2] for s in find_sources(test)})
    said = [teacher.encode_text([t.format(n) for t in evaluate.TEMPLATES]).float() for n in names]
    text, found = torch.stack([evaluate.unit(x).mean(0) for x in said]), []
    for kind in (Images, evaluate.PublishedImages):
        dataset = dataset_of(test, kind)
        items = seen(teacher, dataset, most=1000)
        truth = torch.tensor([names.index(Path(dataset.meta(e)["source"]).parts[-2]) for e, _, _ in items])
        found.append((torch.stack([f["summary"] for _, _, f in items]), text, truth))
    return teacher.name, {
        "strict": evaluate.zeroshot(*found[0]),
        "+ its sizes of images": evaluate.zeroshot(*found[1]),
        "+ bfloat16, ties for the model: published": evaluate.zeroshot(*found[1], published=True),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos")
    parser.add_argument("--teachers", nargs="*", default=[], help="of the photos; the first one embeds captions")
    parser.add_argument("--captions", help="a function that answers their embeddings, in the order of captions.json")
    parser.add_argument("--classes", nargs=2, help="images in a folder a class, and a teacher that embeds text")
    parser.add_argument("--out", default="benchmarks/protocols.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(args.out)  # gains what is measured
    result = {measure: {} for measure in ("knn", "retrieval", "segmentation", "zeroshot")}
    result |= json.loads(out.read_text()) if out.exists() else {}
    for spec in args.teachers:
        teacher = read_function(spec)("cpu")
        kinds = (Images, False), (evaluate.PublishedImages, False), (evaluate.PublishedImages, True)
        datasets = [dataset_of(args.photos, *kind) for kind in kinds]
        native, resized, square = ((dataset, seen(teacher, dataset)) for dataset in datasets)
        result["photos"] = len(native[1])
        result["knn"][teacher.name] = {
            "strict": folds_knn(*native, False),
            "+ its sizes of images": folds_knn(*resized, False),
            "+ bfloat16, ties for the model: published": folds_knn(*resized, True),
        }
        rates = (4e-4, 8e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1e-2, 2e-2)
        result["segmentation"][teacher.name] = segmentation_rows(args.photos, native, square, rates)
        if spec == args.teachers[0]:
            result["retrieval"][teacher.name] = retrieval_rows(
                args.photos, native, resized, read_function(args.captions)()
            )
        out.write_text(json.dumps(result, indent=1) + "\n")
    if args.classes:
        name, rows = zeroshot_rows(*args.classes)
        result["zeroshot"][name] = rows
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
