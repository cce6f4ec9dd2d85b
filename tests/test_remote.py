"""Images and caches on an object store: a real S3 server (moto's) on this machine, where moto is installed."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from common.sources import find_sources
from common.store import open_store
from images import load_image

moto = pytest.importorskip("moto.server", reason="needs moto: pip install 'moto[server,s3]'")
ROOT = Path(__file__).resolve().parents[1]

WRITER = """
import sys, data, toy
world = toy.World('.', 80)
print('begin', flush=True)
data.cache(sys.argv[1], [toy.TextOracle(world), toy.DenseOracle(world)], sys.argv[2], max_tokens=64, shard_images=8)
"""


@pytest.fixture(scope="module")
def s3():
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", address)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT"))
        yield "s3://bucket"
    server.stop()


@pytest.fixture(scope="module")
def tar(s3, world, tmp_path_factory):
    path = shutil.make_archive(tmp_path_factory.mktemp("tar") / "toy", "tar", world.folder / "images")
    open_store(f"{s3}/images").write("toy.tar", Path(path).read_bytes()).result()
    open_store(f"{s3}/images").write("list.txt", b"toy.tar\n").result()
    return Path(path)


def test_a_tar_on_s3_is_read_by_byte_range(s3, tar):
    """Catches a URL taken for a local path, and offsets of another tar."""
    local = find_sources(tar)
    for place in (f"{s3}/images/toy.tar", f"{s3}/images/list.txt", f"{s3}/images"):
        found = find_sources(place)
        assert [s.name for s in found] == [s.name for s in local] and len(found) == 80
        assert torch.equal(load_image(found[41]), load_image(local[41]))
    with pytest.raises(ValueError, match=r"gone\.tar"):
        find_sources(f"{s3}/images/gone.tar")


@pytest.mark.slow
def test_a_cache_on_s3_is_written_killed_resumed_verified_and_trained_on(s3, cache, world, tmp_path):
    """Catches a commit record before its data, and paths that only a folder has."""
    url, images = f"{s3}/cache", str(world.folder / "images")
    command = [sys.executable, "-c", WRITER, images, url]
    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert killed.stdout.readline() == b"begin\n"
    store, end = open_store(url), time.monotonic() + 240
    while not any(b"shard.json" in key for key in store.list().result()) and time.monotonic() < end:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = len(data.Cache(url).numbers)
    assert 0 < before < 10
    subprocess.run(command, cwd=ROOT, check=True, timeout=400, stdout=subprocess.DEVNULL)
    opened = data.Cache(url)
    assert opened.index is not None and len(opened.numbers) == 10 and data.verify(opened) == []
    ids, features = data.open_summaries(url, "dense")
    assert np.array_equal(ids, np.concatenate([s.ids for s in cache.shards]))
    assert np.allclose(features[3:60], data.open_summaries(cache.path, "dense")[1][3:60], atol=1e-4)
    run = [sys.executable, "train.py", "--cache", url, "--steps", "2", "--tokens", "400", "--no-evaluate"]
    subprocess.run([*run, "--out", str(tmp_path)], cwd=ROOT, check=True, timeout=400, env=os.environ.copy())
    key = "shards/00004/pixels/c/0/0"
    raw = bytearray(store.read(key).result().value)
    raw[1000] ^= 1
    store.write(key, bytes(raw)).result()
    (complaint,) = data.verify(data.Cache(url))
    assert "shard 00004, array pixels" in complaint
