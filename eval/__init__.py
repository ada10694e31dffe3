"""Tasks, harness, results and reports."""
