"""Quantised checkpoints: FP8 with its scales is read, others are called by their name.

Sources: transformers' FineGrainedFP8 (DeepSeek, Qwen), fbgemm_fp8, compressed-tensors'
`float-quantized` and NVIDIA's modelopt all store `X.weight` beside `X.weight_scale` or
`X.weight_scale_inv`, by both of which the weight is multiplied.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

from kvjax.messages import shown
from kvjax.models.shards import DTYPES, Shards, Source, finite

_FLOATS = ("F64", "F32", "F16", "BF16")
_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("_scale_inv", "_scale")
_BLOCK = (128, 128)
# What FP8 activations and caches are divided by. Neither is here.
_UNUSED = (
    ".input_scale",
    ".input_scale_ub",
    ".activation_scale",
    ".k_scale",
    ".v_scale",
)
_REMEDY = (
    "Load the unquantised checkpoint, or dequantise this one first (in transformers: "
    "`model.dequantize()`, then `save_pretrained`)."
)
# Endings of tensor names that only one way of quantising has.
_SIGNS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".scales": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".bitsandbytes__nf4": "bitsandbytes",
    ".bitsandbytes__fp4": "bitsandbytes",
    ".weight_packed": "compressed-tensors (packed integers or FP4)",
    ".weight_zero_point": "compressed-tensors (integers)",
    ".W_q": "HQQ",
    "._data": "quanto",
    "_blocks": "MXFP4",
}


def check_settings(settings: Any) -> None:
    """`quantization_config` of a `config.json`, if it is of a kind that is read.

    Raises:
        ValueError: another kind, by its name.
    """
    if not settings:
        return
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"`quantization_config` must be a mapping; got {str(settings):.80}."
        )
    method = settings.get("quant_method")
    if method in ("fp8", "fbgemm_fp8"):
        return
    if method == "modelopt" and settings.get("quant_algo") == "FP8":
        return
    if method == "compressed-tensors":
        return _check_compressed(settings)
    bits = settings.get("bits") or settings.get("w_bit")
    if method is None and (
        settings.get("load_in_4bit") or settings.get("load_in_8bit")
    ):
        method = "bitsandbytes"
    _refuse(
        f"`quantization_config.quant_method` is {str(method)[:40]!r}"
        + (f" with {str(bits)[:10]} bits" if bits else "")
    )


def _check_compressed(settings: Mapping[str, Any]) -> None:
    layout = settings.get("format")
    if layout not in ("float-quantized", "naive-quantized"):
        _refuse(f"compressed-tensors of format {str(layout)[:40]!r}")
    for name in ("sparsity_config", "transform_config"):
        if settings.get(name) and settings[name] != {"format": "dense"}:
            _refuse(f"compressed-tensors with {name!r}")
    for weights in _groups(settings):
        kind, bits = weights.get("type"), weights.get("num_bits")
        if (kind, bits) != ("float", 8):
            _refuse(f"compressed-tensors of {str(bits)[:10]}-bit {str(kind)[:20]!r}")


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    found = groups.values() if isinstance(groups, Mapping) else ()
    weights = [one.get("weights") for one in found if isinstance(one, Mapping)]
    return [one for one in weights if isinstance(one, Mapping)]


def _refuse(what: str) -> NoReturn:
    raise ValueError(
        f"The checkpoint is quantised ({what}), which is not read. {_REMEDY}"
    )


def unquantised(shards: Shards, config: Mapping[str, Any]) -> Source:
    """The tensors of a checkpoint as plain floats; `config` is its `config.json`.

    Raises:
        ValueError: quantised in a way that is not read, or FP8 without scales.
    """
    settings = config.get("quantization_config") or {}
    check_settings(settings)
    for name in shards.shapes:
        for sign, method in _SIGNS.items():
            if name.endswith(sign):
                _refuse(f"{method}: tensor {name[:120]!r} in {shards.files[name]}")
    scales = _scales(shards, _names_a_cast(config))
    hidden = {scale for scale in scales.values() if scale is not None}
    for name, entry in shards.entries.items():
        if name in hidden or (scales and name.endswith(_UNUSED)):
            continue
        if entry.kind not in _FLOATS and name not in scales:
            raise ValueError(
                f"Tensor {name!r:.200} in {entry.path} is {entry.kind}; expected one "
                f"of {sorted(_FLOATS)}. If it is quantised: {_REMEDY}"
            )
    if settings and not scales:
        raise ValueError(
            f"config.json has a `quantization_config` "
            f"({settings.get('quant_method')!r}), but no tensor in {shards.place} is "
            f"FP8. If the weights were dequantised, remove `quantization_config`; "
            f"otherwise download or save the checkpoint again."
        )
    if not scales:
        return shards
    return Dequantised(shards, scales, _block(settings))


def _names_a_cast(config: Mapping[str, Any]) -> bool:
    """Whether the config says that weights are plain numbers in 8 bits."""
    return str(config.get("torch_dtype") or config.get("dtype")).startswith("float8")


def _block(settings: Mapping[str, Any]) -> tuple[int, int]:
    found = [settings.get("weight_block_size")]
    found += [weights.get("block_structure") for weights in _groups(settings)]
    given = next((block for block in found if block is not None), _BLOCK)
    if isinstance(given, list | tuple) and len(given) == 2:
        if all(type(size) is int and 0 < size < 2**31 for size in given):
            return given[0], given[1]
    raise ValueError(
        f"`quantization_config` needs its block as two positive integers of 32 bits; "
        f"got {shown(given)}."
    )


def _scales(shards: Shards, cast: bool) -> dict[str, str | None]:
    """FP8 tensors and the names of their scales; None where it is a mere cast."""
    found: dict[str, str | None] = {}
    for name, entry in shards.entries.items():
        near = [name + end for end in _SCALES if name + end in shards.shapes]
        if entry.kind in _FP8:
            if len(near) > 1 or not (near or cast):
                raise ValueError(
                    f"Tensor {name!r:.200} in {entry.path} is FP8 ({entry.kind}) "
                    f"{'with two scales' if near else 'without a scale'}; expected one "
                    f"of {[name[-80:] + end for end in _SCALES]}. {_REMEDY}"
                )
            found[name] = near[0] if near else None
        elif near:
            raise ValueError(
                f"Tensor {name!r:.200} in {entry.path} is {entry.kind} and has a scale "
                f"({near[0][-80:]!r}); expected FP8. {_REMEDY}"
            )
    return found


class Dequantised:
    """A checkpoint with FP8 weights, as float32: `weight * scale`.

    A scale is one number, one for each row, or one for each block of `block`.

    Raises:
        ValueError: a scale that has another shape or is not finite.
    """

    def __init__(
        self,
        shards: Shards,
        scales: Mapping[str, str | None],
        block: tuple[int, int] = _BLOCK,
    ):
        self.place = shards.place
        hidden = set(scales.values())
        self.shapes = {
            name: shape
            for name, shape in shards.shapes.items()
            if name not in hidden and not name.endswith(_UNUSED)
        }
        self.files = {name: shards.files[name] for name in self.shapes}
        self.shards, self.block = shards, block
        self.scales = {
            name: np.ones((), "f4") if scale is None else self._scale(name, scale)
            for name, scale in scales.items()
        }

    def _scale(self, name: str, scale: str) -> np.ndarray:
        """Of one shape among `()`, `[rows, 1]` and `[blocks, blocks]`."""
        shards, shape = self.shards, self.shapes[name]
        got, entry = shards.shapes[scale], shards.entries[scale]
        if entry.kind not in DTYPES or entry.kind in _FP8:
            raise ValueError(
                f"Scale {scale!r:.200} in {entry.path} is {entry.kind}; expected one "
                f"of {sorted(_FLOATS)}."
            )
        per_row = len(shape) == 2 and got in (shape[:1], (shape[0], 1))
        if len(shape) == 2:
            sizes = zip(shape, self.block, strict=True)
            blocks = tuple(-(-size // block) for size, block in sizes)
        else:
            blocks = ()
        if not (math.prod(got) == 1 or per_row or got == blocks):
            raise ValueError(
                f"Scale {scale!r:.200} in {entry.path} has shape {str(got):.80} for a "
                f"weight of {str(shape):.80}; expected one number, one for each row, "
                f"or {list(blocks)} (blocks of {list(self.block)})."
            )
        values = shards.whole(scale).astype(np.float32)
        if not finite(values):
            raise ValueError(
                f"Scale {scale!r:.200} in {entry.path} holds NaN or Inf. The "
                f"checkpoint is damaged."
            )
        if values.size == 1:
            return values.reshape(())
        return values.reshape(-1, 1) if per_row else values

    def rows(self, name: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """Rows `start:stop` of a tensor, some at a time."""
        scale, first = self.scales.get(name), start
        for piece in self.shards.rows(name, start, stop):
            if scale is None:
                yield piece
                continue
            factors = self._factors(scale, first, len(piece), self.shapes[name])
            with np.errstate(over="ignore"):  # found by who reads it
                made = piece.astype(np.float32) * factors
            yield made
            first += len(piece)

    def _factors(
        self, scale: np.ndarray, first: int, count: int, shape: tuple[int, ...]
    ) -> np.ndarray:
        """What rows `first:first + count` are multiplied by."""
        if scale.ndim == 0:
            return scale
        rows = np.arange(first, first + count)
        if scale.shape == (shape[0], 1):
            return scale[rows]
        tall, wide = self.block[0], min(self.block[1], shape[1])
        return np.repeat(scale[rows // tall], wide, axis=1)[:, : shape[1]]
