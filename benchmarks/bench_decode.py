"""Prefill and decode speed of the bundled model, by compression (`kvjax bench`)."""

import sys

from kvjax.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--json", "--length", "512", *sys.argv[1:]]))
