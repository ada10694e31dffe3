"""What training minimises, and the passes and losses that it is made of."""
