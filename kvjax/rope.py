"""Rotary position embeddings, as data: one frozen record, rotation by any position.

Keys are cached after rotation; codecs that want them before it rotate back by the
stored absolute positions (`Rope.unrotate`), so both forms are one call apart.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

KINDS = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding of one layer ("rotate half" pairing, as Hugging Face stores it).

    Attributes:
        head_dim: `D`.
        theta: base of the geometric frequency ladder.
        rotary_dim: leading channels that are rotated (`partial_rotary_factor * D`).
        kind: `default`, `linear`, `llama3` or `yarn`.
        factor: context extension factor of the scaled kinds.
        low_freq_factor, high_freq_factor: band edges of `llama3`.
        beta_fast, beta_slow: band edges of `yarn`.
        original_max_positions: trained context of `llama3` and `yarn`.
        attention_factor: `yarn` multiplies cos and sin by it; None computes
            `0.1 ln(factor) + 1`.
        truncate: `yarn` rounds its band edges to whole channels.

    Source: RoFormer (2104.09864); llama3 and yarn (2309.00071) scaling as in
    transformers `modeling_rope_utils`.
    """

    head_dim: int
    theta: float = 10_000.0
    rotary_dim: int | None = None
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_positions: int | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"RoPE scaling {self.kind!r} is not supported; expected one of "
                f"{list(KINDS)}."
            )
        if self.width % 2 or not 0 < self.width <= self.head_dim:
            raise ValueError(
                f"`rotary_dim` must be even and within head_dim={self.head_dim}; "
                f"got {self.width}."
            )
        if self.kind in ("llama3", "yarn") and not self.original_max_positions:
            raise ValueError(
                f"RoPE scaling {self.kind!r} needs `original_max_positions`."
            )

    @property
    def width(self) -> int:
        """Rotated channels."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def magnitude(self) -> float:
        """Factor on cos and sin (1 except for `yarn`)."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def frequencies(self) -> np.ndarray:
        """Angles per position, `[width / 2]` float32."""
        half = np.arange(0, self.width, 2, dtype=np.float64) / self.width
        inv = 1.0 / self.theta**half
        if self.kind == "linear":
            inv = inv / self.factor
        elif self.kind == "llama3":
            inv = self._llama3(inv)
        elif self.kind == "yarn":
            inv = self._yarn(inv)
        return inv.astype(np.float32)

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
