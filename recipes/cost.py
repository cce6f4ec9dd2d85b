"""What a run of train.py will take: tokens, floating-point operations, GPU-hours, disk, from its own flags.

    python recipes/cost.py --budgets 256 [1024 ...] --gpus 8 --mfu 0.2 [flags of train.py]

Teachers are SigLIP 2 So400m and DINOv3 ViT-L. Operations are by benchmarks/speed.py's formula; a teacher's are twice
its weights, and its attention, forward. MFU is the share of the GPU's dense bfloat16 peak, and what it will be is an
assumption: 0.2 of an H100's is the rate that the trainer aims at. Images are counted as large as their budget.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import amoe
import train
from benchmarks.speed import flops_per_token
from common.commands import in_range
from teachers import Sizes

REAL = {  # ViT-L and So400m (patch 16, with its text tower)
    "dinov3": Sizes(24, 1024, 16, 4096, 1e-5, "none", key_bias=False, layer_scale=True),
    "siglip2": Sizes(27, 1152, 16, 4304),
}
REGISTERS = {"siglip2": 0, "dinov3": 4}


def teacher_flops(sizes, mean_length):
    """Forward, per token: two for every weight of the tower's matrices, and attention's 2 * 2 * d L a layer."""
    gated = 3 if getattr(sizes, "gated", False) else 2
    matrices = sizes.layers * (4 * sizes.dim**2 + gated * sizes.dim * sizes.hidden)
    return 2 * matrices + sizes.layers * 4 * sizes.dim * mean_length


def cost(flags, budgets, gpus, mfu, peak):
    """{what: figure} of a run; lengths count CLS and registers, which a query meets as well."""
    config = amoe.CONFIGS[flags.model]
    spaces = [amoe.Space(name, s.dim, registers=REGISTERS[name]) for name, s in REAL.items()]
    with torch.device("meta"):
        student = amoe.AMoE(replace(config), spaces)
    special = 1 + config.registers
    lengths = [n + special for n in budgets]
    met = sum(n * n for n in lengths) / sum(lengths)  # keys that a query meets, on average over queries
    tokens = flags.steps * flags.tokens * flags.accumulate * gpus
    images = tokens * len(lengths) / sum(lengths)
    own = flops_per_token(student, met) * tokens
    asked = sum(teacher_flops(sizes, met) for sizes in REAL.values()) * tokens
    features = images * sum(budgets) / len(budgets) * sum(s.dim for s in REAL.values())
    summaries = images * 4 * sum(s.dim * (1 + REGISTERS[name]) for name, s in REAL.items())
    hours = 1 / (peak * mfu * 3600)
    return {
        "tokens a step": tokens / flags.steps,
        "tokens": tokens,
        "images, an image seen once": images,
        "student, FLOP": own,
        "teachers, FLOP": asked,
        "GPU-hours, teachers cached": own * hours,
        "GPU-hours, teachers at every step": (own + asked) * hours,
        "days of all GPUs, cached": own * hours / gpus / 24,
        "days of all GPUs, online": (own + asked) * hours / gpus / 24,
        "tokens/s and GPU, cached": tokens / (own * hours * 3600),
        "cache of these images, TB": (features + summaries + images * sum(budgets) / len(budgets) * amoe.ROW) / 1e12,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--budgets", type=in_range(int, 1, 65536), nargs="+", default=[256], help="patches of an image, at most"
    )
    parser.add_argument("--gpus", type=in_range(int, 1, 10**6), default=8, help="how many")
    parser.add_argument("--mfu", type=in_range(float, 1e-6, 1), default=0.2, help="share of --peak that a step reaches")
    parser.add_argument(
        "--peak", type=in_range(float, 1e9, 1e18), default=989e12, help="bfloat16 FLOP/s of a GPU (H100 SXM)"
    )
    args, words = parser.parse_known_args(argv)
    flags = train.parse(words)
    print(f"{flags.steps} steps on {args.gpus} GPUs at {args.mfu:g} of {args.peak / 1e12:.0f} TFLOP/s, by the formula:")
    for what, figure in cost(flags, args.budgets, args.gpus, args.mfu, args.peak).items():
        print(f"  {what:38} {figure:.3g}")


if __name__ == "__main__":
    main()
