"""What a plan says: a row per chip and compression, and where each number is from."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from kvjax.compress.config import Compression
from kvjax.messages import shown
from kvjax.planning.chips import Chip

if TYPE_CHECKING:  # a figure needs matplotlib, a plan does not
    from matplotlib.figure import Figure

    from kvjax.planning.planner import Planner

Mark = Literal["shapes", "compiled", "formula"]
"""Where a number is from: the shapes of the library's own arrays; the compiler of the
chip; or a formula (`planning.temporaries`, `planning.floors`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
    """Layers that hold alike.

    Attributes:
        count: of them.
        slots: of each KV head behind the prompt, beside the tail; the mean where heads
            or layers share a buffer.
        tail: slots for the newest tokens.
        pooled: whether they share a buffer.
    """

    count: int
    slots: int
    tail: int
    pooled: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One compression on one chip. Bytes are of one chip; `None` is not known.

    Attributes:
        device: name of the chip.
        compression: as it was asked for.
        keep: its budget as a fraction, if it has one.
        weights: of the model.
        codes: keys and values behind the prompt, as numbers or as their codes.
        scales: what decodes them, and summaries of pages.
        positions: of the tokens, and where heads are in a buffer.
        tail: keys, values and positions of the newest tokens.
        statistics: what eviction while decoding remembers.
        host: of codes and scales, what lies in the host's memory.
        decode_temporaries, prefill_temporaries: beside weights and cache.
        peak: at once, of whichever of both needs more.
        memory: that the chip gives to programs.
        fits: whether the peak does, or the compiler says so.
        upper: whether the cache is cut further, by data, once it is there.
        read: bytes that one decode step reads at most, for a token in each row.
        ms_per_token: these at the chip's bandwidth: no step is faster.
        prefill_flops: of the matrix products of a prompt.
        prefill_s: these at the chip's rate: no prompt is read faster.
        largest_context: tokens of a row, prompt and answer, at this batch; 0: none.
        context_bound: what bounds it: `memory`, or the `model`'s range.
        largest_batch: rows at this context; 0: none.
        batch_bound: `memory`, or the most that is looked at (`search`).
        layers: kinds of layers, if not all are alike.
        marks: where each number is from.
        notes: what else there is to say.
    """

    device: str
    compression: str
    keep: float | None
    weights: int
    codes: int
    scales: int
    positions: int
    tail: int
    statistics: int
    host: int
    decode_temporaries: int
    prefill_temporaries: int
    peak: int
    memory: int
    fits: bool
    upper: bool
    read: int
    ms_per_token: float | None
    prefill_flops: int
    prefill_s: float | None
    largest_context: int
    context_bound: str
    largest_batch: int
    batch_bound: str
    layers: tuple[Layers, ...]
    marks: Mapping[str, Mark]
    notes: tuple[str, ...] = ()

    @property
    def cache(self) -> int:
        """Bytes of the cache on the chip, all that belongs to it."""
        held = self.codes + self.scales + self.positions
        return held + self.tail + self.statistics - self.host

    @property
    def free(self) -> int:
        """Memory that is left; below 0, what is missing."""
        return self.memory - self.peak


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Whether a model, a context and a batch fit, under each compression asked for.

    Attributes:
        model: its name.
        context: tokens of a row, prompt and answer.
        batch: rows.
        new_tokens: of these tokens, those of the answer.
        dtype: of the weights, and of keys and values that are not encoded.
        chips: one record per device asked for.
        mesh: sizes of the mesh's axes, if there are several chips.
        versions: of what compiled, if anything did.
        rows: of every chip those of all compressions, in the order asked for.
        planner, drawn: what `plot` asks, and about which compressions: those of the
            first chip.
    """

    model: str
    context: int
    batch: int
    new_tokens: int
    dtype: str
    chips: tuple[Chip, ...]
    mesh: Mapping[str, int]
    versions: Mapping[str, str]
    rows: tuple[Row, ...]
    planner: "Planner | None" = dataclasses.field(
        default=None, repr=False, compare=False
    )
    drawn: Mapping[str, Compression] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def fits(self) -> bool:
        """Whether one of the compressions fits one of the chips."""
        return any(row.fits for row in self.rows)

    def of(self, device: str) -> tuple[Row, ...]:
        """The rows of a chip."""
        return tuple(row for row in self.rows if row.device == device)

    @property
    def headline(self) -> str:
        """The answer in a sentence, and what to change where it is no."""
        from kvjax.planning.words import headline

        return "\n".join(headline(self, chip) for chip in self.chips)

    def table(self) -> str:
        """A row per compression, as text."""
        from kvjax.planning.table import as_text

        return as_text(self)

    def plot(self) -> "Figure":
        """Bytes against context, a line per compression, the chip's memory as a line.

        Raises:
            ValueError: a plan that was read from JSON, which holds no shapes.
        """
        from kvjax.planning.plot import figure

        return figure(self)

    def as_tree(self) -> dict[str, Any]:
        """As JSON has it, what follows from the rest included."""
        bare = dataclasses.replace(self, planner=None, drawn={})
        tree = dataclasses.asdict(bare)
        del tree["planner"], tree["drawn"]
        for row, held in zip(tree["rows"], self.rows, strict=True):
            row |= {"cache": held.cache, "free": held.free, "marks": dict(held.marks)}
        return tree | {"fits": self.fits, "headline": self.headline}

    @classmethod
    def of_tree(cls, tree: Mapping[str, Any]) -> Self:
        """The plan of `as_tree`; only `plot` is not to be had of it.

        Raises:
            ValueError: it is none.
        """
        try:
            given = {k: v for k, v in tree.items() if k not in ("fits", "headline")}
            rows, chips = map(_row, given.pop("rows")), given.pop("chips")
            chips = tuple(Chip(**chip) for chip in chips)
            return cls(**given, rows=tuple(rows), chips=chips)
        except (TypeError, KeyError, AttributeError) as wrong:
            raise ValueError(
                "expected the tree of a plan, as `as_tree` gives it; got "
                f"{shown(tree)} ({wrong})."
            ) from None

    def __str__(self) -> str:
        return f"{self.headline}\n\n{self.table()}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        del cycle
        printer.text(str(self))


def _row(tree: Mapping[str, Any]) -> Row:
    if unknown := {*tree["marks"].values()} - {*get_args(Mark)}:
        raise TypeError(f"unknown marks {sorted(map(str, unknown))}")
    given = {k: v for k, v in tree.items() if k not in ("cache", "free")}
    layers = tuple(Layers(**one) for one in given.pop("layers"))
    return Row(**given | {"layers": layers, "notes": tuple(given["notes"])})
