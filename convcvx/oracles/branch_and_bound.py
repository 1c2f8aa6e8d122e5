"""Branch and bound over the sphere of filters: a rigorous upper bound on max g, for any rank, pooling and outputs.

    g(u) = ‖G(u)‖,   G(u) = Σ_k (x_k·u)_+ s_k   over charged rows,   ‖u‖ = 1

**Cones.** The sphere S^{d-1} is covered by the 2^d orthants, each a simplicial cone {Σ λ_i w_i : λ >= 0} with d
unit vertices; a cone is divided by halving the edge that costs the bound most. A cone and its
antipode are one item of work: G(-u) = G(u) - Σ_k s_k (x_k·u), so they differ by one matrix.

**Enclosure of G.** Let z_i = x·w_i. A row with all z_i >= 0 is linear on the cone and collapses into one matrix,
with all z_i <= 0 it vanishes. For every other row and u = Σ λ_i w_i, convexity of (·)_+ gives

    θ (x·u)  <=  (x·u)_+  <=  Σ λ_i (z_i)_+,      θ = 1 if Σ z_i > 0 else 0,

tangent and chord, both linear in λ. So (x·u)_+ s = Σ λ_i (m_i + τ r_i) s for some |τ| <= 1, with m_i the mean of the
two at w_i and r_i half their distance. Summed over rows, G(u) = Σ λ_i (a_i + e_i), where a_i collects the linear part
and the m_i, and e_i is an unknown vector with |<q, e_i>| <= h_i(q) = Σ_k r_ki |<q, s_k>| for every q. The part of
cell p is no longer than Σ r_ki ‖s_k‖ over its rows; cells are orthogonal, so
‖e_i‖ <= η_i = (Σ_p (Σ_{k in p} r_ki ‖s_k‖)²)^½.

**Bundles.** Rows (x_k, s_k) close to their weighted mean x̄ act as one row (x̄, S = Σ s_k), since

    Σ (x_k·u)_+ s_k = (x̄·u)_+ S + ½ D u + ½ Σ (|x_k·u| - |x̄·u|) s_k,      D = Σ s_k (x_k - x̄)ᵀ,

where the last sum is at most R/2 long on unit u: R = Σ ‖s_k‖ ‖x_k - x̄‖, or by Cauchy-Schwarz
(λ_max(Σ s sᵀ/‖s‖) λ_max(Σ ‖s‖ (x-x̄)(x-x̄)ᵀ))^½, whichever is less. Charges cancel inside a bundle, so S is short:
this, with far fewer rows, is what makes thousands of images affordable. A bundle is divided when R/Σ‖s_k‖, the
mean distance of its rows, is no longer small beside the cone. R/2 is added to h_i and η_i.

**Charges.** Of many rows, each one patch of image i, only w_k = w_pk ‖x_ik‖ is kept; s_k = w_k Z_i is formed where it
is needed, which rounds once more, by ε‖s_k‖. Bundles carry their sums, rows nothing: the proof is that of rows with
charges of their own, in a third of the memory.

**Bound.** Let q be a unit vector, here Σ a_i normalised. Along q the sign of <q, s_k> says which half of the enclosure
matters: a convex piece lies below its chord, a concave one below its tangent. So
|<q, G(u)>| <= Σ λ_i α_i with α_i = <q, a_i> + h_i(q) (or h_i(q) - <q, a_i> if larger), and beside q, with
b_i = a_i - <q, a_i> q, ‖G(u) - <q, G(u)> q‖ <= ‖Σ λ_i b_i‖ + Σ λ_i η_i. Squared and added,

    g(u)² <= λᵀ Q λ,   Q_ij = α_i α_j + <b_i, b_j> + ‖b_i‖ η_j + η_i ‖b_j‖ + η_i η_j,

while ‖u‖² = λᵀ Γ λ with Γ_ij = w_i·w_j. Q <= γ² Γ entry by entry therefore proves g <= γ on the cone, with
γ² = max Q_ij / Γ_ij. No assumption is made on Σ λ_i, which exceeds 1 inside a cone; and vertices need not be unit.
Where some Γ_ij = 0, as in an orthant, λᵀQλ <= max Q (Σ λ_i)² <= d max Q, since Γ >= 0 there. The excess of γ over
max g on a cone of diameter δ is O(δ²), h(q) being first order in the error and all else second.

**Rounding.** Every α_i and η_i is raised by an allowance. Each computed vertex quantity is a sum of at most
N products with total modulus at most T = Σ‖x_k‖‖s_k‖, which is Σ‖s_k‖ where rows are unit, so its error is at most
(N + O(d)) ε T in whatever order it is added; products with q add P·c·ε. Heights that are wrong by d·ε ‖x_k‖ can
misjudge a sign: the row's contribution is then wrong by no more than d·ε ‖x_k‖‖s_k‖. A computed midpoint misses its
edge by a few ε, which opens gaps between cones: u in a gap is within 4 √d ε per halving of a point that is covered, and
g is Lipschitz with constant T. No cone comes from more than 12 d² halvings. The allowance of `_blocks.py` is above
the sum of these.

**Single precision.** On a CPU the entries that a cone keeps carry heights, charges and lengths rounded to single
precision, u = 2^-24: half the memory, where memory is what takes the time. Signs of heights stay, and whichever θ is
taken tangent and chord enclose (x·u)_+, so r_i and m_i are those of heights that are off by u; they are exact halves.
A run of n <= CHUNK entries of one cell is summed up in single precision, runs and cells in double. A product m_i s_k is
off by 5 roundings, its sum by n more, so a_i by (n + 5) u Σ |m_i| ‖s_k‖ in length and η_i by as much; <q, s_k> by
(width + 5) u ‖s_k‖, and h_i(q) by (n + width + 8) u Σ r_i ‖s_k‖. Since |m_i| <= |z_i| and r_i <= |z_i| / 2, twice
(n + width + 16) u Σ |z_i| ‖s_k‖ is above the sum of these, and of the rounding of itself: α_i and η_i are raised by
that as well. Like η_i it vanishes with the square of the cone's width, so that no tolerance is out of reach. What lies
on one side of a cone is summed up in double precision. Charges of scale one that underflow are off by 2^-126, which is
nothing beside the allowance.

The few operations on the d×d forms have a relative error below 1e-12, by which the bound is raised.

**Where it runs.** On a CPU threads take blocks of cones (`_blocks.py`) and bound one cone after another (`_cones.py`,
`_cone_bounds.py`, compiled); on a GPU batches of cones are bounded at a time (`_batches.py`, `_batched_cones.py`), in
float64 as well. The mathematics and the allowance are the same; what differs is the order of sums, of cones, and hence
of incumbents.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from convcvx.budget import NEVER, Deadline, OutOfTime, clock
from convcvx.errors import check_choice, check_count, check_positive
from convcvx.oracles._batches import BatchedSearch
from convcvx.oracles._blocks import BlockSearch, Goal, Incumbents
from convcvx.oracles._row_tree import RowTree
from convcvx.oracles.base import Oracle, OracleResult, Wanted
from convcvx.oracles.charged_rows import ChargedRows
from convcvx.oracles.local import LocalOracle
from convcvx.oracles.needs import Need
from convcvx.problem import Problem
from convcvx.terms.scope import Scope
from convcvx.terms.stop import Stop

FIRST_LOOK = LocalOracle(n_climbers=8, n_steps=4, n_batches=1)
"""What finds filters where there is no time for a search: a few passes."""
SCOUT = LocalOracle(n_climbers=64, n_polished=128)
"""What looks for filters on samples, and before a proof on many images, which takes as long as many rounds if it fails.
Climbs by the defaults took half the time, and found an excess of g over β of 1.9 to 3.9 % where these find 4.3 to
6.4 %."""
ROOM = 0.25
"""Share of what g may be above β that a round's bound may be off by: the rest is for the network."""
MAX_RANK = 16
"""The search begins with 2^(rank - 1) cones; long before this rank it stops to prove anything of use."""


class BranchAndBoundOracle(Oracle):
    """Prove an upper bound on max g over all filters; the cost grows exponentially with the rank only.

    Parameters
    ----------
    rel_tol : float
        The search stops at a bound <= (1 + rel_tol) times the best g found, or <= the `target` of the call.
    time_limit : float, optional
        Seconds after which the best bound proved so far is returned, and used; as at the deadline of the problem.
    max_cones : int, optional
        Likewise, in cones.
    far_tol : float
        For rounds of a solver, which has far to go and needs no digits: as long as g is found above the `target`, half
        of its relative excess takes the place of `rel_tol`, or if that is more a share `ROOM` of what the target is
        above β, but no more than this.
    share : float
        Of the time left to the problem a call takes no more than this.
    device : {"cpu", "cuda"}, optional
        Where cones are bounded, by default where the problem's images are: on a CPU one after another in compiled
        threads, on a GPU in batches. The proof is the same; the order in which a GPU adds differs from run to run, and
        with it the last digits.

    Examples
    --------
    >>> result = BranchAndBoundOracle(rel_tol=0.01)(problem, problem.dual_point(predictions))  # doctest: +SKIP
    >>> result.values[0] <= result.upper_bound  # doctest: +SKIP
    True
    """

    name = "branch-and-bound"

    def __init__(
        self,
        rel_tol: float = 1e-2,
        time_limit: float | None = None,
        max_cones: int | None = None,
        far_tol: float = 0.0,
        device: str | None = None,
        share: float = 1.0,
    ) -> None:
        self.rel_tol = check_positive("rel_tol", rel_tol)
        self.time_limit = None if time_limit is None else check_positive("time_limit", time_limit, zero=True)
        self.max_cones = None if max_cones is None else check_count("max_cones", max_cones, minimum=0)
        self.far_tol = check_positive("far_tol", far_tol, zero=True)
        self.share = check_positive("share", share)
        self.device = None if device is None else check_choice("device", device, ("cpu", "cuda"))

    @property
    def scout(self) -> Oracle:
        """Climbs, which find the filters in a fraction of the time."""
        return SCOUT

    def answer(self, problem: Problem, dual_point: Tensor, wanted: Wanted) -> OracleResult:
        """As `Oracle` says; `stats` holds cones, seconds, rank, rel_gap_of_bound and why the search stopped."""
        began = clock()
        deadline = problem.deadline.share(self.share)
        try:
            deadline.check()
            charged = ChargedRows.build(problem.until(deadline), dual_point, shared=True)
        except OutOfTime:
            late = OracleResult.unfinished(problem, Scope.GLOBAL, clock() - began)
            return _with_filters(late, problem, dual_point, wanted)
        starts = wanted.starts
        points = None if starts is None else (starts.double().cpu() @ charged.frame.T).numpy()
        found = self.maximise(
            charged,
            points,
            n_filters=wanted.n_filters,
            seed=wanted.seed,
            target=wanted.target,
            rough=min(ROOM * (wanted.target / problem.beta - 1), self.far_tol),
            began=began,
            device=problem.responses.device,
            deadline=deadline,
        )
        return _with_filters(found, problem, dual_point, wanted) if found.cut_short else found

    def maximise(
        self,
        charged: ChargedRows,
        starts: np.ndarray | None = None,
        *,
        n_filters: int = 1,
        seed: int = 0,
        target: float = 0.0,
        rough: float = 0.0,
        began: float | None = None,
        device: torch.device | str = "cpu",
        deadline: Deadline = NEVER,
    ) -> OracleResult:
        """The same for rows already charged, and `starts` (q, d) in their coordinates.

        `rough` takes the place of `rel_tol` where it is more. `began`, by `convcvx.budget.clock`, is when the time
        limit starts to run, and the `deadline` holds besides; `device` is the one to use if the oracle was given none.
        """
        check_count("n_filters", n_filters)
        began = clock() if began is None else began
        deadline = deadline.sooner(Deadline.after(self.time_limit, spent=clock() - began))
        charged = charged.scaled()
        n, d = charged.rows.shape
        bound, cones, entries, stopped = 0.0, 0, 0, Stop.BOUND
        points, values = np.zeros((0, d)), np.zeros(0)
        if (instead := _too_high(d)) is not None:
            raise LOW_RANK.refusal(f"oracle {self.name}", instead)
        tree = self._tree(charged, deadline) if n and d else None
        if tree is None and n and d:
            bound, stopped = charged.total, Stop.TIME_LIMIT
        elif tree is not None:
            incumbents = Incumbents(charged, tree, n_filters + 3)
            first = np.random.default_rng(seed).standard_normal((4 * d, d))
            incumbents.climb(first if starts is None else np.concatenate([first, starts]), 0)
            incumbents.climb(incumbents.points[:4], 6)
            goal = Goal(max(self.rel_tol, rough), self.far_tol, charged.target(target), deadline, self.max_cones)
            search = self.search(charged, tree, incumbents, goal, self.device or device)
            bound, cones, entries, stopped = search.run()
            incumbents.climb(incumbents.points[:n_filters], 5)
            points = incumbents.points[:n_filters]
            values = charged.g(points)
            order = np.argsort(-values, kind="stable")
            points, values = points[order], values[order]
        stats = {
            "cones": cones,
            "entries": entries,
            "rank": d,
            "rel_gap_of_bound": charged.looseness(bound, values),
            "stopped": stopped,
            "seconds": clock() - began,
        }
        return charged.result(points, values, bound, stats)

    @staticmethod
    def _tree(charged: ChargedRows, deadline: Deadline) -> RowTree | None:
        """None where the deadline passes before it is there: it takes seconds for a million rows."""
        try:
            return RowTree.build(charged, deadline)
        except OutOfTime:
            return None

    @staticmethod
    def search(
        charged: ChargedRows, tree: RowTree, incumbents: Incumbents, goal: Goal, device: torch.device | str
    ) -> BlockSearch | BatchedSearch:
        """The search that suits the device."""
        if torch.device(device).type == "cuda":
            return BatchedSearch(charged, tree, incumbents, goal, device)
        return BlockSearch(charged, tree, incumbents, goal)


def _with_filters(found: OracleResult, problem: Problem, dual_point: Tensor, wanted: Wanted) -> OracleResult:
    """What a search proved that time cut short, with filters if it has none: a training cannot go on without any."""
    if len(found.values) or problem.deadline.passed:
        return found
    seen = FIRST_LOOK(problem.with_dtype(torch.float64), dual_point, wanted, target=0.0)
    return replace(found, filters=seen.filters, values=seen.values)


def _too_high(rank: int) -> str | None:
    return f"patches of rank {rank}" if rank > MAX_RANK else None


LOW_RANK = Need(
    f"patches of a rank of {MAX_RANK} at most, as it begins with 2^(rank - 1) cones",
    lambda problem: _too_high(problem.responses.embedding.patch_rank),
    "pass a smaller rank, or oracle='local'",
)
