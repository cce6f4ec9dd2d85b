"""Where bytes lie: files and folders, object stores and web servers by byte range, arrays and sealed JSON in them.

All goes through tensorstore's key-value stores but for what is read from a local file by its range.
"""

from common.commands import one_line, one_line_errors

# isort: split
import collections
import contextlib
import hashlib
import json
import os
import stat
import zlib
from functools import lru_cache
from pathlib import Path

import safetensors.torch
import tensorstore as ts
import torch

SHARED = ts.Context()  # what is written to memory:// is there for all who read in this process
CHUNK = 64  # rows behind one checksum: an image is read without decoding much of its neighbours


def digest(data):
    """The blake2b hash of bytes, 16 bytes of it in hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def seal(content, indent=None):
    """JSON bytes of a dict that end in the hash of its other entries."""
    return json.dumps(content | {"hash": digest(json.dumps(content, sort_keys=True).encode())}, indent=indent).encode()


def unseal(raw):
    """The dict, its "hash" included, or None where the bytes are not what was sealed."""
    try:
        content = json.loads(raw)
        rest = {key: value for key, value in content.items() if key != "hash"}
        return content if content["hash"] == digest(json.dumps(rest, sort_keys=True).encode()) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def is_remote(path):
    return "://" in str(path)


def open_store(path):
    """The tensorstore key-value store of a folder, or of a URL such as s3://bucket/cache.

    AWS_ENDPOINT_URL, a variable of Amazon's own tools, names another server that speaks S3.
    """
    # What a relative path or a link means may change: the folder is looked up every time.
    place = str(path).rstrip("/") if is_remote(path) else str(Path(path).resolve())
    return open_place(place, os.environ.get("AWS_ENDPOINT_URL"), os.environ.get("AWS_REGION", "us-east-1"))


@lru_cache(256)
def open_place(path, endpoint, region):
    """`open_store` of an absolute path or a URL, opened once."""
    url = f"{path}/" if is_remote(path) else {"driver": "file", "path": f"{path}/"}
    if path.startswith("s3://") and endpoint:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        url = {"driver": "s3", "bucket": bucket, "path": key, "endpoint": endpoint, "aws_region": region}
    try:
        return ts.KvStore.open(url, context=SHARED).result()
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be opened: {one_line(error)}") from error


def stamp(*state):
    """32 bits that tell one state of a file from another."""
    return zlib.crc32(repr(state).encode())


def read_bytes(path, first=0, size=None, known=None):
    """(bytes of a file or a remote object, stamp of when it was changed: of its time in ns or the object's generation).

    ValueError where it is no regular file, or was changed at another time than `known`.
    """
    if is_remote(path):
        folder, _, key = path.rpartition("/")
        span = slice(first, None if size is None else first + size)
        try:
            result = open_store(folder).read(key, byte_range=span).result()
        except (ValueError, OSError) as error:
            if "OUT_OF_RANGE" not in str(error) or size is None:
                raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0][:200]}") from error
            return read_bytes(path, first, None, known)  # a range that ends behind the object is refused as a whole
        if result.state == "missing":
            raise FileNotFoundError(2, "No such file or directory")
        raw, when = result.value, stamp(result.stamp.generation)
    else:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe is not waited for
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("no regular file")
            file.seek(first)
            raw, when = file.read(size), stamp(status.st_mtime_ns)
    if known not in (None, when):
        raise ValueError("has changed since it was indexed: python data.py index --images ... looks again")
    return raw, when


class Remote:
    """The bytes of a remote object by slices, like a memory map: a mebibyte is fetched at a time."""

    def __init__(self, url):
        self.url, self.first = url, 0
        self.raw, self.when = read_bytes(url, 0, 1 << 20)

    def __getitem__(self, span):
        """The bytes of a slice, fewer at the object's end, none behind it."""
        if not self.first <= span.start <= span.stop <= self.first + len(self.raw):
            size = max(1 << 20, span.stop - span.start)
            try:
                self.raw, self.first = read_bytes(self.url, span.start, size, self.when)[0], span.start
            except ValueError:
                return b""  # behind the end
        return self.raw[span.start - self.first : span.stop - self.first]


def map_ahead(pool, function, items, ahead):
    """function of every item, in order, by a pool of threads or processes; `ahead` of them are under way."""
    under_way = collections.deque()
    for item in items:
        under_way.append(pool.submit(function, item))
        if len(under_way) >= ahead:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def name_hash(name):
    """63 bits of a name's hash, an image's id: non-negative in int64, the same on every machine."""
    raw = name if isinstance(name, bytes) else name.encode()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") >> 1


def clear(store, prefix):
    """Remove what lies below a prefix, a killed writer's locks too."""
    store.delete_range(ts.KvStore.KeyRange(prefix, prefix[:-1] + "0")).result()


def open_array(store, key, context=None, create=None, chunk=None):
    """A zarr3 array under `key`. create: (shape, dtype) of a new one, in chunks of `chunk` rows of one checksum each.

    Without `chunk` it is one file of inner chunks: CHUNK rows, or 4,096 numbers.
    """
    spec = {"driver": "zarr3", "kvstore": store.spec().to_json() | {"path": f"{store.path}{key}/"}}
    if create is None:
        # A chunk that is not there is damage, never a run of zeros.
        return ts.open(spec | {"open": True, "fill_missing_data_reads": False}, context=context)
    (n, *columns), dtype = create
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    plain, check = {"name": "bytes"} if dtype in ("uint8", "int8") else little, {"name": "crc32c"}
    inner = CHUNK if columns else max(CHUNK, min(n, 4096))
    codec = {"chunk_shape": [inner, *columns], "codecs": [plain, check], "index_codecs": [little, check]}
    whole = [chunk or max(1, -(-n // inner)) * inner, *columns]
    spec["metadata"] = {
        "shape": [n, *columns],
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": whole}},
        "codecs": [plain, check] if chunk else [{"name": "sharding_indexed", "configuration": codec}],
    }
    return ts.open(spec | {"create": True, "open": True, "store_data_equal_to_fill_value": True}, context=SHARED)


def write_file(store, key, raw):
    """Write a small file and look at it: a lock that a killed writer left is reused with what it held beyond our bytes.

    That lock is then gone, so the second time is right.
    """
    for _ in range(2):
        store.write(key, raw).result()
        if store.read(key).result().value == raw:
            return
    raise ValueError(f"{key} reads back other than it was written")


@contextlib.contextmanager
def write_errors(what):
    """A full disk, a lost mount or missing rights become a ValueError of one line that names what was written."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot write {what}: {one_line(error)}; what is committed stays, and the same command goes on from there"
        ) from error


def read_state(path):
    """A state dict of tensors from .safetensors, .pth or .pt, or from the parts that a .safetensors.index.json names.

    A folder stands for its index, else for its one .safetensors. ValueError names the file that holds anything else.
    """
    path = Path(path)
    if path.is_dir():
        found = list(path.glob("*.safetensors.index.json")) or list(path.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(sorted(p.name for p in found)) or "no .safetensors"
            raise ValueError(f"{path} holds {names}: name the file of weights to take")
        return read_state(found[0])
    if not path.is_file():
        raise ValueError(f"no weights at {path}")
    with one_line_errors(path):
        if path.suffix == ".json":
            parts = sorted(set(json.loads(path.read_text())["weight_map"].values()))
            return {key: value for part in parts for key, value in read_state(path.with_name(part)).items()}
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
            raise ValueError("holds no state dict of tensors")
    return state


def write_atomically(path, write):
    """write(file) to a binary file that takes `path`'s name once it is whole and on the disk, or not at all.

    ValueError names the path where that fails, a full disk say; what was there before is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)  # the new name, too, must outlive a power cut
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's writer hides a full disk behind a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        said = one_line(error.__context__ if isinstance(error.__context__, OSError) else error)
        said = said.removeprefix(f"{temporary}: ")
        raise ValueError(f"cannot write {path}: {said}; what was there before is untouched") from error


def write_json(path, value):
    """A value as a JSON file, by `write_atomically`."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))
