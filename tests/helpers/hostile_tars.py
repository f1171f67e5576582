"""Tars whose headers claim what is not in them."""

import io
import tarfile


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """The header of a member, in GNU's form, which has room for any size."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A member: header, bytes, padding."""
    return header(name, len(data), kind) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def pax(**fields: str) -> bytes:
    """A header of fields for the member after it."""
    records = b""
    for key, value in fields.items():
        line = f" {key}={value}\n".encode()
        length = next(n for n in range(len(line), len(line) + 9) if n == len(line) + len(str(n)))
        records += str(length).encode() + line
    return member("pax", records, tarfile.XHDTYPE)


def sparse(name: str, size: int) -> bytes:
    """A member of holes alone, which are `size` zeros when it is read."""
    info = tarfile.TarInfo(name)
    info.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = f"{size:011o}\0".encode() if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


END = bytes(2 * tarfile.BLOCKSIZE)
HOSTILE = {
    "petabyte": header("a.mp4", 10**15) + bytes(512),
    "huge": header("a.mp4", 1 << 80) + bytes(512),
    "negative": header("a.mp4", -5) + bytes(512),
    "pax-size": pax(size=str(10**15)) + member("a.mp4", b"x") + END,
    "pax-size-of-4000-digits": pax(size="9" * 4000) + member("a.mp4", b"x") + END,
    "pax-of-a-gigabyte": header("pax", 1 << 30, tarfile.XHDTYPE) + bytes(512),
    "long-name-of-a-gigabyte": header("name", 1 << 30, tarfile.GNUTYPE_LONGNAME) + bytes(512),
    "chain-of-pax": pax(comment="x") * 20_000 + member("a.mp4", b"x") + END,
    "chain-of-long-names": member("././@LongLink", b"n\0", tarfile.GNUTYPE_LONGNAME) * 20_000 + END,
    "sparse": sparse("a.json", 40 << 30) + END,
    "sparse-pax-0.1": pax(**{"GNU.sparse.map": "0,x", "GNU.sparse.size": "1"}) + member("a.json", b"x") + END,
    "sparse-pax-1.0": pax(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"})
    + member("a.json", b"99\n1\n")
    + END,
    "damaged-second-header": member("a.mp4", b"x") + b"\xff" * 512 + END,
    "cut-header": member("a.mp4", b"x") + header("b.mp4", 1)[:100],
    "cut-member": header("a.mp4", 5000) + bytes(512),
    "text": b"hello\n" * 1000,
    "gzip": b"\x1f\x8b" + bytes(1000),
    "empty": b"",
}


def tar_of(files: dict[str, bytes]) -> bytes:
    """A plain tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
