"""The search in batches, as a GPU does it, run on the CPU: it proves what the compiled search proves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.batches import Batched, agree, batched, both_on_every_cone, undropped
from helpers.rows import dense_max, largest, random_rows

from convcvx.budget import NEVER
from convcvx.errors import InputError
from convcvx.oracles import _batches
from convcvx.oracles._batched_cones import Entries, form_bounds
from convcvx.oracles._blocks import BlockSearch, Goal, Incumbents
from convcvx.oracles._cone_bounds import form_bound
from convcvx.oracles._row_tree import RowTree
from convcvx.oracles.branch_and_bound import BranchAndBoundOracle
from convcvx.oracles.charged_rows import ChargedRows


@pytest.mark.parametrize(("n", "d", "c", "n_cells"), [(40, 2, 3, 2), (400, 3, 5, 1), (300, 4, 2, 3), (100, 5, 1, 2)])
def test_bounds_each_cone_as_the_compiled_search_does(n, d, c, n_cells):
    """The same enclosures, bounds and strain on the same cones; the mathematics stands in two places."""
    charged = random_rows(n, d, c, n_cells)
    weight = np.linalg.norm(charged.charges, axis=1).sum()
    pairs = both_on_every_cone(charged, 5)
    assert len(pairs) > 2**d
    agree(pairs, weight)


@pytest.mark.parametrize("seed", range(3))
def test_single_precision_never_lowers_a_bound(seed):
    """Charges of moduli from 1e-6 to 1e6 that cancel, of many rows in one cell, and rows that hardly cross a cone."""
    rng = np.random.default_rng(seed)
    charged = random_rows(900, 2 + seed, 1 + 3 * seed, 1 + seed % 2, seed=seed)
    charges = charged.charges * 10.0 ** rng.uniform(-6, 6, (len(charged.charges), 1))
    charges[1::2] = -charges[::2] * (1 + 1e-9 * rng.standard_normal((len(charges[::2]), 1)))
    charged = replace(charged, charges=charges).scaled()
    agree(both_on_every_cone(charged, 6 - seed), np.linalg.norm(charged.charges, axis=1).sum())


def test_forms_are_bounded_alike():
    """Also where the two vertices are orthogonal, and where everything vanishes."""
    rng = np.random.default_rng(0)
    for d in (1, 2, 5):
        ends = rng.standard_normal((50, d, d + 2))
        beside, along, across = ends @ ends.transpose(0, 2, 1), rng.standard_normal((50, d)), rng.random((50, d))
        vertices = np.abs(rng.standard_normal((50, d, d))) * rng.integers(0, 2, (50, d, d)) + np.eye(d)
        gram = vertices @ vertices.transpose(0, 2, 1)
        beside[0], along[0], across[0], gram[1] = 0, 0, 0, np.eye(d)
        ours = form_bounds(*(torch.as_tensor(part) for part in (along, beside, across, gram)))
        theirs = np.array([form_bound(*parts) for parts in zip(along, beside, across, gram, strict=True)])
        np.testing.assert_allclose(ours, theirs, rtol=1e-13)
        assert theirs[0] == 0 < theirs[1]
        # it bounds the form at random λ >= 0 of unit length, and a tenth less would not
        lam = rng.random((50, 4000, d)) ** 3
        lam /= np.sqrt(np.einsum("bki,bij,bkj->bk", lam, gram, lam))[..., None]
        lengths = np.sqrt(np.einsum("bii->bi", beside))
        form = np.einsum("bki,bij,bkj->bk", lam, beside, lam) + (lam @ along[:, :, None])[..., 0] ** 2
        form += 2 * (lam @ lengths[:, :, None])[..., 0] * (lam @ across[:, :, None])[..., 0]
        form = np.sqrt(np.maximum(form + (lam @ across[:, :, None])[..., 0] ** 2, 0)).max(axis=1)
        assert (form <= ours.numpy() * (1 + 1e-12)).all()
        assert (form[1:] > 0.9 * ours.numpy()[1:]).any()


@pytest.mark.parametrize("d", [2, 3, 4, 5])
@pytest.mark.parametrize(("n", "c", "n_cells"), [(1, 1, 1), (60, 2, 3), (300, 4, 1)])
def test_agrees_with_the_compiled_search(d, n, c, n_cells):
    charged = random_rows(n, d, c, n_cells, seed=d)
    tol = 1e-2 if d < 5 else 0.2
    ours, theirs = Batched(tol).maximise(charged), BranchAndBoundOracle(tol).maximise(charged)
    reference = dense_max(charged)
    for result in (ours, theirs):
        assert result.stats["stopped"] == "bound"
        assert reference <= result.upper_bound <= largest(result) * (1 + tol) * (1 + 1e-9)
    assert ours.stats["cones"] < 1.5 * theirs.stats["cones"] + 10
    assert ours.stats["entries"] < 1.5 * theirs.stats["entries"] + 100


def margin(charged: ChargedRows) -> float:
    """The least by which the bound of a cone or its antipode exceeds g, at random points of many cones."""
    search, rng, least = undropped(charged), np.random.default_rng(0), np.inf
    cones = search.orthants()
    for _ in range(9):
        edges = (cones.vertices[:, :, None] - cones.vertices[:, None]).square().sum(-1)
        linear = cones.linear.clone()
        kept = search.rows.collapse(cones, search.fineness * edges.amax((1, 2)).sqrt(), linear, 1 << 30)
        bounds = search.bound(cones.vertices, kept, linear)[0].numpy()
        points = rng.dirichlet(np.full(search.rank, 0.5), (len(cones), 30)) @ cones.vertices.numpy()
        points /= np.linalg.norm(points, axis=2, keepdims=True)
        for side, sign in enumerate((1, -1)):
            g = charged.g(sign * points.reshape(-1, search.rank)).reshape(len(cones), -1)
            least = min(least, float((bounds[:, side] - g.max(axis=1)).min()))
        cones = search._divide(cones)
    return least


@pytest.mark.parametrize("part", ["radius", "above"])
def test_the_enclosure_is_needed(monkeypatch, part):
    """g exceeds no bound of a cone it is taken in; without the radius, or the tangents, it does: the control."""
    charged = random_rows(30, 3)
    assert margin(charged) > 0
    enclosed, projected = Entries.enclose, Entries.project

    def careless(self, kept, linear):
        middle, radius, remainder, strain = enclosed(self, kept, linear)
        return middle, radius * (part != "radius"), remainder, strain

    def one_sided(self, kept, direction):
        chords, above, below = projected(self, kept, direction)
        return chords, above * (part != "above"), below

    monkeypatch.setattr(Entries, "enclose", careless)
    monkeypatch.setattr(Entries, "project", one_sided)
    assert margin(charged) < 0


def test_little_room_changes_the_order_alone(monkeypatch):
    """Batches that have to be cut, and a frontier that is too long, where the narrowest cones come first."""
    charged = random_rows(500, 3, 2, 2)
    roomy = Batched(1e-3).maximise(charged)
    monkeypatch.setattr(_batches, "ROUND_BYTES", {"cpu": 1 << 15})
    monkeypatch.setattr(_batches, "WAITING_ROUNDS", 1)
    waiting = []
    concatenate = _batches.Cones.concatenate

    def watched(*batches):
        waiting.append(sum(len(batch.entries) for batch in batches))
        return concatenate(*batches)

    monkeypatch.setattr(_batches.Cones, "concatenate", watched)
    cramped = Batched(1e-3).maximise(charged)
    assert cramped.stats["stopped"] == "bound"
    assert max(largest(cramped), largest(roomy)) <= cramped.upper_bound
    assert cramped.upper_bound == pytest.approx(roomy.upper_bound, rel=1e-3)
    assert max(waiting) < roomy.stats["entries"] / 5


def test_every_tensor_is_made_on_the_device_of_the_search():
    """One made elsewhere, here on a device that computes nothing, would stop it."""
    search = batched(random_rows(200, 3, 2, 2))
    with torch.device("meta"):
        assert search.run()[3] == "bound"
        with pytest.raises(RuntimeError, match="meta"):  # the control
            torch.arange(3) + search.odd[0, :, 0]


def test_each_device_has_its_search(monkeypatch):
    charged = random_rows(10, 2)
    tree = RowTree.build(charged)
    incumbents = Incumbents(charged, tree, 4)
    incumbents.climb(np.eye(2), 0)
    arguments = charged, tree, incumbents, Goal(1e-2, 0.0, 0.0, NEVER, None)
    assert isinstance(BranchAndBoundOracle.search(*arguments, "cpu"), BlockSearch)
    monkeypatch.setattr("convcvx.oracles.branch_and_bound.BatchedSearch", lambda *given: given[-1])
    assert BranchAndBoundOracle.search(*arguments, "cuda") == "cuda"
    with pytest.raises(InputError, match="device must be one of cpu, cuda; got 'tpu'"):
        BranchAndBoundOracle(device="tpu")
