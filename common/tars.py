"""A tar's members by its raw headers: 6 us a member, where Python's own tarfile takes 30."""

import zlib
from pathlib import PurePosixPath

BLOCK, EMPTY = 512, bytes(512)


def tar_members(data, end):
    """(name, (first byte, size)) of a tar's files, by its raw headers. end: its size, None where that is not known."""
    at, said = 0, {}
    while header := bytes(data[at : at + BLOCK]):
        if header == EMPTY:
            return
        kind, first = header[156:157], at + BLOCK
        # The checksum is the sum of all bytes with its own as spaces; adler32's lower half is 1 + a sum modulo 65521.
        total = zlib.adler32(header[156:], zlib.adler32(b" " * 8, zlib.adler32(header[:148]))) & 0xFFFF
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
                name = name.decode(errors="backslashreplace")
                yield PurePosixPath(name).as_posix() if "./" in name or "//" in name else name, (first, size)
            if said:
                said = {}
    if at != end or not at:
        raise ValueError(f"damaged at byte {at}")


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
