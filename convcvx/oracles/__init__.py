"""Oracles: the search for the filter that violates dual feasibility most."""
