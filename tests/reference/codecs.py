"""Reference codecs: what a stored key or value becomes when it is read back."""

import numpy as np

from .base import resolve_positions, rotate


def quantise_group(x: np.ndarray, bits: int) -> tuple[np.ndarray, float, float]:
    """Codes, scale and zero of one group: `x ~ codes * scale + zero`.

    Source: METHODS B 1.2, "common quantiser": `scale = (max - min) / (2^b - 1)`,
    `zero = min`, codes rounded to nearest (halves to even). A constant group has
    scale 0 and codes 0.
    """
    zero = float(x.min())
    scale = float(x.max() - zero) / (2**bits - 1)
    if scale == 0.0:
        return np.zeros(x.shape, int), 0.0, zero
    return np.round((x - zero) / scale).astype(int), scale, zero


def _read_back(x: np.ndarray, bits: int) -> np.ndarray:
    codes, scale, zero = quantise_group(x, bits)
    return codes * scale + zero


def kivi_keys(
    k: np.ndarray, *, bits: int, group: int = 32, residual: int | None = None
) -> np.ndarray:
    """Keys `[K, S, D]` read back: per channel, in groups of `group` tokens.

    Source: METHODS A 1.4 and B 1.2 (KIVI). The first `S // residual * residual` tokens
    are quantised, the rest stays exact; `residual` (a multiple of `group`) defaults
    to `group`.
    """
    k = np.asarray(k, np.float64)
    residual = group if residual is None else residual
    assert residual % group == 0
    back = k.copy()
    for head in range(k.shape[0]):
        for start in range(0, k.shape[1] // residual * residual, group):
            tokens = slice(start, start + group)
            for channel in range(k.shape[2]):
                back[head, tokens, channel] = _read_back(k[head, tokens, channel], bits)
    return back


def kivi_values(
    v: np.ndarray, *, bits: int, group: int = 32, residual: int = 0
) -> np.ndarray:
    """Values `[K, S, D]` read back: per token, in groups of `group` channels.

    Source: METHODS A 1.4 and B 1.2 (KIVI). The newest `residual` tokens stay exact.
    """
    v = np.asarray(v, np.float64)
    assert v.shape[2] % group == 0
    back = v.copy()
    for head in range(v.shape[0]):
        for token in range(max(0, v.shape[1] - residual)):
            for start in range(0, v.shape[2], group):
                channels = slice(start, start + group)
                back[head, token, channels] = _read_back(v[head, token, channels], bits)
    return back


def one_bit(x: np.ndarray, *, axis: str, group: int) -> np.ndarray:
    """`[K, S, D]` read back from 1 bit an element; groups of slots or of channels.

    Two levels per group: the means of the elements up to the middle of its range and of
    those above it. Every element takes the nearer level, the lower one between them.
    """
    x = np.asarray(x, np.float64)
    if axis == "channel":
        return one_bit(x.swapaxes(1, 2), axis="token", group=group).swapaxes(1, 2)
    back = np.zeros_like(x)
    for head, slot in np.ndindex(x.shape[:2]):
        for start in range(0, x.shape[2], group):
            one = x[head, slot, start : start + group]
            middle = (one.min() + one.max()) / 2
            low, high = one[one <= middle].mean(), one.max()
            if (one > middle).any():
                high = one[one > middle].mean()
            near = np.where(one - low <= high - one, low, high)
            back[head, slot, start : start + group] = near
    return back


def int8_per_token(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes `[K, S, D]`, scales `[K, S]` and read-back of symmetric int8.

    One scale per token and head, `max|x| / 127`; codes in -127..127, rounded to
    nearest (halves to even). A zero vector has scale 0.
    """
    x = np.asarray(x, np.float64)
    codes, scales = np.zeros(x.shape, int), np.zeros(x.shape[:2])
    for head in range(x.shape[0]):
        for token in range(x.shape[1]):
            scale = np.abs(x[head, token]).max() / 127
            scales[head, token] = scale
            if scale > 0:
                codes[head, token] = np.round(x[head, token] / scale)
    return codes, scales, codes * scales[..., None]


def low_rank_keys(
    k: np.ndarray, *, inv_freq: np.ndarray, rank: int, positions=None
) -> np.ndarray:
    """Post-RoPE keys `[K, S, D]` after truncating the pre-RoPE keys to `rank`.

    Source: METHODS C 1.5 (ShadowKV prefill): SVD of the pre-RoPE keys with all KV
    heads concatenated, `[S, K * D]`; RoPE is applied again at the true positions.
    """
    kv_heads, length, width = k.shape
    positions = resolve_positions(positions, length)
    plain = rotate(k, positions, inv_freq, inverse=True)
    wide = np.concatenate(list(plain), axis=1)
    left, singular, right = np.linalg.svd(wide, full_matrices=False)
    narrow = (left[:, :rank] * singular[:rank]) @ right[:rank]
    heads = narrow.reshape(length, kv_heads, width).transpose(1, 0, 2)
    return rotate(heads, positions, inv_freq)
