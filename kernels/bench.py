"""Right first, then how fast: python kernels/bench.py [--all] [--only PART] [--out DIR].

    moe, attention, arkd, kmeans    an operation's forms at real sizes (at awkward ones tests/test_kernels.py has them)
    checks                          all of these, not timed
    step                            amoe-0.3b's training step (benchmarks/speed.py); the compiler takes minutes

A form that is wrong against float64, gradients included, on the inputs it is timed on is not timed, and the exit status
is 1. Without a GPU shapes are small, and forms that need one are left out. A part has a process of its own: it may
spoil the GPU's context. "% of floor" is floor over time, at best 100: the floor is the time of an operation's products
at the rate of a large one, or of its fewest bytes (inputs and outputs once) at that of a large copy, if that is longer.

Shape letters: T tokens, D model width, E experts, F expert width, K experts a token or centroids, B images of the
global batch, H heads, d head width, N points.
"""

import argparse
import functools
import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, also when run as a script

from benchmarks import speed
from benchmarks.measure import CUDA, DEVICE, machine, median_ms, peaks, record
from kernels import arkd as arkd_file
from kernels import kmeans as kmeans_file
from kernels import moe as moe_file
from kernels.attention import attend, image_runs, mask_of

import torch  # isort: skip  after kernels, which sets how OpenMP's threads wait

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@dataclass
class Case:
    """One operation at one shape."""

    op: str
    shape: str
    inputs: tuple  # those that require a gradient are asked for it
    forms: dict[str, Callable | str]  # by name; a string is the reason why that form does not run here
    exact: Callable  # the reference, given float64 inputs
    flops: float  # of the backward pass too where there is one
    tolerance: tuple  # of |out - exact| / |exact|, of the value and of each gradient
    value: Callable = lambda out: out  # what of a form's result is compared


# ---- the operations ----


def forms_of(file, function, *asked):
    """{form: function of the inputs, or why it cannot run} of a kernel file; asked: what its `choose` has to know."""
    forms = {}
    for impl in file.IMPLS:
        try:
            file.choose(impl, DEVICE, *asked)
            forms[impl] = functools.partial(function, impl=impl)
        except ValueError as refusal:
            forms[impl] = str(refusal)
    return forms


def normal(*shape, dtype=FLOAT32, scale=1.0, gradient=True):
    return (torch.randn(shape, device=DEVICE, dtype=dtype) * scale).requires_grad_(gradient)


def moe_case(dtype, shape):
    T, D, E, F, K = shape
    w1, w3, w2 = (normal(*s, dtype=dtype, scale=s[2] ** -0.5) for s in ((E, F, D), (E, F, D), (E, D, F)))
    weight_TK = torch.rand(T, K, device=DEVICE).requires_grad_()
    inputs = (normal(T, D, dtype=dtype), torch.rand(T, E, device=DEVICE).topk(K).indices, weight_TK, w1, w2, w3)
    forms = forms_of(moe_file, moe_file.moe, dtype)
    if dtype != BFLOAT16:
        forms["grouped"] = "computes in bfloat16"
    elif CUDA:
        forms["compiled grouped"] = torch.compile(forms["grouped"], dynamic=False)
    flops = 3 * 2 * T * K * 3 * D * F  # three products forward; each has two in the backward
    exact, tolerance = functools.partial(moe_file.moe, impl="ref"), 2e-2 if dtype == BFLOAT16 else 1e-5
    return Case("moe", f"T{T} D{D} E{E} F{F} K{K} {dtype}", inputs, forms, exact, flops, (tolerance,) * 6)


def arkd_case(B, D):
    forms = {impl: functools.partial(arkd_file.arkd, impl=impl) for impl in arkd_file.IMPLS}
    if B > arkd_file.MEDIAN_EXACT:
        forms["ref"] = f"its {B} x {B} tensors would take {B * B * 4 / 2**30:.0f} GiB each"
    flops = 7 * 2 * B * B * D  # two products for the means, two for the loss; in the backward two and weights @ z
    # A gate is a step: in float32 a pair or two fall on the other side of the median, about 1 / B of the gradient.
    exact, tolerance = functools.partial(arkd_file.arkd, impl="chunked"), (1e-4, 2 / B)
    inputs = normal(B, D), normal(B, D, gradient=False)
    return Case("arkd", f"B{B} D{D} {FLOAT32}", inputs, forms, exact, flops, tolerance)


def attention_case(dtype, H, d, lengths):
    """The last of the lengths is padding."""
    *starts, T = itertools.accumulate(lengths, initial=0)
    starts = torch.tensor(starts, dtype=torch.int32)
    sdpa, flex = (
        lambda q, k, v, sinks, mask=mask: attend(q, k, v, mask, sinks)
        for mask in (image_runs(starts, T), mask_of(starts, T, DEVICE))
    )
    inputs = (*(normal(T, H, d, dtype=dtype) for _ in range(3)), normal(H))
    flops = 3.5 * 4 * H * d * sum(n * n for n in lengths)  # a backward is 2.5: it computes the scores once more
    # 1e-4: some of CUDA's float32 attention splits its operands into three TF32 products
    tolerance, shape = 2e-2 if dtype == BFLOAT16 else 1e-4, f"T{T} H{H} d{d} M{len(lengths)} {dtype}"
    forms = {"ref": sdpa, "compiled flex": torch.compile(flex, dynamic=False) if CUDA else "has gradients on CUDA only"}
    return Case("attention", shape, inputs, forms, sdpa, flops, (tolerance,) * 5)


def kmeans_case(N, D, K, dtype):
    """Compared are squared distances to the centroids of the labels, summed over about 4096 points."""
    x_ND, c_KD = (normal(n, D, dtype=dtype, gradient=False) for n in (N, K))
    inputs, some = (x_ND, c_KD, -c_KD.float().square().sum(1) / 2), slice(0, N, max(N // 4096, 1))
    d_BK = torch.cdist(x_ND[some].double(), c_KD.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    of_labels = lambda answer: d_BK.gather(1, answer[0][some, :1].long()).sum()  # noqa: E731
    nearest = lambda *_: d_BK.min(1).values.sum()  # noqa: E731
    forms, shape = forms_of(kmeans_file, kmeans_file.top3), f"N{N} D{D} K{K} {dtype}"
    # bfloat16 products are exact and the sums are float32: the same tolerance
    return Case("kmeans", shape, inputs, forms, nearest, 2 * N * K * D, (1e-5,), of_labels)


# What makes a case, and its arguments; without a GPU sizes are divided by 16.
S, REAL = (1, BFLOAT16) if CUDA else (16, FLOAT32)
# Tokens of images, 16384 in all: over blocks of the mask, also several to one, also with blocks inside one image.
UNIFORM, MIXED, LARGE = [261] * 62 + [202], [21, 81, 141, 201] * 36 + [400], [1029] * 15 + [949]
CASES = {
    "moe": [(moe_case, REAL, (T // S, 768 // S, 28, 384 // S, K)) for T, K in ((16384, 6), (16384, 2), (65536, 6))],
    "attention": [(attention_case, REAL, 8, 128 // S, lengths) for lengths in (UNIFORM, MIXED, LARGE)],
    "arkd": [(arkd_case, B // S, 1152 // S) for B in (2048, 32768)],
    "kmeans": [
        (kmeans_case, 10**6 // S, D // S, K // S, dtype)
        for D, K, dtype in ((384, 1000, BFLOAT16), (384, 1000, FLOAT32), (256, 4096, BFLOAT16))
    ],
}
CHECKS = [case for cases in CASES.values() for case in cases]
PARTS = (*CASES, "step")


# ---- checking and timing ----


def run(case, function, dtype=None):
    """Forward and, where inputs ask for gradients, backward; the value and the gradients. Floats in `dtype`."""
    inputs = [t.to(dtype) if dtype and t.is_floating_point() else t for t in case.inputs]
    out, asked = function(*inputs), [t for t in inputs if t.requires_grad]
    if not asked:
        return [out]
    cotangent = inputs[0].detach() if out.ndim else None
    return [out.detach(), *torch.autograd.grad(out, asked, cotangent)]


def measure(case, peak):
    """One row a form: its errors and, given the peaks, its speed; or why it did not run."""
    exact, rows = run(case, case.exact, torch.float64), []
    for form, function in case.forms.items():
        rows.append(row := {"op": case.op, "shape": case.shape, "form": form})
        if isinstance(function, str):
            row["not_run"] = function
            continue
        try:
            torch._dynamo.reset()  # forms share their code, and a compiler's limit is on the shapes of one code
            value, *gradients = run(case, function)
            pairs = zip([case.value(value), *gradients], exact, strict=True)
            row["errors"] = [float((a.double() - b).norm() / b.norm().clamp(min=1e-300)) for a, b in pairs]
            if not all(e <= most for e, most in zip(row["errors"], case.tolerance, strict=True)):  # a NaN is not
                row["wrong"] = f"errors {', '.join(f'{e:.1e}' for e in row['errors'])} against {case.tolerance}"
            elif peak:
                row |= time_form(case, function, peak)
        except Exception as failure:  # of one form: the others are still worth their time
            row["failed"] = f"{type(failure).__name__}: {failure}".strip().splitlines()[0]
    return rows


def time_form(case, function, peak):
    """Milliseconds forward, and with the backward pass where there is one; rates, and the share of the floor."""
    with torch.no_grad():
        out = function(*case.inputs)
        forward_ms = median_ms(lambda: function(*case.inputs))
    ms = median_ms(lambda: run(case, function))
    moved = sum(t.nbytes for t in (*case.inputs, *(out if isinstance(out, tuple) else (out,))))
    moved *= 3 if case.inputs[0].requires_grad else 1  # a backward moves what the forward does, and as gradients
    row = {"forward_ms": forward_ms, "step_ms": ms, "tflops": case.flops / ms / 1e9, "gbytes_per_s": moved / ms / 1e6}
    floor_ms = 1e3 * max(case.flops / peak["matmul_flops"], moved / peak["copy_bytes"])
    return row | {"percent_of_floor": 100 * floor_ms / ms}


def line(row):
    """A row as it is printed."""
    said = [f"{outcome.upper()}: {row[outcome]}" for outcome in ("not_run", "failed", "wrong") if outcome in row]
    said = said or [f"error {max(row['errors']):.1e}", *(f"{k} {v:.3f}" for k, v in row.items() if type(v) is float)]
    return f"{row['op']:<10}{row['shape']:<44}{row['form']:<18}" + "  ".join(said)


def run_part(part, folder):
    """Print and write the step's figures, or a part's rows case by case. Returns whether any is wrong or failed."""
    if part == "step":
        words = ["--model", "amoe-0.3b", "--tokens", "16384"] if CUDA else []
        return speed.main([*words, *(["--out", str(folder)] if folder else [])])
    torch.manual_seed(0)
    peak, rows = {} if part == "checks" else peaks(), []
    for make, *arguments in CASES.get(part, CHECKS):
        new = measure(make(*arguments), peak)
        rows += new
        print(*map(line, new), sep="\n", flush=True)
        record(folder, "kernels.json", part, machine() | peak | {"rows": rows})
    return any("wrong" in row or "failed" in row for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--all", action="store_true", help="every part (the default)")
    parser.add_argument("--only", "--op", choices=("checks", *PARTS), help="one part")
    parser.add_argument("--out", type=Path, help="folder to write kernels.json and step.json to")
    flags = parser.parse_args()
    if flags.only and not flags.all:
        return run_part(flags.only, flags.out)
    print(machine())
    command, failed = [sys.executable, __file__, *(["--out", str(flags.out)] if flags.out else [])], []
    for part in PARTS:
        print(f"\n---- {part} ----", flush=True)
        if subprocess.run([*command, "--only", part]).returncode:
            failed.append(part)
    print(f"\nwrong or failed: {', '.join(failed) or 'nothing'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
