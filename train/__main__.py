"""`python -m kvjax.train --config configs/train/kvjax_tiny.yaml --set seed=1`."""

import argparse
import functools
import pathlib

from flax import nnx

from kvjax.models.decoder import Decoder
from kvjax.train.config import TrainConfig, load_config
from kvjax.train.data import Mixture
from kvjax.train.evaluate import held_out_batches
from kvjax.train.loop import TrainState, train
from kvjax.train.objective import next_token_loss
from kvjax.train.optimizer import make_optimizer


def run(config: TrainConfig, directory: pathlib.Path) -> TrainState:
    """Train what `config` says, or go on where `directory` stands."""
    mixture = Mixture(config.data, config.stages, config.seed)
    return train(
        Decoder(config.model, rngs=nnx.Rngs(config.seed)),
        next_token_loss,
        make_optimizer(config.optimizer, config.steps),
        mixture.batches,
        steps=config.steps,
        directory=directory,
        held_out=functools.partial(held_out_batches, config),
        log_every=config.log_every,
        eval_every=config.eval_every,
        save_every=config.save_every,
    )


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m kvjax.train", description=__doc__)
    parser.add_argument("--config", required=True, help="recipe (YAML)")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("runs"))
    args = parser.parse_args()
    config = load_config(args.config, args.set)
    run(config, args.directory / f"seed{config.seed}")


if __name__ == "__main__":
    main()
