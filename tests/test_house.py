"""How the house is laid out: imports run one way, no circles, no data in module variables, few files at the top."""

from __future__ import annotations

import ast
from pathlib import Path

import convcvx

ROOT = Path(convcvx.__file__).parent
ORDER = [
    "_compat",
    "errors",
    "terms",
    "rounding",
    "machine",
    "storage",
    "data",
    "pooling",
    "activations",
    "losses",
    "arrangements",
    "patches",
    "budget",
    "responses",
    "problem",
    "oracles",
    "optimum",
    "display",
    "certificate",
    "solution",
    "callbacks",
    "units",
    "solvers",
    "network",
    "baseline",
    "training",
    "stack",
    "report",
    "comparison",
    "estimator",
    "cli",
    "__main__",
]
"""Whoever stands later may import those that stand before, never the other way round."""
TOP = 16
"""Files at the top at most: beyond that they need packages."""


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(("convcvx", *parts)).removesuffix(".__init__")] = path
    return found


def imports(tree: ast.AST, known: dict[str, Path]) -> set[str]:
    """The modules of convcvx that one imports anywhere, in functions and for type checking too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "convcvx":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else str(node.module))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
    return found


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(ast.parse(path.read_text()), known) for name, path in known.items()}


def unit(module: str) -> str:
    """The file or package at the top in which a module stands."""
    return module.split(".")[1]


def upward(found: dict[str, set[str]]) -> list[str]:
    """Imports against the order, by name."""
    inside = {name: {t for t in targets if t != "convcvx"} for name, targets in found.items() if name != "convcvx"}
    return [
        f"{name} imports {target}"
        for name, targets in inside.items()
        for target in targets
        if ORDER.index(unit(target)) > ORDER.index(unit(name))
    ]


def circles(found: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves by way of others."""

    def reached(name: str) -> set[str]:
        seen: set[str] = set()
        todo = list(found[name])
        while todo:
            other = todo.pop()
            if other not in seen:
                seen.add(other)
                todo += found.get(other, set())
        return seen

    return [name for name in found if name in reached(name)]


def test_imports_run_one_way():
    found = graph()
    assert len(found) > 100
    unknown = {unit(name) for name in found if name != "convcvx"} - set(ORDER)
    assert not unknown, f"say in ORDER where {unknown} stand"
    assert upward(found) == []


def test_there_are_no_circles():
    assert circles(graph()) == []


def test_negative_control_an_upward_import_and_a_circle_are_seen():
    found = graph()
    found["convcvx.errors"] = {"convcvx.cli"}
    assert "convcvx.errors imports convcvx.cli" in upward(found)
    assert "convcvx.errors" in circles(found)
    assert imports(ast.parse("def f():\n    from convcvx.cli import train"), modules()) == {"convcvx.cli.train"}


def test_few_files_stand_at_the_top():
    assert len(list(ROOT.glob("*.py"))) <= TOP


def test_no_function_keeps_data_in_a_module_variable():
    """`global` is how that is done."""
    for name, path in modules().items():
        kept = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Global)]
        assert not kept, name
