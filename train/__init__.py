"""Training: a model, an objective and data, joined by one loop."""
