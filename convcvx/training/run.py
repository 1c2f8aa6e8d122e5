"""A run folder: everything a training run leaves behind, `FILES`.

What holds tensors is imported where it is read or written: `convcvx runs` does not wait for torch.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from convcvx.errors import InputError, RunError
from convcvx.storage.places import MODEL, RESULT, Contents
from convcvx.storage.reading import form_of
from convcvx.terms.names import OPTIMIZERS
from convcvx.training.folder import Folder
from convcvx.training.journal import Checkpoint, Descent, Journal
from convcvx.training.options import TrainConfig, check_unchanged, is_config

if TYPE_CHECKING:
    from convcvx.certificate import Certificate
    from convcvx.network.two_layer import TwoLayerCNN
    from convcvx.patches import PatchEmbedding
    from convcvx.solution import Solution
    from convcvx.solvers.slide.descent import State

RECORD = {"objective": (float, None), "lower_bound": (float, None), "rel_gap": (float, None), "seconds": float}
"""What every record of a history has; what is infinite is null."""
STEP = {**dict.fromkeys(("beta", "held_out_loss", "held_out_error"), float), "n_filters": int}
"""What every step of a path along β has."""
NETWORK = {"filters": "m r", "weights": "m p c", "intercept": "c"}
"""Axes of a solution's tensors."""
COMPARISON = {
    "convex": {"dual": float, "scope": str},
    "twin": {"optimizer": str, "seeds": [{"history": [{"seconds": float, "objective": (float, None)}]}]},
    "finetune": (dict, None),
}
"""The form of compare-OPTIMIZER.json, as far as it is read."""
FILES = {
    "config.json": "the options",
    "environment.json": "versions and machine",
    "data.json": "where the data came from, and by what to know them again",
    "beta_max.json": "the β from which on no filter helps, or none of the dictionary",
    "beta.json": "of a dictionary, the β that was chosen",
    "path.json": "of a dictionary, what held-out images said of each β that was tried",
    "embedding.safetensors": "the basis that filters live in (exact, float64)",
    "state.safetensors": "the checkpoint: the solution in float64, with its rounds and history",
    "descent.safetensors": "before the first of those: where the filters of a dictionary are that slide",
    "history.json": "one record a round",
    MODEL: "the trained network, float32, self-describing",
    "certificate.json": "the certificate of that network",
    RESULT: "what `convcvx train --json` prints",
    "report.html": "the report",
} | {
    name: what
    for optimizer in OPTIMIZERS
    for name, what in (
        (f"compare-{optimizer}.json", "a comparison with a twin"),
        (f"compare-{optimizer}.png", "its plot"),
        (f"twin-{optimizer}.safetensors", "the twin"),
    )
}
"""What a run writes; any other file in its folder is the user's."""


STAGE = "stage-"
"""What the folders of the stages of a stack are called, before their numbers."""
STACK_OPTIONS = "stack.json"
"""The options of a stack, in its folder."""
OPTIMUM = {
    **dict.fromkeys(("slope", "slope_low", "slope_high"), float),
    "proved?": bool,
    **dict.fromkeys(("active", "active_used"), (int, None)),
}
"""Form of what metrics tell of the optimum."""


class Run(Folder, Journal):
    """One run folder: the journal of a training on disk."""

    KIND, COMMAND, CONTENTS = "run", "train", Contents("config.json", FILES)
    OTHER = "it is a stack, whose stages are runs, such as {0}/stage-1; to go on: convcvx stack --resume --out {0}"
    METRICS: ClassVar[Any] = {
        **dict.fromkeys(("primal", "dual", "rel_gap", "seconds"), float),
        **dict.fromkeys(("scope", "meaning", "status"), str),
        **dict.fromkeys(("train_accuracy", "test_accuracy"), (float, None)),
        "n_filters": int,
        # What an earlier version did not write, or holds for some trainings alone.
        **dict.fromkeys(("proved?", "proved_gap?", "family_gap?", "family_seconds?"), (float, None)),
        **dict.fromkeys(("beta_max?", "core_seconds?", "compiling_seconds?", "peak_memory_mb?"), (float, None)),
        **dict.fromkeys(("validation_accuracy?", "test_r2?"), (float, None)),
        **dict.fromkeys(("proved_by?", "family?"), (str, None)),
        "family_size?": (int, None),
        "optimum?": (OPTIMUM, None),
    }

    @staticmethod
    def _knows(options: Any) -> bool:
        return is_config(options)

    @property
    def _is_other(self) -> bool:
        return (self.folder / STACK_OPTIONS).is_file() and (self.folder / f"{STAGE}1").is_dir()

    @property
    def is_stage(self) -> bool:
        """Whether it is one of a stack, which alone makes the features that it is trained on."""
        return self.out.name.startswith(STAGE) and (self.out.parent / STACK_OPTIONS).is_file()

    @property
    def go_on(self) -> str:
        """By which line the training in it goes on: that of a stage is a part of its stack's."""
        return f"convcvx stack --resume --out {shlex.quote(str(self.out.parent))}" if self.is_stage else super().go_on

    @property
    def config(self) -> TrainConfig:
        try:
            return TrainConfig.from_dict(self._read_json("config.json", {}))
        except InputError as error:
            raise RunError(f"{self.folder / self.CONTENTS.options} is not as convcvx writes it: {error}") from None

    def continued(self, given: dict[str, Any]) -> TrainConfig:
        """The stored options, with what was `given` explicitly; only budgets may differ."""
        stored = self.config
        for name, value in given.items():
            check_unchanged(name, getattr(stored, name, None), value)
        return TrainConfig.from_dict(stored.to_dict() | given)

    @property
    def checkpoint(self) -> Checkpoint:
        """What is known of its training."""
        return Checkpoint(
            self.load_embedding(), self.load_state(), self.beta_max, self.chosen_beta, self.load_descent()
        )

    def save_beta_max(self, beta_max: float) -> None:
        """So that a resumed run need not search for it again."""
        self._write_json("beta_max.json", beta_max)

    @property
    def beta_max(self) -> float | None:
        return self._read_beta("beta_max.json")

    def save_chosen_beta(self, beta: float) -> None:
        self._write_json("beta.json", beta)

    @property
    def chosen_beta(self) -> float | None:
        """The β of a dictionary, which held-out images may have chosen."""
        return self._read_beta("beta.json")

    def save_path(self, path: list[dict[str, Any]]) -> None:
        if path:
            self._write_json("path.json", path)

    @property
    def path(self) -> list[dict[str, Any]]:
        """The β tried for a dictionary with their held-out scores; empty where none was, or by an earlier version."""
        return self._read_json("path.json", [STEP]) if (self.folder / "path.json").exists() else []

    def _read_beta(self, name: str) -> float | None:
        """The β in a file, if that is there; 0 for a beta_max of data on which no filter helps."""
        if not (self.folder / name).exists():
            return None
        beta = self._read_json(name, float)
        if not (math.isfinite(beta) and beta >= 0):
            raise RunError(f"{self.folder / name} must hold a number >= 0; got {beta}: remove it and train again")
        return beta

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
        from convcvx.patches import PatchEmbedding, PatchSpec

        if not (self.folder / "embedding.safetensors").exists():
            return None
        name, form = "embedding.safetensors", {"spec": {}, "channels": int, "patch_rank": int, "energy": float}
        tensors, description = self._read_tensors(name, {"basis": "r h"}, form)
        try:
            return PatchEmbedding(PatchSpec(**description.pop("spec")), basis=tensors["basis"], **description)
        except (InputError, TypeError) as error:
            raise RunError(f"{self.folder / name} is of another version of convcvx: {error}") from None

    def save_state(self, solution: Solution) -> None:
        """Checkpoint a solution."""
        tensors = {name: getattr(solution, name) for name in ("filters", "weights", "intercept")}
        if solution.dual_point is not None:
            tensors["dual_point"] = solution.dual_point
        described = {"rounds": solution.rounds, "status": solution.status, "history": solution.history}
        self._write_tensors("state.safetensors", tensors, described)
        self.follow(solution)

    def follow(self, solution: Solution) -> None:
        """Make the other files those of the checkpoint of `solution`, which a kill may have kept from being done."""
        self._write_json("history.json", solution.history)
        self._remove("descent.safetensors")

    def load_state(self) -> Solution | None:
        """The last checkpoint; None before the first."""
        from convcvx.solution import Solution

        if not (self.folder / "state.safetensors").exists():
            return None
        form = {"rounds": int, "status": str, "history": [RECORD]}
        tensors, described = self._read_tensors("state.safetensors", NETWORK | {"dual_point?": "n c"}, form)
        parts: dict[str, Any] = tensors | described
        try:
            return Solution(**parts)
        except (InputError, TypeError) as error:
            raise RunError(f"{self.folder / 'state.safetensors'} is of another version of convcvx: {error}") from None

    def save_descent(self, start: Solution, beta: float, state: State) -> None:
        """Checkpoint a descent from the optimum `start` over a dictionary, at weight decay `beta`."""
        begun = {name: getattr(start, name) for name in ("filters", "weights", "intercept")}
        self._write_tensors("descent.safetensors", begun | state, {"beta": beta})

    def load_descent(self) -> Descent | None:
        """What `save_descent` was given last; None without a descent under way."""
        from convcvx.solution import Solution

        if not (self.folder / "descent.safetensors").exists():
            return None
        state, described = self._read_tensors("descent.safetensors", NETWORK, {"beta": float})
        if "values" not in state:
            raise RunError(
                f"{self.folder / 'descent.safetensors'} is of another version of convcvx: go on with that one, or "
                "remove the file to descend anew from the dictionary"
            )
        start = Solution(state.pop("filters"), state.pop("weights"), state.pop("intercept"))
        return start, described["beta"], state

    def save_network(self, network: TwoLayerCNN) -> None:
        """The network alone; what was said of another one goes before that does."""
        model, file = network.to_bytes(), self.folder / MODEL
        if file.exists():
            if file.read_bytes() == model:
                return
            self._remove(RESULT, "certificate.json")
        self._write(file.name, model)

    def save_result(self, network: TwoLayerCNN, certificate: Certificate) -> None:
        """The network and its certificate."""
        self.save_network(network)
        self._write_json("certificate.json", certificate.to_dict())

    @property
    def certificate(self) -> Certificate:
        """The one that was saved, as it was."""
        from convcvx.certificate import Certificate

        numbers = dict.fromkeys(("primal", "dual", "rel_gap", "beta"), float)  # of these none is infinite
        form = form_of(Certificate) | numbers
        try:
            return Certificate.from_dict(self._read_json("certificate.json", form))
        except (TypeError, ValueError) as error:  # keys and scopes that it does not know
            raise RunError(f"{self.folder / 'certificate.json'} is of another version of convcvx: {error}") from None

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """The last of a run: with it the run is finished."""
        self._write_json(RESULT, metrics)
        self.settle()

    def save_comparison(self, optimizer: str, comparison: dict[str, Any], plot: bytes, twin: TwoLayerCNN) -> None:
        """What `convcvx compare` found, its plot and the twin's network."""
        self._write(f"twin-{optimizer}.safetensors", twin.to_bytes())
        self._write(f"compare-{optimizer}.png", plot)
        self._write_json(f"compare-{optimizer}.json", comparison)

    @property
    def comparisons(self) -> list[dict[str, Any]]:
        """What `convcvx compare` left here, by optimiser."""
        return [self._read_json(path.name, COMPARISON) for path in sorted(self.folder.glob("compare-*.json"))]

    @property
    def history(self) -> list[dict[str, Any]]:
        """One record a round."""
        return self._read_json("history.json", [RECORD])

    @property
    def model_file(self) -> Path:
        path = self.folder / MODEL
        if not path.exists():
            raise RunError(f"{self.folder} has no {MODEL} yet: finish it with {self.go_on}")
        return path
