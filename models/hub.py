"""Where a checkpoint is: a directory, a file, or fetched from the Hugging Face hub.

Of a repository, only what will be loaded is fetched. Many hold the weights twice (a
`consolidated.safetensors`, an `original/`) or the checkpoints of their training.
"""

import os
import pathlib
import re
from collections.abc import Sequence

from kvjax.files import read_json
from kvjax.messages import shown
from kvjax.models.gguf.header import is_gguf
from kvjax.models.published import fetched
from kvjax.models.shards import CONFIG, INDEX, SINGLE
from kvjax.places import given_path

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Patterns of the hub are of whole paths, and `*` goes into folders.
_FOLDERS = ["*/*"]
_SMALL = (
    CONFIG,
    "generation_config.json",
    ADAPTER_CONFIG,
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def checkpoint_directory(
    path_or_hub_id: str | os.PathLike[str], revision: str | None = None
) -> pathlib.Path:
    """The place of a checkpoint, fetched from the hub where it is an id.

    Args:
        path_or_hub_id: directory, GGUF file, `owner/name`, or the name of a model that
            `kvjax fetch` has fetched.
        revision: branch, tag or commit on the hub; None: its main branch.

    Raises:
        ValueError: none of these, or it could not be fetched.
    """
    if (own := fetched(path_or_hub_id)) is not None:
        return own
    path = given_path(
        path_or_hub_id, "a directory, a GGUF file or a hub id of the form 'owner/name'"
    )
    if os.path.isdir(path) or is_gguf(path):
        return path
    name = os.fspath(path_or_hub_id)
    if os.path.lexists(path) or not _HUB_ID.fullmatch(name):
        raise ValueError(
            f"{shown(name)} is neither a directory, a GGUF file nor a hub id of the "
            "form 'owner/name'."
        )
    try:
        return _fetched(name, revision)
    # Network, authorisation and name errors share no base class across versions.
    except Exception as error:
        raise ValueError(
            f"{shown(name)} is not a local directory and could not be fetched from the "
            f"hub: {str(error):.1000}"
        ) from error


def check_snapshot(directory: pathlib.Path) -> None:
    """The folder of a repository in the hub's cache is no checkpoint; it holds some.

    Raises:
        ValueError: it is that; names the checkpoints.
    """
    snapshots = directory / "snapshots"
    names = (CONFIG, ADAPTER_CONFIG)
    if not os.path.isdir(snapshots) or any(
        os.path.isfile(directory / n) for n in names
    ):
        return
    found = [path.name for path in sorted(snapshots.iterdir()) if path.is_dir()]
    kind, *parts = directory.resolve().name.split("--")
    name = "/".join(parts) if kind == "models" and len(parts) == 2 else ""
    raise ValueError(
        f"{directory} is a repository's folder in the hub's cache; its checkpoints are "
        f"{snapshots}/<commit>: {shown(found)}. Give one of them"
        + (f", or the id {name!r}." if name else ".")
    )


def _fetched(name: str, revision: str | None) -> pathlib.Path:
    """Small files first; they say which large ones will be loaded."""
    folder = _snapshot(name, revision, _SMALL)
    if _COMMIT.fullmatch(folder.name):
        revision = folder.name  # the branch may move on between two downloads
    adapter = (folder / ADAPTER_CONFIG).is_file()
    if adapter and not (folder / CONFIG).is_file():
        return _snapshot(name, revision, (ADAPTER_CONFIG, ADAPTER))
    # Named with a file that is there: the hub warns about patterns that match nothing.
    wanted = (CONFIG, SINGLE, *([ADAPTER] if adapter else []))
    folder = _snapshot(name, revision, wanted)
    if (folder / SINGLE).is_file() or (folder / ADAPTER).is_file():
        return folder
    if (folder / INDEX).is_file():
        return _snapshot(name, revision, (CONFIG, *_shards(folder)))
    if (folder / CONFIG).is_file():
        _say_what_there_is(name, revision)
    return folder


def _snapshot(name: str, revision: str | None, patterns: Sequence[str]) -> pathlib.Path:
    from huggingface_hub import snapshot_download

    found = snapshot_download(
        name,
        revision=revision,
        allow_patterns=list(patterns),
        ignore_patterns=_FOLDERS,
    )
    return pathlib.Path(found)


def _shards(folder: pathlib.Path) -> list[str]:
    """The files that an index names, but for names that its reader will refuse."""
    table = read_json(folder / INDEX).get("weight_map")
    files = table.values() if isinstance(table, dict) else ()
    return sorted({f for f in files if isinstance(f, str) and not set(f) & set("*?[")})


def _say_what_there_is(name: str, revision: str | None) -> None:
    """Raise with the files of a repository that has no weights to load."""
    from huggingface_hub import list_repo_files

    try:
        found = list_repo_files(name, revision=revision)
    except Exception:  # offline: whoever reads the directory says what it lacks
        return
    large = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
    weights = [file for file in found if file.endswith(large)]
    raise ValueError(
        f"it has neither {SINGLE} nor {INDEX}; its weights are {weights[:10]}. Convert "
        "them to safetensors first, or download a GGUF file and name that."
    )
