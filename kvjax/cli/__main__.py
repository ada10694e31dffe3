"""`python -m kvjax.cli`, the same as `kvjax`."""

import sys

from kvjax.cli.main import main

sys.exit(main())
