"""A run: its loop, what it writes, and the devices and processes it is spread over."""

from kvjax.train.run.runner import run as run
