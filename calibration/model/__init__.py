"""A model's blocks and weights, read from its directory piece by piece."""
