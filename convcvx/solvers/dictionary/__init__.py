"""Weights over a fixed set of filters: the dictionary, its features, the lasso, the path along β."""
