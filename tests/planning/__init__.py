"""Tests of kvjax.planning."""
