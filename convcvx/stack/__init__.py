"""Greedy stacks of certified layers."""
