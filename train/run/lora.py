"""LoRA: low-rank updates beside frozen matrices."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kvjax.messages import nearest
from kvjax.models.blocks import Linear
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.train.recipe import LoRAConfig

PATTERNS = ("*.lora_a", "*.lora_b")
"""Names of what LoRA adds, for `params.split`."""

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")


class LoRALinear(Linear):
    """`x @ kernel + bias + alpha / rank * (x @ lora_a) @ lora_b`; `lora_b` starts at 0.

    Source: LoRA (2106.09685) section 4.1.
    """

    def __init__(self, base: Linear, config: LoRAConfig, rngs: nnx.Rngs):
        self.kernel, self.bias = base.kernel, base.bias
        (*lead, n_in, n_out), dtype = base.kernel.shape, base.kernel.dtype
        shape = (*lead, n_in, config.rank)
        noise = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.lora_a = nnx.Param((noise * n_in**-0.5).astype(dtype))
        self.lora_b = nnx.Param(jnp.zeros((*lead, config.rank, n_out), dtype))
        self.scale = config.alpha / config.rank

    @property
    def matrix(self) -> Float[Array, "in out"]:
        """The matrix that inputs are multiplied with."""
        update = self.lora_a[...] @ self.lora_b[...]
        return self.kernel[...] + (self.scale * update).astype(self.kernel.dtype)

    def __call__(self, x: Float[Array, "*shape in"]) -> Float[Array, "*shape out"]:
        """`[..., in]` to `[..., out]`; the update is never multiplied out."""
        update = (x @ self.lora_a[...]) @ self.lora_b[...]
        return super().__call__(x) + (self.scale * update).astype(x.dtype)


def with_lora(model: Decoder, config: LoRAConfig, *, seed: int = 0) -> Decoder:
    """A copy of `model` with updates beside the matrices that `config` names.

    Raises:
        ValueError: a name that is no matrix of a layer.
    """
    known = (*ATTENTION, *MLP)
    for name in config.modules:
        if name not in known:
            raise ValueError(
                f"`lora.modules` has {name!r}; expected some of {list(known)}."
                f"{nearest(name, known)}"
            )
    made, rngs = nnx.clone(model), nnx.Rngs(seed)
    for name in config.modules:
        owner = made.layers.attention if name in ATTENTION else made.layers.mlp
        setattr(owner, name, LoRALinear(getattr(owner, name), config, rngs))
    return made


def check_rank(config: LoRAConfig, shape: DecoderConfig) -> None:
    """No update has more columns than the matrix that it is beside.

    Raises:
        ValueError: names the thinnest of the matrices.
    """
    heads = dict.fromkeys("qo", shape.num_heads) | dict.fromkeys(
        "kv", shape.num_kv_heads
    )
    other = {name: count * shape.head_dim for name, count in heads.items()}
    other |= dict.fromkeys(MLP, shape.intermediate_size)
    for name in config.modules:
        thin = min(shape.hidden_size, other.get(name, shape.hidden_size))
        if config.rank > thin:
            raise ValueError(
                f"`lora.rank` is {config.rank}, and the matrix {name!r} has {thin} "
                "rows or columns: no update of it needs more. Lower it, or leave the "
                "matrix out of `lora.modules`."
            )


def merged(model: Decoder) -> Decoder:
    """A plain decoder whose matrices hold the updates."""
    made = nnx.clone(model)
    for owner, names in ((made.layers.attention, ATTENTION), (made.layers.mlp, MLP)):
        for name in names:
            linear = getattr(owner, name)
            if isinstance(linear, LoRALinear):
                setattr(owner, name, _plain(linear))
    return made


def updates_of(model: Decoder) -> dict[str, tuple[Array, Array]]:
    """What training added, by matrix (`attention.q`): A `[L, in, r]`, B `[L, r, out]`.

    In bfloat16, as the exported model is.
    """
    found = {}
    for place, names in (("attention", ATTENTION), ("mlp", MLP)):
        for name in names:
            linear = getattr(getattr(model.layers, place), name)
            if isinstance(linear, LoRALinear):
                a, b = linear.lora_a[...], linear.lora_b[...]
                found[f"{place}.{name}"] = a.astype("bfloat16"), b.astype("bfloat16")
    return found


def _plain(linear: LoRALinear) -> Linear:
    # NNX fixes at birth whether an attribute holds arrays: with a bias, it needs one.
    own, dtype = linear.bias is not None, linear.kernel.dtype
    made = Linear(1, 1, bias=own, std=0.0, dtype=dtype, rngs=nnx.Rngs(0))
    made.kernel, made.bias = nnx.Param(linear.matrix), linear.bias
    return made
