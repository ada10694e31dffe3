"""Reference probes: what a replay of the prompt says about its tokens.

Sources: KVzip (2505.23416) and KVgrad as kvpress 0.5.5 has them (`kvzip_press.py`,
`kvgrad_press.py`); `gate_slopes` is the definition itself, by central differences
through a small transformer.
"""

import dataclasses

import numpy as np

from .held import masked_softmax, similarity, turn, visible


def kvzip_attention(
    q,
    k,
    replay_k,
    *,
    positions,
    q_positions,
    start: int,
    end: int,
    n_sink: int = 4,
    sliding: int | None = None,
    **options,
) -> np.ndarray:
    """Weights `[H, R, S]` of a chunk's replay on the prompt's tokens.

    Softmax over the sinks (positions below `min(n_sink, start)`), the chunk
    (`start <= position < end`) and the replayed tokens so far, causal by their
    positions. `q [H, R, D]` and `replay_k [K, R, D]` stand at `q_positions [R]`, behind
    the prompt. `options`: `scale`, `softcap`. kvpress refuses sliding layers; here
    `sliding` hides what the layer would not see.
    """
    positions, q_positions = np.asarray(positions), np.asarray(q_positions)
    weights = np.zeros((q.shape[0], q.shape[1], k.shape[1]))
    size = q.shape[0] // k.shape[0]
    logits = similarity(q, np.concatenate([k, replay_k], axis=1), **options)
    for h in range(q.shape[0]):
        p = positions[h // size]
        read = ((p >= 0) & (p < min(n_sink, start))) | ((p >= start) & (p < end))
        prompt = visible(q_positions, p, sliding) & read
        replay = visible(q_positions, q_positions, sliding)
        allowed = np.concatenate([prompt, replay], axis=1)
        weights[h] = masked_softmax(logits[h], allowed)[:, : k.shape[1]]
    return weights


def kvzip_chunk_scores(
    q,
    k,
    replay_k,
    *,
    positions,
    start: int,
    end: int,
    row_weights: np.ndarray | None = None,
    column_weights: np.ndarray | None = None,
    **arguments,
) -> np.ndarray:
    """Scores `[K, S]` of a chunk: the largest weight over replay queries and group.

    Zero outside the chunk (the sinks' own weights are not scores). KVzip+ is
    `row_weights [R] = 1 / ||h_r||` (the layer's input to the attention, after its norm)
    and `column_weights [H, S] = ||W_O v||_2`; KVgrad the same with
    `row_weights = ||grad of the attention's output||`.
    """
    weights = kvzip_attention(
        q, k, replay_k, positions=positions, start=start, end=end, **arguments
    )
    if row_weights is not None:
        weights = weights * np.asarray(row_weights)[None, :, None]
    if column_weights is not None:
        weights = weights * np.asarray(column_weights)[:, None]
    largest = weights.max(axis=1)
    grouped = largest.reshape(k.shape[0], -1, k.shape[1]).max(axis=1)
    chunk = (np.asarray(positions) >= start) & (np.asarray(positions) < end)
    return np.where(chunk, grouped, 0.0)


def kvzip_scores(chunks: np.ndarray, positions, *, n_sink: int = 4) -> np.ndarray:
    """Final scores `[L, K, S]` of the chunk scores `[C, L, K, S]`.

    A token has its own chunk's score; one in no chunk has 0. The sinks (positions below
    `n_sink`) get the largest score of all layers and heads plus one; free slots -inf.
    """
    positions = np.asarray(positions)
    scores = np.asarray(chunks).max(axis=0)
    sinks = (positions >= 0) & (positions < n_sink)
    scores = np.where(sinks, scores.max() + 1, scores)
    return np.where(positions >= 0, scores, -np.inf)


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A decoder with RMSNorm before each half, GQA, RoPE and SwiGLU.

    Attributes:
        weights: `embed [V, E]`, `norm [E]`, `head [E, V]` (without it the embedding is
            used), and for layer `n`: `n/attn_norm [E]`, `n/q [E, H, D]`, `n/k` and
            `n/v [E, K, D]`, `n/o [H, D, E]`, `n/mlp_norm [E]`, `n/gate` and
            `n/up [E, F]`, `n/down [F, E]`.
        frequencies: RoPE frequencies `[D/2]`.
        epsilon: of RMSNorm.
    """

    weights: dict[str, np.ndarray]
    frequencies: np.ndarray
    epsilon: float = 1e-6

    @property
    def n_layers(self) -> int:
        """Layers there are weights for."""
        return sum(name.endswith("/q") for name in self.weights)

    def _norm(self, x, name: str) -> np.ndarray:
        root = np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
        return x / root * self.weights[name]

    def _attention(self, x, layer: int, gates: np.ndarray | None) -> np.ndarray:
        w = self.weights
        places = np.arange(len(x))
        q, k, v = (np.einsum("te,ehd->htd", x, w[f"{layer}/{n}"]) for n in "qkv")
        q, k = (turn(y, places[None], self.frequencies) for y in (q, k))
        logits, out = similarity(q, k), np.zeros_like(x)
        causal = visible(places, places)
        for h in range(len(q)):
            head = h * len(k) // len(q)
            top = np.where(causal, logits[h], -np.inf).max(-1, keepdims=True)
            mass = np.where(causal, np.exp(np.minimum(logits[h] - top, 0.0)), 0.0)
            if gates is not None:
                prompt = gates.shape[1]
                mass[prompt:, :prompt] *= gates[head]
            share = mass / mass.sum(-1, keepdims=True)
            out += share @ v[head] @ w[f"{layer}/o"][h]
        return out

    def _mlp(self, x, layer: int) -> np.ndarray:
        gate = x @ self.weights[f"{layer}/gate"]
        hidden = gate / (1 + np.exp(-gate)) * (x @ self.weights[f"{layer}/up"])
        return hidden @ self.weights[f"{layer}/down"]

    def forward(self, tokens, gates: np.ndarray | None = None) -> np.ndarray:
        """Logits `[T, V]` of `tokens [T]` at positions `0 .. T-1`.

        `gates [L, K, S]` multiply the unnormalised weight of prompt token `s` (position
        `s`) for the queries behind the prompt (positions from `S` on): 1 is there, 0
        is absent. Queries of the prompt see the whole prompt.
        """
        x = np.asarray(self.weights["embed"], np.float64)[np.asarray(tokens)]
        for n in range(self.n_layers):
            of_layer = None if gates is None else np.asarray(gates[n], np.float64)
            x = x + self._attention(self._norm(x, f"{n}/attn_norm"), n, of_layer)
            x = x + self._mlp(self._norm(x, f"{n}/mlp_norm"), n)
        head = self.weights.get("head")
        head = self.weights["embed"].T if head is None else head
        return self._norm(x, "norm") @ head


def mean_nll(
    model: Transformer, tokens, prompt: int, gates=None, *, from_prompt: bool = True
) -> float:
    """Mean negative log likelihood of the tokens behind the first `prompt`.

    The first of them is predicted by the prompt's last query, which no gate reaches;
    `from_prompt=False` leaves it out (of the count as well).
    """
    logits = model.forward(tokens, gates)
    logits = logits - logits.max(-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = np.arange(prompt if from_prompt else prompt + 1, len(tokens))
    return float(-logs[targets - 1, np.asarray(tokens)[targets]].mean())


def gate_slopes(
    model: Transformer,
    tokens,
    gates: np.ndarray,
    *,
    step: float = 1e-5,
    from_prompt: bool = True,
) -> np.ndarray:
    """Derivative `[L, K, S]` of `mean_nll` by each gate, by central differences.

    At `gates [L, K, S]`. Positive: the tokens behind would be likelier with less of
    this token. The gates may lie at 0 or 1: `forward` is smooth beyond both.
    """
    gates = np.asarray(gates, np.float64)
    slopes, prompt = np.zeros(gates.shape), gates.shape[2]
    for index in np.ndindex(gates.shape):
        ends = []
        for sign in (1.0, -1.0):
            moved = gates.copy()
            moved[index] += sign * step
            ends.append(mean_nll(model, tokens, prompt, moved, from_prompt=from_prompt))
        slopes[index] = (ends[0] - ends[1]) / (2 * step)
    return slopes
