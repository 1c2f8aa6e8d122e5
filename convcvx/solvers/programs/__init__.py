"""Finite convex programs over activation patterns."""
