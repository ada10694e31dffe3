"""Runs an evaluation, cell by cell.

Each prompt is read once per method and compressed to every budget; replies are decoded
from the compressed cache and scored. Uncompressed replies come first in every group:
agreement is counted against them.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.compress.observe import wants_mass
from kvjax.eval.config import EvalConfig
from kvjax.eval.groups import AbstractGroup, Answers
from kvjax.eval.header import RECORD, read_header
from kvjax.eval.inputs import inputs_of
from kvjax.eval.maps import MapMaker, entry
from kvjax.eval.methods import NONE, Method
from kvjax.eval.plan import Cell, EvalPlan, plan
from kvjax.eval.reading import PromptReader
from kvjax.eval.record import averages, describe, header, provenance
from kvjax.eval.results import RunWriter, check_directory, open_run
from kvjax.eval.timing import timed
from kvjax.inputs import checkpoint_files, of_stamps
from kvjax.models.adapters import base_directory, tokenizer_directory
from kvjax.models.decoder import Decoder
from kvjax.models.published import source_of
from kvjax.narrow import narrow
from kvjax.places import busy, held


@dataclasses.dataclass(frozen=True)
class EvalProgress:
    """What the callback is told after each cell.

    Attributes:
        done: cells finished.
        total: cells of the run.
        cell: the cell's name.
        row: its row.
        resumed: whether it was finished by an earlier call.
    """

    done: int
    total: int
    cell: str
    row: Mapping[str, Any]
    resumed: bool


Callback = Callable[[EvalProgress], None]


@dataclasses.dataclass
class _TurnTally:
    """What the batches of one method at one budget add up to at one question."""

    items: list[dict[str, Any] | None] = dataclasses.field(default_factory=list)
    ask_s: list[float] = dataclasses.field(default_factory=list)
    decode_s: float = 0.0
    steps: int = 0
    compile_s: float = 0.0

    def add(self, given: Answers) -> None:
        self.items += [None if one is None else dict(one) for one in given.items]
        self.ask_s.append(given.ask_s)
        self.decode_s += given.decode_s
        self.steps += given.steps
        self.compile_s += given.compile_s


@dataclasses.dataclass
class _Tally:
    """The same of all its questions."""

    turns: list[_TurnTally]
    resident: list[float] = dataclasses.field(default_factory=list)
    host: list[float] = dataclasses.field(default_factory=list)
    compress_s: list[float] = dataclasses.field(default_factory=list)
    compile_s: float = 0.0
    maps: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Measured:
    """What the batches of one method add up to, by budget; none where all is there."""

    tallies: dict[float | None, _Tally]
    prefill_s: list[float] = dataclasses.field(default_factory=list)
    compile_s: float = 0.0


@narrow
def run(
    model: Decoder,
    tokenizer: Any,
    config: EvalConfig,
    run_dir: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callback | None = None,
) -> list[dict[str, Any]]:
    """Evaluate, cell by cell, into a run directory.

    A directory with some cells of the same evaluation goes on where it stopped.

    Args:
        model: what is evaluated.
        tokenizer: a Hugging Face tokenizer.
        config: what is run. `config.model` is a label here.
        run_dir: see `kvjax.eval.results`. No other process writes to it meanwhile.
        checkpoint: directory that the model and its tokenizer are from; its weights
            are not looked at again while their files stay as they are.
        progress: called after each cell; what it raises ends the run.

    Returns:
        The rows of all cells, in the order they run.

    Raises:
        ValueError: anything wrong with any cell, before the first compute; a
            directory of another run, or one whose inputs have changed since; another
            process that writes to it.
        OSError: a result cannot be written; finished cells are kept.
    """
    path = pathlib.Path(run_dir)
    check_directory(path, config)
    made = plan(model.config, tokenizer, config)
    files, words = _files(config.model, checkpoint)
    with held(path) as mine:
        if not mine:
            raise busy(path)
        old = read_header(path) if (path / RECORD).exists() else {}
        inputs = inputs_of(made, words, old.get("inputs", {}))
        about = header(model, config, inputs, of_stamps(files), old)
        if checkpoint is not None and (source := source_of(checkpoint)):
            about["source"] = source  # of a fetched model: which weights these are
        runner = _Runner(model, made, open_run(path, about), progress)
        for group in made.groups:
            runner.group(group)
    return runner.rows


def _files(
    name: str, checkpoint: str | os.PathLike[str] | None
) -> tuple[dict[str, pathlib.Path], dict[str, pathlib.Path]]:
    """Files of a checkpoint, by name: all of them, and those beside its tokenizer.

    All are those of the base model, too, where the checkpoint is an adapter.
    """
    if checkpoint is None:
        return {}, {}
    own = pathlib.Path(checkpoint)
    base, words = base_directory(own), tokenizer_directory(own)
    files = checkpoint_files(name, own)
    if base != own:
        files |= checkpoint_files(f"base of {name}", base)
    return files, {one: file for one, file in files.items() if file.parent == words}


class _Runner:
    """The loop of `run`, with what its steps share."""

    def __init__(self, model: Decoder, made: EvalPlan, store: RunWriter, progress):
        self.made, self.store = made, store
        self.reader = PromptReader(
            model,
            share=made.config.share_passes,
            mass=any(wants_mass(method.base) for method in made.methods),
        )
        self.maps = MapMaker(model, made.config.keeps)
        self.progress: Callback | None = progress
        self.rows: list[dict[str, Any]] = []
        # All of it now: a damaged file is found before anything is computed.
        self.old = {
            cell.name: store.row(describe(cell, made.config), len(cell.items))
            for cell in made.all_cells()
        }
        self.full: dict[float | None, dict[str, Any]] = {}  # rows of `none`, by depth
        self.replies: dict[tuple[int | None, int], str | None] = {}  # of `none`

    def group(self, group: AbstractGroup) -> None:
        """All cells of a group; finished ones are taken over.

        Methods that share passes go through each batch together, so that the passes of
        one batch are held at a time; others one after the other, so that what is
        finished when a run stops is more.
        """
        methods = self.made.methods
        together = [methods] if self.reader.share else [(one,) for one in methods]
        for some in together:
            measured = [self._todo(group, method) for method in some]
            for index in group.batches() if any(m.tallies for m in measured) else ():
                for method, one in zip(some, measured, strict=True):
                    if one.tallies:
                        self._batch(group, method, one, index)
            for method, one in zip(some, measured, strict=True):
                self._cells(group, method, one)

    def _todo(self, group: AbstractGroup, method: Method) -> _Measured:
        """The budgets at which cells are missing."""
        cells = self.made.cells(group, method)
        missing = {cell.keep for cell in cells if self.old[cell.name] is None}
        keeps = [k for k in method.keeps(self.made.config.keeps) if k in missing]
        turns = range(group.turns)
        return _Measured({k: _Tally([_TurnTally() for _ in turns]) for k in keeps})

    def _cells(self, group: AbstractGroup, method: Method, one: _Measured) -> None:
        """Finish the cells of a method, all of whose batches were measured."""
        cells = self.made.cells(group, method)
        if method.name == NONE:
            self._refer(cells, one.tallies)
        prefill_ms = 1e3 * float(np.mean(one.prefill_s or [0.0]))
        for cell in cells:
            row = self.old[cell.name]
            if row is None:
                tally = one.tallies[cell.keep]
                row = self._finish(cell, tally, prefill_ms, one.compile_s)
                one.compile_s = 0.0  # reading counts once, in the first cell
            self.rows.append(row)
            if method.name == NONE:
                self.full[cell.depth] = row
            self._tell(cell, row, resumed=self.old[cell.name] is not None)

    def _batch(
        self, group: AbstractGroup, method: Method, one: _Measured, index: np.ndarray
    ) -> None:
        """Read a batch, compress it to every budget, and answer."""
        read = None
        for keep, tally in one.tallies.items():
            c = method.at(keep, group.visibility)
            # In chunks a prompt is read to one budget.
            if read is None or c.schedule.chunk is not None:
                read = self.reader.read(group, c, index)
                one.prefill_s.append(read.run_s)
                one.compile_s += read.compile_s
            packed = timed(
                lambda c=c, p=read.value: p.compress(c, max_new_tokens=group.room)
            )
            answers = group.answer(self.reader, packed.value, read.value, index)
            for turn, given in zip(tally.turns, answers, strict=True):
                turn.add(given)
            tally.resident.append(packed.value.nbytes / len(index))
            tally.host.append(packed.value.host_nbytes / len(index))
            tally.compress_s.append(packed.run_s)
            tally.compile_s += packed.compile_s
            made = (packed.value, read.value, answers[0], index)
            tally.maps |= self.maps.made(group, c, keep, *made)

    def _refer(self, cells: Sequence[Cell], tallies: Mapping[Any, _Tally]) -> None:
        """Remember the uncompressed replies, computed now or earlier."""
        self.full, self.replies = {}, {}
        for cell in cells:
            if None in tallies:
                made = tallies[None].turns[(cell.turn or 1) - 1].items
                found = [made[i] or {} for i in cell.items]
            else:
                found = self.store.items(cell.name)
            for i, item in zip(cell.items, found, strict=True):
                self.replies[cell.turn, i] = item.get("reply")

    def _finish(self, cell: Cell, tally: _Tally, prefill_ms: float, compile_s: float):
        """Score and write one cell."""
        turn, items = tally.turns[(cell.turn or 1) - 1], []
        for number, i in enumerate(cell.items):
            item = turn.items[i]
            assert item is not None
            if "reply" in item:
                item["agrees"] = float(item["reply"] == self.replies[cell.turn, i])
            items.append({"item": number, **item})
        resident = float(np.mean(tally.resident))
        full = self.full.get(cell.depth, {}).get("resident_bytes", resident)
        row = {
            **describe(cell, self.made.config),
            **averages(items),
            "resident_bytes": resident,
            "full_bytes": full,
            "host_bytes": float(np.mean(tally.host)),
            "prefill_ms": prefill_ms,
            "compress_ms": 1e3 * float(np.mean(tally.compress_s)),
            "ask_ms": 1e3 * float(np.mean(turn.ask_s)),
            "ms_per_token": 1e3 * turn.decode_s / turn.steps if turn.steps else None,
            "compile_s": compile_s + tally.compile_s + turn.compile_s,
            **provenance(),
        }
        # Cells of one call share their programs: they count in the first.
        tally.compile_s = turn.compile_s = 0.0
        first = cell.items[0]
        found = tally.maps.get(first) if (cell.turn or 1) == 1 else None
        kept = None if found is None else entry(cell, first, found)
        self.store.write(cell.name, row, items, kept)
        return row

    def _tell(self, cell: Cell, row: Mapping[str, Any], *, resumed: bool) -> None:
        if self.progress is not None:
            done, total = len(self.rows), len(self.old)
            self.progress(EvalProgress(done, total, cell.name, row, resumed))
