"""`python -m kvjax.train.export`: a checkpoint as a Hugging Face directory in bf16."""

import argparse
import pathlib

import jax
import jax.numpy as jnp

from kvjax.models.io import save
from kvjax.train.config import TrainConfig, load_config
from kvjax.train.loop import init_state, restore, with_params
from kvjax.train.optimizer import make_optimizer
from kvjax.train.run import initial, trained
from kvjax.train.tokenizer import save_tokenizer


def export(config: TrainConfig, checkpoints: pathlib.Path, target: pathlib.Path) -> int:
    """Write the newest checkpoint to `target`; returns its step."""
    model = trained(initial(config), config)
    state = init_state(model, make_optimizer(config.optimizer, config.steps))
    state = restore(checkpoints, state)
    if int(state.step) == 0:
        raise ValueError(f"No checkpoint in {checkpoints}; train first.")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
    target.mkdir(parents=True, exist_ok=True)
    save(with_params(model, params), target)
    save_tokenizer(target, model.config.max_positions)
    return int(state.step)


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(
        prog="python -m kvjax.train.export", description=__doc__
    )
    parser.add_argument("--config", required=True, help="recipe (YAML)")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--checkpoints", type=pathlib.Path, required=True)
    parser.add_argument("--target", type=pathlib.Path, required=True)
    args = parser.parse_args()
    config = load_config(args.config, args.set)
    step = export(config, args.checkpoints, args.target)
    print(f"step {step} -> {args.target}")


if __name__ == "__main__":
    main()
