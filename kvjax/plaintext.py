"""Bytes of files as text: their encoding, the mark before them, what is no text."""

import codecs
import re

MARK = "\ufeff"
"""Some editors put it before a text. It is no part of it."""

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as that of UTF-16 does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
PACKED = (
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"PK\x03\x04", "zip", "unzip"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"\xfd7zXZ", "xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
)
"""How packed files begin, and what unpacks them."""
SURROGATE = re.compile("[\ud800-\udfff]")


def marked(begin: bytes) -> str:
    """The encoding that a byte order mark says, or empty bytes; empty without these."""
    for mark, name in MARKS:
        if begin.startswith(mark):
            return name
    empty = tuple(not byte for byte in begin[:4])
    sides = {(False, True) * 2: "utf-16-le", (True, False) * 2: "utf-16-be"}
    return sides.get(empty, "")


def decoded(data: bytes, what: str) -> str:
    """UTF-8 text, without the mark before it; lines end with a newline alone.

    Args:
        data: of a file.
        what: the file, as messages name it.

    Raises:
        ValueError: it is of another encoding; names that, or the first wrong byte.
    """
    if (name := marked(data[:4])) not in ("", "utf-8"):
        raise ValueError(
            f"{what} begins as {name.upper()} text does; expected UTF-8. Convert it "
            f"first: iconv -f {name.upper()} -t UTF-8."
        )
    try:
        text = data.decode("utf-8").removeprefix(MARK)
    except UnicodeDecodeError as wrong:
        for begin, kind, tool in PACKED:
            if data.startswith(begin):
                raise ValueError(
                    f"{what} is packed ({kind}); expected UTF-8 text. Unpack it first: "
                    f"{tool}."
                ) from None
        line = data.count(b"\n", 0, wrong.start) + 1
        raise ValueError(
            f"{what}, line {line}: byte 0x{data[wrong.start]:02x} is not UTF-8. "
            "Convert the file first, from Latin-1 say: iconv -f LATIN1 -t UTF-8."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_text(text: str, what: str) -> None:
    """Every character can be written.

    Raises:
        ValueError: it has half of a surrogate pair, which is no character; says where.
    """
    if not text.isascii() and (found := SURROGATE.search(text)):
        raise ValueError(
            f"{what} has U+{ord(found[0]):04X} at character {found.start()}, half of a "
            "surrogate pair, which is no text. Take it out, or write the pair."
        )
