"""What several test files need: a small toy world and its cache, and the reference files where there are any."""

import os
from pathlib import Path

import pytest
import torch

# Triton kernels run in its interpreter where there is no GPU; triton reads the variable once, when first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import data
import toy

SHARED = Path(os.environ.get("AMOE_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(autouse=True)
def own_threads():
    """A test sets torch's threads for itself alone: sums of another number of threads differ in a last digit."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def index(tmp_path_factory):
    """Tables of sources of the tests' images are kept apart from the user's."""
    os.environ["AMOE_INDEX"] = str(tmp_path_factory.mktemp("index"))


@pytest.fixture
def shared():
    """Reference outputs, photos and real teachers that are not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(
            f"needs reference files beside the checkout: {SHARED} is not there (AMOE_SHARED names another place)"
        )
    return SHARED


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    world = toy.World(tmp_path_factory.mktemp("toy"), 80)
    world.write()
    return world


@pytest.fixture(scope="session")
def oracles(world):
    return [toy.TextOracle(world), toy.DenseOracle(world)]


@pytest.fixture(scope="session")
def cache(world, oracles):
    """80 toy images in four shards."""
    path = world.folder / "cache"
    return data.cache(world.folder / "images", oracles, path, max_tokens=64, shard_images=20, progress=False)


@pytest.fixture
def random_images():
    """(rows, shapes) of five images of different shapes, uint8."""
    torch.manual_seed(0)
    shapes = [(4, 6), (5, 3), (1, 1), (2, 7), (5, 3)]
    return [torch.randint(256, (h * w, 768), dtype=torch.uint8) for h, w in shapes], shapes


@pytest.fixture
def plug_in(tmp_path):
    """The spec of a plug-in teacher whose features are pixels."""
    (tmp_path / "plug.py").write_text(
        "import torch\n"
        "class T:\n"
        "    name, dim, registers = 't', 12, 0\n"
        "    def __call__(self, batch):\n"
        "        x = batch.rows[:, :12].float()\n"
        "        return {'patch': x, 'summary': x[batch.starts[:-1].long() + 5]}\n"
        "def make(device): return T()\n"
    )
    return f"t={tmp_path}/plug.py:make"
