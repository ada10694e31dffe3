"""One pass over a prompt for many methods: what their scores look at is kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt32

from kvjax.cache import Weights, token_digest
from kvjax.compress.config import Compression
from kvjax.compress.observe import observe, wants_mass
from kvjax.compress.survey import plans_of
from kvjax.depth import Depth, members, over, regrouped
from kvjax.fields import fit
from kvjax.models import checks, origins
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Attending, Decoder
from kvjax.models.finite import check_logits
from kvjax.models.meshes import Placement, entry, placement_of
from kvjax.models.padding import PROMPT, bucket, pad_tokens
from kvjax.models.prompts import Prompt, check_whole, method_of
from kvjax.models.reading import last_logits
from kvjax.prefills import AbstractPrefill
from kvjax.types import (
    LayerInputs,
    Lengths,
    LengthsLike,
    TokensLike,
    loops_of,
    padded_positions,
    pytree,
    static,
)


@pytree
class SharedPass:
    """A prompt that was read once; any method with this prefill can look at it.

    Attributes:
        logits: `[B, V]` of each row's last token.
        lengths: `[B]` tokens per row.
        inputs: queries, keys and values of all tokens; of layers that the model has
            alike together, with a first axis for them.
        mass: `[B, H, S]` attention each key received, likewise, or None.
        config: of the model.
        dtype: of the model.
        prefill: how it was read.
        longest: no row has more tokens.
        digest: of the tokens, see `KVCache`.
        weights: of the model, where they are known.
        placement: of the model, where it is spread over a mesh.
    """

    logits: Float[Array, "B V"]
    lengths: Lengths
    inputs: tuple[LayerInputs, ...]
    mass: tuple[Float[Array, "B H S"] | None, ...]
    config: DecoderConfig = static()
    dtype: jnp.dtype = static()
    prefill: AbstractPrefill = static()
    longest: int = static()
    digest: UInt32[Array, "B 4"]
    weights: Weights | None = static(default=None)
    placement: Placement | None = static(default=None)

    @entry
    def prompt(self, c: Compression) -> Prompt:
        """What `read_prompt` with `c` gives, up to the order of summation.

        Raises:
            ValueError: see `prefill`; `c` reads prompts in another way or more than
                once, or needs attention sums that were not kept.
        """
        checks.compression(self.config, c, self.lengths)
        check_whole(c)
        if c.probes:
            names = [type(score).__name__ for score in c.scores if score.probes]
            raise ValueError(
                f"{', '.join(names)} runs the model over the prompt again, which this "
                "pass cannot. Use `read_prompt(model, tokens, lengths, c)`."
            )
        if c.prefill != self.prefill:
            raise ValueError(
                f"this prompt was read with {self.prefill}; got a compression with "
                f"{c.prefill}. Read it again."
            )
        if wants_mass(c) and None in self.mass:
            raise ValueError(
                "the score sums attention over all queries, which this pass did not "
                "keep. Read the prompt again with `mass=True`."
            )
        method = method_of(c)
        return Prompt(
            logits=self.logits,
            lengths=self.lengths,
            seen=_look(
                self.inputs,
                self.mass,
                self.lengths,
                self.config,
                method,
                self.longest,
            ),
            config=self.config,
            dtype=self.dtype,
            method=method,
            longest=self.longest,
            digest=self.digest,
            weights=self.weights,
            placement=self.placement,
        )


@functools.partial(jax.jit, static_argnames=("config", "c", "longest"))
def _look(inputs, mass, lengths, config: DecoderConfig, c: Compression, longest: int):
    plans = plans_of(c, config.layers, longest)
    loops = loops_of(config.layers, plans)
    groups = members(loops)

    def one(depth: Depth, state: None, given: tuple[LayerInputs, Array | None]):
        plan = plans[groups[depth.group].start]
        layer = dataclasses.replace(given[0], depth=depth)
        return state, observe(layer, lengths, plan, given[1])

    held = list(zip(inputs, mass, strict=True))
    plain = loops_of(config.layers)
    return over(loops, one, None, regrouped(plain, held, loops))[1]


@functools.partial(jax.jit, static_argnames=("graph", "prefill", "mass"))
def _read(graph, params, tokens, lengths, prefill: AbstractPrefill, mass: bool):
    model = nnx.merge(graph, params)

    def keep(inputs: LayerInputs, state: None):
        out, sums = prefill.attend(inputs, lengths, mass)
        return out, state, (inputs, sums)

    positions = padded_positions(lengths, tokens.shape[1])
    seen = model.run(tokens, positions, Attending(step=keep))
    inputs, sums = zip(*seen.left, strict=True)
    digest = token_digest(tokens, positions)
    return last_logits(model, seen.hidden, lengths), inputs, sums, digest


@entry
def read_shared(
    model: Decoder,
    tokens: TokensLike,
    lengths: LengthsLike | None,
    prefill: AbstractPrefill,
    *,
    mass: bool = False,
) -> SharedPass:
    """Read a prompt once for many methods.

    Args:
        model: a decoder.
        tokens: `[B, T]` right-padded token ids.
        lengths: `[B]` tokens per row; None: all of them.
        prefill: how.
        mass: keep the attention each key received, for scores that sum it (`h2o`).

    Raises:
        ValueError: see `prefill`; logits that are not finite, unless they are traced.

    Cost: holds `(H + 2 K) D` numbers per token and layer, where `read_prompt` holds
    `2 K D`.
    """
    tokens, lengths = checks.asked(model, tokens, lengths)
    checks.reading(model.config, prefill)
    fit(mass, bool, "mass")
    width = tokens.shape[1]
    tokens = pad_tokens(tokens, bucket(width, PROMPT))
    graph, params = nnx.split(model)
    logits, inputs, sums, digest = _read(graph, params, tokens, lengths, prefill, mass)
    check_logits(model.dtype, logits, " behind the prompts")
    return SharedPass(
        logits=logits,
        lengths=lengths,
        inputs=inputs,
        mass=sums,
        config=model.config,
        dtype=model.dtype,
        prefill=prefill,
        longest=bucket(width),
        digest=digest,
        weights=origins.weights_of(model),
        placement=placement_of(model),
    )
