"""Right first, then how fast: python kernels/bench.py [--all] [--only PART] [--out DIR].

--all runs every part below in a process of its own, of two minutes at most and nine in all: what fails, hangs or spoils
the GPU's context costs its own part only. Results are written after every measurement. What a part compiles, the parts
after it and the next run find in Inductor's cache.

    checks               every form of every operation at awkward sizes against float64, values and gradients
    agree                compiled against eager steps of a small model (tests/test_step.py, with pytest)
    step, step-triton    amoe-0.3b's, a block and a head compiled once for all of them, and packed against padded
                         (benchmarks/speed.py)
    moe, attention, arkd, kmeans      an operation's forms at real sizes
    step-whole           the step as training compiles it, in the time that is left: minutes go to the compiler

A form that is wrong against float64 on the inputs it is timed on is not timed, and the exit status is 1. Without a GPU
shapes are small and Triton is left out: its interpreter is no measure of speed. "% of floor" is floor over time, at
best 100: the floor is the time of an operation's products at the rate of a large one, or of its fewest bytes (inputs
read and outputs written once) at the rate of a large copy, whichever is longer; both rates are of the same run.

Shape letters: T tokens, D model width, E experts, F expert width, K experts a token or centroids, B images of the
global batch, H heads, d head width, N points.
"""

import argparse
import functools
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, also when run as a script

import kernels
from benchmarks.measure import CUDA, DEVICE, ROOT, machine, median_ms, peaks, record
from kernels import arkd as arkd_file
from kernels import kmeans as kmeans_file
from kernels import moe as moe_file
from kernels.attention import attend, image_runs, mask_of

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@dataclass
class Case:
    """One operation at one shape."""

    op: str
    shape: str
    inputs: tuple
    gradients: tuple  # which inputs get one; none: the operation has no backward
    forms: dict[str, Callable | str]  # by name; a string is the reason why that form does not run here
    exact: Callable | None  # the reference, given float64 inputs
    flops: float  # of the backward pass too where there is one
    tolerance: tuple  # of |out - exact| / |exact|, of the value and of every gradient
    error: Callable | None = None  # of an output that is no float tensor


# ---- the operations ----


def forms_of(file, function, *asked):
    """{form: function of the inputs, or why it does not run or is not timed here} of a kernel file's IMPLS.

    asked: what its `choose` wants to know beside the device.
    """
    forms = {} if CUDA else {"triton": "Triton's interpreter is no measure of speed"}
    for impl in [impl for impl in file.IMPLS if impl not in forms]:
        try:
            file.choose(impl, DEVICE, *asked)
            forms[impl] = functools.partial(function, impl=impl)
        except ValueError as refusal:
            forms[impl] = str(refusal)
    return forms


def normal(*shape, dtype=FLOAT32, scale=1.0):
    return torch.randn(shape, device=DEVICE, dtype=dtype) * scale


def name(dtype):
    return str(dtype).removeprefix("torch.")


def moe_case(dtype, shape, empty=()):
    T, D, E, F, K = shape
    score_TE = torch.rand(T, E, device=DEVICE)
    score_TE[:, list(empty)] = -1
    w1, w3, w2 = (normal(*s, dtype=dtype, scale=s[2] ** -0.5) for s in [(E, F, D)] * 2 + [(E, D, F)])
    weight_TK = torch.rand(T, K, device=DEVICE)
    inputs = (normal(T, D, dtype=dtype), score_TE.topk(K, dim=1).indices, weight_TK, w1, w2, w3)
    forms = forms_of(moe_file, moe_file.moe, dtype)
    if dtype != BFLOAT16:
        forms["grouped"] = "computes in bfloat16"
    flops = 3 * 2 * T * K * 3 * D * F  # three products forward; each has two in the backward
    exact, tolerance = functools.partial(moe_file.moe, impl="ref"), 2e-2 if dtype == BFLOAT16 else 1e-5
    shape = f"T{T} D{D} E{E} F{F} K{K} {name(dtype)}"
    return Case("moe", shape, inputs, (0, 2, 3, 4, 5), forms, exact, flops, (tolerance, tolerance))


def arkd_case(B, D, teacher_D, spread=1.0, duplicates=0):
    student_BD, teacher_BD = normal(B, D), normal(B, teacher_D, scale=spread)
    student_BD[:duplicates] = student_BD[0]
    forms = forms_of(arkd_file, arkd_file.arkd, FLOAT32, B)
    if B > arkd_file.MEDIAN_EXACT:
        forms["ref"] = f"its {B} x {B} tensors would take {B * B * 4 / 2**30:.0f} GiB each"
    flops = 7 * 2 * B * B * D  # two products for the means, two for the loss; in the backward two and weights @ z
    # A gate is a step: in float32 a pair or two fall on the other side of the median, about 1 / B of the gradient.
    exact, tolerance = functools.partial(arkd_file.arkd, impl="chunked"), (1e-4, 2 / B)
    inputs = (student_BD, teacher_BD)
    return Case("arkd", f"B{B} D{D} float32", inputs, (0,), forms, exact, flops, tolerance)


def attention_case(dtype, H, d, starts, T):
    starts = torch.tensor(starts, dtype=torch.int32)
    masks = image_runs(starts, T), mask_of(starts, T, DEVICE)
    inputs = (*(normal(T, H, d, dtype=dtype) for _ in range(3)), normal(H))
    sdpa, flex = (lambda *a, mask=mask: attend(*a[:3], mask, a[3]) for mask in masks)
    forms = {"ref": sdpa, "compiled flex": torch.compile(flex, dynamic=False) if CUDA else "has gradients on CUDA only"}
    lengths = [*starts.diff().tolist(), T - int(starts[-1])]
    flops = 3.5 * 4 * H * d * sum(n * n for n in lengths)  # a backward is 2.5: it computes the scores once more
    # 1e-4: some of CUDA's float32 attention splits its operands into three TF32 products
    tolerance, shape = 2e-2 if dtype == BFLOAT16 else 1e-4, f"T{T} H{H} d{d} M{len(lengths)} {name(dtype)}"
    return Case("attention", shape, inputs, (0, 1, 2, 3), forms, sdpa, flops, (tolerance, tolerance))


def kmeans_case(N, D, K, dtype=FLOAT32):
    # bfloat16 products are exact and the sums are float32: the same tolerance
    x_ND, c_KD = normal(N, D, dtype=dtype), normal(K, D, dtype=dtype)

    def excess(answer):
        """How much further the labelled centroids are than the nearest ones, relative; over about 4096 points."""
        some = slice(0, N, max(N // 4096, 1))
        x, c, label = x_ND[some].double(), c_KD.double(), answer[0][some, 0].long()
        nearest = torch.cdist(x, c, compute_mode="donot_use_mm_for_euclid_dist").square().min(1).values.sum()
        return float(((x - c[label]).square().sum() - nearest) / nearest)

    forms, inputs = forms_of(kmeans_file, kmeans_file.top3), (x_ND, c_KD, -c_KD.float().square().sum(1) / 2)
    return Case("kmeans", f"N{N} D{D} K{K} {name(dtype)}", inputs, (), forms, None, 2 * N * K * D, (1e-5,), excess)


def image_starts(low, high=261, T=16384):
    """First tokens of images of `low` to `high` tokens, as many as fit the pack."""
    random = torch.Generator().manual_seed(0)
    starts = torch.randint(low, high + 1, (T // low,), generator=random).cumsum(0)
    return [0, *starts[starts <= T].tolist()]


# What makes a case, and its arguments: at awkward sizes, and at real ones (small ones without a GPU).
FLOATS = (FLOAT32, BFLOAT16) if CUDA else (FLOAT32,)
CHECKS = [
    *((moe_case, dtype, (1, 16, 3, 24, 1)) for dtype in FLOATS),  # one token, most experts empty
    *((moe_case, dtype, (1037, 72, 6, 40, 3), (0, 4)) for dtype in FLOATS),  # several tiles, the last one ragged
    *((moe_case, dtype, (512, 768, 28, 384, 6)) for dtype in FLOATS),
    *((arkd_case, *shape) for shape in ((2, 3, 5), (131, 33, 70, 0.1, 5))),
    *((arkd_case, *shape) for shape in ((2500, 129, 65), (5000, 64, 64)) if CUDA),  # strips; a median from a sample
    *((attention_case, dtype, 2, 64, [0, 100, 230, 600], 700) for dtype in FLOATS),  # within a block, over several
    *((attention_case, FLOATS[-1], 2, 64, *starts) for starts in (([0, 128, 256, 512], 512), ([0, 7], 384))),
    *((kmeans_case, *shape, dtype) for dtype in (FLOAT32, BFLOAT16) for shape in ((1, 5, 1), (3000, 70, 300))),
    *((kmeans_case, 1001, 33, 7, dtype) for dtype in (FLOAT32, BFLOAT16)),
]
TIMED = {
    "moe": [(moe_case, FLOAT32, (1024, 128, 8, 128, 2))],
    "attention": [(attention_case, FLOAT32, 4, 32, list(range(0, 1024, 69)), 1024)],
    "arkd": [(arkd_case, 512, 384, 384)],
    "kmeans": [(kmeans_case, 10_000, 64, 200)],
}
if CUDA:
    TIMED = {
        "moe": [(moe_case, BFLOAT16, (T, 768, 28, 384, K)) for T, K in ((16384, 6), (16384, 2), (65536, 6))],
        "attention": [(attention_case, BFLOAT16, 8, 128, image_starts(low), 16384) for low in (261, 21)],
        "arkd": [(arkd_case, B, 1152, 1152) for B in (2048, 32768)],
        "kmeans": [
            (kmeans_case, 1_000_000, *shape) for shape in ((384, 1000, BFLOAT16), (384, 1000), (256, 4096, BFLOAT16))
        ],
    }
COMPILED = {"moe": "grouped", "arkd": "ref"}  # too, at an operation's first shape: compiling is most of the time


# ---- checking and timing ----


def leaves(case, dtype=None):
    """The inputs anew, those that get a gradient as leaves; floats in `dtype`."""
    out = [t.to(dtype) if dtype and t.is_floating_point() else t for t in case.inputs]
    return [t.detach().clone().requires_grad_() if i in case.gradients else t for i, t in enumerate(out)]


def step(function, inputs, case):
    """Forward and backward; the value and the gradients."""
    out = function(*inputs)
    if not case.gradients:
        return [out]
    cotangent = torch.ones_like(out) if out.ndim == 0 else case.inputs[0].sin().to(out.dtype)
    return [out, *torch.autograd.grad(out, [inputs[i] for i in case.gradients], cotangent)]


def measure(case, peak):
    """One row a form: error and, given the peaks, milliseconds, TFLOP/s, share of the floor; or why it did not run."""
    exacts, rows = None, []
    for form, function in case.forms.items():
        rows.append(row := {"op": case.op, "shape": case.shape, "form": form})
        if isinstance(function, str):
            row["not_run"] = function
            continue
        try:
            if case.exact and exacts is None:
                exacts = step(case.exact, leaves(case, torch.float64), case)
            check(case, function, exacts, row)
            if peak and "wrong" not in row:
                time_form(case, function, peak, row)
        except Exception as failure:  # of one form: the others are still worth their time
            row["failed"] = f"{type(failure).__name__}: {failure}".strip().splitlines()[0]
    return rows


def check(case, function, exacts, row):
    """Add a form's errors to the row, |out - exact| / |exact| of value and gradients, and what is wrong with them."""
    torch._dynamo.reset()  # forms share their code, and a compiler's limit is on the shapes of one code
    outs = step(function, leaves(case), case)
    if case.error:
        row["errors"] = [case.error(outs[0])]
    else:
        pairs = [(a.detach().double(), b.detach()) for a, b in zip(outs, exacts, strict=True)]
        row["errors"] = [float((a - b).norm() / b.norm().clamp(min=1e-300)) for a, b in pairs]
    value, *gradients = row["errors"]
    # `not all <=`, for a NaN is over every tolerance
    if not all([value <= case.tolerance[0], *(e <= case.tolerance[1] for e in gradients)]):
        row["wrong"] = f"errors {', '.join(f'{e:.1e}' for e in row['errors'])} against {case.tolerance}"


def time_form(case, function, peak, row):
    """Add its milliseconds to the row: of the forward pass and, where there is a backward, of both."""
    inputs = leaves(case)
    with torch.no_grad():
        out = function(*inputs)
        row["forward_ms"] = ms = median_ms(lambda: function(*inputs))
    if case.gradients:
        row["step_ms"] = ms = median_ms(lambda: step(function, inputs, case))
    moved = sum(tensor.nbytes for tensor in (*inputs, *(out if isinstance(out, tuple) else (out,))))
    moved *= 3 if case.gradients else 1  # a backward moves what the forward does, and as gradients
    floor_ms = 1e3 * max(case.flops / peak["matmul_flops"], moved / peak["copy_bytes"])
    row |= {"tflops": case.flops / ms / 1e9, "gbytes_per_s": moved / ms / 1e6, "percent_of_floor": 100 * floor_ms / ms}


# ---- the parts ----


def line(row):
    """A row as it is printed."""
    head = f"{row['op']:<10}{row['shape']:<38}{row['form']:<18}"
    if bad := row.get("wrong") or row.get("failed"):
        return f"{head}WRONG OR FAILED: {bad}"
    if reason := row.get("not_run"):
        return f"{head}not run: {reason}"
    cells = ("forward_ms", "step_ms", "tflops", "percent_of_floor")
    return f"{head}error {max(row['errors']):.1e}  " + "  ".join(f"{c} {row[c]:.3f}" for c in cells if c in row)


def run_part(part, folder):
    """The checks, or one operation's figures; written and printed row by row. Returns whether all was right."""
    torch.manual_seed(0)
    peak = None if part == "checks" else peaks()
    file, rows = "checks.json" if part == "checks" else "kernels.json", {}
    if peak:
        print(f"measured: matmul {peak['matmul_flops'] / 1e12:.2f} TFLOP/s, copy {peak['copy_bytes'] / 1e9:.1f} GB/s")
        record(folder, file, "peak", peak)
    record(folder, file, "machine", machine())
    for make, *arguments in TIMED.get(part, CHECKS):
        case, form = make(*arguments), COMPILED.get(part)
        if CUDA and not rows and callable(case.forms.get(form)):
            case.forms[f"compiled {form}"] = torch.compile(case.forms[form], dynamic=False)
        new = measure(case, peak)
        rows[case.op] = rows.get(case.op, []) + new
        print(*map(line, new), sep="\n", flush=True)
        record(folder, file, case.op, rows[case.op])
        if CUDA:
            torch.cuda.empty_cache()
    return not any("wrong" in row or "failed" in row for op in rows for row in rows[op])


def run_all(folder):
    """Every part in a process of its own, in the order of their worth. Returns whether all of them were right."""
    out = ["--out", str(folder.resolve())] if folder else []
    step = ["-m", "benchmarks.speed", *out, *(["--model", "amoe-0.3b", "--tokens", "16384"] if CUDA else [])]
    own = {part: ["kernels/bench.py", "--only", part, *out] for part in ("checks", *TIMED)}
    agree = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_step.py", "-k", "compiled_steps"]
    parts = {"checks": own.pop("checks"), "agree": agree, "step": [*step, "--blocks"], **own}
    if CUDA:
        parts |= {"step-triton": [*step, "--blocks", "--kernels", "triton"], "step-whole": step}
    until, outcomes = time.monotonic() + 530, {}
    for part, words in parts.items():
        left = until - time.monotonic()
        seconds = max(1.0, left if part == "step-whole" else min(left, 120.0))
        print(f"\n---- {part}, {seconds:.0f} s at most ----", flush=True)
        try:
            status = subprocess.run([sys.executable, *words], cwd=ROOT, timeout=seconds).returncode
            outcomes[part] = f"exit status {status}" if status else "right"
        except subprocess.TimeoutExpired:
            outcomes[part] = "ran out of its time; what it had measured is written"
        record(folder, "checks.json", "parts", outcomes)
    print(*(f"{part:<14}{outcome}" for part, outcome in outcomes.items()), sep="\n")
    return all(outcome == "right" for outcome in outcomes.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--all", action="store_true", help="every part, within nine minutes (the default)")
    parser.add_argument("--only", "--op", choices=("checks", *TIMED), action="append", help="one part; repeatable")
    parser.add_argument("--out", type=Path, help="folder to write checks.json, kernels.json and step.json to")
    flags = parser.parse_args()
    if CUDA and kernels.triton is None:
        raise SystemExit("kernels/bench.py times with triton.testing on CUDA: pip install triton")
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    if not CUDA:
        print("no GPU: small shapes, and only the forms that run on a CPU. Nothing here says how fast a GPU is.")
    if flags.all or not flags.only:
        return not run_all(flags.out)
    return not all([run_part(part, flags.out) for part in flags.only])


if __name__ == "__main__":
    sys.exit(main())
