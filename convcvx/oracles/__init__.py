"""Oracles: the search for the filter that violates dual feasibility most."""

from convcvx.oracles.base import Oracle, OracleResult, Wanted
from convcvx.oracles.branch_and_bound import BranchAndBoundOracle
from convcvx.oracles.charged_rows import ChargedRows
from convcvx.oracles.copositive import CopositiveOracle
from convcvx.oracles.cylinders import CylinderOracle
from convcvx.oracles.enumerate import ExactOracle
from convcvx.oracles.family import FAMILIES, Family, FamilyOracle, Listed, Ternary
from convcvx.oracles.local import LocalOracle
from convcvx.oracles.polynomial import PolynomialOracle
from convcvx.oracles.remainder import RemainderOracle
from convcvx.oracles.sampled import SampledOracle
from convcvx.oracles.spectral import SpectralOracle
from convcvx.oracles.table import ORACLES, get_oracle, pick_oracle
from convcvx.terms.scope import Scope

__all__ = [
    "FAMILIES",
    "ORACLES",
    "BranchAndBoundOracle",
    "ChargedRows",
    "CopositiveOracle",
    "CylinderOracle",
    "ExactOracle",
    "Family",
    "FamilyOracle",
    "Listed",
    "LocalOracle",
    "Oracle",
    "OracleResult",
    "PolynomialOracle",
    "RemainderOracle",
    "SampledOracle",
    "Scope",
    "SpectralOracle",
    "Ternary",
    "Wanted",
    "get_oracle",
    "pick_oracle",
]
