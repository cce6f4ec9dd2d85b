"""Right first, then how fast: python kernels/bench.py [--all] [--only PART] [--out DIR].

--all runs every part below in a process of its own, each within its share of nine minutes: what fails, hangs or spoils
the GPU's context costs its own part only. Results are written after every measurement.

    checks               every form of every operation at awkward sizes against float64, values and gradients
    agree                compiled against eager steps of a small model (tests/test_step.py, with pytest)
    step, step-triton    amoe-0.3b's, compiled by blocks, and packed against padded (benchmarks/speed.py)
    step-whole           the same as training compiles it, in the time that is left: minutes go to the compiler, whose
                         results a second run finds in its cache
    moe, attention, arkd, kmeans      an operation's forms at real sizes

A form that is wrong against float64 on the inputs it is timed on is not timed, and the exit status is 1. Without a GPU
shapes are small and Triton is left out: its interpreter is no measure of speed. Times are medians, of
`triton.testing.do_bench` on CUDA (which clears L2 between runs), of wall time on a CPU.

The floor of a shape is the longer of its operations at the rate of a large bfloat16 matrix product (float32 on a CPU)
and its fewest bytes, each input read and each output written once, at the rate of a large copy, both measured in the
same run. "% of floor" is floor over time: 100 is the best that machine allows.

Shape letters: T tokens, D model width, E experts, F expert width, K experts a token or centroids, B images of the
global batch, H heads, d head width, L tokens of an image, N points.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.utils.benchmark

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, also when run as a script

from common.store import write_atomically
from kernels import arkd as arkd_file
from kernels import kmeans as kmeans_file
from kernels import moe as moe_file
from kernels.arkd import arkd
from kernels.attention import attend, image_runs, mask_of
from kernels.moe import moe

if moe_file.triton is not None:
    import triton.testing

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16

# In the order of their worth, with the seconds each may take; what one leaves over is there for those after it.
PARTS = {"checks": 110, "agree": 130, "step": 130, "moe": 90, "attention": 60, "arkd": 50, "kmeans": 40}
PARTS |= {"step-triton": 130, "step-whole": 400} if CUDA else {}
SECONDS = 530  # of --all


@dataclass
class Case:
    """One operation at one shape. Pairs are of the forward pass, and of forward and backward."""

    op: str
    shape: str
    inputs: tuple
    gradients: tuple  # which inputs get one; none: the operation has no backward
    forms: dict[str, Callable | str]  # by name; a string is the reason why that form does not run here
    exact: Callable | None  # the reference, given float64 inputs
    flops: tuple
    bytes: tuple
    tolerance: tuple  # of |out - exact| / |exact|, of the value and of every gradient
    error: Callable | None = None  # of an output that is no float tensor


# ---- the operations ----


def moe_case(dtype, shape, empty=(), compiled=False):
    T, D, E, F, K = shape
    score_TE = torch.rand(T, E, device=DEVICE)
    score_TE[:, list(empty)] = -1
    expert_TK = score_TE.topk(K, dim=1).indices
    w1, w3, w2 = (torch.randn(s, device=DEVICE, dtype=dtype) * s[2] ** -0.5 for s in [(E, F, D)] * 2 + [(E, D, F)])
    inputs = (torch.randn(T, D, device=DEVICE, dtype=dtype), expert_TK, torch.rand(T, K, device=DEVICE), w1, w2, w3)
    forms = {impl: form(moe_file.choose, moe, impl, dtype) for impl in moe_file.IMPLS}
    if dtype != BFLOAT16:
        forms["grouped"] = "computes in bfloat16"
    forms |= {
        f"compiled {impl}": compiled_form(compiled, forms[impl])
        for impl in (("grouped", "triton") if CUDA else ("ref",))
    }
    flops = 2 * T * K * 3 * D * F  # three products forward; each has two in the backward
    read = w1.element_size() * (2 * T * D + 3 * E * F * D) + 12 * T * K
    sizes, tolerance = ((flops, 3 * flops), (read, 3 * read)), 2e-2 if dtype == BFLOAT16 else 1e-5
    shape = f"T{T} D{D} E{E} F{F} K{K} {name(dtype)}"
    return Case("moe", shape, inputs, (0, 2, 3, 4, 5), forms, lambda *a: moe(*a, "ref"), *sizes, (tolerance, tolerance))


def arkd_case(B, D, teacher_D, spread=1.0, duplicates=0, compiled=False):
    student_BD, teacher_BD = torch.randn(B, D, device=DEVICE), spread * torch.randn(B, teacher_D, device=DEVICE)
    student_BD[:duplicates] = student_BD[0]
    loss = lambda s, t, impl: arkd(s, t, "arkd", impl)  # noqa: E731
    forms = {impl: form(arkd_file.choose, loss, impl, FLOAT32, B) for impl in arkd_file.IMPLS}
    if B > arkd_file.MEDIAN_EXACT:
        forms["ref"] = f"its {B} x {B} tensors would take {B * B * 4 / 2**30:.0f} GiB each"
    forms["compiled ref"] = compiled_form(compiled, forms["ref"])
    gram, read = (
        2 * B * B * D,
        4 * 2 * B * D,
    )  # two for the means, two for the loss; in the backward two and weights @ z
    # A gate is a step: in float32 a pair or two fall on the other side of the median, about 1 / B of the gradient.
    sizes = (4 * gram, 7 * gram), (read, 2 * read), (1e-4, 2 / B)
    exact = lambda s, t: loss(s, t, "chunked")  # noqa: E731
    return Case("arkd", f"B{B} D{D} float32", (student_BD, teacher_BD), (0,), forms, exact, *sizes)


def attention_case(dtype, H, d, starts, T, compiled=False):
    starts = torch.tensor(starts, dtype=torch.int32)
    extents, mask = image_runs(starts, T), mask_of(starts, T, DEVICE)
    q, k, v = (torch.randn(T, H, d, device=DEVICE, dtype=dtype) for _ in range(3))
    sdpa = lambda *a: attend(*a[:3], extents, a[3])  # noqa: E731
    flex = compiled_form(compiled, lambda *a: attend(*a[:3], mask, a[3])) if CUDA else "has gradients on CUDA only"
    lengths = [*starts.diff().tolist(), T - int(starts[-1])]
    flops, size = 4 * H * d * sum(n * n for n in lengths), 4 * T * H * d * q.element_size()
    # A flash backward is 2.5 forwards: it computes the scores once more.
    # 1e-4: some of CUDA's float32 attention splits its operands into three TF32 products
    sizes = (flops, 3.5 * flops), (size, 3 * size), (2e-2, 2e-2) if dtype == BFLOAT16 else (1e-4, 1e-4)
    inputs, shape = (q, k, v, torch.randn(H, device=DEVICE)), f"T{T} H{H} d{d} M{len(lengths)} {name(dtype)}"
    return Case("attention", shape, inputs, (0, 1, 2, 3), {"ref": sdpa, "compiled flex": flex}, sdpa, *sizes)


def kmeans_case(N, D, K, dtype=FLOAT32):
    # bfloat16 products are exact and the sums are float32: the same tolerance
    x_ND, c_KD = torch.randn(N, D, device=DEVICE, dtype=dtype), torch.randn(K, D, device=DEVICE, dtype=dtype)
    bias_K = -c_KD.float().square().sum(1) / 2

    def excess(answer):
        """How much further the labelled centroids are than the nearest ones, relative; over about 4096 points."""
        some = slice(0, N, max(N // 4096, 1))
        x, c, label = x_ND[some].double(), c_KD.double(), answer[0][some, 0].long()
        nearest = torch.cdist(x, c, compute_mode="donot_use_mm_for_euclid_dist").square().min(1).values.sum()
        return float(((x - c[label]).square().sum() - nearest) / nearest)

    forms = {impl: lambda *a, impl=impl: kmeans_file.top3(*a, impl=impl) for impl in ("ref", "triton")}
    if not CUDA:
        forms["triton"] = "needs a CUDA device"
    sizes = (2 * N * K * D,) * 2, (x_ND.element_size() * (N * D + K * D) + 28 * N,) * 2, (1e-5,)
    return Case("kmeans", f"N{N} D{D} K{K} {name(dtype)}", (x_ND, c_KD, bias_K), (), forms, None, *sizes, excess)


def image_starts(low, high=261, T=16384):
    """First tokens of images of `low` to `high` tokens, as many as fit the pack."""
    random = torch.Generator().manual_seed(0)
    starts = torch.randint(low, high + 1, (T // low,), generator=random).cumsum(0)
    return [0, *starts[starts <= T].tolist()]


# The arguments of every operation's cases, at awkward sizes and at real ones; the last says whether to compile, which
# is most of the time.
BOTH = (FLOAT32, BFLOAT16) if CUDA else (FLOAT32,)
CHECKS = {
    # one token, most experts empty; several tiles, the last one ragged
    "moe": [(dtype, *rest) for dtype in BOTH for rest in
            (((1, 16, 3, 24, 1), ()), ((1037, 72, 6, 40, 3), (0, 4)), ((512, 768, 28, 384, 6), ()))],
    # on CUDA also several strips, then a median from a sample
    "arkd": [(2, 3, 5), (131, 33, 70, 0.1, 5), *([(2500, 129, 65), (5000, 64, 64)] if CUDA else [])],
    # images within a block, on its edges, over several; padding, none; an odd end
    "attention": [(dtype, 2, 64, starts, T, CUDA) for dtype in BOTH
                  for starts, T in (([0, 100, 230, 600], 700), ([0, 128, 256, 512], 512), ([0, 7], 384))
                  if dtype == BFLOAT16 or not CUDA or T == 700],
    "kmeans": [(*shape, dtype) for dtype in (FLOAT32, BFLOAT16)
               for shape in ((1001, 33, 7), (1, 5, 1), (3000, 70, 300))],
}  # fmt: skip
CASES = {
    "moe": [(BFLOAT16, (16384, 768, 28, 384, 6), (), True), (BFLOAT16, (16384, 768, 28, 384, 2)),
            (BFLOAT16, (65536, 768, 28, 384, 6))],
    "attention": [(BFLOAT16, 8, 128, image_starts(low), 16384, True) for low in (261, 21)],
    "arkd": [(2048, 1152, 1152, 1.0, 0, True), (32768, 1152, 1152, 1.0, 0, True)],
    "kmeans": [(1_000_000, 384, 1000, BFLOAT16), (1_000_000, 384, 1000, FLOAT32), (1_000_000, 256, 4096, BFLOAT16)],
} if CUDA else {
    "moe": [(FLOAT32, (1024, 128, 8, 128, 2))],
    "attention": [(FLOAT32, 4, 32, list(range(0, 1024, 69)), 1024)],
    "arkd": [(512, 384, 384)],
    "kmeans": [(10_000, 64, 200)],
}  # fmt: skip
MAKE = {"moe": moe_case, "attention": attention_case, "arkd": arkd_case, "kmeans": kmeans_case}


def form(choose, function, impl, *arguments):
    """`function` with that impl, or the reason why it does not run or is not timed here."""
    try:
        choose(impl, DEVICE, *arguments)
    except ValueError as refusal:
        return str(refusal)
    interpreted = impl == "triton" and not CUDA
    return "Triton's interpreter is no measure of speed" if interpreted else lambda *a: function(*a, impl)


def compiled_form(compiled, function):
    if isinstance(function, str):
        return function
    # A graph break is no error here: ref reads the counts on the host.
    return torch.compile(function, dynamic=False) if compiled else "not compiled here"


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


def median_ms(function, device=DEVICE):
    """(median milliseconds, n)."""
    if device.type == "cuda":
        times = triton.testing.do_bench(function, warmup=100, rep=400, return_mode="all")
        return statistics.median(times), len(times)
    timer = torch.utils.benchmark.Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    times = timer.blocked_autorange(min_run_time=0.5)
    return 1e3 * times.median, len(times.times) * times.number_per_run


def peaks():
    """Measured FLOP/s of a large matrix product and bytes/s of a large copy, read and written."""
    n, dtype = (8192, torch.bfloat16) if CUDA else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    source = torch.randn(2**28 if CUDA else 2**24, device=DEVICE)
    target = torch.empty_like(source)
    product_ms, copy_ms = median_ms(lambda: a @ b)[0], median_ms(lambda: target.copy_(source))[0]
    return {"matmul_flops": 2 * n**3 / product_ms * 1e3, "copy_bytes": 8 * source.numel() / copy_ms * 1e3}


def measure(case, peak):
    """One row a form: error and, given the peaks, milliseconds, TFLOP/s, share of the floor; or why it did not run."""
    if case.gradients and case.op != "arkd":
        case.cotangent = torch.randn_like(case.inputs[0])
    exacts = step(case.exact, leaves(case, torch.float64), case) if case.exact else None
    rows = []
    for form_name, function in case.forms.items():
        rows.append({"op": case.op, "shape": case.shape, "form": form_name})
        if isinstance(function, str):
            rows[-1]["not_run"] = function
            continue
        try:
            check(case, function, exacts, rows[-1])
            if peak and "wrong" not in rows[-1]:
                time_form(case, function, peak, rows[-1])
        except Exception as failure:  # of one form: the others are still worth their time
            said = str(failure).strip().splitlines()[:1]
            rows[-1]["failed"] = f"{type(failure).__name__}: {''.join(said)}"
    return rows


def check(case, function, exacts, row):
    """Add a form's errors to the row, and what is wrong with them."""
    torch._dynamo.reset()  # forms share their code, and a compiler's limit is on the shapes of one code
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    outs = step(function, leaves(case), case)
    if CUDA:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    value, *gradients = row["errors"] = [case.error(outs[0])] if case.error else errors(outs, exacts)
    # `not all <=`, for a NaN is over every tolerance
    if not all([value <= case.tolerance[0], *(e <= case.tolerance[1] for e in gradients)]):
        row["wrong"] = f"errors {', '.join(f'{e:.1e}' for e in row['errors'])} against {case.tolerance}"


def time_form(case, function, peak, row):
    inputs = leaves(case)
    with torch.no_grad():
        row["forward_ms"], row["n_forward"] = median_ms(lambda: function(*inputs))
    if case.gradients:
        row["step_ms"], row["n_step"] = median_ms(lambda: step(function, inputs, case))
    ms, part = (row["step_ms"], 1) if case.gradients else (row["forward_ms"], 0)
    row |= {"tflops": case.flops[part] / ms / 1e9, "gbytes_per_s": case.bytes[part] / ms / 1e6}
    floor = max(case.flops[part] / peak["matmul_flops"], case.bytes[part] / peak["copy_bytes"]) * 1e3
    row |= {"floor_ms": floor, "percent_of_floor": 100 * floor / ms}


def record(folder, file, key, value):
    """Put {key: value} into a JSON file of the folder, atomically; no folder, no file."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    text = json.dumps(content | {key: value}, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


# ---- the parts ----


def machine():
    return {
        "machine": torch.cuda.get_device_name() if CUDA else platform.processor() or platform.machine(),
        "device": DEVICE.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": moe_file.triton and moe_file.triton.__version__,
    }


HEAD = f"{'op':<10}{'shape':<38}{'form':<18}{'error':>9}{'forward ms':>12}{'step ms':>10}{'TFLOP/s':>9}{'% floor':>9}"


def line(row):
    head = f"{row['op']:<10}{row['shape']:<38}{row['form']:<18}"
    if reason := row.get("not_run"):
        return f"{head}  not run: {reason}"
    if bad := row.get("wrong") or row.get("failed"):
        return f"{head}  WRONG OR FAILED: {bad}"
    text = f"{head}{max(row['errors']):>9.1e}"
    if "forward_ms" in row:
        step_ms = f"{row['step_ms']:.3f}" if "step_ms" in row else "-"
        text += f"{row['forward_ms']:>12.3f}{step_ms:>10}{row['tflops']:>9.3f}{row['percent_of_floor']:>9.1f}"
    return text


def run_part(part, folder):
    """The checks, or one operation's figures; written and printed row by row. Returns whether all was right."""
    torch.manual_seed(0)
    if part == "checks":
        file, peak, cases = "checks.json", None, CHECKS
    else:
        file, peak, cases = "kernels.json", peaks(), {part: CASES[part]}
        print(f"measured: matmul {peak['matmul_flops'] / 1e12:.2f} TFLOP/s, copy {peak['copy_bytes'] / 1e9:.1f} GB/s")
        record(folder, file, "peak", peak)
    record(folder, file, "machine", machine())
    print(HEAD, flush=True)
    rows = {op: [] for op in cases}
    for op, arguments in [(op, arguments) for op, some in cases.items() for arguments in some]:
        case = MAKE[op](*arguments)
        try:
            new = measure(case, peak)
        except Exception as failure:  # the reference itself: out of memory, say
            new = [{"op": op, "shape": case.shape, "form": "reference", "failed": f"{failure}"[:500]}]
        rows[op] += new
        print(*map(line, new), sep="\n", flush=True)
        record(folder, file, op, rows[op])
        if CUDA:
            torch.cuda.empty_cache()
    return not any("wrong" in row or "failed" in row for op in rows for row in rows[op])


def commands(out):
    """{part: words after the interpreter's} of all parts."""
    size = ["--model", "amoe-0.3b", "--tokens", "16384"] if CUDA else []
    whole, blocks = (["-m", "benchmarks.speed", *out, "step", *more, *size] for more in ([], ["--blocks"]))
    agree = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_step.py", "-k", "compiled_steps"]
    steps = {"agree": agree, "step": blocks, "step-triton": [*blocks, "--kernels", "triton"], "step-whole": whole}
    return {part: ["kernels/bench.py", "--only", part, *out] for part in PARTS} | steps


def run_all(folder):
    """Every part in a process of its own, within the time there is. Returns whether all of them were right."""
    until, outcomes = time.monotonic() + SECONDS, {}
    words = commands(["--out", str(folder.resolve())] if folder else [])
    for part, seconds in PARTS.items():
        began, left = time.monotonic(), until - time.monotonic()
        print(f"\n---- {part}, {min(seconds, left):.0f} s at most ----", flush=True)
        if left < 15:
            outcomes[part] = "not begun: no time was left"
        else:
            try:
                done = subprocess.run([sys.executable, *words[part]], cwd=ROOT, timeout=min(seconds, left))
                outcomes[part] = "right" if done.returncode == 0 else f"exit status {done.returncode}"
            except subprocess.TimeoutExpired:
                outcomes[part] = "ran out of its time; what it had measured is written"
        outcomes[part] += f", {time.monotonic() - began:.0f} s"
        record(folder, "checks.json", "parts", outcomes)
    print(*(f"{part:<14}{outcome}" for part, outcome in outcomes.items()), sep="\n")
    return all(outcome.startswith("right") for outcome in outcomes.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parts = ("checks", *CASES)
    parser.add_argument("--all", action="store_true", help="every part, within nine minutes (the default)")
    parser.add_argument("--only", "--op", choices=parts, action="append", help="one part in this process; repeatable")
    parser.add_argument("--out", type=Path, help="folder to write checks.json, kernels.json and step.json to")
    flags = parser.parse_args()
    if CUDA and moe_file.triton is None:
        raise SystemExit("kernels/bench.py times with triton.testing on CUDA: pip install triton")
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    if not CUDA:
        print("no GPU: small shapes, and only the forms that run on a CPU. Nothing here says how fast a GPU is.")
    if flags.all or not flags.only:
        return not run_all(flags.out)
    return not all([run_part(part, flags.out) for part in flags.only])


if __name__ == "__main__":
    sys.exit(main())
