"""Inputs with faults: refused in words, or their rows are left out and counted."""
