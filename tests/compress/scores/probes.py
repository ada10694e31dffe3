"""Scores that run the model: they need more than the inputs of one layer."""

WITHOUT = {
    name: "it runs the model over the prompt again; see tests/compress/test_probes.py"
    for name in ("kvzip", "oracle")
}
