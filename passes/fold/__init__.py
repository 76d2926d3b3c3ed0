"""Stage 2: what pruning left behind leaves the weights and the graph."""
