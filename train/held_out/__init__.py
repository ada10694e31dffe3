"""What a run measures on held-out rows and items while it trains."""
