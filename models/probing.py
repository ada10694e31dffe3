"""A second look at a prompt: the model runs over tokens behind it, for a score."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache import Memory
from kvjax.compress.observe import Observed
from kvjax.compress.plan import LayerPlan
from kvjax.depth import Loop, in_order, members
from kvjax.models.decoder import Attending, Decoder
from kvjax.pallas_kernels.dense import causal_attention
from kvjax.scorers.base import AbstractProbe, Again, Look, Replayed
from kvjax.turns import take
from kvjax.types import LayerInputs, Lengths, Scores, Tokens, padded_positions


def probed(
    again: Again,
    tokens: Tokens,
    lengths: Lengths,
    loops: Sequence[Loop],
    seen: Sequence[Observed],
    plans: Sequence[LayerPlan],
) -> tuple[Observed, ...]:
    """What the pass over a prompt left, with what scores found by a second look.

    Args:
        again: runs the model behind the prompts.
        tokens: the prompts.
        lengths: of each row.
        loops: which layers are together.
        seen: what the pass left of them.
        plans: what is done in each layer.
    """
    found: dict[AbstractProbe, Scores] = {}

    def one(numbers: range, observed: Observed) -> Observed:
        evict = plans[numbers.start].evict
        score = None if evict is None else evict.score
        if not isinstance(score, AbstractProbe):
            return observed
        if score not in found:
            found[score] = score.probe(again, tokens, lengths)
        mine = found[score][numbers.start : numbers.stop : numbers.step]
        return dataclasses.replace(observed, memory=Memory(slots=mine))

    return tuple(map(one, members(loops), seen))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rereading:
    """A model behind prompts that it has read; an `Again`.

    Attributes:
        model: a decoder.
        lengths: of each row.
        loops: which layers are together.
        seen: what the pass over the prompts left of them.
    """

    model: Decoder
    lengths: Lengths
    loops: tuple[Loop, ...]
    seen: tuple[Observed, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Layers, rows, KV heads and tokens of the prompts."""
        b, kv_heads, slots = self.seen[0].k.shape[1:4]
        return self.model.config.num_layers, b, kv_heads, slots

    def __call__(
        self,
        tokens: Int[Array, "B R"],
        positions: Int[Array, "B R"],
        look: Look | None = None,
        gates: Float[Array, "L B K S"] | None = None,
    ) -> Replayed:
        """Tokens behind the prompts through the model."""

        def step(inputs: LayerInputs, state: None):
            depth = inputs.depth
            held = take(self.seen[depth.group], depth.turn)
            gate = None if gates is None else take(gates, depth.layer)
            out = behind(inputs, held, self.lengths, gate)
            left = () if look is None else look(inputs, held.k, held.v)
            return out, state, left

        # Not `trained`: a gradient is that of the gates alone, and loops that keep what
        # they close over to themselves would keep the prompt once for every layer.
        back = gates is not None
        asked = Attending(step=step, loops=self.loops)
        passed = self.model.run(tokens, positions, asked, remat=back)
        looks = None if look is None else in_order(passed.loops, passed.left)
        return Replayed(logits=self.model.logits(passed.hidden), looks=looks)


def behind(
    inputs: LayerInputs,
    held: Observed,
    lengths: Lengths,
    gate: Float[Array, "B K S"] | None = None,
) -> Float[Array, "B H R D"]:
    """Attention of tokens behind a prompt over it and themselves.

    Args:
        inputs: a layer's, of the tokens.
        held: what the pass over the prompt left of the layer.
        lengths: of each prompt.
        gate: what the weight of each of its tokens is multiplied by.
    """
    width = held.k.shape[2]

    def bias(q_positions: Array, k_positions: Array) -> Array:
        assert gate is not None
        fresh = k_positions.shape[1] - width
        padded = jnp.pad(gate, [(0, 0), (0, 0), (0, fresh)], constant_values=1.0)
        shape = (*gate.shape[:2], q_positions.shape[1], k_positions.shape[1])
        return jnp.broadcast_to(jnp.log(padded)[:, :, None], shape)

    at = padded_positions(lengths, width)
    return causal_attention(
        inputs.q,
        jnp.concatenate([held.k, inputs.k], axis=2),
        jnp.concatenate([held.v, inputs.v], axis=2),
        inputs.positions,
        jnp.concatenate([at, inputs.positions], axis=1),
        scale=inputs.spec.scale,
        window=inputs.spec.window,
        softcap=inputs.spec.softcap,
        bias=None if gate is None else bias,
    ).out
