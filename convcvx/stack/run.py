"""The folder of a stack. It needs no torch, as that of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from convcvx.errors import InputError, RunError
from convcvx.stack.options import StackConfig
from convcvx.storage.places import MODEL, RESULT, Contents
from convcvx.training.folder import Folder
from convcvx.training.options import TrainConfig, is_config
from convcvx.training.origin import PARTS
from convcvx.training.run import STACK_OPTIONS, STAGE, Run

if TYPE_CHECKING:
    from convcvx.stack.network import StackedCNN


class StackRun(Folder):
    """The folder of a stack: options, data, metrics, model, the features under way, and a run folder for each stage."""

    KIND, COMMAND = "stack", "stack"
    OTHER = "it is a run: `convcvx train --resume --out {0}` goes on with it"
    METRICS: ClassVar[Any] = {"stages": [Run.METRICS | {"stage": int, "kept": bool}], "heads?": str}
    CONTENTS = Contents(
        STACK_OPTIONS,
        (
            *(STACK_OPTIONS, "environment.json", "data.json", RESULT, MODEL, "report.html"),
            *(f"features-{name}.{kind}" for name in PARTS for kind in ("f16", "new")),
        ),
        {r"stage-\d+": Run.CONTENTS},
    )

    @property
    def _is_other(self) -> bool:
        return Run(self.folder).ours

    @staticmethod
    def _knows(options: Any) -> bool:
        stages = options.get("stages") if isinstance(options, dict) else None
        return isinstance(stages, list) and bool(stages) and all(map(is_config, stages))

    @property
    def config(self) -> StackConfig:
        form = {"stages": [{}], "channels": [int], "downsample": [int], "heads?": str, "ensemble?": bool}
        stored = self._read_json(self.CONTENTS.options, form)
        try:
            stages = tuple(TrainConfig.from_dict(stage) for stage in stored["stages"])
        except InputError as error:
            raise RunError(f"{self.folder / self.CONTENTS.options} is not as convcvx writes it: {error}") from None
        heads = stored.get("heads") or ("mean" if stored.get("ensemble") else "last")  # as earlier versions said it
        return StackConfig(stages, tuple(stored["channels"]), tuple(stored["downsample"]), heads)

    def stage(self, number: int) -> Run:
        """The run folder of stage 1, 2, ..."""
        name = f"{STAGE}{number}"
        return Run(self.folder / name, self.out / name)

    def cache(self, name: str) -> Path:
        return self.folder / f"features-{name}.f16"

    def save_result(self, model: StackedCNN, metrics: dict[str, Any]) -> None:
        """The last of a stack: with it the stack is finished."""
        self._write(MODEL, model.to_bytes())
        self._remove(*(self.cache(name).name for name in PARTS))
        self._write_json(RESULT, metrics)
        self.settle()
