"""Solvers: each takes a `Problem` and an oracle and gives a `Solution`."""

SOLVERS = ("auto", "sliding-fw")
"""What `solver=` and `--solver` take."""
