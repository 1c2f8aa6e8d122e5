"""Cells of a central arrangement by their extreme rays, one hyperplane at a time (double description).

Fukuda, Prodon, Double description method revisited, 1996.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import njit

TOLERANCE = 1e-10
"""Unit rows and rays with a smaller product touch; cells thinner than this are not told apart."""


def walk(normals: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """Yield (signs (L,) bool, extreme rays (m, d), overshoot) of every cell of distinct hyperplanes
    spanning R^d.

    If rays r_i of an undivided cell pass a hyperplane by at most δ, then so by κδ does any unit u = Σ
    λ_i r_i >= 0 of it. With the basis rows B of the orthant and w = Σ ±b_i: σ_min(B) Σ λ_i <= Σ λ_i
    w·r_i = w·u <= d, so that κ = Σ λ_i <= d / σ_min(B).
    """
    n, d = normals.shape
    basis = _independent(normals)
    order = np.concatenate([basis, np.setdiff1d(np.arange(n), basis)])
    sorted_normals = np.ascontiguousarray(normals[order])
    back = np.argsort(order)
    corner = np.linalg.inv(sorted_normals[:d]).T  # ray i lies on every basis hyperplane but i
    corner /= np.linalg.norm(corner, axis=1, keepdims=True)
    words = -(-n // 64)
    stretch = d / np.linalg.norm(sorted_normals[:d], -2)
    passed = np.full(1, 2.0**-48)  # rays are that accurate
    for orthant in range(1 << d):
        positive = np.array([(orthant >> i) & 1 for i in range(d)], dtype=bool)
        signs = np.zeros(n, dtype=bool)
        signs[:d] = positive
        tight = np.zeros((d, words), dtype=np.uint64)
        for ray in range(d):
            for i in range(d):
                if i != ray:
                    tight[ray, i // 64] |= np.uint64(1 << (i % 64))
        stack = [(d, signs, np.where(positive[:, None], corner, -corner), tight)]
        while stack:
            start, signs, rays, tight = stack.pop()
            cut = _advance(sorted_normals, start, rays, signs, passed)
            if cut == n:
                yield signs[back], rays, float(passed[0] * stretch)
                continue
            for side in (True, False):
                child = signs.copy()
                child[cut] = side
                stack.append((cut + 1, child, *_halve(rays, tight, sorted_normals[cut], cut, side)))


def _independent(normals: np.ndarray) -> np.ndarray:
    """Indices of d rows that span R^d, each as far as can be from the span of those before."""
    rest, chosen = normals.copy(), []
    for _ in range(normals.shape[1]):
        k = int(np.linalg.norm(rest, axis=1).argmax())
        direction = rest[k] / np.linalg.norm(rest[k])
        chosen.append(k)
        rest = rest - np.outer(rest @ direction, direction)
    return np.array(chosen)


@njit(cache=True)
def _advance(normals: Any, start: int, rays: Any, signs: Any, passed: Any) -> int:
    """Set the signs of rows from `start` on, up to the first that cuts the cell; return its index."""
    for k in range(start, len(normals)):
        low, high = 0.0, 0.0
        for i in range(len(rays)):
            value = 0.0
            for a in range(rays.shape[1]):
                value += rays[i, a] * normals[k, a]
            low, high = min(low, value), max(high, value)
        if low < -TOLERANCE and high > TOLERANCE:
            return k
        signs[k] = high > -low
        passed[0] = max(passed[0], min(high, -low))
    return len(normals)


@njit(cache=True)
def _halve(rays: Any, tight: Any, normal: Any, index: int, positive: bool) -> tuple[Any, Any]:
    """Rays, and the hyperplanes each lies on, of one half of a cell: one double description step.

    Rays on both sides meet the hyperplane between them if and only if they span a two-dimensional face.
    """
    m, d = rays.shape
    values = np.zeros(m)
    for i in range(m):
        for a in range(d):
            values[i] += rays[i, a] * normal[a]
        if not positive:
            values[i] = -values[i]
    pairs, count = np.empty((m * m // 4 + 1, 2), np.int64), 0
    for i in range(m):
        for j in range(m):
            if values[i] > TOLERANCE and values[j] < -TOLERANCE and _adjacent(tight, i, j):
                pairs[count, 0], pairs[count, 1] = i, j
                count += 1
    kept = np.flatnonzero(values >= -TOLERANCE)
    new_rays, new_tight = (
        np.empty((len(kept) + count, d)),
        np.empty((len(kept) + count, tight.shape[1]), np.uint64),
    )
    new_rays[: len(kept)], new_tight[: len(kept)] = rays[kept], tight[kept]
    for place in range(count):
        i, j = pairs[place]
        ray = values[i] * rays[j] - values[j] * rays[i]
        new_rays[len(kept) + place] = ray / np.sqrt((ray * ray).sum())
        new_tight[len(kept) + place] = tight[i] & tight[j]
    bit = np.uint64(1) << np.uint64(index % 64)
    for place in range(len(new_rays)):
        if place >= len(kept) or values[kept[place]] <= TOLERANCE:
            new_tight[place, index // 64] |= bit
    return new_rays, new_tight


@njit(cache=True)
def _adjacent(tight: Any, i: int, j: int) -> bool:
    """Whether no third ray lies on all the hyperplanes that rays i and j share."""
    for other in range(len(tight)):
        if other != i and other != j:
            contains = True
            for w in range(tight.shape[1]):
                if tight[i, w] & tight[j, w] & ~tight[other, w]:
                    contains = False
                    break
            if contains:
                return False
    return True
