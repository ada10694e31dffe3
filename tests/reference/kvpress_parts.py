# PyTorch is not a dependency of kvjax; this file runs in an interpreter of its own.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportOptionalSubscript=false
"""Runs ThinK, KVzip and CaM of kvpress and writes what they do to an npz file.

    python tests/reference/kvpress_parts.py OUT.npz

The random Llama is that of `tests/kvpress_reference.py`. Layout of OUT.npz, floats as
computed (float32), `C` a case:

    think/P/layerL/q, k              inputs of prompt P (its length)
    think/P/R-W/layerL/k             keys at ratio R and window W
    kvzip/C/layerL/{k,v,w_o}         the prompt's, and the output projection
    kvzip/C/chunkN/{start,end}       bounds
    kvzip/C/chunkN/layerL/{q,k,h}    the replay's queries, keys, attention inputs
    kvzip/C/scores                   [L, K, S]
    llama/{tokens,logits,frequencies,epsilon}
    llama/weights/..                 named as in `probes.Transformer`
    cam/C/{k,v,received,scores,out_k,out_v}, cam/C/{budget,merged,target}
"""

import pathlib
import sys
import types

# The script's own folder has modules named like those of the standard library.
sys.path[0] = str(pathlib.Path(__file__).parent.parent)

import dataclasses  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from kvpress import CAMPress, KVzipPress, ScorerPress, ThinKPress  # noqa: E402
from kvpress_reference import Recorder, make_model  # noqa: E402
from transformers import DynamicCache  # noqa: E402
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # noqa: E402

THINK = {"320": 320, "20": 20}
ZIP = {"plain": (0, False), "prefix": (7, False), "plus": (0, True)}


def think(model, out) -> None:
    """ThinK at several ratios and windows."""
    recorder = Recorder(model)
    for name, length in THINK.items():
        tokens = torch.as_tensor(np.random.default_rng(3).permutation(640)[:length])
        with torch.no_grad():
            model(tokens[None], past_key_values=DynamicCache())
        for n, (q, k, _) in recorder.layers.items():
            out[f"think/{name}/layer{n}/q"] = q.numpy()
            out[f"think/{name}/layer{n}/k"] = k.numpy()
        for ratio, window in ((0.3, 32), (0.5, 8), (0.75, 32)):
            cache = DynamicCache()
            with torch.no_grad(), ThinKPress(ratio, window_size=window)(model):
                model(tokens[None], past_key_values=cache)
            for n, layer in enumerate(cache.layers):
                key = f"think/{name}/{ratio}-{window}/layer{n}/k"
                out[key] = layer.keys[0].numpy()


def llama(model, out) -> None:
    """The model itself: weights, tokens and logits."""
    config = model.config
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, 24)
    with torch.no_grad():
        logits = model(torch.as_tensor(tokens)[None]).logits[0]
    weights = {
        "embed": model.model.embed_tokens.weight,
        "norm": model.model.norm.weight,
        "head": model.lm_head.weight.T,
    }
    for n, layer in enumerate(model.model.layers):
        attn, mlp = layer.self_attn, layer.mlp
        weights[f"{n}/attn_norm"] = layer.input_layernorm.weight
        weights[f"{n}/mlp_norm"] = layer.post_attention_layernorm.weight
        for name, part in (("q", attn.q_proj), ("k", attn.k_proj), ("v", attn.v_proj)):
            weights[f"{n}/{name}"] = part.weight.T.unflatten(1, (-1, attn.head_dim))
        weights[f"{n}/o"] = attn.o_proj.weight.T.unflatten(0, (-1, attn.head_dim))
        for name in ("gate", "up", "down"):
            weights[f"{n}/{name}"] = getattr(mlp, f"{name}_proj").weight.T
    for name, weight in weights.items():
        out[f"llama/weights/{name}"] = weight.detach().numpy()
    out["llama/tokens"], out["llama/logits"] = tokens, logits.numpy()
    out["llama/frequencies"] = model.model.rotary_emb.inv_freq.numpy()
    out["llama/epsilon"] = config.rms_norm_eps


class Replay:
    """Takes what a replay's attention sees, before the press cuts the cache back."""

    def __init__(self, model):
        """Hooks every attention layer; must come before the press does."""
        self.passes = []
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(self._hook, with_kwargs=True)

    def _hook(self, module, args, kwargs, output):
        hidden = kwargs["hidden_states"]
        shape = (*hidden.shape[:2], -1, module.head_dim)
        q = module.q_proj(hidden).view(shape).transpose(1, 2)
        q, _ = apply_rotary_pos_emb(q, q, *kwargs["position_embeddings"])
        cached = kwargs["past_key_values"].layers[module.layer_idx]
        if module.layer_idx == 0:
            self.passes.append([])
        tensors = (q[0], cached.keys[0], cached.values[0], hidden[0])
        self.passes[-1].append([x.clone().numpy() for x in tensors])


def kvzip(model, out, case: str, prefix: int, plus: bool) -> None:
    """KVzip with given replays in place of a tokenizer's."""
    draw = np.random.default_rng(5)
    tokens = torch.as_tensor(draw.integers(0, 640, 150))[None]
    press = KVzipPress(0.5, chunk_size=64, kvzip_plus_normalization=plus)
    chunks = [tokens[:, prefix:][:, i : i + 64] for i in range(0, 150 - prefix, 64)]
    lead = [torch.as_tensor(draw.integers(0, 640, 5))[None] for _ in chunks]
    config = model.config

    def prepare(*_):
        shape = (config.num_hidden_layers, 1, config.num_key_value_heads, 150)
        press.score_val = torch.zeros(shape)
        return [(x, torch.cat(y, 1)) for x, y in zip(chunks, pairs, strict=True)]

    pairs = list(zip(lead, chunks, strict=True))
    press.prepare, press.prefix_length = prepare, prefix
    press._context_ids, press._cache = tokens, DynamicCache()
    replay = Replay(model)
    with torch.no_grad():
        model(tokens, past_key_values=press._cache)
        press._perform_kvzip_compression(model, None)
    for n, (_, k, v, _) in enumerate(replay.passes[0]):
        stem = f"kvzip/{case}/layer{n}"
        weight = model.model.layers[n].self_attn.o_proj.weight.detach().T
        w_o = weight.reshape(config.num_attention_heads, -1, weight.shape[1])
        out[f"{stem}/k"], out[f"{stem}/v"], out[f"{stem}/w_o"] = k, v, w_o.numpy()
    start = prefix
    for i, chunk in enumerate(chunks):
        out[f"kvzip/{case}/chunk{i}/start"] = start
        start += chunk.shape[1]
        out[f"kvzip/{case}/chunk{i}/end"] = start
        for n, (q, k, _, h) in enumerate(replay.passes[i + 1]):
            stem = f"kvzip/{case}/chunk{i}/layer{n}"
            out[f"{stem}/q"], out[f"{stem}/k"], out[f"{stem}/h"] = q, k[:, 150:], h
    out[f"kvzip/{case}/scores"] = press.score_val[:, 0].numpy()


@dataclasses.dataclass
class Given(ScorerPress):
    """Scores that are given."""

    given: object = None

    def score(self, *_):
        return self.given.clone()


def cam(out, case: str, budget: int, merged: int, target: int) -> None:
    """CaM's expectation: each draw replaced by its probability."""
    draw = np.random.default_rng(11)
    k, v = draw.normal(size=(2, 1, 3, 60, 8)).astype(np.float32)
    received = draw.gamma(0.5, size=(1, 3, 60)).astype(np.float32)
    received[0, 0, :10] = 0
    scores = draw.permutation(60).astype(np.float32)
    scores = np.broadcast_to(scores, (1, 3, 60)).copy()
    tensors = [torch.as_tensor(x.copy()) for x in (k, v, received, scores)]
    base = Given(0.0, given=tensors[3])
    press = CAMPress(base, target_size=target, merge_budget=budget)
    press.layer_step_counts[0] = merged
    press._running_attn_sum[0] = tensors[2]
    draw_one, torch.bernoulli = torch.bernoulli, lambda x: x
    try:
        module = types.SimpleNamespace(layer_idx=0)
        new_k, new_v = press.compress(module, None, *tensors[:3], {})
    finally:
        torch.bernoulli = draw_one
    arrays = {"k": k, "v": v, "received": received, "scores": scores}
    arrays |= {"out_k": new_k.numpy(), "out_v": new_v.numpy()}
    for name, array in arrays.items():
        out[f"cam/{case}/{name}"] = array[0]
    for name, number in (("budget", budget), ("merged", merged), ("target", target)):
        out[f"cam/{case}/{name}"] = number


def main() -> None:
    """Command line; see the module's docstring."""
    torch.use_deterministic_algorithms(True)
    out: dict = {}
    llama(make_model().eval(), out)
    think(make_model().eval(), out)
    for case, options in ZIP.items():
        kvzip(make_model().eval(), out, case, *options)
    for case, numbers in {"all": (4, 60, 25), "some": (32, 7, 40)}.items():
        cam(out, case, *numbers)
    np.savez_compressed(sys.argv[1], **out)


if __name__ == "__main__":
    main()
