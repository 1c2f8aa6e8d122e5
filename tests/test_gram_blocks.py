"""The Gram matrix by blocks: that of one process, in as many as there are, with so much less memory for each."""

from __future__ import annotations

import pytest
import torch
from helpers.rehearsal import together

from convcvx.machine.wire import Agreed
from convcvx.solvers.master import blocks
from convcvx.solvers.master.blocks import GramBlocks, striped
from convcvx.solvers.master.gram import Gram

N, D, C = 90, 70, 3


def data():
    random = torch.Generator().manual_seed(0)
    features = torch.rand(N, D, generator=random, dtype=torch.float64)
    counts = torch.rand(N, generator=random, dtype=torch.float64) + 0.5
    return features, torch.rand(N, C, generator=random, dtype=torch.float64), counts


def alone(centred: bool, counts, shift) -> Gram:
    features, targets, _ = data()
    gram = Gram(D, C, torch.float64, centred=centred, shift=shift)
    gram.add(features, targets, counts)
    return gram


def shared(wire, centred: bool, counts, shift, batch: int = 7) -> GramBlocks:
    """Each process has a third of the images, of several the last has none."""
    features, targets, _ = data()
    gram = GramBlocks(wire, D, C, torch.float64, centred=centred, shift=shift)
    own = torch.arange(N)[wire.rank :: max(1, wire.size - 1)] if wire.rank < max(1, wire.size - 1) else torch.arange(0)
    parts = (
        (features[part], targets[part], None if counts is None else counts[part])
        for part in own.split(batch)
        if len(part)
    )
    gram.add_all(parts, batch)
    return gram


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_blocks_multiply_and_solve_as_the_whole_does(centred, weighed):
    shift = torch.full((D,), 0.4, dtype=torch.float64)
    counts, matrix = data()[2] if weighed else None, torch.rand(D, C, dtype=torch.float64)
    ridges = torch.linspace(1e-3, 2, D, dtype=torch.float64)
    whole = alone(centred, counts, shift)
    expected = [whole.linear, whole.times(matrix), whole.intercept(matrix)]
    whole.factorise(ridges)
    expected.append(whole.unfactor(matrix))

    def work(wire):
        gram = shared(wire, centred, counts, shift)
        found = [gram.linear, gram.times(matrix), gram.intercept(matrix)]
        gram.factorise(ridges)
        return [*found, gram.unfactor(matrix)]

    for size in (1, 2, 5):
        found = together(size, work)[0]
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert float((whole.times(expected[-1]) + ridges[:, None] * expected[-1] - matrix).abs().max()) < 1e-9


def test_a_matrix_without_factor_gets_larger_ridges():
    """More features than images, in float32: rounding leaves no factor, in any process, until ridges are larger."""
    features = torch.rand(10, D, generator=torch.Generator().manual_seed(0))
    matrix = torch.rand(D, C)

    def work(wire):
        gram = GramBlocks(wire, D, C, torch.float32, centred=False, shift=torch.zeros(D))
        gram.add_all([(features.clone(), torch.rand(10, C), None)] if wire.rank == 0 else [], 10)
        gram._diagonal -= 1e-3 * gram._diagonal  # rounding of an unlucky kind
        gram.factorise(torch.full((D,), 1e-9))
        return gram.unfactor(matrix)

    assert bool(together(3, work)[0].isfinite().all())


def test_each_process_has_its_share_of_the_matrix(monkeypatch):
    """All together no more than the square that one process has, nor any process much more than its share."""

    monkeypatch.setattr(blocks, "LEAST", 2)

    def bytes_of(wire):
        gram = shared(wire, False, None, torch.zeros(D))
        gram.factorise(torch.ones(D))
        return gram.nbytes

    square = D * D * 8
    assert together(1, bytes_of) == [pytest.approx(square, rel=0.3)]  # squares on the diagonal are there twice
    for size in (2, 4):
        found = together(size, bytes_of)
        assert sum(found) < 1.3 * square
        assert max(found) < 1.3 * square / size


@pytest.mark.parametrize(("size", "n"), [(27_000, 2), (16_000, 8), (27_000, 64)])
def test_at_full_size_shares_are_even(size, n):
    entries = [0] * n
    for rows in striped(size, n, blocks.STRIPE["cpu"]):
        entries[rows.rank] += (rows.own.stop - rows.own.start) * (size - rows.own.start)
    assert 2 * max(entries) < 1.15 * size**2 / n
    assert min(entries) > 0


def test_images_that_fail_in_one_process_end_the_sums_in_all():
    def work(wire):
        def broken():
            yield torch.rand(2, D), torch.rand(2, C), None
            raise OSError("disk gone")

        gram = GramBlocks(wire, D, C, torch.float32, centred=False, shift=torch.zeros(D))
        own = broken() if wire.rank == 1 else ((torch.rand(2, D), torch.rand(2, C), None) for _ in range(9))
        with pytest.raises(Agreed) as caught:
            gram.add_all(own, 2)
        return caught.value.error

    first, second, third = together(3, work)
    assert first is None
    assert third is None
    assert str(second) == "disk gone"
