"""Solvers: each takes a `Problem` and gives a `Solution`."""
