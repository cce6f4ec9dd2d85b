"""The model card of an exported student: README.md of its folder, filled from what its run recorded."""

import json
from pathlib import Path

# Said with the teacher's own name for its terms; others are for the user to look up.
LICENCES = {
    "siglip2": "SigLIP 2 is Apache-2.0.",
    "dinov3": "DINOv3 is under the DINOv3 License, which says what may be done with models made from its outputs.",
}

PLAIN = """```python
from modeling_amoe import load, open_image  # one image at a time; torch and safetensors alone, Pillow for open_image

features = load()(open_image("photo.jpg"))  # {"patch": {name: [n, C]}, "summary": {name: [C]}}
```

With transformers: `AutoModel.from_pretrained(FOLDER, trust_remote_code=True)`. Packed, and many times as fast, from a
checkout of amoe: `amoe.load(FOLDER).encode(["photo.jpg"], centre=True)`."""

OWN_TRUNK = """The trunk is a plug-in, so there is no modeling_amoe.py: a checkout of amoe loads it, and runs {file}
when it does. Read that first.

```python
import amoe

features = amoe.load(FOLDER).encode(["photo.jpg"], centre=True)  # a dict an image: "patch", "summary", "shape"
```"""

CARD = """---
license: other
library_name: {library}
pipeline_tag: image-feature-extraction
tags: [image-feature-extraction, distillation]
---
# {title}

One vision model with features in the spaces of {teachers}, and in one of its own ("amoe"): a summary of every image,
and a feature for every patch of 16 x 16 pixels. Distilled with amoe, a trainer after AMoE / SigLino
(arXiv 2512.20157).

{use}

Features are in the teachers' own spaces. Any two images have a high cosine there unless the teacher's mean is
subtracted first: `patch_mean` and `summary_mean` of a head hold it, and `centre=True` does it.

| | |
| --- | --- |
| trunk | {trunk} |
| parameters | {parameters:,} |
| heads | {heads} |
| images | {images} |
| training | {step} steps, {tokens:,} tokens, {seconds:.0f} s |
| flags that are not the defaults | {flags} |
| commit | {commit} |
| versions, device | {versions}; {device} |

## Scores

{scores}

## Licences

The weights were learned from the teachers' features: find out whether the teachers' licences extend to them.
{licences} The images have terms of their own.{code}
"""


def score_table(result):
    """A Markdown table of result.json."""
    if not result:
        return "Not measured."
    who = ("student", "teacher", "untrained")
    lines = ["| measure | " + " | ".join(who) + " |", "| --- | --- | --- | --- |"]
    for measure in result["student"]:
        cells = [result[w].get(measure) for w in who]
        lines.append(f"| {measure} | " + " | ".join("" if c is None else f"{c:.3f}" for c in cells) + " |")
    return "\n".join(lines)


def words_of(value):
    """A flag's value as it is typed, of paths their names."""
    return " ".join(Path(str(word)).name for word in (value if isinstance(value, tuple) else [value]))


def card(folder, state, changed):
    """The card's text: of a run's folder, a checkpoint's state, and the flags that are not at their defaults."""
    begun, result = {"commit": "unknown", "versions": {}, "device": "unknown"}, {}
    if (folder / "log.jsonl").exists():
        begun = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    if (folder / "result.json").exists():
        result = json.loads((folder / "result.json").read_text())
    if result.get("steps") != state["step"] or "student" not in result:  # of another step, or not measured
        result = {}
    flags, trunk, heads = state["flags"], state["student"]["trunk"], state["student"]["heads"]
    file = Path(trunk["factory"].rpartition(":")[0]).name if "factory" in trunk else None
    paths = [flags["cache"]] if flags["cache"] else flags["images"]
    return CARD.format(
        title=f"{file or flags['model']}, a student of {' and '.join(heads)}",
        library="amoe" if file else "transformers",
        teachers=" and ".join(heads),
        use=OWN_TRUNK.format(file=file) if file else PLAIN,
        trunk=f"that of {file}" if file else ", ".join(f"{key} {value}" for key, value in trunk.items()),
        parameters=sum(v.numel() for key, v in state["model"].items() if ".phi_s." not in key and "_mean" not in key),
        heads=", ".join(f"{name} ({head['dim']} channels)" for name, head in heads.items()),
        images=", ".join(Path(path).name for path in paths) or f"the toy world, {flags['toy_images']} drawn images",
        step=state["step"],
        tokens=round(state["tokens"]),
        seconds=state["seconds"],
        flags=" ".join(f"`--{name.replace('_', '-')} {words_of(value)}`" for name, value in changed.items()) or "none",
        commit=begun["commit"],
        versions=", ".join(f"{name} {version}" for name, version in begun["versions"].items()),
        device=begun["device"],
        scores=score_table(result),
        code="" if file else " modeling_amoe.py is Apache-2.0.",
        licences=" ".join(LICENCES.get(name, f"That of {name} is not known here.") for name in heads),
    )
