"""`python -m kvjax.train --config configs/train/kvjax_tiny.yaml --set seed=1`."""

import argparse
import pathlib

from kvjax.train.config import load_config
from kvjax.train.run import run


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
