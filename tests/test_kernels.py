"""kernels/moe.py and kernels/arkd.py against definitions written here in float64, values and gradients.

Without a GPU the Triton kernels run in its interpreter, which computes what the kernels say and nothing of their speed.

Shape letters: as in the two files.
"""

import itertools
import json
import os
import subprocess
import sys
import unittest.mock
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it once, when it is first imported: see conftest.py

import torch.multiprocessing
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import arkd as arkd_file
from kernels import bench
from kernels import moe as moe_file
from kernels.arkd import arkd
from kernels.moe import moe
from kernels.norm import rms_norm
from kernels.rope import rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parent.parent
no_triton = kernels.why_not_triton(torch.device(DEVICE), torch.float32, moe_file.DTYPES)
needs_triton = pytest.mark.skipif(no_triton is not None, reason=f"triton {no_triton}")
FORMS = ["ref", pytest.param("triton", marks=needs_triton)]


def error(out, expected):
    """|out - expected| / |expected|, and |out| where nothing is expected; NaN fails every comparison."""
    expected = expected.double().cpu()
    return float((out.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-12))


# ---- the mixture of experts ----


def moe_dense(x_TD, expert_TK, weight_TK, w1_EFD, w2_EDF, w3_EFD):
    """Every expert on every token, then the chosen ones: nothing of the order, the counts or the tiles."""
    h1, h3 = (torch.einsum("td,efd->tef", x_TD, w) for w in (w1_EFD, w3_EFD))
    y_TED = torch.einsum("tef,edf->ted", h1 / (1 + torch.exp(-h1)) * h3, w2_EDF)
    return sum(weight_TK[:, k, None] * y_TED[range(len(x_TD)), expert_TK[:, k]] for k in range(expert_TK.shape[1]))


def moe_inputs(T, D, E, F, K, empty=(), padding=0, seed=0):
    """Arguments of moe in float64; experts in `empty` are never chosen, the last `padding` rows of x are zero."""
    random = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    score_TE = torch.rand(T, E, generator=random)
    score_TE[:, list(empty)] = -1
    x_TD = normal(T, D)
    x_TD[T - padding :] = 0
    weight_TK = torch.rand(T, K, generator=random, dtype=torch.float64)
    weights = normal(E, F, D) / D**0.5, normal(E, D, F) / F**0.5, normal(E, F, D) / D**0.5
    return x_TD, score_TE.topk(K, dim=1).indices, weight_TK, *weights


def values_and_gradients(function, inputs, dtype):
    """The output and the gradients by every float input, of a fixed random cotangent."""
    leaves = [t.to(DEVICE, dtype if t.is_floating_point() else None) for t in inputs]
    floats = [t.requires_grad_() for t in leaves if t.is_floating_point()]
    y_TD = function(*leaves)
    cotangent = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y_TD.detach(), *torch.autograd.grad(y_TD, floats, cotangent.to(y_TD))]


MOE_SHAPES = [
    pytest.param(dict(T=1, D=5, E=3, F=7, K=1), id="one-token"),
    pytest.param(dict(T=37, D=40, E=5, F=24, K=2, empty=(1, 4)), id="empty-experts"),
    pytest.param(dict(T=150, D=70, E=3, F=67, K=2, padding=9), id="odd-sizes-many-tiles-padding"),
    pytest.param(dict(T=64, D=32, E=2, F=32, K=2), id="exactly-one-tile-an-expert"),
    pytest.param(dict(T=0, D=8, E=2, F=8, K=1), id="no-tokens"),
]


@pytest.mark.parametrize("shape", MOE_SHAPES)
@pytest.mark.parametrize("impl", FORMS)
def test_moe_values_and_gradients_match_the_dense_definition(impl, shape):
    """Catches: a tile running past its expert's end (`real` from N instead of end_E); dh1 without (1 + h1 (1 - gate));
    dweight taken after the weight; rows scattered to `row` instead of `place`; dw of an empty expert left unwritten."""
    inputs = moe_inputs(**shape)
    expected = values_and_gradients(moe_dense, inputs, torch.float64)
    out = values_and_gradients(lambda *a: moe(*a, impl), inputs, torch.float32)
    assert [t.shape for t in out] == [t.shape for t in expected]
    assert max(error(a, b) for a, b in zip(out, expected, strict=True)) < 2e-6


@needs_triton
def test_moe_in_half_precision_keeps_float32_sums():
    """Catches: accumulators in the operands' dtype (`tl.zeros(..., dtype=x.dtype)`), 3 bits worse at D = 512.

    bfloat16, which the interpreter cannot multiply, is tested where there is a GPU.
    """
    inputs = moe_inputs(T=40, D=512, E=3, F=40, K=2)
    expected = values_and_gradients(moe_dense, inputs, torch.float64)
    for dtype, allowed in [(torch.float16, 2e-3)] + [(torch.bfloat16, 1e-2)] * (DEVICE == "cuda"):
        out = values_and_gradients(lambda *a: moe(*a, "triton"), inputs, dtype)
        assert max(error(a, b) for a, b in zip(out, expected, strict=True)) < allowed


@needs_triton
def test_moe_under_autocast_computes_in_half_and_gives_masters_float32_gradients():
    """Catches: `weights.to(dtype)` outside the Function, whose gradients then pass through 16 bits."""
    inputs = moe_inputs(T=20, D=16, E=3, F=24, K=2)
    expected = values_and_gradients(moe_dense, inputs, torch.float64)
    with torch.autocast(DEVICE, torch.float16):
        out = values_and_gradients(lambda *a: moe(*a, "triton"), inputs, torch.float32)
    assert all(t.dtype == torch.float32 for t in out)
    assert 1e-5 < error(out[0], expected[0]) < 2e-3  # it did run in float16
    assert not torch.equal(out[3], out[3].half().float())
    assert max(error(a, b) for a, b in zip(out, expected, strict=True)) < 2e-3


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped_mm")
def test_grouped_mm_form_matches_the_dense_definition():
    """Catches: the groups' starts passed for their ends; w1 and w3 exchanged; a gradient gathered through the order in
    the place of its inverse; K neighbours summed that belong to different tokens."""
    for shape in (dict(T=30, D=16, E=4, F=24, K=1), dict(T=37, D=40, E=5, F=24, K=3, empty=(1, 4), padding=5)):
        inputs = moe_inputs(**shape)
        expected = values_and_gradients(moe_dense, inputs, torch.float64)
        out = values_and_gradients(moe_file.moe_grouped, inputs, torch.bfloat16)
        assert max(error(a, b) for a, b in zip(out, expected, strict=True)) < 2e-2


@pytest.mark.parametrize("counts", [[0, 0, 0], [1, 0, 129], [128, 128, 128], [0, 300, 1], [5]])
def test_schedule_gives_every_row_one_tile_within_the_bound(counts):
    """Catches: `n_rows // block` tiles without the `+ E`; searchsorted with right=False, which visits empty experts."""
    count_E = torch.tensor(counts)
    end_E, covered = count_E.cumsum(0), []
    for expert, row, end in moe_file.schedule(end_E, int(count_E.sum()), 128).tolist():
        if expert < len(counts):
            covered += [(expert, r) for r in range(row, min(row + 128, end))]
    expected = [(e, r) for e in range(len(counts)) for r in range(int(end_E[e]) - counts[e], int(end_E[e]))]
    assert covered == expected


def test_moe_impl_that_cannot_run_says_why():
    """Catches: a silent fallback (`return "ref"` for whatever cannot run)."""
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="no implementation 'fast'"):
        moe_file.choose("fast", cpu)
    with pytest.raises(ValueError, match="'grouped' needs a CUDA device"):
        moe_file.choose("grouped", cpu)
    with pytest.raises(ValueError, match=r"'triton'.*use ref"):
        moe(*moe_inputs(3, 4, 2, 4, 1), "triton")  # float64
    assert moe_file.choose("auto", cpu) == "ref"
    without = dict(os.environ, TRITON_INTERPRET="0")
    code = "import torch; from kernels.moe import choose; choose('triton', torch.device('cpu'))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=without, capture_output=True, text=True)
    assert run.stderr.splitlines()[-1].startswith("ValueError: kernels.moe: 'triton' needs")


# ---- relational distillation ----


def arkd_dense(student_BD, teacher_BD, mode):
    """(E4) word by word, over the list of ordered pairs i != j."""
    B = len(student_BD)
    i, j = torch.tensor(list(itertools.permutations(range(B), 2))).T

    def relative(z_BD):
        squared = (z_BD[i] - z_BD[j]).square().sum(1)
        d = torch.where(squared > 0, torch.where(squared > 0, squared, 1).sqrt(), 0)
        return d / d.mean() if d.any() else d

    student, teacher = relative(student_BD), relative(teacher_BD)
    h = lambda x: torch.where(x.abs() < 1, x**2 / 2, x.abs() - 0.5)  # noqa: E731
    if mode == "rkd":
        return h(student - teacher).sum() / (B * (B - 1))
    m = teacher.sort().values[(len(teacher) - 1) // 2]
    shrink, expand = (student - teacher).clamp(min=0), (teacher - student).clamp(min=0)
    return torch.where(teacher < m, h(shrink), h(expand)).sum() / (B * (B - 1))


def summaries(B, D_student, D_teacher, case="", seed=0):
    random = torch.Generator().manual_seed(seed)
    student = torch.randn(B, D_student, generator=random, dtype=torch.float64)
    teacher = 0.1 * torch.randn(B, D_teacher, generator=random, dtype=torch.float64)
    student[0], teacher[-1] = 5 * student[0], 8 * teacher[-1]  # pairs on the linear side of the smooth L1
    if case == "duplicates":
        student[3], student[5:9], teacher[10] = student[4], student[5], teacher[11]
    if case == "close":  # under CLOSE of the norms: the Gram product alone would be wrong by percents
        student[3:6] = student[3] + 1e-3 * torch.randn(3, D_student, generator=random, dtype=torch.float64)
        teacher[7:9] = teacher[7] + 1e-4 * torch.randn(2, D_teacher, generator=random, dtype=torch.float64)
    if case == "far":  # a common offset, which distances do not see
        student, teacher = (student + 30).float().double(), (teacher - 30).float().double()
    if case == "ties":  # a grid: most distances occur many times, so m is equal to many of them
        teacher = torch.cartesian_prod(*[torch.arange(3.0)] * D_teacher)[:B].double()
    return student, teacher


def loss_and_gradient(student_BD, teacher_BD, mode, impl, dtype=torch.float32, **options):
    student_BD = student_BD.to(DEVICE, dtype).requires_grad_()
    function = arkd_dense if impl == "dense" else lambda *a: arkd(*a, impl=impl, **options)
    loss = function(student_BD, teacher_BD.to(DEVICE, dtype), mode)
    return loss.detach(), torch.autograd.grad(loss, student_BD)[0]


ARKD_CASES = [(2, 3, 5, ""), (3, 1, 2, ""), (70, 33, 40, "duplicates"), (67, 40, 8, "close"), (66, 20, 35, "far")]
ARKD_CASES += [(64, 32, 4, "ties")]


@pytest.mark.parametrize("mode", arkd_file.MODES)
@pytest.mark.parametrize("case", ARKD_CASES, ids=lambda c: f"{c[0]}-{c[3] or 'plain'}")
@pytest.mark.parametrize("impl", arkd_file.IMPLS)
def test_arkd_matches_the_definition(impl, case, mode, monkeypatch):
    """Catches: c = 0 (no path through the student's mean); the gates exchanged; no factor 2 for j's share of a pair;
    the upper median; distances from the Gram product without `close`; weights 1 / 0 at duplicates."""
    monkeypatch.setattr(arkd_file, "STRIP", 40)  # several strips, the last one short
    student, teacher = summaries(*case)
    loss, gradient = loss_and_gradient(student, teacher, mode, "dense", torch.float64)
    out, out_gradient = loss_and_gradient(student, teacher, mode, impl)
    assert abs(out.double() - loss) < 1e-6 + 1e-5 * loss
    # 1e-3: a direction between rows 1e-3 apart is known in float32 to 1e-4, and its weight is the largest
    assert error(out_gradient, gradient) < (1e-3 if case[3] == "close" else 1e-5)
    out, out_gradient = loss_and_gradient(student, teacher, mode, impl, torch.float64)
    assert abs(out - loss) < 1e-12 and error(out_gradient, gradient) < 1e-9


@pytest.mark.parametrize("impl", arkd_file.IMPLS)
def test_arkd_does_not_see_the_students_scale(impl):
    """Catches: a gradient that takes the mean distance for a constant: it would have a component along z."""
    student, teacher = summaries(40, 12, 9)
    _, gradient = loss_and_gradient(student, teacher, "arkd", impl)
    centred = student - student.mean(0)
    assert abs((gradient.cpu() * centred).sum()) < 1e-5 * gradient.cpu().norm() * centred.norm()
    assert gradient.norm() > 0


@pytest.mark.parametrize("impl", arkd_file.IMPLS)
def test_arkd_of_fewer_than_two_images_or_of_equal_images_is_finite(impl):
    """Catches: a mean over no pairs (0 / 0); a mean of 0 that is not clamped; sqrt's gradient at 0."""
    for B in (0, 1):
        loss, gradient = loss_and_gradient(torch.ones(B, 3), torch.ones(B, 4), "arkd", impl)
        assert loss == 0 and gradient.shape == (B, 3) and not gradient.any()
    for mode in arkd_file.MODES:
        loss, gradient = loss_and_gradient(torch.ones(5, 3), torch.randn(5, 4), mode, impl)
        assert torch.isfinite(loss) and not gradient.any()


def test_arkd_parts_of_the_rows_add_up():
    """Catches: means over this rank's rows only; the loss of all rows returned by each; c from this rank's rows."""
    student, teacher = summaries(75, 8, 6, "duplicates")
    loss, gradient = loss_and_gradient(student, teacher, "arkd", "chunked")
    parts = [loss_and_gradient(student, teacher, "arkd", "chunked", rows=r) for r in ((0, 31), (31, 31), (31, 75))]
    assert abs(sum(part for part, _ in parts) - loss) < 1e-6
    assert error(sum(part for _, part in parts), gradient) < 1e-6
    assert not parts[0][1][31:].any() and error(parts[0][1][:31], gradient[:31]) < 1e-6


def one_rank(rank, store, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    student, teacher = summaries(50, 8, 6)
    rows = ((0, 20), (20, 50))[rank]
    student = student.float().requires_grad_()
    loss = arkd(student, teacher.float(), impl="chunked", rows=rows, group=torch.distributed.group.WORLD)
    loss.backward()
    torch.save((loss.detach(), student.grad), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_arkd_over_two_processes_is_the_loss_of_one(tmp_path):
    """Catches: an all_reduce left out for the means or for c."""
    torch.multiprocessing.spawn(one_rank, (tmp_path / "store", tmp_path), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    loss, gradient = loss_and_gradient(*summaries(50, 8, 6), "arkd", "chunked")
    assert abs(parts[0][0] + parts[1][0] - loss.cpu()) < 1e-6
    assert error(parts[0][1] + parts[1][1], gradient) < 1e-6


def test_sampled_median_is_near_the_exact_one_and_the_same_for_every_form(monkeypatch):
    """Catches: an unseeded sample; pairs (i, i) in it (a shift of 0), which pull the median down."""
    student, teacher = summaries(90, 6, 5)
    exact = arkd_file.median_cut(teacher)
    monkeypatch.setattr(arkd_file, "MEDIAN_EXACT", 50)
    assert abs(arkd_file.median_cut(teacher) / exact - 1) < 0.02
    loss, gradient = loss_and_gradient(student, teacher, "arkd", "ref")
    out, out_gradient = loss_and_gradient(student, teacher, "arkd", "chunked")
    assert abs(out - loss) < 1e-6 and error(out_gradient, gradient) < 1e-5


def test_chunked_arkd_makes_no_tensor_of_every_pair(monkeypatch):
    """Catches: STRIP ignored; distances kept for the backward."""
    B, largest = 600, [0]

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            out = function(*arguments, **(keywords or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                largest[0] = max(largest[0], t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    monkeypatch.setattr(arkd_file, "STRIP", 100)
    monkeypatch.setattr(arkd_file, "MEDIAN_EXACT", 10)
    with Largest():
        loss_and_gradient(*summaries(B, 8, 8, "duplicates"), "arkd", "chunked")
    assert 100 * B <= largest[0] <= arkd_file.MEDIAN_SHIFTS * B < B * B


def test_arkd_ignores_autocast_and_reduced_float32_products():
    """Catches: a pass in float32, whose products are bfloat16's here: they err by 1e-3."""
    student, teacher = summaries(150, 60, 50)
    loss, gradient = loss_and_gradient(student, teacher, "arkd", "dense", torch.float64)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(DEVICE, torch.bfloat16):
            out, out_gradient = loss_and_gradient(student, teacher, "arkd", "chunked")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert abs(out.double() - loss) < 1e-6 and error(out_gradient, gradient) < 1e-5


def test_arkd_bad_arguments_are_named():
    """Catches: a part of the rows silently computed whole by ref; a group whose ranks all do every row."""
    z = torch.randn(6, 4)
    for options, message in [
        (dict(mode="kd"), "mode 'kd'"),
        (dict(impl="fast"), "no implementation 'fast'"),
        (dict(impl="ref", rows=(0, 3)), "'ref' computes every row"),
        (dict(rows=(4, 9)), r"rows \(4, 9\) are not a range of the 6 images"),
        (dict(group=object()), "without rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            arkd(z, z, **options)
    with pytest.raises(ValueError, match="6 student rows, 5 of the teacher"):
        arkd(z, z[:5])


# ---- the benchmark ----


def test_the_benchmark_times_only_what_is_right_and_keeps_the_rest():
    """Catches: a wrong form that is timed all the same, NaN taken for agreement, one failure that ends the others."""
    case = bench.moe_case(torch.float32, (7, 8, 3, 16, 2))

    def broken(*_):
        raise RuntimeError("out of luck")

    ref = lambda *a: moe(*a, "ref")  # noqa: E731
    case.forms = {"off": lambda *a: 1.001 * ref(*a), "nan": lambda *a: ref(*a) * torch.nan, "broken": broken}
    case.forms |= {"absent": "needs another machine", "ref": ref}
    peak = {"matmul_flops": 1e12, "copy_bytes": 1e10}
    off, nan, failed, absent, right = bench.measure(case, peak)
    assert "wrong" in off and "wrong" in nan and "step_ms" not in off | nan
    assert failed["failed"] == "RuntimeError: out of luck" and absent["not_run"] == "needs another machine"
    assert right["step_ms"] > right["forward_ms"] * 0.5 > 0 and max(right["errors"]) < 1e-5


def test_records_are_added_to_what_is_there(tmp_path):
    """Catches: a part of the benchmark that overwrites the one before."""
    bench.record(tmp_path, "x.json", "a", 1)
    bench.record(tmp_path, "x.json", "b", [2])
    bench.record(None, "x.json", "c", 3)
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1, "b": [2]}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.slow
def test_the_benchmarks_checks_pass_here():
    """Catches: a case of kernels/bench.py that does not run, before it costs time on a GPU."""
    command = [sys.executable, "kernels/bench.py", "--only", "checks"]
    environment = dict(os.environ, TRITON_INTERPRET="0")
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "WRONG" not in run.stdout, run.stdout[-2000:] + run.stderr[-2000:]
    assert {"moe", "arkd", "attention", "kmeans"} <= {line.split()[0] for line in run.stdout.splitlines() if line}


# ---- what a GPU would be given ----


@pytest.mark.slow
@needs_triton
def test_every_kernel_compiles_for_hopper(tmp_path):
    """Catches: what the interpreter lets pass (a tile too large for shared memory, a dot of unequal dtypes), and a
    kernel that left the matrix units. Needs no GPU: Triton brings its own assembler."""
    environment = dict(os.environ, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    command = [sys.executable, "-m", "benchmarks.lower", "--only", "own"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 12
    for name, shared, _, spilled, matrix_instructions in lines:
        assert int(shared) <= 227 * 1024 and int(spilled) <= 512, name
        assert (int(matrix_instructions) > 0) == name.endswith("bfloat16"), name


# ---- RMSNorm ----


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rms_norm_is_torchs(weighted, dtype):
    """Catches a mean that is not subtracted from the gradient, and a weight's gradient that leaves out an axis."""
    torch.manual_seed(0)
    x = torch.randn(5, 7, 24, dtype=dtype, requires_grad=True)
    weight = torch.randn(24, dtype=dtype, requires_grad=True) if weighted else None
    asked = [x, weight] if weighted else [x]
    g = torch.randn_like(x)
    forms = rms_norm(x, weight, 1e-5), F.rms_norm(x, (24,), weight, 1e-5)
    grads = [torch.autograd.grad(y, asked, g) for y in forms]
    close = 1e-12 if dtype == torch.float64 else 1e-5
    assert "RMSNormFunction" in forms[0].grad_fn.name() and (forms[0] - forms[1]).abs().max() < close
    assert all((a - b).abs().max() < close for a, b in zip(*grads, strict=True))
    if weighted:
        assert torch.autograd.gradcheck(lambda *z: rms_norm(*z, 1e-5), (x.double()[0], weight.double()))


# ---- rotary embeddings ----


def test_the_complex_rotation_is_the_real_one():
    """Catches a turn the other way, and channels paired with their neighbour's neighbour."""
    torch.manual_seed(0)
    x, theta = torch.randn(9, 3, 16, requires_grad=True), torch.randn(9, 3, 4)
    with unittest.mock.patch("torch.compiler.is_compiling", lambda: True):
        want = rotate(x, theta.cos(), theta.sin())
    got, g = rotate(x, theta.cos(), theta.sin()), torch.randn(9, 3, 16)
    grads = [torch.autograd.grad(y, x, g)[0] for y in (got, want)]
    assert (got - want).abs().max() < 1e-6 and (grads[0] - grads[1]).abs().max() < 1e-6


# ---- how OpenMP's threads wait ----


def test_idle_threads_sleep_at_once_beside_busy_programs():
    """Catches a count that misses other programs, a run that spins beside them, and a user's setting that is lost."""
    file = Path("/proc/loadavg")
    if not file.exists() or " 0/" in file.read_text():
        pytest.skip("this system does not count running threads")
    code = "import kernels, os; print(kernels.others_running(), kernels.BUSY, *map(os.environ.get, "
    words = [sys.executable, "-c", code + "('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')))"]
    unset = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    say = lambda **env: subprocess.run(words, cwd=ROOT, env=unset | env, capture_output=True, text=True).stdout.split()  # noqa: E731
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    try:
        others, *chosen = say()
        assert int(others) >= len(busy) and chosen == ["True", "PASSIVE", "None"]
        assert say(OMP_WAIT_POLICY="ACTIVE")[1:] == ["False", "ACTIVE", "None"]
        assert say(GOMP_SPINCOUNT="7")[1:] == ["True", "PASSIVE", "7"]
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_the_thread_that_counts_is_not_counted():
    """Catches a command that finds itself on an idle machine and calls it busy."""
    with unittest.mock.patch("builtins.open", unittest.mock.mock_open(read_data="0.5 0.4 0.3 1/200 4711")):
        assert kernels.others_running() == 0
