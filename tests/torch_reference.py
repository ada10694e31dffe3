# PyTorch is not a dependency of kvjax; this file runs in an interpreter of its own.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false
"""Builds small random models with transformers, and writes what they compute.

    python tests/torch_reference.py OUT.npz [--make FOLDER] [--run DIR ...]
        [--story DIR]

`--make` writes one model directory per case of `CASES` into FOLDER and runs it;
`--run` runs directories that exist; `--story` continues `PROMPT` greedily.

Layout of OUT.npz (`M` the directory's name, `B` = 2 prompts, right-padded):

    M/tokens    [B, T]      int32 prompts
    M/lengths   [B]         int32
    M/logits    [B, T, V]   float32, of the padded batch
    M/greedy    [B, 32]     int32, each prompt continued alone with transformers' cache
    story       [N]         int32, prompt and continuation
"""

import argparse
import json
import pathlib

import numpy as np
import torch
import transformers

VOCAB = 97
LENGTHS = (13, 6)
STEPS = 32
WINDOW = 8
PROMPT = "Once upon a time, there was a little girl named Lily."
STORY_TOKENS = 200

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}

# name: (config class, settings, spell RoPE the old way)
CASES = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}, False),
    "llama3": (
        "Llama",
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16},
        False,
    ),
    "llama_linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        True,
    ),
    "llama_yarn": ("Llama", {"rope_parameters": YARN}, True),
    "mistral": ("Mistral", {"sliding_window": WINDOW}, False),
    "qwen2": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
        True,
    ),
    "qwen3": (
        "Qwen3",
        {
            "head_dim": 12,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        False,
    ),
    "phi3": (
        "Phi3",
        {
            "sliding_window": WINDOW,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        },
        False,
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 12,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 0.5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "factor": 8.0,
                    "rope_theta": 1e6,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        False,
    ),
    "gemma3_pattern": (
        "Gemma3Text",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "sliding_window_pattern": 2,
        },
        True,
    ),
}


def make(folder: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    kind, settings, old = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**(SMALL | settings))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            # Everything random: a norm or bias at its initial value hides mistakes.
            # Small tied embeddings: with large ones a model repeats its last token.
            tied = config.tie_word_embeddings and "embed" in path
            weight.normal_(0.0, (0.04 if tied else 0.2) if weight.ndim > 1 else 0.3)
            if path.endswith("norm.weight") and kind != "Gemma3Text":
                weight.add_(1.0)
    directory = folder / name
    # Two cases in several shards.
    size = "20KB" if name in ("llama", "phi3") else "5GB"
    model.save_pretrained(directory, max_shard_size=size)
    if old:
        respell(directory / "config.json")
    return directory


def respell(path: pathlib.Path) -> None:
    """RoPE as `rope_theta` and `rope_scaling`, as before transformers 5."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config.pop("layer_types", None)
    if "full_attention" in rope:
        config["rope_theta"] = rope["full_attention"]["rope_theta"]
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = 2
    else:
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    path.write_text(json.dumps(config))


def prompts() -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(3, VOCAB, (len(LENGTHS), max(LENGTHS)))
    lengths = np.array(LENGTHS)
    tokens[np.arange(max(LENGTHS)) >= lengths[:, None]] = 0
    return tokens.astype(np.int32), lengths.astype(np.int32)


def load(directory: pathlib.Path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def greedy(model, ids, steps: int) -> np.ndarray:
    model.generation_config.eos_token_id = None
    out = model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=steps, pad_token_id=0
    )
    return out[0].numpy().astype(np.int32)


def run(directory: pathlib.Path) -> dict[str, np.ndarray]:
    model = load(directory)
    tokens, lengths = prompts()
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    logits = model(
        torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()
    ).logits
    rows = [
        greedy(model, row[:n].tolist(), STEPS)[n:]
        for row, n in zip(tokens, lengths, strict=True)
    ]
    out = {"tokens": tokens, "lengths": lengths, "greedy": np.stack(rows)}
    out["logits"] = logits.numpy()
    return {f"{directory.name}/{key}": value for key, value in out.items()}


def story(directory: pathlib.Path) -> np.ndarray:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return greedy(load(directory), tokenizer(PROMPT)["input_ids"], STORY_TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--make", type=pathlib.Path)
    parser.add_argument("--run", type=pathlib.Path, nargs="*", default=[])
    parser.add_argument("--story", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    directories = list(args.run)
    if args.make:
        args.make.mkdir(parents=True, exist_ok=True)
        directories += [make(args.make, name, seed) for seed, name in enumerate(CASES)]
    arrays = {}
    with torch.no_grad():
        for directory in directories:
            arrays |= run(directory)
        if args.story:
            arrays["story"] = story(args.story)
    np.savez(args.out, **arrays)


if __name__ == "__main__":
    main()
