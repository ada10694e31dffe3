"""The command line: `kvjax demo|eval|generate|report|bench|convert`."""

from kvjax.cli.main import main as main
