"""The command line: `kvjax demo|eval|lm-eval|generate|report|bench|...`."""

from kvjax.cli.main import main as main
