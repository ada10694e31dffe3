"""How an evaluation reads prompts: once for a method, or once for all that read alike.

Either way a method compresses what was read to every budget, unless it compresses while
it reads.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import final

import numpy as np

from kvjax.compress.config import Compression
from kvjax.eval.groups import AbstractGroup
from kvjax.eval.timing import Timed, timed
from kvjax.models.decoder import Decoder
from kvjax.models.finite import check_logits
from kvjax.models.inference import prefill
from kvjax.models.prompts import CompressedPrompt, Prompt, read_prompt
from kvjax.models.shared_pass import SharedPass, read_shared
from kvjax.prefills import AbstractPattern, AbstractPrefill

LOG = logging.getLogger("kvjax.eval")


@final
class PromptReader:
    """Reads the prompts of groups, batch by batch.

    Args:
        model: what reads.
        share: methods that read prompts in the same way look at one pass over each
            batch, but for those that probe. The passes of one batch are held at a
            time.
        mass: shared passes keep the attention each key received, for scores that sum
            it.
    """

    def __init__(self, model: Decoder, *, share: bool = False, mass: bool = False):
        self.model, self.share, self.mass = model, share, mass
        self._at: tuple[int, int] | None = None
        self._passes: dict[AbstractPrefill, Timed[SharedPass]] = {}
        self._dense: set[AbstractPrefill] = set()

    def read(
        self, group: AbstractGroup, c: Compression, index: np.ndarray
    ) -> Timed[Prompt] | Timed[CompressedPrompt]:
        """The prompts `index` of a group as `c` looks at them.

        Raises:
            ValueError: the model gives logits that are not finite.
        """
        self._note_dense(c.prefill, [len(group.prompts[i]) for i in index])
        if c.schedule.chunk is not None:
            tokens, lengths = group.read(index)
            given, room = (self.model, tokens, lengths, c), group.room
            read = timed(
                lambda: CompressedPrompt(c, room, *prefill(*given, max_new_tokens=room))
            )
        elif not self.share or c.probes:  # which have a pass of their own
            tokens, lengths = group.read(index)
            read = timed(lambda: read_prompt(self.model, tokens, lengths, c))
        else:
            passed = self._pass(group, c, index)
            looked = timed(lambda: passed.value.prompt(c))
            read = Timed(
                looked.value,
                passed.run_s + looked.run_s,
                passed.compile_s + looked.compile_s,
            )
        check_logits(self.model.dtype, read.value.logits, " behind the prompts")
        return read

    def _note_dense(self, prefill: AbstractPrefill, lengths: Sequence[int]) -> None:
        """Say once of a pattern that prompts are too short for it."""
        if not isinstance(prefill, AbstractPattern) or prefill in self._dense:
            return
        if short := sum(length < prefill.dense_below for length in lengths):
            self._dense.add(prefill)
            LOG.warning(
                "%s: %d of %d prompts have fewer than %d tokens and are read densely; "
                "prefill.dense_below=0 has all of them read sparsely",
                type(prefill).__name__,
                short,
                len(lengths),
                prefill.dense_below,
            )

    def _pass(
        self, group: AbstractGroup, c: Compression, index: np.ndarray
    ) -> Timed[SharedPass]:
        """The pass over a batch that methods share; only its first use compiles."""
        if (at := (id(group), int(index[0]))) != self._at:
            self._at, self._passes = at, {}
        if c.prefill in self._passes:
            return dataclasses.replace(self._passes[c.prefill], compile_s=0.0)
        tokens, lengths = group.read(index)
        self._passes[c.prefill] = timed(
            lambda: read_shared(self.model, tokens, lengths, c.prefill, mass=self.mass)
        )
        return self._passes[c.prefill]
