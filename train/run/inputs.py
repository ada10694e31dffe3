"""What a run reads beside its recipe, by digests: see `kvjax.inputs`."""

import glob
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from kvjax import inputs
from kvjax.compress.presets import canonical, compression
from kvjax.inputs import Inputs
from kvjax.messages import shown
from kvjax.models.adapters import base_directory
from kvjax.models.bundled import model_directory
from kvjax.models.hub import checkpoint_directory
from kvjax.places import expanded
from kvjax.train.data.sources import reader_of
from kvjax.train.recipe import Source, TrainConfig


def inputs_of(config: TrainConfig, known: Inputs) -> Inputs:
    """Digests of compressions, of local data files, and of the checkpoint.

    A compression counts by what it means: comments in its file do not. Datasets of the
    hub are not looked at: `revision` in their `fields` says which one is meant.

    Args:
        config: the recipe.
        known: what an earlier call found; files that it stamped are not read again.

    Raises:
        ValueError: a file cannot be read.
    """
    found: Inputs = {}
    for choice in (*config.sampling.choices, *config.cached.choices):
        name, fields = choice.compression, choice.fields
        label = f"compression {name!r}" + (f" with {shown(fields)}" if fields else "")
        meaning = canonical(compression(name, **fields))
        found[label] = inputs.of_text(name, meaning)
    for source in _sources(config):
        label = f"dataset {source.dataset!r}"
        files = dict(_named(source))
        if files:
            before = found.get(label, {}) | known.get(label, {})
            found[label] = found.get(label, {}) | inputs.of_files(files, before)
    if config.init:
        label = f"init {config.init!r}"
        directory = checkpoint_directory(model_directory(config.init))
        files = inputs.checkpoint_files(config.init, directory)
        found[label] = inputs.of_files(files, known.get(label, {}))
        base = base_directory(directory)
        if base != directory:  # a label of its own: earlier versions did not look
            label = f"base of {label}"
            files = inputs.checkpoint_files(f"base of {config.init}", base)
            found[label] = inputs.of_files(files, known.get(label, {}))
    return found


def _sources(config: TrainConfig) -> Iterator[Source]:
    for stage in config.stages:
        yield from stage.sources
    yield from config.data.sources


def _named(source: Source) -> Iterator[tuple[str, pathlib.Path]]:
    """The local files of a source, by their paths as the recipe leads to them."""
    if not source.dataset:
        return
    given = [source.dataset, *_texts(source.fields.get("data_files"))]
    given += _texts(source.fields.get("data_dir"))
    for name in given:
        try:
            found = _local(name)
        except OSError as wrong:  # a name that no disk takes
            raise ValueError(
                f"dataset {shown(source.dataset)}: {shown(name)}: {wrong.strerror}."
            ) from None
        for file in found:
            yield str(file), file


def _local(name: str) -> list[pathlib.Path]:
    """The files that a path, a pattern or a folder leads to; none for a hub id."""
    path = expanded(name)
    if os.path.isdir(path):
        found = [one for one in path.rglob("*") if reader_of(one)]
    elif glob.has_magic(name):
        found = map(pathlib.Path, glob.glob(str(path), recursive=True))
    else:
        found = [path]
    return sorted(one for one in found if os.path.isfile(one))


def _texts(tree: Any) -> list[str]:
    if isinstance(tree, str):
        return [tree]
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    return [t for one in tree for t in _texts(one)] if isinstance(tree, list) else []
