"""A tar's members by its raw headers: those of small files many at a time, by numpy; others one by one."""

import struct
import zlib
from pathlib import PurePosixPath

import numpy as np

BLOCK = 512
CHUNK = 1 << 20  # bytes looked at together at most
FIELDS = struct.Struct("100s 24x 12s 12x 8s s 100x 6s 82x 155s 12x").unpack  # name, size, checksum, kind, magic, prefix
DIGITS = [*range(124, 135), *range(148, 154)]  # where a plain header has its size and its checksum, in octal
OCTAL = 8 ** np.arange(11)[::-1]


def tar_members(data, end):
    """(name, (first byte, size)) of a tar's files, by its raw headers. end: its size, None where that is not known."""
    at, said, chunk, alone = 0, {}, BLOCK * 256, 0
    while True:
        if not (said or alone):
            names, spans, size = plain_files(data[at : at + chunk], at)
            yield from zip(names, spans, strict=True)
            at += size
            few = len(names) < 16  # large members: their bytes are not to be read for their headers
            chunk, alone = BLOCK * 256 if few else min(2 * chunk, CHUNK), 1024 * few
        alone -= alone > 0
        if not (header := data[at : at + BLOCK]):
            break
        first = at + BLOCK
        try:
            name, size, check, kind, magic, prefix = FIELDS(header)
            # The checksum sums all bytes with its own as spaces; adler32's lower half is 1 + a sum modulo 65521.
            total = (zlib.adler32(header) & 0xFFFF) - (zlib.adler32(check) & 0xFFFF) + 8 * ord(" ")
            size, sound = tar_number(size), (int(check.strip(b"\0 "), 8) - total) % 65521 == 0
        except (ValueError, struct.error):
            if header == bytes(BLOCK):
                return
            sound = False
        if not sound or size < 0 or at >= 1 << 41 or (kind in b"xL" and size > 1 << 20):
            raise ValueError(f"damaged at byte {at}, or of more than 2 TiB")
        if kind not in b"xgLK":
            size = said.get("size", size)
        if kind in b"07\0":
            name = said.get("path") or name.split(b"\0", 1)[0]
            if prefix[0] and magic == b"ustar\0" and "path" not in said:
                name = prefix.split(b"\0")[0] + b"/" + name
            yield readable(name.decode(errors="backslashreplace")), (first, size)
        if kind == b"L":
            said["path"] = data[first : first + size].rstrip(b"\0")
        elif kind == b"x":
            said |= pax_records(data[first : first + size])
        elif kind not in b"gK" and said:
            said = {}
        at = first if kind in b"123456" else first - -size // BLOCK * BLOCK
    if at != end or not at:
        raise ValueError(f"damaged at byte {at}, or cut short")


def plain_files(raw, at):
    """(names, (first byte, size) of each, bytes) of the files whose plain headers follow one another from byte `at` on.

    Plain are those of regular files in plain octal, without a prefix, whose bytes are all in `raw`, which begins there:
    shape letters N blocks of it, M headers among them.
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
    if not n:
        return [], [], 0
    names = np.ascontiguousarray(head_MB[:n, :100]).view("S100").ravel().tolist()
    if (text := b"\0".join(names)).count(b"\0") >= n:  # there is something behind the end of a name
        text = b"\0".join(name.split(b"\0", 1)[0] for name in names)
    text = text.decode(errors="backslashreplace")  # all together: a third of the time
    names = text.split("\0")
    if "./" in text or "//" in text:
        names = [*map(readable, names)]
    firsts = (at + BLOCK * (block_M[:n] + 1)).tolist()
    return names, zip(firsts, size_M[:n].tolist(), strict=True), BLOCK * int(end_M[n - 1])


def readable(name):
    """A member's name without "." and empty parts."""
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
