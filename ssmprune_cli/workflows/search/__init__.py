"""Search for what to prune within a budget, by the divergence from the dense model on a few unlabelled images."""
