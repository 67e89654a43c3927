"""Training recipes: small enough to read whole, good enough to use."""
