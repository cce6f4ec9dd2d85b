"""Teachers, packed beside padded (to be merged)."""

import argparse
import json
import resource
import time

import torch
import torch.nn.functional as F

from amoe import ROW, autocast
from teachers import NAMES, DINOv3, SigLIP2, Sizes, Text, file_key, load_state

# ---- packed against padded, at real sizes ----

REAL = {  # ViT-L and So400m (patch 16, with its text tower), weights random
    "dinov3": Sizes(24, 1024, 16, 4096, 1e-5, "none", key_bias=False, layer_scale=True),
    "siglip2": Sizes(27, 1152, 16, 4304),
}


def random_state(kind, sizes, vocabulary=256_000):
    """A state dict of normal weights under the transformers library's keys."""
    with torch.device("meta"):
        if kind == "dinov3":
            parts = [(DINOv3(kind, sizes, 4), NAMES["huggingface"])]
        else:
            vision, text = SigLIP2(kind, sizes, 256, sizes.hidden), Text(sizes, sizes.dim, vocabulary, 64)
            parts = [(vision, NAMES["vision"]), (text, NAMES["text"])]
    return {
        file_key(name, names): torch.empty(tensor.shape).normal_(std=0.02)
        for module, names in parts
        for name, tensor in module.state_dict().items()
    }


def bench(kind, device, repeats):
    """Tokens/s of one mixed-resolution set, packed and then padded to its largest image; one JSON line."""
    from packs import pack

    shapes = [(16, 16), (8, 12), (6, 6), (4, 8), (10, 10), (5, 5)]
    rows = [torch.randint(0, 256, (h * w, ROW), dtype=torch.uint8) for h, w in shapes]
    tokens, largest = sum(map(len, rows)), max(map(len, rows))
    teacher = load_state(kind, random_state(kind, REAL[kind])).to(device)
    packed = pack(rows, shapes).to(device)
    # Equal lengths are one dense batch to the attention, and no mask is charged for: the padded side at its best.
    padded = pack([F.pad(r, (0, 0, 0, largest - len(r))) for r in rows], [(largest, 1)] * len(rows)).to(device)

    def seconds(call):
        taken = []
        for _ in range(repeats + 1):  # the first warms up
            start = time.perf_counter()
            float(call().sum())  # the sum waits for a GPU
            taken.append(time.perf_counter() - start)
        return sorted(taken[1:])[repeats // 2]

    line = {"teacher": kind, "parameters_m": round(sum(p.numel() for p in teacher.parameters()) / 1e6, 1)}
    line |= {"device": str(device), "threads": torch.get_num_threads(), "repeats": repeats}
    line |= {"images": len(rows), "patches": tokens, "padded_patches": largest * len(rows)}
    with autocast(torch.device(device)):
        packed_s, padded_s = (seconds(lambda b=b: teacher(b)["patch"]) for b in (packed, padded))
        line["packed_tokens_per_s"], line["padded_tokens_per_s"] = (round(tokens / t, 1) for t in (packed_s, padded_s))
        line["packed_over_padded"] = round(padded_s / packed_s, 2)
        if kind == "siglip2":
            ids_NL = torch.randint(0, 256_000, (8, 64), device=device)
            line["texts_per_s"] = round(8 / seconds(lambda: teacher.text(ids_NL)), 2)
    line["peak_host_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Packed and padded throughput of real-size teachers", allow_abbrev=False
    )
    parser.add_argument("--bench", choices=[*REAL, "all"], nargs="?", const="all", required=True, help="which teacher")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls, of which the median counts")
    flags = parser.parse_args()
    for kind in REAL if flags.bench == "all" else [flags.bench]:
        bench(kind, flags.device, flags.repeats)
