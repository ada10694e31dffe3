"""`calibrate`: which sparse pattern of prefill suits each head of a model."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from flax import nnx
from jaxtyping import Array, Float

from kvjax.axes import as_numpy
from kvjax.compress.config import Compression
from kvjax.compress.presets import COMPONENTS
from kvjax.config import encode
from kvjax.depth import in_order
from kvjax.fields import Share, fit
from kvjax.files import write_text
from kvjax.messages import shown
from kvjax.models import checks, origins
from kvjax.models.decoder import Attending, Decoder
from kvjax.models.finite import check_rows
from kvjax.models.meshes import entry
from kvjax.models.padding import PROMPT, bucket, pad_tokens
from kvjax.pallas_kernels.dense import self_attention_with_mass
from kvjax.pallas_kernels.partial import merge
from kvjax.places import check_place
from kvjax.prefills import (
    AbstractPattern,
    AbstractPrefill,
    AShape,
    BlockTopK,
    ByHead,
    VerticalSlash,
)
from kvjax.prefills.chosen import own
from kvjax.types import (
    LayerInputs,
    Lengths,
    LengthsLike,
    TokensLike,
    loops_of,
    padded_positions,
)

CANDIDATES: tuple[AbstractPrefill, ...] = (
    AShape(first=100, local=800),
    VerticalSlash(vertical=30, slash=800),
    VerticalSlash(vertical=100, slash=750),
    VerticalSlash(vertical=500, slash=700),
    VerticalSlash(vertical=3500, slash=100),
    BlockTopK(blocks=30),
)
"""MInference's: all cost about the same at the 30 thousand tokens of its search."""

SKIPPED = 1 / 12
"""Of a row, whose queries do not count: 2500 of 30 thousand, as in MInference."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What `calibrate` has measured, and the table that follows from it.

    Attributes:
        model: name and digests of the model.
        patterns: the candidates.
        retained: `[L, H, P]` mass of full attention that a head keeps in each of them.
        share: `[L, H, P]` blocks that it computes, of those of full attention.
        table: `[L, H]` the place of each head's candidate.
        about: what it was measured on, in words.
    """

    model: str
    patterns: tuple[AbstractPrefill, ...]
    retained: np.ndarray
    share: np.ndarray
    table: np.ndarray
    about: str

    @property
    def compression(self) -> Compression:
        """Prompts are read by the table; the cache is kept whole."""
        sparse = [p for p in self.patterns if isinstance(p, AbstractPattern)]
        fields = {"block": sparse[0].block} if sparse else {}
        by_head = ByHead(
            patterns=self.patterns,
            table=tuple(tuple(map(int, row)) for row in self.table),
            model=self.model,
            **fields,
        )
        return Compression(prefill=by_head)

    def chosen(self, of: np.ndarray) -> np.ndarray:
        """`[L, H]` what the chosen patterns have of `retained` or `share`."""
        return np.take_along_axis(of, self.table[..., None], axis=-1)[..., 0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a compression: `kvjax.compression(path)` reads it.

        Raises:
            ValueError: the name does not end in `.yaml`.
            OSError: it cannot be written.
        """
        check_target(path)
        target = pathlib.Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, self.text())

    def text(self) -> str:
        """The file that `save` writes."""
        kept, cost = self.chosen(self.retained), self.chosen(self.share)
        lines = [
            "Sparse prefill with a pattern for every head, as it was measured.",
            "",
            "Source: `kvjax.calibrate`, after MInference (2407.02490) section 3.2.",
            f"Model: {self.model}. {self.about}",
            f"Mass kept: {kept.mean():.4f} in the mean, {kept.min():.4f} at least. "
            f"Blocks computed there: {cost.mean():.4f} of full attention's.",
        ]
        tree = encode(self.compression, COMPONENTS)
        head = "".join(f"# {line}".rstrip() + "\n" for line in lines)
        return head + yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)


def check_target(path: str | os.PathLike[str]) -> None:
    """The name is one of a compression's file, which can be written."""
    if pathlib.Path(path).suffix not in (".yaml", ".yml"):
        raise ValueError(
            f"the name of a compression's file ends in .yaml; got {shown(str(path))}."
        )
    check_place(pathlib.Path(path).parent, "Write it to another file.")


def measured(
    inputs: LayerInputs, lengths: Lengths, patterns: Sequence[AbstractPrefill]
) -> tuple[Array, Float[Array, "P H"], Float[Array, "P H"]]:
    """Full attention of a layer; what each pattern keeps of it, and computes.

    The mass that a query keeps is `exp(lse - lse of all)`: no matrix of weights.
    """
    asked, spec = own(inputs), inputs.spec
    how = {"scale": spec.scale, "window": spec.window, "softcap": spec.softcap}
    full, _ = self_attention_with_mass(
        asked.q, asked.k, asked.v, asked.positions, mass=False, **how
    )
    first = jnp.floor(lengths.astype(jnp.float32) * SKIPPED).astype(jnp.int32)
    counts = asked.positions >= first[:, None]
    number = jnp.maximum(jnp.sum(counts, dtype=jnp.float32), 1)
    ones = jnp.ones(inputs.q.shape[1], jnp.float32)
    kept, share = [], []
    for pattern in patterns:
        if not isinstance(pattern, AbstractPattern):  # dense
            kept, share = [*kept, ones], [*share, ones]
            continue
        chosen = pattern.choose(asked, lengths)
        lse = merge(chosen.parts(asked)).lse
        mass = jnp.exp(jnp.where(counts[:, None], lse - full.lse, -jnp.inf))
        kept.append(jnp.sum(jnp.minimum(mass, 1), axis=(0, 2)) / number)
        share.append(jnp.mean(chosen.share(asked), axis=0))
    return full.out, jnp.stack(kept), jnp.stack(share)


@functools.partial(jax.jit, static_argnames=("graph", "patterns"))
def _measure(graph, params, tokens, lengths, patterns):
    model = nnx.merge(graph, params)

    def step(inputs: LayerInputs, state: None):
        out, *found = measured(inputs, lengths, patterns)
        return out, state, tuple(found)

    positions = padded_positions(lengths, tokens.shape[1])
    seen = model.run(tokens, positions, Attending(step=step))
    return in_order(loops_of(model.config.layers), seen.left)


@entry
def calibrate(
    model: Decoder,
    tokens: TokensLike,
    lengths: LengthsLike | None = None,
    *,
    candidates: Sequence[AbstractPrefill] = CANDIDATES,
    retain: float | None = None,
    name: str = "",
) -> Calibration:
    """The pattern of prefill that keeps most of each head's attention.

    The candidates' sizes are numbers of tokens, so that the table serves longer prompts
    than those it is measured on. The model itself attends in full. A query counts from
    a twelfth of its row on: before, there is little to leave out.

    Args:
        model: a decoder.
        tokens: `[B, S]` right-padded prompts, as long as can be: MInference takes one
            of 30 thousand tokens in which something is to be found.
        lengths: `[B]` tokens per row; None: all of them.
        candidates: sparse patterns of one `block`; `dense` may be among them.
        retain: take the candidate that computes least of those that keep this share of
            a head's mass, and where none does, the one that keeps most; None: the one
            that keeps most.
        name: of the model, for the file.

    Raises:
        ValueError: see `prefill`; candidates that cannot be mixed; statistics that are
            not finite.

    Cost: a prompt's pass, with every layer's attention once in full and once by each
        candidate. Memory is linear in `S`, up to the maps of `(S / block) ** 2` blocks
        per head.

    Source: MInference (2407.02490) section 3.2 and `search_pattern`. Deviations: the
        mass is counted from a share of each row on instead of from its query 2500;
        its candidates' relabelling (A-shape and block-sparse heads become
        vertical-slash) is left out.
    """
    tokens, lengths = checks.asked(model, tokens, lengths)
    patterns = tuple(candidates)
    if not patterns:
        raise ValueError("`candidates` must name a pattern; got none.")
    for one in patterns:
        checks.reading(model.config, one)
    if retain is not None:
        fit(retain, Share, "retain")
    config, width = model.config, tokens.shape[1]
    none = np.zeros((config.num_layers, config.num_heads), int)
    empty = Calibration(
        model=_called(model, name),
        patterns=patterns,
        retained=none[..., None],
        share=none[..., None],
        table=none,
        about=_about(lengths, retain),
    )
    _ = empty.compression  # raise where candidates do not go together
    graph, params = nnx.split(model)
    padded = pad_tokens(tokens, bucket(width, PROMPT))
    found = _measure(graph, params, padded, lengths, patterns)
    retained, share = (np.moveaxis(as_numpy(x), 1, 2) for x in found)
    sound = np.isfinite(retained).all(axis=(1, 2))
    check_rows(model.dtype, sound, " or the attention in front of them")
    table = choice(retained, share, retain)
    return dataclasses.replace(empty, retained=retained, share=share, table=table)


def choice(retained: np.ndarray, share: np.ndarray, retain: float | None) -> np.ndarray:
    """`[..., P]` to the place of what is chosen; of equal ones the cheaper.

    Args:
        retained: mass kept.
        share: blocks computed.
        retain: see `calibrate`.
    """
    enough = retained >= (np.inf if retain is None else retain)
    cheapest = np.where(enough, share, np.inf)
    best = np.lexsort((share, -retained), axis=-1)[..., 0]
    least = np.lexsort((-retained, cheapest), axis=-1)[..., 0]
    return np.where(enough.any(axis=-1), least, best)


def _called(model: Decoder, name: str) -> str:
    """Name and digests of a model."""
    weights: Any = origins.weights_of(model)
    digest = "unknown" if weights is None else weights.digest
    shape = origins.fingerprint(model.config)
    return f"{name or 'unnamed'} (weights {digest}, config {shape})"


def _about(lengths: Lengths, retain: float | None) -> str:
    rows = ", ".join(map(str, as_numpy(lengths)[:8])) + ", ..." * (len(lengths) > 8)
    how = "the most mass" if retain is None else f"the least work for {retain:g} of it"
    return f"Measured on {len(lengths)} rows of {rows} tokens; chosen by {how}."
