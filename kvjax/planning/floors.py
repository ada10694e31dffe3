"""How fast it could be at most: bytes that are read, products that are multiplied."""

from kvjax.compress.config import Compression
from kvjax.models.config import DecoderConfig


def prefill_flops(
    config: DecoderConfig, kernels: int, c: Compression, batch: int, tokens: int
) -> int:
    """Operations of a prompt's matrix products, two for each multiply-add.

    Every token meets every weight of every layer, and every visible pair of a query and
    a key its two products; logits are of the last token. A sparse prefill's blocks go
    with the data: its attention is left out, and so are second passes.

    Args:
        config: of the model.
        kernels: numbers in the matrices of all layers.
        c: what is done to the cache.
        batch: rows.
        tokens: of each.
    """
    head = config.hidden_size * config.vocab_size
    flops = 2 * batch * (tokens * kernels + head)
    if not c.prefill.causal:
        return flops
    pairs = sum(_pairs(tokens, spec.window) for spec in config.layers)
    return flops + 4 * batch * pairs * config.num_heads * config.head_dim


def _pairs(tokens: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees."""
    seen = min(window or tokens, tokens)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen
