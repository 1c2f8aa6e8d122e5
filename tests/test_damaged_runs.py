"""Files of a run and of a stack, replaced by all kinds of bad content, under every command that reads them.

What each reader makes of its own file: `test_reading`. Here are all pairs of a file and a command, or a sample of them.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import NO_SEARCH, cli, invoke
from safetensors.torch import save

from convcvx.storage.reading import open_tensors
from convcvx.training.run import Run

MODEL = ["--kernel-size", "3", "--pool", "2", "--tol", "0.5", "--oracle", "local"]
ONE_LAYER = ["train", *MODEL, "--stride", "2", "--limit", "80"]
RUNS = {
    "plain": [*ONE_LAYER, "--beta-ratio", "0.2", "--rank", "2"],
    "dictionary": [*ONE_LAYER, "--dictionary", "8", "--tune", "0.2", "--max-rounds", "0"],
    "stack": ["stack", *MODEL, "--padding", "1", "--limit", "200", "--beta-ratio", "0.2", "--stages", "2"],
}
OF_RUN = {
    "certify": lambda folder: ["certify", folder, "--json", *NO_SEARCH],
    "compare": lambda folder: ["compare", folder, "--epochs", "1", "--json"],
    "report": lambda folder: ["report", folder],
    "export": lambda folder: ["export", folder, "--to", "torch"],
    "resume": lambda folder: ["train", "--resume", "--out", folder, "--json"],
    "runs": lambda folder: ["runs", folder.parent, "--json"],
}
OF_STACK = {
    "report": OF_RUN["report"],
    "export": OF_RUN["export"],
    "resume": lambda folder: ["stack", "--resume", "--out", folder, "--json"],
    "runs": OF_RUN["runs"],
}
TEXTS = {
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "true": b"true",
    "a text": b'"text"',
    "an empty object": b"{}",
    "NaN": b"NaN",
    "a huge number": b"1e999",
    "nothing": b"",
    "half": b'{"a": ',
    "no text": b"\xff\xfe\x00",
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "long": b"9" * 5000,
}
WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "complex": lambda tensor: tensor.to(torch.complex64) + 1j,
    "bool": lambda tensor: tensor.bool(),
    "whole": lambda tensor: tensor.long(),
    "NaN": lambda tensor: tensor * torch.nan,
    "empty": lambda tensor: tensor[:0],
    "another axis": lambda tensor: tensor[None],
    "flat": lambda tensor: tensor.flatten(),
}
"""What becomes of each tensor of a file in turn."""
DRAWN = 10
"""Cases of each command and kind of folder, of a thousand or two: all of them take hours."""
TIMES = ("seconds", "core_seconds", "compiling_seconds", "peak_memory_mb", "search", "out", "status")
"""What may differ from one run of a command to the next."""


def damaged(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """Kinds of bad contents of a file, by name; None for a file that is not there."""
    yield "gone", None
    yield from TEXTS.items()
    good = path.read_bytes()
    yield "cut", good[: len(good) // 2]
    if path.suffix == ".json":
        yield from ((name, json.dumps(value).encode()) for name, value in bent(json.loads(good)))
    elif path.suffix == ".safetensors":
        yield from bent_tensors(path)


def bent(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """JSON with each key of its first two levels, of a list those of its first entry, missing or of other kinds."""
    if isinstance(value, list) and value and place.count(".") < 2:
        yield from ((name, [other, *value[1:]]) for name, other in bent(value[0], place))
    if not isinstance(value, dict) or place.count(".") >= 2:
        return
    for key in value:
        yield f"without {place}{key}", {other: part for other, part in value.items() if other != key}
        for wrong in (None, True, -1, 1e300, "text", [], {}):
            yield f"{place}{key} is {wrong}", value | {key: wrong}
        yield from ((name, value | {key: part}) for name, part in bent(value[key], f"{place}{key}."))


def bent_tensors(path: Path) -> Iterator[tuple[str, bytes]]:
    tensors, described = open_tensors(path)

    def packed(tensors: dict[str, torch.Tensor], described: Any = described) -> bytes:
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        return save(contiguous, None if described is None else {"convcvx": json.dumps(described)})

    for key, tensor in tensors.items():
        yield f"without {key}", packed({other: tensors[other] for other in tensors if other != key})
        for name, change in WRONG.items():
            yield f"{key} {name}", packed(tensors | {key: change(tensor)})
    yield "no tensors", packed({})
    for name, other in bent(described):
        yield name, packed(tensors, other)


def told(result: Any) -> dict[str, Any]:
    """What a command says in JSON, without what differs from time to time."""
    lines = result.stdout.splitlines()
    found = json.loads(lines[0]) if lines and lines[0].startswith("{") else {}
    return {name: value for name, value in found.items() if name not in TIMES}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One of each kind, with a twin."""
    made = {}
    for name, command in RUNS.items():
        made[name] = tmp_path_factory.mktemp("good") / name
        assert invoke(command[0], *command[1:], "--out", made[name], "--quiet").exit_code in (0, 3)
        if name != "stack":
            cli("compare", made[name], "--epochs", "1", "--optimizer", "adam")
    return made


def faults(good: Path, commands: dict[str, Any], where: Path, drawn: int, seed: int = 0) -> list[str]:
    """Of the cases, so many of them `drawn` for each command, those that end in neither a result nor one line of error.

    Nor may a certificate of the same problem have another bound than that of the undamaged run.
    """
    found, folder = [], where / "copy" / good.name

    def restored() -> None:
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(good, folder)

    restored()
    own = told(invoke(*map(str, commands["certify"](folder)))) if "certify" in commands else {}
    files = sorted(path.relative_to(good) for path in good.rglob("*") if path.suffix in (".json", ".safetensors"))
    contents = [(file, *damage) for file in files for damage in damaged(good / file)]
    draw = random.Random(seed)
    for command, line in commands.items():
        for file, kind, content in draw.sample(contents, min(drawn, len(contents))):
            restored()
            if content is None:
                (folder / file).unlink()
            else:
                (folder / file).write_bytes(content)
            case = f"{good.name}/{file} {kind}: {command}"
            try:
                result = invoke(*map(str, line(folder)))
            except Exception as error:
                found.append(f"{case}: {type(error).__name__} {str(error)[:200]}")
                continue
            if result.exit_code not in (0, 2, 3):
                found.append(f"{case}: exit status {result.exit_code}")
            elif result.exit_code == 2 and result.output.count("convcvx: error: ") != 1:
                found.append(f"{case}: {result.output[-200:]}")
            elif result.exit_code != 2 and command == "certify":
                other = told(result)
                if other["beta"] == own["beta"]:
                    wrong = [name for name in ("primal", "dual") if other[name] != own[name]]
                else:  # other options are another problem, honestly certified
                    wrong = [] if file.name in ("config.json", "beta_max.json", "beta.json") else ["beta"]
                found += [f"{case}: {name} {other[name]}, not {own[name]}" for name in wrong]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_whatever_a_file_holds_a_command_ends_with_a_result_or_one_line(folders, name, tmp_path):
    found = faults(folders[name], OF_STACK if name == "stack" else OF_RUN, tmp_path, DRAWN)
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_negative_control_a_traceback_is_found(folders, tmp_path, monkeypatch):
    def broken(self):
        raise KeyError("beta")

    monkeypatch.setattr(Run, "metrics", property(broken))
    found = faults(folders["plain"], {"runs": OF_RUN["runs"], "report": OF_RUN["report"]}, tmp_path, 1)
    assert found
    assert all("KeyError" in fault for fault in found)
