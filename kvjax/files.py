"""Files in and out: JSON and YAML read strictly, text and bytes written whole.

What cannot be what was meant is refused by name: a file that is no file, another
encoding than UTF-8, a key that stands twice, aliases that unfold without an end.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import stat
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from kvjax.messages import shown
from kvjax.plaintext import decoded

MOST_JSON = 64 * 2**20
"""Bytes of a JSON file; the index of the largest checkpoint is smaller."""

MOST_YAML = 2**20
"""Bytes of a YAML file, which people write."""

MOST_NODES = 100_000
"""Of a YAML document, aliases unfolded."""


def regular(path: str | os.PathLike[str]) -> pathlib.Path:
    """`path`, if an ordinary file is there; links are followed.

    Raises:
        ValueError: there is none; it is a directory, a pipe or a device; it may not be
            read.
    """
    file = pathlib.Path(path)
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        raise ValueError(f"There is no file at {shown(str(file))}.") from None
    except (OSError, ValueError) as wrong:  # ValueError: a name with NUL in it
        raise ValueError(_unread(file, wrong)) from None
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise ValueError(f"Cannot read {file}: it is {what}; expected a file.")
    return file


def read_text(path: str | os.PathLike[str], most: int | None = None) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        ValueError: no such file, more than `most` bytes, or another encoding.
    """
    file = regular(path)
    size = file.stat().st_size
    if most is not None and size > most:
        raise ValueError(
            f"{file} has {size} bytes; at most {most} are read. Is it the right file?"
        )
    try:
        data = file.read_bytes()
    except OSError as wrong:
        raise ValueError(_unread(file, wrong)) from None
    return decoded(data, str(file))


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
        ValueError: it cannot be read, is not JSON, has a key twice, or holds something
            else than an object; names the file.
    """
    found = parse_json(read_text(path, MOST_JSON), str(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object; got {shown(found)}.")
    return found


def parse_json(text: str, name: str) -> Any:
    """JSON of which `name` is said in messages; see `read_json`."""
    try:
        found = json.loads(text, object_pairs_hook=_once)
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{name} holds half a character (a lone surrogate, \\ud800 to \\udfff). "
            "Write the character whole."
        ) from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply to be read.") from None
    except ValueError as wrong:
        raise ValueError(f"{name} is not JSON: {wrong}.") from None
    return found


def check_plain(name: str, value: Any) -> None:
    """A file can hold `value`, which is of the field `name`, and reads it as equal.

    Raises:
        ValueError: it holds a NaN, a date or something else that is no JSON.
    """
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as wrong:
        raise ValueError(
            f"`{name}` must hold finite numbers, texts, true, false, lists and "
            f"mappings ({wrong}); got {shown(value)}. A date is a text in quotes."
        ) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} stands twice in one object")
        found[key] = value
    return found


def read_yaml(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """A file that holds a YAML mapping.

    Raises:
        ValueError: it cannot be read, is not YAML, has a key twice, unfolds into more
            than `MOST_NODES`, or holds something else than a mapping; names the file.
    """
    return yaml_mapping(read_text(path, MOST_YAML), str(path))


def yaml_mapping(text: str, name: str) -> dict[Any, Any]:
    """YAML text that holds a mapping; see `read_yaml`."""
    found = parse_yaml(text, name)
    if not isinstance(found, dict):
        raise ValueError(
            f"{name} must hold a mapping (`name: value` in each line); got "
            f"{'nothing' if found is None else shown(found)}."
        )
    return found


def parse_yaml(text: str, name: str) -> Any:
    """YAML of which `name` is said in messages; see `read_yaml`."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a safe loader of our own
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply to be read.") from None
    except (yaml.YAMLError, ValueError) as wrong:
        said = " ".join(str(wrong).split())
        raise ValueError(f"{name} is not YAML: {said[:300]}.") from None


class _Loader(yaml.SafeLoader):
    """Of plain data: each key once, aliases that unfold into a bounded whole."""

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return self.construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        self._refuse_twice(node)
        return super().construct_mapping(node, deep)

    def _refuse_twice(self, node: yaml.MappingNode) -> None:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name = (key.tag, key.value)
            if name in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(
                    f"the key {shown(key.value)} stands twice in one mapping (line "
                    f"{line})"
                )
            seen.add(name)


# Numbers as YAML 1.2 has them: to YAML 1.1 `1e-3` is a text, `010` is 8, `1:30` is 90.
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, how) for tag, how in rules if tag not in (_INT, _FLOAT)]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _INT, re.compile(r"[-+]?(0|[1-9][\d_]*|0x[\da-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"[-+]?(\.\d+|\d[\d_]*\.[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$"
        r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def _size(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Nodes below `node`, aliases unfolded.

    Raises:
        yaml.YAMLError: more than `MOST_NODES`, or one that holds itself.
    """
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise yaml.YAMLError("an alias stands inside of what it is an alias of")
        return size
    known[id(node)] = None
    size = 1
    if isinstance(node, yaml.SequenceNode):
        size += sum(_size(one, known) for one in node.value)
    elif isinstance(node, yaml.MappingNode):
        size += sum(_size(k, known) + _size(v, known) for k, v in node.value)
    if size > MOST_NODES:
        raise yaml.YAMLError(f"it unfolds into more than {MOST_NODES} values")
    known[id(node)] = size
    return size


def digest(path: pathlib.Path) -> str:
    """SHA-256 of what a file holds."""
    with regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: pathlib.Path, text: str) -> None:
    """All of the file or none of it, in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """An indented JSON object; see `write_bytes`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """All of the file or none of it, on the disk when this returns.

    Raises:
        OSError: it could not be written; what was there before is there still.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file to write beside `path`, which takes its place if nothing is raised."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as wrong:  # that of a write names no file
        wrong.filename = wrong.filename or str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_full(wrong: BaseException) -> bool:
    """Whether that came of a full disk; some libraries say so in words alone."""
    code = wrong.errno if isinstance(wrong, OSError) else None
    return code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(wrong)


def _unread(path: pathlib.Path, wrong: Exception) -> str:
    code = wrong.errno if isinstance(wrong, OSError) else None
    why = os.strerror(code) if code else str(wrong)
    return f"Cannot read {shown(str(path))}: {why}."
