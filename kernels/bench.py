"""Right first, then how fast: python kernels/bench.py [--op OP] [--all] [--out DIR] [--compiled].

Each form of an operation is first compared with a float64 reference on the inputs it is timed on, values and gradients;
one that is wrong is not timed, and the exit status is 1. Times are medians: of `triton.testing.do_bench` on CUDA (which
clears L2 between runs), of wall time on a CPU, where shapes are small and Triton's interpreter is never timed.

The floor of a shape is the longer of its operations at the rate of a large bfloat16 matrix product (float32 on a CPU)
and its fewest bytes, each input read and each output written once, at the rate of a large copy, both measured in the
same run. "% of floor" is floor over time: 100 is the best that machine allows.

Shape letters: T tokens, D model width, E experts, F expert width, K experts a token or centroids, B images of the
global batch, H heads, d head width, L tokens of an image, N points.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, also when run as a script

from kernels import arkd as arkd_file
from kernels import moe as moe_file
from kernels.arkd import arkd
from kernels.attention import attend, block_mask, runs
from kernels.moe import moe

if moe_file.triton is not None:
    import triton.testing

OPS = ("moe", "arkd", "attention", "kmeans")


@dataclass
class Case:
    """One operation at one shape."""

    op: str
    shape: str
    inputs: tuple
    gradients: tuple  # which inputs get one; none: the operation has no backward
    forms: dict[str, Callable | str]  # by name; a string is the reason why that form does not run here
    exact: Callable  # the reference, given float64 inputs
    flops: tuple  # of the forward, of forward and backward
    bytes: tuple
    tolerance: tuple  # of |out - exact| / |exact|, of the value and of every gradient
    error: Callable | None = None  # of an output that is no float tensor


# ---- the operations ----


def moe_cases(device, compiled):
    if device.type == "cuda":
        dtype, tolerance = torch.bfloat16, (2e-2, 2e-2)
        shapes = [(16384, 768, 28, 384, 6), (65536, 768, 28, 384, 6), (16384, 768, 28, 384, 2)]
    else:
        dtype, tolerance = torch.float32, (1e-5, 1e-5)
        shapes = [(1024, 128, 8, 128, 2)]
    for T, D, E, F, K in shapes:
        expert_TK = torch.rand(T, E, device=device).topk(K, dim=1).indices
        w1, w3, w2 = (torch.randn(s, device=device, dtype=dtype) * s[2] ** -0.5 for s in [(E, F, D)] * 2 + [(E, D, F)])
        x_TD, weight_TK = torch.randn(T, D, device=device, dtype=dtype), torch.rand(T, K, device=device)
        forms = {impl: form(moe_file.choose, moe, impl, device, dtype) for impl in moe_file.IMPLS}
        auto = moe_file.choose("auto", device, dtype)
        forms[f"compiled {auto}"] = compile_if(compiled, forms[auto])
        flops = 2 * T * K * 3 * D * F  # three products forward; each has two in the backward
        size = x_TD.element_size()
        read = size * (2 * T * D + 3 * E * F * D) + 12 * T * K
        yield Case(
            *("moe", f"T{T} D{D} E{E} F{F} K{K} {name(dtype)}", (x_TD, expert_TK, weight_TK, w1, w2, w3)),
            *((0, 2, 3, 4, 5), forms, lambda *a: moe(*a, "ref"), (flops, 3 * flops)),
            *((read, 3 * read), tolerance),
        )


def arkd_cases(device, compiled):
    shapes = [(2048, 1152), (32768, 1152)] if device.type == "cuda" else [(512, 384)]
    for B, D in shapes:
        student_BD, teacher_BD = (torch.randn(B, D, device=device) for _ in range(2))
        forms = {impl: form(arkd_file.choose, relational, impl, device, torch.float32, B) for impl in arkd_file.IMPLS}
        if B > arkd_file.MEDIAN_EXACT:
            forms["ref"] = f"its {B} x {B} tensors would take {B * B * 4 / 2**30:.0f} GiB each"
        forms["compiled ref"] = compile_if(compiled, forms["ref"])
        gram = 2 * B * B * D  # two for the means, two for the loss; in the backward two again and weights @ z
        flops, read = (4 * gram, 7 * gram), 4 * 2 * B * D
        exact = lambda s, t: arkd(s, t, impl="chunked")  # noqa: E731
        # A gate is a step: in float32 a pair or two fall on the other side of the median, about 1 / B of the gradient.
        tolerance = (1e-4, 2 / B)
        yield Case(
            *("arkd", f"B{B} D{D} float32", (student_BD, teacher_BD), (0,), forms, exact, flops),
            *((read, 2 * read), tolerance),
        )


def relational(student_BD, teacher_BD, impl):
    return arkd(student_BD, teacher_BD, "arkd", impl)


def attention_cases(device, compiled):
    cuda = device.type == "cuda"
    dtype, H, d, L = (torch.bfloat16, 8, 128, 261) if cuda else (torch.float32, 4, 32, 69)
    T = 16384 if cuda else 1024
    images = T // L
    starts = torch.arange(images + 1, dtype=torch.int32) * L
    groups = runs(starts, T)
    q, k, v = (torch.randn(T, H, d, device=device, dtype=dtype) for _ in range(3))
    sinks = torch.randn(H, device=device)
    sdpa = lambda *a: attend(*a[:3], groups, a[3])  # noqa: E731
    forms = {
        "ref": sdpa,
        "compiled flex": "FlexAttention has gradients on CUDA only; SDPA on runs of equal images here",
    }
    if cuda:
        mask = block_mask(starts, T, device)
        forms["compiled flex"] = compile_if(compiled, lambda *a: attend(*a[:3], mask, a[3]))
    forms["compiled ref"] = compile_if(compiled, sdpa)
    flops = 4 * H * d * (images * L * L + (T - images * L) ** 2)
    size = 4 * T * H * d * q.element_size()
    shape = f"T{T} H{H} d{d} L{L} {name(dtype)}"
    tolerance = (2e-2, 2e-2) if cuda else (1e-5, 1e-5)
    # A flash backward is 2.5 forwards: it computes the scores once more.
    yield Case(
        "attention",
        shape,
        (q, k, v, sinks),
        (0, 1, 2, 3),
        forms,
        sdpa,
        (flops, 3.5 * flops),
        (size, 3 * size),
        tolerance,
    )


def kmeans_cases(device, compiled):
    if importlib.util.find_spec("kernels.kmeans") is None:
        return
    from kernels.kmeans import assign

    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    shapes = [(1_000_000, 384, 1000), (1_000_000, 256, 4096)] if device.type == "cuda" else [(10_000, 64, 200)]
    for N, D, K in shapes:
        x_ND, c_KD = torch.randn(N, D, device=device), torch.randn(K, D, device=device)

        def excess(assigned_N, x_ND=x_ND, c_KD=c_KD):
            """How much further the assigned centroids are than the nearest ones, relative; over about 4096 points."""
            some = slice(0, len(x_ND), max(len(x_ND) // 4096, 1))
            x, c = x_ND[some].double(), c_KD.double()
            nearest = torch.cdist(x, c).square().min(1).values.sum()
            return float(((x - c[assigned_N[some].long()]).square().sum() - nearest) / nearest)

        forms = {}
        for impl in ("ref", "triton"):
            forms[impl] = lambda x, c, impl=impl: first(assign(x, c, impl=impl))
            if impl == "triton" and device.type != "cuda":
                forms[impl] = "needs a CUDA device"
        forms["compiled ref"] = compile_if(compiled, forms["ref"])
        sizes = (2 * N * K * D,) * 2, (4 * (N * D + K * D + N),) * 2
        yield Case("kmeans", f"N{N} D{D} K{K} float32", (x_ND, c_KD), (), forms, None, *sizes, (1e-5,), excess)


def form(choose, function, impl, device, *arguments):
    """`function` with that impl, or the reason why it does not run or is not timed here."""
    try:
        choose(impl, device, *arguments)
    except ValueError as refusal:
        return str(refusal)
    if impl == "triton" and device.type != "cuda":
        return "Triton's interpreter is no measure of speed"
    return lambda *a: function(*a, impl)


def compile_if(compiled, function):
    if isinstance(function, str):
        return function
    # A graph break is no error here: ref reads the counts on the host.
    return torch.compile(function, dynamic=False) if compiled else "not compiled: no GPU, and --compiled was not given"


# ---- checking and timing ----


def name(dtype):
    return str(dtype).removeprefix("torch.")


def leaves(case, dtype=None):
    """The inputs anew, those that get a gradient as leaves; floats in `dtype`."""
    out = [t.to(dtype) if dtype and t.is_floating_point() else t for t in case.inputs]
    return [t.detach().clone().requires_grad_() if i in case.gradients else t for i, t in enumerate(out)]


def step(function, inputs, case):
    """Forward and backward; the value and the gradients."""
    out = function(*inputs)
    if not case.gradients:
        return [out]
    cotangent = torch.ones_like(out) if out.ndim == 0 else case.cotangent.to(out.dtype)
    return [out, *torch.autograd.grad(out, [inputs[i] for i in case.gradients], cotangent)]


def errors(outs, exacts):
    """|out - exact| / |exact| of the value and of each gradient."""
    pairs = zip([t.detach().double() for t in outs], [t.detach() for t in exacts], strict=True)
    return [float((a - b).norm() / b.norm().clamp(min=1e-300)) for a, b in pairs]


def median_ms(function, device):
    """(median milliseconds, n)."""
    if device.type == "cuda":
        times = triton.testing.do_bench(function, warmup=100, rep=400, return_mode="all")
    else:
        function()
        times, until = [], time.perf_counter() + 0.5
        while len(times) < 5 or (time.perf_counter() < until and len(times) < 100):
            began = time.perf_counter()
            function()
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times), len(times)


def peaks(device):
    """Measured FLOP/s of a large matrix product and bytes/s of a large copy, read and written."""
    cuda = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(2**28 if cuda else 2**24, device=device)
    target = torch.empty_like(source)
    product_ms, _ = median_ms(lambda: a @ b, device)
    copy_ms, _ = median_ms(lambda: target.copy_(source), device)
    return {"matmul_flops": 2 * n**3 / product_ms * 1e3, "copy_bytes": 8 * source.numel() / copy_ms * 1e3}


def measure(case, peak, device):
    """One row a form: error, milliseconds, TFLOP/s and share of the floor, or why it did not run."""
    if case.gradients and case.op != "arkd":
        case.cotangent = torch.randn_like(case.inputs[0])
    exacts = step(case.exact, leaves(case, torch.float64), case) if case.exact else None
    floor = [
        max(f / peak["matmul_flops"], b / peak["copy_bytes"]) * 1e3 for f, b in zip(case.flops, case.bytes, strict=True)
    ]
    rows = []
    for form_name, function in case.forms.items():
        row = {"op": case.op, "shape": case.shape, "form": form_name}
        rows.append(row)
        if isinstance(function, str):
            row["not_run"] = function
            continue
        try:
            inputs = leaves(case)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            outs = step(function, inputs, case)
            if device.type == "cuda":
                row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            row["errors"] = [case.error(outs[0])] if case.error else errors(outs, exacts)
            value, *gradients = row["errors"]
            # `not all <=`, for a NaN is over every tolerance
            if not all([value <= case.tolerance[0], *(e <= case.tolerance[1] for e in gradients)]):
                row["wrong"] = f"errors {', '.join(f'{e:.1e}' for e in row['errors'])} against {case.tolerance}"
                continue
            with torch.no_grad():
                row["forward_ms"], row["n_forward"] = median_ms(lambda f=function, i=inputs: f(*i), device)
            if case.gradients:
                row["step_ms"], row["n_step"] = median_ms(lambda f=function, i=inputs: step(f, i, case), device)
        except Exception as failure:  # of one form: the others are still worth their time
            row["failed"] = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure) else ''}"
            continue
        ms, part = (row["step_ms"], 1) if case.gradients else (row["forward_ms"], 0)
        row |= {"tflops": case.flops[part] / ms / 1e9, "gbytes_per_s": case.bytes[part] / ms / 1e6}
        row |= {"floor_ms": floor[part], "percent_of_floor": 100 * floor[part] / ms}
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--op", choices=OPS, action="append", help="an operation to measure, may be repeated; default all"
    )
    parser.add_argument("--all", action="store_true", help="every operation (the default)")
    parser.add_argument("--out", type=Path, help="folder to write kernels.json to")
    parser.add_argument("--compiled", action="store_true", help="torch.compile on a CPU too; always done on CUDA")
    flags = parser.parse_args()
    ops = OPS if flags.all or not flags.op else flags.op

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    if cuda and moe_file.triton is None:
        raise SystemExit("kernels/bench.py times with triton.testing on CUDA: pip install triton")
    torch.manual_seed(0)
    report = {
        "machine": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": moe_file.triton and moe_file.triton.__version__,
        "argv": sys.argv[1:],
    }
    print(", ".join(f"{key} {value}" for key, value in report.items() if key != "argv"))
    if not cuda:
        print("no GPU: small shapes, and only the forms that run on a CPU. Nothing here says how fast a GPU is.")
    report["peak"] = peak = peaks(device)
    print(f"measured peaks: matmul {peak['matmul_flops'] / 1e12:.2f} TFLOP/s, copy {peak['copy_bytes'] / 1e9:.1f} GB/s")

    cases = {"moe": moe_cases, "arkd": arkd_cases, "attention": attention_cases, "kmeans": kmeans_cases}
    report["rows"] = rows = []
    for op in ops:
        made = 0
        for case in cases[op](device, cuda or flags.compiled):
            made += 1
            rows += measure(case, peak, device)
        if not made:
            print(f"{op}: kernels/{op}.py is not here")
    if flags.out:
        flags.out.mkdir(parents=True, exist_ok=True)
        (flags.out / "kernels.json").write_text(json.dumps(report, indent=1) + "\n")

    for row in rows:
        if reason := row.get("not_run"):
            print(f"not run: {row['op']} {row['form']} at {row['shape']}: {reason}")
    print(
        f"{'op':<10}{'shape':<36}{'form':<18}{'error':>9}{'forward ms':>12}{'step ms':>10}{'TFLOP/s':>9}{'% floor':>9}"
    )
    for row in rows:
        head = f"{row['op']:<10}{row['shape']:<36}{row['form']:<18}"
        if bad := row.get("wrong") or row.get("failed"):
            print(f"{head}  WRONG OR FAILED: {bad}")
        elif "forward_ms" in row:
            step_ms = f"{row['step_ms']:.3f}" if "step_ms" in row else "-"
            print(
                f"{head}{max(row['errors']):>9.1e}{row['forward_ms']:>12.3f}{step_ms:>10}"
                f"{row['tflops']:>9.3f}{row['percent_of_floor']:>9.1f}"
            )
    return any("wrong" in row or "failed" in row for row in rows)


if __name__ == "__main__":
    sys.exit(main())
