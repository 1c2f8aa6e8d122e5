"""Slides: joint descents on filters and weights."""

from convcvx.solvers.slide.joint import (
    slide,
    slide_lbfgs,
)

__all__ = [
    "slide",
    "slide_lbfgs",
]
