"""A checkpoint of random weights over characters, small enough for every command."""

import pathlib

import pytest

from kvjax.cli import main


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    """Directory of a decoder that knows characters and nothing else."""
    import jax.numpy as jnp
    from flax import nnx

    import kvjax
    from kvjax.models import Decoder, DecoderConfig
    from kvjax.rope import Rope
    from kvjax.train.data.tokenizer import VOCABULARY, build_tokenizer

    config = DecoderConfig(
        family="llama",
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope=Rope(head_dim=8),
        max_positions=512,
        pad_token=0,
        bos_token=1,
        eos_tokens=(2,),
    )
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    model = Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    kvjax.save(model, path, build_tokenizer())
    return path


@pytest.fixture
def kvjax(capsys):
    """Run a command in this process: `(exit code, stdout, stderr)`."""

    def run(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run
