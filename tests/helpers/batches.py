"""The search in batches, as a GPU does it, wherever it runs; and what it and the compiled search make of cones."""

from __future__ import annotations

import numpy as np
import torch

from convcvx.budget import NEVER
from convcvx.oracles._batches import BatchedSearch
from convcvx.oracles._blocks import Goal, Incumbents
from convcvx.oracles._cone_bounds import collapse, cone_bound, enclose, take
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


def both_on_every_cone(charged: ChargedRows, rounds: int, device: str = "cpu") -> list[tuple[np.ndarray, np.ndarray]]:
    """Kept entries, bounds of cone and antipode, and strain of all cones, halved `rounds` times: ours, compiled."""
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
            indices, heights = np.zeros(len(listed) + n_entries, np.int64), np.zeros((d, n_entries))
            indices[: len(listed)] = listed
            n = collapse(tree, indices, 0, len(listed), vertices, float(finest[k]), odd, heights)
            middle, radius, remainder = np.zeros(shape), np.zeros(shape[:2]), np.zeros(shape[1])
            bend, gram = np.zeros((d, d)), vertices @ vertices.T
            mine = kept.entries[low : low + int(counts[k])].cpu().numpy()
            own = indices[len(listed) :][:n]
            assert sorted(mine) == sorted(own)
            np.testing.assert_allclose(linear[k].transpose(0, 1).cpu(), odd, atol=1e-12 * search.tree.weight)
            scratch = (
                heights,
                np.zeros((shape[2] + 1, n)),
                np.zeros((d, n)),
                np.zeros(n),
                np.zeros((n + 1, 2), np.uint64),
            )
            n_runs = take(tree, own, scratch[1], scratch[-1])
            enclose(tree, own, scratch, n_runs, odd, middle, radius, remainder, bend)
            theirs, tops = [], []
            for part in (odd, odd - search.fold):
                best = np.zeros(1 + d)
                theirs.append(
                    cone_bound(scratch, n_runs, vertices, gram, part, middle, radius, remainder, search.allowance, best)
                )
                tops.append(best[0])
            out.append(
                (
                    np.concatenate([bounds[k].cpu(), values[k].amax(1).clamp(min=0).cpu(), strain[k].flatten().cpu()]),
                    np.concatenate([theirs, tops, bend.flatten()]),
                )
            )
            low += int(counts[k])
        cones = search._divide(cones)
    return out
