"""The assignment kernel against its reference, the reference against float64. Without a GPU, Triton interprets."""

import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
import torch

from kernels import kmeans as km

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
triton_runs = pytest.mark.skipif(not (HAS_GPU or INTERPRETED), reason="runs in the interpreter's process, below")


@pytest.mark.skipif(HAS_GPU or INTERPRETED or km.triton is None, reason="triton_runs run as they are")
def test_triton_in_its_interpreter():
    """Runs the tests marked triton_runs in a fresh process: Triton reads TRITON_INTERPRET as it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "triton or ties"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "failed" not in done.stdout and "11 passed" in done.stdout, (
        done.stdout + done.stderr
    )


def problem(n, k, d, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, c, bias = (torch.randn(*shape, generator=g) for shape in ((n, d), (k, d), (k,)))
    return x.to(DEVICE, dtype), c.to(DEVICE, dtype), bias.to(DEVICE)


SHAPES = [(1, 1, 1), (5, 2, 3), (130, 67, 33), (64, 300, 70)]


@pytest.mark.parametrize("n, k, d", SHAPES)
def test_reference_equals_float64(n, k, d):
    """Catches a best score left in the scores (second = first), and a bias not added."""
    x, c, bias = problem(n, k, d)
    label, score = km.top3(x, c, bias, impl="ref")
    exact = x.double() @ c.double().T + bias
    want, at = exact.topk(min(3, k), dim=1)
    assert torch.equal(label[:, : min(2, k)], at[:, :2])
    torch.testing.assert_close(score[:, : min(3, k)].double(), want, atol=1e-4, rtol=1e-5)
    assert (score[:, k:] == -torch.inf).all()


def test_reference_across_tiles(monkeypatch):
    """Catches a tile's rows written to the wrong place, and a last, shorter tile left out."""
    x, c, bias = problem(150, 20, 8)
    whole = km.top3(x, c, bias, impl="ref")
    monkeypatch.setattr(km, "TILE_BYTES", 1)  # tiles of 64 rows
    assert all(torch.equal(a, b) for a, b in zip(km.top3(x, c, bias, impl="ref"), whole, strict=True))


@triton_runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, k, d", SHAPES)
def test_triton_equals_reference(n, k, d, dtype):
    """Catches masks missing on N, K or D (all three are odd here), and second-best lists merged wrongly over tiles."""
    x, c, bias = problem(n, k, d, dtype)
    label, score = km.top3(x, c, bias, impl="triton")
    want_label, want_score = km.top3(x, c, bias, impl="ref")
    assert torch.equal(label[:, : min(2, k)], want_label[:, : min(2, k)])
    torch.testing.assert_close(score, want_score, atol=1e-4, rtol=1e-5)


@triton_runs
def test_triton_merges_the_best_in_any_order_over_tiles():
    """Catches each wrong branch of the merge: all orders of the four best over two tiles of centroids."""
    orders = list(permutations(range(4)))
    x = torch.zeros(len(orders), 150)
    places = (3, 70, 71, 149)  # in three tiles of 64 for float32
    for i, order in enumerate(orders):
        for place, value in zip(places, order, strict=True):
            x[i, place] = value + 1.0
    x, eye, bias = x.to(DEVICE), torch.eye(150, device=DEVICE), torch.zeros(150, device=DEVICE)
    label, score = km.top3(x, eye, bias, impl="triton")
    assert score.tolist() == [[4.0, 3.0, 2.0]] * len(orders)
    assert label.tolist() == [[places[o.index(3)], places[o.index(2)]] for o in orders]


@triton_runs
def test_ties_go_to_the_lower_index():
    """Catches `>=` in the kernel's merge, which hands a tie to a later tile."""
    x = torch.ones(3, 4, device=DEVICE)
    c = torch.ones(140, 4, device=DEVICE)
    for impl in ("ref", "triton"):
        label, score = km.top3(x, c, torch.zeros(140, device=DEVICE), impl=impl)
        assert label.tolist() == [[0, 1]] * 3
        assert (score == 4).all()


def test_bad_input_is_named():
    """Catches a check dropped: torch's own message, or a silent wrong answer, would come instead."""
    x, c, bias = problem(4, 3, 2)
    for arguments, word in [
        ((x, c[:, :1], bias), "x \\[4, 2\\]"),
        ((x, c[:0], bias[:0]), "K is 0"),
        ((x.double(), c.double(), bias), "float64"),
        ((x, c.bfloat16(), bias), "bfloat16"),
    ]:
        with pytest.raises(ValueError, match=word):
            km.top3(*arguments)
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        km.top3(x, c, bias, impl="cuda")


@pytest.mark.skipif(HAS_GPU, reason="Triton can run here")
def test_explicit_triton_that_cannot_run_raises(monkeypatch):
    """Catches a silent fall back to the reference."""
    monkeypatch.setattr("kernels.INTERPRETED", False)
    x, c, bias = problem(4, 3, 2)
    with pytest.raises(ValueError, match="'triton' needs a CUDA device"):
        km.top3(x, c, bias, impl="triton")
