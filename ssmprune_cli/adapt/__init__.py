"""A user's own module: its mixers are recognised and proven, computed by our ops, and pruned inside."""
