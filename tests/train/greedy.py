"""Greedy replies without a cache: the gold answer as the draft of what comes next.

What replies through a cache are compared with.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.attention import causal_attention
from kvjax.eval.tasks import STOP, Item
from kvjax.models.decoder import Decoder
from kvjax.models.padding import pad_rows
from kvjax.train.data.tokenizer import BOS, decode, encode

PASS_TOKENS = 16384
"""Tokens of one pass; bounds its memory."""


@dataclasses.dataclass
class _Draft:
    """One reply under way: what greedy decoding is known to give, and a guess."""

    prompt: np.ndarray
    gold: np.ndarray
    own: np.ndarray
    done: bool = False

    @property
    def guess(self) -> np.ndarray:
        return np.concatenate([self.own, self.gold[len(self.own) :]])

    def accept(self, chosen: np.ndarray, most: int) -> None:
        """Keep the guess up to the first token greedy decoding would not choose."""
        guess, first = self.guess, len(self.prompt) - 1
        choice = chosen[first : first + len(guess) + 1]
        wrong = np.flatnonzero(choice[:-1] != guess)
        end = wrong[0] if len(wrong) else len(guess)
        self.own = choice[: end + 1]
        self.done = STOP in decode(self.own) or len(self.own) >= most


def replies(model: Decoder, items: Sequence[Item], max_new_tokens: int) -> list[str]:
    """What greedy decoding replies to each item, stop character included.

    One pass over prompt and guess gives the greedy choice at every position; it is
    exact up to the first departure from the guess. So a right reply costs one pass
    and a wrong one a pass per error, instead of a pass per token.
    """
    graph, state = nnx.split(model)
    drafts = [
        _Draft(
            prompt=np.concatenate([[BOS], encode(item.prompt)]),
            gold=encode(item.answer),
            own=np.zeros(0, np.int32),
        )
        for item in items
    ]
    longest = max(len(d.prompt) + max(len(d.gold), max_new_tokens) for d in drafts)
    width = -(-longest // 64) * 64
    while left := [draft for draft in drafts if not draft.done]:
        # Few wrong replies remain after the first pass: powers of two bound compiling.
        rows = min(max(1, PASS_TOKENS // width), 1 << (len(left) - 1).bit_length())
        for start in range(0, len(left), rows):
            group = left[start : start + rows]
            texts = [np.concatenate([one.prompt, one.guess]) for one in group]
            texts += [np.zeros(0, np.int32)] * (rows - len(group))
            tokens, _ = pad_rows(texts, width)
            chosen = np.asarray(_choices(graph, state, tokens))
            for line, draft in zip(chosen, group, strict=False):
                draft.accept(line, max_new_tokens)
    return [decode(draft.own) for draft in drafts]


@functools.partial(jax.jit, static_argnames=("graph",))
def _choices(graph: nnx.GraphDef, state: nnx.State, tokens: jax.Array) -> jax.Array:
    """Greedy next token after every position, `[B, T]`."""
    model = nnx.merge(graph, state)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
    hidden = model(tokens, positions, causal_attention)
    return jnp.argmax(model.logits(hidden), axis=-1)
