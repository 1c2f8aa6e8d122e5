"""The search in batches, as a GPU does it, wherever it runs; and what it and the compiled search make of cones."""

from __future__ import annotations

import math

import numpy as np
import torch

from convcvx.budget import NEVER
from convcvx.oracles._batches import BatchedSearch
from convcvx.oracles._blocks import Goal, Incumbents
from convcvx.oracles._cone_bounds import CHUNK, collapse, cone_bound, enclose
from convcvx.oracles._row_tree import RowTree
from convcvx.oracles.branch_and_bound import BranchAndBoundOracle
from convcvx.oracles.charged_rows import ChargedRows


class Batched(BranchAndBoundOracle):
    """The search that a GPU gets, wherever it runs."""

    search = staticmethod(BatchedSearch)


def batched(charged: ChargedRows, device: str = "cpu") -> BatchedSearch:
    tree = RowTree.build(charged)
    incumbents = Incumbents(charged, tree, 4)
    incumbents.climb(np.random.default_rng(0).standard_normal((4, charged.rows.shape[1])), 0)
    return BatchedSearch(charged, tree, incumbents, Goal(1e-2, 0.0, 0.0, NEVER, None), device)


def undropped(charged: ChargedRows, device: str = "cpu") -> BatchedSearch:
    """A search that halves every cone."""
    search = batched(charged, device)
    search.threshold[0], search.incumbents.values[0] = 0.0, np.inf
    return search


def both_on_every_cone(
    charged: ChargedRows, rounds: int, device: str = "cpu"
) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Bounds of cone and antipode, the largest g at a vertex of each, and strain, of all cones halved `rounds` times:
    ours, compiled, and what the latter adds for its single precision."""
    search, out = undropped(charged, device), []
    cones = search.orthants()
    tree, n_entries = search.tree.arrays, len(search.tree.cells)
    d = search.rank
    shape = search.fold.shape
    for _ in range(rounds):
        edges = (cones.vertices[:, :, None] - cones.vertices[:, None]).square().sum(-1)
        finest, linear = search.fineness * edges.amax((1, 2)).sqrt(), cones.linear.clone()
        kept = search.rows.collapse(cones, finest, linear, 1 << 30)
        bounds, values, strain = search.bound(cones.vertices, kept, linear)
        counts, low = torch.bincount(kept.owners, minlength=len(cones)), 0
        for k in range(len(cones)):
            listed = cones[k : k + 1].entries.cpu().numpy()
            vertices, odd = cones.vertices[k].cpu().numpy(), cones.linear[k].transpose(0, 1).cpu().numpy().copy()
            indices = np.zeros(len(listed) + n_entries, np.int64)
            chunks, runs = -(-n_entries // CHUNK), np.zeros((n_entries, 4), np.int32)
            scratch = np.zeros((chunks, d + shape[2] + 1, CHUNK), np.float32), np.zeros((2, CHUNK), np.float32), runs
            indices[: len(listed)] = listed
            n, n_runs = collapse(tree, indices, 0, len(listed), vertices, float(finest[k]), odd, scratch)
            middle, radius, remainder = np.zeros(shape), np.zeros(shape[:2]), np.zeros(shape[1])
            bend, gram = np.zeros((d, d)), vertices @ vertices.T
            mine = kept.entries[low : low + int(counts[k])].cpu().numpy()
            own = indices[len(listed) :][:n]
            assert sorted(mine) == sorted(own)
            np.testing.assert_allclose(linear[k].transpose(0, 1).cpu(), odd, atol=1e-12 * search.tree.weight)
            single = enclose(tree, own, scratch, n_runs, odd, middle, radius, remainder, bend)
            theirs, tops = [], []
            for part in (odd, odd - search.fold):
                best = np.zeros(1 + d)
                theirs.append(
                    cone_bound(
                        scratch,
                        n_runs,
                        vertices,
                        gram,
                        part,
                        middle,
                        radius,
                        remainder,
                        search.allowance + single,
                        best,
                    )
                )
                tops.append(best[0])
            out.append(
                (
                    np.concatenate([bounds[k].cpu(), values[k].amax(1).clamp(min=0).cpu(), strain[k].flatten().cpu()]),
                    np.concatenate([theirs, tops, bend.flatten()]),
                    single,
                )
            )
            low += int(counts[k])
        cones = search._divide(cones)
    return out


def agree(pairs: list[tuple[np.ndarray, np.ndarray, float]], weight: float) -> None:
    """The compiled search, whose entries have single precision, is above the other by what it adds for that at most."""
    double = 1e-11 * weight
    for ours, theirs, single in pairs:
        d = math.isqrt(len(theirs) - 4)
        assert single <= 1e-4 * weight
        assert (theirs[:2] >= ours[:2] * (1 - 1e-12) - double).all()
        np.testing.assert_allclose(theirs[:2], ours[:2], rtol=1e-6, atol=2 * d * single + double)
        assert (theirs[2:4] <= ours[2:4] + double).all()
        np.testing.assert_allclose(theirs[2:4], ours[2:4], rtol=1e-6, atol=2 * single + double)
        np.testing.assert_allclose(theirs[4:], ours[4:], rtol=1e-4, atol=double)
