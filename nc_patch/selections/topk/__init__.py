"""``topk``: the highest scores of each query."""
