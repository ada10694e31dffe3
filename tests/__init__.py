"""Tests of kvjax."""
