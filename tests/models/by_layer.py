"""A model layer by layer, each with a cache of its own: no loops, no shared arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kvjax.cache import LayerCache, Memory
from kvjax.compress.config import Compression
from kvjax.compress.layer import build
from kvjax.compress.observe import observe, wants_mass
from kvjax.compress.survey import plans_of, survey
from kvjax.depth import Depth, in_order
from kvjax.models import Decoder
from kvjax.models.reading import last_logits, observe_prompt
from kvjax.types import LayerInputs, loops_of, padded_positions


class ByLayer:
    """What `prefill` and `generate` do, written as loops in Python."""

    def __init__(self, model: Decoder, c: Compression, room: int):
        self.model, self.c, self.room = model, c, room
        self.layers = [model.layer(n) for n in range(model.config.num_layers)]
        self._step = jax.jit(self._one_step)

    def _through(self, tokens: Array, positions: Array, attend):
        """Hidden states, and what `attend(n, inputs)` gives beside its output."""
        x, left = self.model.embed(tokens), []
        for n, layer in enumerate(self.layers):
            spec = self.model.config.layers[n]

            def one(inputs: LayerInputs, n: int = n):
                return attend(n, inputs)

            x, (more,) = layer(x, positions, spec, Depth(layer=n), one)
            left.append(more)
        return self.model.norm(x), left

    def prompt(self, tokens: np.ndarray, lengths: np.ndarray):
        """Logits of each row's last token, and the caches."""
        return jax.jit(self._prompt)(jnp.asarray(tokens), jnp.asarray(lengths))

    def _prompt(self, tokens: Array, lengths: Array):
        c, (_, width) = self.c, tokens.shape
        config, dtype = self.model.config, self.model.dtype
        found = survey(c, config.layers, lengths, width, dtype)
        read = self._read_again(tokens, lengths) if c.probes else None
        reuse = 1 if c.evict is None else c.evict.unit.reuse
        handed = None

        def attend(n: int, inputs: LayerInputs):
            nonlocal handed
            out, mass = c.prefill.attend(inputs, lengths, wants_mass(c))
            layout = found.layouts[n]
            if layout.pooled:  # nothing is shared here
                layout = dataclasses.replace(layout, slots=found.slots[n])
            seen = observe(inputs, lengths, layout.plan, mass)
            if read is not None:
                seen = dataclasses.replace(seen, memory=Memory(slots=read[n]))
            share, given = found.of(Depth(layer=n)), handed if n % reuse else None
            how = (lengths, layout, share)
            cache, handed = build(seen, *how, room=self.room, layer=n, priorities=given)
            return out, cache

        hidden, caches = self._through(tokens, padded_positions(lengths, width), attend)
        return last_logits(self.model, hidden, lengths), caches

    def _read_again(self, tokens: Array, lengths: Array) -> Array:
        """What a score that runs the whole model finds, `[L, B, K, S]`."""
        specs, width = self.model.config.layers, tokens.shape[1]
        _, seen = observe_prompt(self.model, tokens, lengths, self.c)
        loops = loops_of(specs, plans_of(self.c, specs, width))
        memories = [layer.memory for layer in seen]
        return in_order(loops, [memory.slots for memory in memories if memory])

    def _one_step(self, caches: list[LayerCache], token: Array, positions: Array):
        def attend(n: int, inputs: LayerInputs):
            return caches[n].attend(inputs)

        hidden, caches = self._through(token, positions, attend)
        return self.model.logits(hidden)[:, 0], caches

    def greedy(self, logits: Array, caches, lengths: np.ndarray, steps: int):
        """Tokens `[B, N]`, and the logits behind all but the last, `[B, N - 1, V]`."""
        tokens, seen = [jnp.argmax(logits, axis=-1)], []
        for step in range(steps - 1):
            positions = jnp.asarray(lengths + step, jnp.int32)[:, None]
            logits, caches = self._step(caches, tokens[-1][:, None], positions)
            seen.append(logits)
            tokens.append(jnp.argmax(logits, axis=-1))
        return np.stack(tokens, axis=1).astype(np.int32), np.stack(seen, axis=1)
