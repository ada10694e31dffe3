"""Rotary position embeddings, as data: one frozen record, rotation by any position.

Keys are cached after rotation; codecs that want them before it rotate back by the
stored absolute positions (`Rope.unrotate`), so both forms are one call apart.
"""

import dataclasses
import math
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.fields import Checked, Factor, OneOf, Positive, Range, Size

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_TRAINED = ("dynamic", "llama3", "yarn", "longrope")
_REACHING = ("dynamic", "longrope")

Context = Annotated[int, Range(2)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope(Checked):
    """Rotary embedding of one layer ("rotate half" pairing, as Hugging Face stores it).

    Attributes:
        head_dim: `D`.
        theta: base of the geometric frequency ladder.
        rotary_dim: leading channels that are rotated (`partial_rotary_factor * D`).
        kind: one of `KINDS`.
        factor: context extension factor of the scaled kinds.
        low_freq_factor, high_freq_factor: band edges of `llama3`.
        beta_fast, beta_slow: band edges of `yarn`.
        original_max_positions: trained context of all scaled kinds but `linear`.
        reach: context that `dynamic` and `longrope` take their frequencies for.
        short_factor, long_factor: divisors of `longrope`, a number for each angle: for
            a `reach` up to the trained context, and beyond it.
        attention_factor: `yarn` and `longrope` multiply cos and sin by it; None
            computes `0.1 ln(factor) + 1` and `sqrt(1 + ln(factor) / ln(trained))`.
        truncate: `yarn` rounds its band edges to whole channels.

    Source: RoFormer (2104.09864); llama3, yarn (2309.00071), longrope (2402.13753) and
    dynamic (NTK) scaling as in transformers `modeling_rope_utils`. Deviation: there the
    last two choose by the length of each sequence, so that a sequence that outgrows the
    trained context reads keys that were turned by other angles. Here `reach` chooses
    once, and cached keys stay right; the angles are those of transformers for a
    sequence of `reach` tokens (`longrope`: of any length on the same side).
    """

    head_dim: Size
    theta: Annotated[float, Range(1e-3, 1e12)] = 10_000.0
    rotary_dim: Positive | None = None
    kind: Annotated[str, OneOf(*KINDS)] = "default"
    factor: Factor = 1.0
    low_freq_factor: Factor = 1.0
    high_freq_factor: Factor = 4.0
    beta_fast: Factor = 32.0
    beta_slow: Factor = 1.0
    original_max_positions: Context | None = None
    reach: Context | None = None
    short_factor: tuple[Factor, ...] = ()
    long_factor: tuple[Factor, ...] = ()
    attention_factor: Factor | None = None
    truncate: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.width % 2 or not 0 < self.width <= self.head_dim:
            raise ValueError(
                f"`rotary_dim` must be even and within head_dim={self.head_dim}; "
                f"got {self.width}."
            )
        if self.kind == "yarn" and self.theta == 1:
            raise ValueError("RoPE scaling 'yarn' needs a `theta` other than 1.")
        needed = ["original_max_positions"] * (self.kind in _TRAINED)
        for name in [*needed, *["reach"] * (self.kind in _REACHING)]:
            if getattr(self, name) is None:
                raise ValueError(f"RoPE scaling {self.kind!r} needs `{name}`.")
        if self.kind == "longrope":
            self._check_divisors()
        if self.kind == "dynamic" and (self.width < 4 or self.factor < 1):
            raise ValueError(
                f"RoPE scaling 'dynamic' needs at least 4 rotated channels and a "
                f"`factor` of at least 1; got {self.width} and {self.factor}."
            )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"RoPE scaling 'llama3' needs `high_freq_factor` above "
                f"`low_freq_factor`; got {self.high_freq_factor} and "
                f"{self.low_freq_factor}."
            )

    def _check_divisors(self) -> None:
        for name in ("short_factor", "long_factor"):
            found = getattr(self, name)
            if len(found) != self.width // 2:
                raise ValueError(
                    f"RoPE scaling 'longrope' needs {self.width // 2} numbers in "
                    f"`{name}`, one for two of the {self.width} rotated channels; got "
                    f"{len(found)}."
                )

    @property
    def width(self) -> int:
        """Rotated channels."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def magnitude(self) -> float:
        """Factor on cos and sin (1 except for `yarn` and `longrope`)."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        if self.kind == "yarn":
            return 0.1 * math.log(self.factor) + 1.0
        assert self.original_max_positions is not None
        return math.sqrt(
            1 + math.log(self.factor) / math.log(self.original_max_positions)
        )

    def frequencies(self) -> np.ndarray:
        """Angles per position, `[width / 2]` float32."""
        half = np.arange(0, self.width, 2, dtype=np.float64) / self.width
        inv = 1.0 / self._base() ** half
        if self.kind == "linear":
            inv = inv / self.factor
        elif self.kind == "llama3":
            inv = self._llama3(inv)
        elif self.kind == "yarn":
            inv = self._yarn(inv)
        elif self.kind == "longrope":
            inv = inv / np.array(self._divisors())
        return inv.astype(np.float32)

    def _base(self) -> float:
        if self.kind != "dynamic":
            return self.theta
        assert self.original_max_positions is not None and self.reach is not None
        times = max(self.reach / self.original_max_positions, 1.0)
        stretch = self.factor * times - (self.factor - 1)
        return self.theta * stretch ** (self.width / (self.width - 2))

    def _divisors(self) -> tuple[float, ...]:
        assert self.original_max_positions is not None and self.reach is not None
        beyond = self.reach > self.original_max_positions
        return self.long_factor if beyond else self.short_factor

    def _llama3(self, inv: np.ndarray) -> np.ndarray:
        assert self.original_max_positions is not None
        wavelength = 2 * math.pi / inv
        low = self.original_max_positions / self.low_freq_factor
        high = self.original_max_positions / self.high_freq_factor
        smooth = (self.original_max_positions / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended = (1 - smooth) * inv / self.factor + smooth * inv
        scaled = np.where(wavelength > low, inv / self.factor, inv)
        return np.where((wavelength <= low) & (wavelength >= high), blended, scaled)

    def _yarn(self, inv: np.ndarray) -> np.ndarray:
        def channel(rotations: float) -> float:
            assert self.original_max_positions is not None
            period = self.original_max_positions / (rotations * 2 * math.pi)
            return self.width * math.log(period) / (2 * math.log(self.theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.width - 1)
        span = (high - low) or 0.001
        ramp = np.clip((np.arange(self.width // 2) - low) / span, 0, 1)
        return inv / self.factor * ramp + inv * (1 - ramp)

    def cos_sin(self, positions: Int[Array, "*shape"]) -> tuple[Array, Array]:
        """`(cos, sin)`, `[*shape, width / 2]` in float32, `magnitude` not applied."""
        angle = positions[..., None].astype(jnp.float32) * self.frequencies()
        return jnp.cos(angle), jnp.sin(angle)

    def rotate(
        self, x: Float[Array, "*shape D"], positions: Int[Array, "*#shape"]
    ) -> Float[Array, "*shape D"]:
        """`x` turned to its absolute positions, in float32, back in its dtype."""
        cos, sin = self.cos_sin(positions)
        return self._turn(x, cos * self.magnitude, sin * self.magnitude)

    def unrotate(
        self, x: Float[Array, "*shape D"], positions: Int[Array, "*#shape"]
    ) -> Float[Array, "*shape D"]:
        """Inverse of `rotate`."""
        cos, sin = self.cos_sin(positions)
        return self._turn(x, cos / self.magnitude, -sin / self.magnitude)

    def _turn(self, x: Array, cos: Array, sin: Array) -> Array:
        half = self.width // 2
        wide = x.astype(jnp.float32)
        first, second = wide[..., :half], wide[..., half : self.width]
        turned = [first * cos - second * sin, second * cos + first * sin]
        rest = [wide[..., self.width :]] if self.width < self.head_dim else []
        return jnp.concatenate(turned + rest, axis=-1).astype(x.dtype)
