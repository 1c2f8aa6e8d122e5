"""A run folder: everything a training run leaves behind, each file written whole or not at all.

config.json            the options
beta_max.json          the β from which on no filter helps
environment.json       versions and machine
embedding.safetensors  the basis that filters live in (exact, float64)
state.safetensors      the checkpoint: the solution in float64, with its rounds and history
descent.safetensors    before the first of those: where the filters of a dictionary are that slide
history.json           one record a round
model.safetensors      the trained network, float32, self-describing
certificate.json       the certificate of that network
metrics.json           what `convcvx train --json` prints
compare-*.json, .png   a comparison with a twin, and twin-*.safetensors, the twin
report.html            the report
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from convcvx.certificate import Certificate
from convcvx.config import BUDGETS, TrainConfig
from convcvx.errors import InputError, RunError
from convcvx.network import TwoLayerCNN
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.solution import Solution
from convcvx.solvers.descent import State

PACKAGES = ("convcvx", "torch", "numpy", "numba", "scipy", "scikit-learn")


class Folder:
    """A folder of files, each written whole or not at all; one with `OPTIONS` in it has begun.

    Parameters
    ----------
    folder : path
        Need not exist yet.
    """

    KIND, OPTIONS = "run", "config.json"

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @classmethod
    def new(cls, folder: str | Path, *, overwrite: bool = False) -> Self:
        """What is to begin in `folder`; raise `RunError` where one exists, unless `overwrite`. Writes nothing."""
        run = cls(folder)
        if run.folder.exists() and (not run.folder.is_dir() or any(run.folder.iterdir())):
            if not overwrite:
                raise RunError(
                    f"{folder} exists and is not empty; choose another --out, or pass --resume or --overwrite"
                )
            if not run.begun:
                raise RunError(
                    f"{folder} is no {run.KIND} folder (it has no {run.OPTIONS}); it is not overwritten: remove it"
                )
        return run

    def begin(self, config: Any) -> None:
        """Create the folder, in place of the one that `new` was allowed to overwrite."""
        if self.begun:
            shutil.rmtree(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot create {self.folder}: {error.strerror}; choose another --out") from None
        self.save_config(config)
        self._write_json("environment.json", environment())

    def save_config(self, config: Any) -> None:
        self._write_json(self.OPTIONS, config.to_dict())

    @property
    def begun(self) -> bool:
        return (self.folder / self.OPTIONS).is_file()

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """An existing one; raise `RunError` if `folder` is none."""
        run = cls(folder)
        if not run.begun:
            raise RunError(f"{folder} is no {run.KIND} folder: it has no {run.OPTIONS}")
        return run

    def save_report(self, html: str) -> Path:
        self._write("report.html", html.encode())
        return self.folder / "report.html"

    @property
    def metrics(self) -> dict[str, Any]:
        """What the command that made it printed as JSON."""
        if not (self.folder / "metrics.json").exists():
            raise RunError(f"{self.folder} has no metrics.json yet: finish it with --resume")
        return self._read_json("metrics.json")

    def _write(self, name: str, content: bytes) -> None:
        """Write beside the file and rename: a reader, or a crash, sees the old file or the new one."""
        temporary = self.folder / f".{name}.tmp"
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / name)

    def _write_json(self, name: str, value: Any) -> None:
        self._write(name, (json.dumps(value, indent=2) + "\n").encode())

    def _read_json(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read {self.folder / name}: {error}") from None

    def _write_tensors(self, name: str, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        self._write(name, save(contiguous, {"convcvx": json.dumps(description)}))

    def _read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        path = self.folder / name
        try:
            with safe_open(str(path), framework="pt") as file:
                # Copied to aligned memory: on unaligned operands BLAS rounds otherwise, and rounds would not repeat.
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - no mapping
                return tensors, json.loads(file.metadata()["convcvx"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"cannot read {path}: {error}; remove it and train again") from None


class Run(Folder):
    """One run folder."""

    @property
    def config(self) -> TrainConfig:
        return TrainConfig.from_dict(self._read_json("config.json"))

    def continued(self, given: dict[str, Any]) -> TrainConfig:
        """The stored options, with what was `given` explicitly; only budgets may differ."""
        stored = self._read_json("config.json")
        for name, value in given.items():
            if name in BUDGETS or stored.get(name) == value:
                continue
            raise InputError(
                f"{name} is {stored.get(name)!r} in {self.folder} but {value!r} was asked for; a resumed run may "
                f"change only {', '.join(BUDGETS)}"
            )
        return TrainConfig.from_dict(stored | given)

    def save_beta_max(self, beta_max: float) -> None:
        """So that a resumed run need not search for it again."""
        self._write_json("beta_max.json", beta_max)

    @property
    def beta_max(self) -> float | None:
        return self._read_json("beta_max.json") if (self.folder / "beta_max.json").exists() else None

    # -- the parts ------------------------------------------------------------------------------------

    def save_embedding(self, embedding: PatchEmbedding) -> None:
        description = {
            "spec": asdict(embedding.spec),
            "channels": embedding.channels,
            "patch_rank": embedding.patch_rank,
            "energy": embedding.energy,
        }
        self._write_tensors("embedding.safetensors", {"basis": embedding.basis}, description)

    def load_embedding(self) -> PatchEmbedding | None:
        """The saved embedding; None before it was fitted."""
        if not (self.folder / "embedding.safetensors").exists():
            return None
        tensors, description = self._read_tensors("embedding.safetensors")
        return PatchEmbedding(PatchSpec(**description.pop("spec")), basis=tensors["basis"], **description)

    def save_state(self, solution: Solution) -> None:
        """Checkpoint a solution."""
        tensors = {name: getattr(solution, name) for name in ("filters", "weights", "intercept")}
        if solution.dual_point is not None:
            tensors["dual_point"] = solution.dual_point
        described = {"rounds": solution.rounds, "status": solution.status, "history": solution.history}
        self._write_tensors("state.safetensors", tensors, described)
        self._write_json("history.json", solution.history)

    def load_state(self) -> Solution | None:
        """The last checkpoint; None before the first."""
        if not (self.folder / "state.safetensors").exists():
            return None
        tensors, described = self._read_tensors("state.safetensors")
        return Solution(**(tensors | described))

    def save_descent(self, start: Solution, beta: float, state: State) -> None:
        """Checkpoint a descent from the optimum `start` over a dictionary, at weight decay `beta`."""
        begun = {name: getattr(start, name) for name in ("filters", "weights", "intercept")}
        self._write_tensors("descent.safetensors", begun | state, {"beta": beta})

    def load_descent(self) -> tuple[Solution, float, State] | None:
        """What `save_descent` was given last; None without a descent under way."""
        if not (self.folder / "descent.safetensors").exists():
            return None
        state, described = self._read_tensors("descent.safetensors")
        if "values" not in state:
            raise RunError(
                f"{self.folder / 'descent.safetensors'} is of another version of convcvx: go on with that one, or "
                "remove the file to descend anew from the dictionary"
            )
        start = Solution(state.pop("filters"), state.pop("weights"), state.pop("intercept"))
        return start, described["beta"], state

    def end_descent(self) -> None:
        (self.folder / "descent.safetensors").unlink(missing_ok=True)

    def save_result(self, network: TwoLayerCNN, certificate: Certificate) -> None:
        self._write("model.safetensors", network.to_bytes())
        self._write_json("certificate.json", certificate.to_dict())

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        self._write_json("metrics.json", metrics)

    def save_comparison(self, optimizer: str, comparison: dict[str, Any], plot: bytes, twin: TwoLayerCNN) -> None:
        """What `convcvx compare` found, its plot and the twin's network."""
        self._write(f"twin-{optimizer}.safetensors", twin.to_bytes())
        self._write(f"compare-{optimizer}.png", plot)
        self._write_json(f"compare-{optimizer}.json", comparison)

    @property
    def comparisons(self) -> list[dict[str, Any]]:
        """What `convcvx compare` left here, by optimiser."""
        return [self._read_json(path.name) for path in sorted(self.folder.glob("compare-*.json"))]

    @property
    def history(self) -> list[dict[str, Any]]:
        """One record a round."""
        return self._read_json("history.json")

    @property
    def model_file(self) -> Path:
        path = self.folder / "model.safetensors"
        if not path.exists():
            raise RunError(f"{self.folder} has no model.safetensors yet: finish it with --resume")
        return path


def environment() -> dict[str, Any]:
    """Versions and machine, for whoever reads the run later."""

    def version_of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "versions": {package: version_of(package) for package in PACKAGES},
    }
