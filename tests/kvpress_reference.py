# PyTorch is not a dependency of kvjax; this file runs in an interpreter of its own.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportOptionalSubscript=false
"""Runs kvpress on a small Llama and writes what every press keeps to an npz file.

    python tests/kvpress_reference.py OUT.npz [--model DIR] [--tokens IN.npz]
        [--save-model DIR] [--keep 0.25 0.5 0.75]

Without `--model` a random Llama with a fixed seed is made (and saved as a Hugging Face
directory by `--save-model`). `--tokens` holds one-dimensional arrays of ids;
each array is a prompt and its key is the prompt's name. Default: random prompts
`S320` and `S512` in which no token repeats (a repeated token has the same key norm in
layer 0, a tie that any order may break).

Layout of OUT.npz (`P` prompt, `L` layer, `C` case of `cases()`, `F` fraction kept):

    inv_freq                  [D/2]      RoPE frequencies
    layerL/w_o                [H, D, E]  output projection, per query head
    P/tokens                  [S]        int32
    P/next_token              []         argmax of the prompt's logits
    P/logits                  [V]        logits of the prompt's last token
    P/layerL/q                [H, S, D]  post-RoPE queries
    P/layerL/k, P/layerL/v    [K, S, D]  post-RoPE keys, values
    P/kept/C/F/layerL/headK   [n]        sorted kept positions, int32
    P/scores/C/F/layerL       [K, S]     by which the press chose them, where it scores
                                         tokens one by one
    P/next_logits/C/F         [V]        logits after feeding `next_token` at position S
                                         to the compressed cache (C = full, F = 1.0:
                                         to the uncompressed one)

Floats are float32 as computed. `F` is written as Python prints it (`0.25`).
"""

import argparse
from contextlib import ExitStack

import numpy as np
import torch
from kvpress import (
    AdaKVPress,
    ChunkKVPress,
    CriticalKVPress,
    CURPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    ObservedAttentionPress,
    PyramidKVPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

EAGER = ("observed_attention",)  # reads the attention matrix


def cases(ratio: float) -> dict:
    """Press by case name at the given compression ratio (fraction removed)."""
    snap = {"compression_ratio": ratio, "window_size": 64, "kernel_size": 5}
    short = snap | {"window_size": 8}
    mean_only = {"use_covariance": False, "use_vnorm": False}
    return {
        "streaming_llm": StreamingLLMPress(ratio),
        "knorm": KnormPress(ratio),
        "keydiff": KeyDiffPress(ratio),
        "snapkv": SnapKVPress(**snap),
        "snapkv_w8": SnapKVPress(**short),
        "tova": TOVAPress(ratio),
        "observed_attention": ObservedAttentionPress(ratio),
        "expected_attention": ExpectedAttentionPress(ratio),
        "expected_attention_mean": ExpectedAttentionPress(ratio, **mean_only),
        "pyramidkv": PyramidKVPress(**snap),
        "pyramidkv_w8": PyramidKVPress(**short),
        "adakv_snapkv": AdaKVPress(SnapKVPress(**snap)),
        "adakv_snapkv_w8": AdaKVPress(SnapKVPress(**short)),
        "adakv_knorm": AdaKVPress(KnormPress(ratio)),
        "adakv_knorm_a80": AdaKVPress(KnormPress(ratio), alpha_safeguard=0.8),
        "chunkkv_knorm": ChunkKVPress(KnormPress(ratio)),
        "chunkkv_snapkv": ChunkKVPress(SnapKVPress(**snap)),
        "chunkkv_snapkv_w8": ChunkKVPress(SnapKVPress(**short)),
        "criticalkv_snapkv": CriticalKVPress(SnapKVPress(**snap)),
        "criticalkv_snapkv_w8": CriticalKVPress(SnapKVPress(**short)),
        "lagkv": LagKVPress(ratio),
        "cur": CURPress(ratio),
    }


def make_model() -> LlamaForCausalLM:
    """A random Llama: 4 layers, 8 query and 4 KV heads of 16, fixed seed."""
    torch.manual_seed(20250101)
    config = LlamaConfig(
        vocab_size=640,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=4096,
        # Wide enough that attention is far from uniform and scores are far apart.
        initializer_range=0.12,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide a forgotten norm weight
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


class Recorder:
    """Takes queries, keys and values of each layer before any press acts."""

    def __init__(self, model):
        """Hooks every attention layer; must come before the press does."""
        self.layers = {}
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(self._hook, with_kwargs=True)

    def _hook(self, module, args, kwargs, output):
        hidden = kwargs["hidden_states"]
        if hidden.shape[1] == 1:  # decode step
            return
        shape = (*hidden.shape[:2], -1, module.head_dim)
        q = module.q_proj(hidden).view(shape).transpose(1, 2)
        q, _ = apply_rotary_pos_emb(q, q, *kwargs["position_embeddings"])
        cached = kwargs["past_key_values"].layers[module.layer_idx]
        self.layers[module.layer_idx] = (
            q[0].clone(),
            cached.keys[0].clone(),
            cached.values[0].clone(),
        )


def record_scores(press) -> list[np.ndarray]:
    """By layer, `[K, S]` of what `press` will choose by; empty of one that chunks."""
    found: list[np.ndarray] = []
    scorer = press.press if isinstance(press, AdaKVPress) else press
    if not isinstance(scorer, ScorerPress):
        return found
    score = scorer.score

    def recorded(*args, **kwargs):
        scores = score(*args, **kwargs)
        found.append(scores[0].numpy().copy())  # AdaKV writes into them
        return scores

    scorer.score = recorded
    return found


def run(model, tokens, press=None, following=None):
    """Cached keys after prefill, the prompt's logits, those after `following`.

    `following` is the token fed to the compressed cache; None takes the likeliest.
    """
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    cache, length = DynamicCache(), tokens.shape[1]
    with torch.no_grad():
        with ExitStack() as stack:
            if press is not None:
                stack.enter_context(press(model))
            logits = model(tokens, past_key_values=cache).logits[0, -1]
        # Before the decode step below appends to the cache.
        snapshot = [layer.keys[0].clone() for layer in cache.layers]
        following = logits.argmax() if following is None else following
        place = torch.tensor([length])
        after = model(
            following.view(1, 1),
            past_key_values=cache,
            position_ids=place[None],
            cache_position=place,
        ).logits[0, -1]
    return snapshot, logits, after


def matched(compressed, full) -> np.ndarray:
    """Positions in `full [S, D]` of the rows of `compressed [n, D]`."""
    equal = (compressed[:, None, :] == full[None]).all(-1)
    if not (equal.sum(1) == 1).all():
        raise RuntimeError("a kept key does not match exactly one key of the prompt")
    return np.sort(equal.int().argmax(1).numpy())


def kept_positions(model, snapshot, recorder) -> list[list[np.ndarray]]:
    """Sorted kept positions by layer and KV head."""
    result = []
    for index, layer in enumerate(model.model.layers):
        full = recorder.layers[index][1]
        masked = layer.self_attn.masked_key_indices
        if masked is None:
            heads = [matched(*pair) for pair in zip(snapshot[index], full, strict=True)]
        else:
            keep = torch.ones(full.shape[:2], dtype=torch.bool)
            keep[masked[1], masked[2]] = False
            heads = [np.flatnonzero(row) for row in keep.numpy()]
        result.append(heads)
    return result


def record_prompt(out, name, ids, models, recorders, fractions) -> None:
    """Adds everything about one prompt to `out`."""
    tokens = torch.as_tensor(ids, dtype=torch.long)[None]
    out[f"{name}/tokens"] = np.asarray(ids, np.int32)
    _, logits, after = run(models["sdpa"], tokens)
    out[f"{name}/logits"] = logits.numpy()
    following = logits.argmax()
    out[f"{name}/next_token"] = following.numpy().astype(np.int32)
    out[f"{name}/next_logits/full/1.0"] = after.numpy()
    for index, tensors in recorders["sdpa"].layers.items():
        for letter, tensor in zip("qkv", tensors, strict=True):
            out[f"{name}/layer{index}/{letter}"] = tensor.numpy()
    for fraction in fractions:
        for case, press in cases(1 - fraction).items():
            kind = "eager" if case in EAGER else "sdpa"
            scores = record_scores(press)
            snapshot, _, after = run(models[kind], tokens, press, following)
            kept = kept_positions(models[kind], snapshot, recorders[kind])
            out[f"{name}/next_logits/{case}/{fraction}"] = after.numpy()
            for index, of_layer in enumerate(scores):
                out[f"{name}/scores/{case}/{fraction}/layer{index}"] = of_layer
            for index, heads in enumerate(kept):
                for head, positions in enumerate(heads):
                    key = f"{name}/kept/{case}/{fraction}/layer{index}/head{head}"
                    out[key] = positions.astype(np.int32)


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="kvpress reference data")
    parser.add_argument("out")
    parser.add_argument("--model")
    parser.add_argument("--tokens")
    parser.add_argument("--save-model")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    source = LlamaForCausalLM.from_pretrained(options.model) if options.model else None
    model = (source or make_model()).float().eval()
    if options.save_model:
        model.save_pretrained(options.save_model)
    models = {}
    for kind in ("sdpa", "eager"):
        config = LlamaConfig.from_dict(model.config.to_dict())
        config._attn_implementation = kind
        models[kind] = LlamaForCausalLM(config).eval()
        models[kind].load_state_dict(model.state_dict())
    recorders = {kind: Recorder(models[kind]) for kind in models}
    if options.tokens:
        prompts = dict(np.load(options.tokens))
    else:
        draw = np.random.default_rng(7)
        size = model.config.vocab_size
        prompts = {f"S{n}": draw.permutation(size)[:n] for n in (320, 512)}
    out = {"inv_freq": model.model.rotary_emb.inv_freq.numpy()}
    heads = model.config.num_attention_heads
    for index, layer in enumerate(model.model.layers):
        weight = layer.self_attn.o_proj.weight.detach().T
        out[f"layer{index}/w_o"] = weight.reshape(heads, -1, weight.shape[1]).numpy()
    for name, ids in prompts.items():
        record_prompt(out, name, ids, models, recorders, options.keep)
    np.savez_compressed(options.out, **out)


if __name__ == "__main__":
    main()
