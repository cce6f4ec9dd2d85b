"""A tar's members by its raw headers: those of small files many at a time, by numpy; others one by one."""

import zlib
from pathlib import PurePosixPath

import numpy as np

BLOCK, EMPTY = 512, bytes(512)
CHUNK = 1 << 20  # bytes looked at together at most
DIGITS = [*range(124, 135), *range(148, 154)]  # where a plain header has its size and its checksum, in octal
OCTAL = 8 ** np.arange(11)[::-1]


def tar_members(data, end):
    """(name, (first byte, size)) of a tar's files, by its raw headers. end: its size, None where that is not known."""
    at, said, chunk, alone = 0, {}, BLOCK * 64, 0
    while True:
        if not (said or alone):
            for name, first, size in (found := plain_files(data[at : at + chunk])):
                yield name, (at + first, size)
            if found:
                at += first - -size // BLOCK * BLOCK
            few = len(found) < 16  # large members: their bytes are not to be read for their headers
            chunk, alone = BLOCK * 64 if few else min(2 * chunk, CHUNK), 64 * few
        alone = max(0, alone - 1)
        if not (header := bytes(data[at : at + BLOCK])):
            break
        if header == EMPTY:
            return
        kind, first = header[156:157], at + BLOCK
        # The checksum is the sum of all bytes with its own as spaces; adler32's lower half is 1 + a sum modulo 65521.
        total = (zlib.adler32(header) & 0xFFFF) - sum(header[148:156]) + 8 * ord(" ")
        try:
            size = tar_number(header[124:136])
            sound = (int(header[148:156].strip(b"\0 "), 8) + 1 - total) % 65521 == 0 and len(header) == BLOCK
        except (ValueError, IndexError):
            sound = False
        if not sound or size < 0 or at >= 1 << 41 or (kind in b"xL" and size > 1 << 20):
            raise ValueError(f"damaged at byte {at}, or of more than 2 TiB")
        size = 0 if kind in b"123456" else size if kind in b"xgLK" else said.get("size", size)
        if size and not data[first + size - 1 : first + size]:
            raise ValueError(f"cut short at byte {first}")
        at = first - -size // BLOCK * BLOCK
        if kind == b"L":
            said["path"] = bytes(data[first : first + size]).rstrip(b"\0")
        elif kind == b"x":
            said |= pax_records(bytes(data[first : first + size]))
        elif kind not in b"gK":
            if kind in b"07\0":
                name = said.get("path") or header[:100].split(b"\0")[0]
                if "path" not in said and header[345] and header[257:263] == b"ustar\0":
                    name = header[345:500].split(b"\0")[0] + b"/" + name
                yield readable(name), (first, size)
            if said:
                said = {}
    if at != end or not at:
        raise ValueError(f"damaged at byte {at}")


def plain_files(raw):
    """[(name, first byte, size)] of the files whose plain headers follow one another from the first byte of `raw` on.

    Plain are those of regular files in plain octal, without a prefix, whose bytes are all in `raw`: shape letters N
    blocks of it, M headers among them.
    """
    block_NB = np.frombuffer(raw, np.uint8, len(raw) // BLOCK * BLOCK).reshape(-1, BLOCK)
    block_M = np.flatnonzero((block_NB[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(1))
    head_MB = block_NB[block_M]
    digit_MD = head_MB[:, DIGITS] - ord("0")  # what is below "0" wraps round to more than 7
    size_M, check_M = digit_MD[:, :11] @ OCTAL, digit_MD[:, 11:] @ OCTAL[-6:]
    sum_M = head_MB.sum(1, dtype=np.int32) - head_MB[:, 148:156].sum(1, dtype=np.int32) + 8 * ord(" ")
    end_M = block_M + 1 - -size_M // BLOCK
    plain_M = (digit_MD < 8).all(1) & (check_M == sum_M) & (head_MB[:, [135, 154, 155]] & 0xDF == 0).all(1)
    plain_M &= np.isin(head_MB[:, 156], list(b"07\0")) & (head_MB[:, 345] == 0) & (end_M <= len(block_NB))
    plain_M &= block_M == np.concatenate([[0], end_M[:-1]])[: len(block_M)]
    n = int(np.append(plain_M, False).argmin())
    names = np.ascontiguousarray(head_MB[:n, :100]).view("S100").ravel().tolist()
    firsts = (BLOCK * (block_M[:n] + 1)).tolist()
    return [
        (readable(name.split(b"\0", 1)[0]), first, size)
        for name, first, size in zip(names, firsts, size_M[:n].tolist(), strict=True)
    ]


def readable(name):
    """A member's name as text, without "." and empty parts."""
    name = name.decode(errors="backslashreplace")
    return PurePosixPath(name).as_posix() if "./" in name or "//" in name else name


def tar_number(field):
    """Octal digits, or base 256 where the first bit is set; ValueError where it is neither."""
    return int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.strip(b"\0 ") or b"0", 8)


def pax_records(raw):
    """{"path", "size"} of a pax header: records "length key=value" and a line end."""
    said = {}
    while raw.strip(b"\0"):
        length, _, rest = raw.partition(b" ")
        key, _, value = rest[: max(0, int(length) - len(length) - 2)].partition(b"=")
        if key in (b"path", b"size"):
            said[key.decode()] = value if key == b"path" else max(0, int(value))
        raw = raw[max(1, int(length)) :]
    return said
