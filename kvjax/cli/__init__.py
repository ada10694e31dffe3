"""The command line: `kvjax demo|eval|lm-eval|generate|report|bench|convert`."""

from kvjax.cli.main import main as main
