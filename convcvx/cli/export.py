"""`convcvx export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convcvx.cli import flags as f
from convcvx.cli.ending import finish, guard, open_console
from convcvx.errors import check_choice
from convcvx.stack.run import StackRun
from convcvx.terms.names import EXPORTS
from convcvx.training.run import Run

Folder = Annotated[Path, typer.Argument(help="The folder of a finished run or stack.", metavar="RUN")]
To = Annotated[
    str,
    typer.Option(
        help="onnx (needs pip install 'convcvx\\[onnx]'), torch (for torch.export.load) or sklearn (for joblib.load)."
    ),
]


def export(run: Folder, to: To = "onnx", json_output: f.Json = False, quiet: f.Quiet = False) -> None:
    """Write the network of a run or a stack as model.onnx, model.pt2 or model.joblib into its folder, and check it.

    One file, which takes any number of images (n, C, H, W), pixels in [0, 1].
    Those of onnx and torch need convcvx no more.

    Example:

      convcvx export checkpoints/demo --to onnx
    """
    console = open_console(json_output, quiet)
    with guard(json_output):
        path = run / f"model{EXPORTS[check_choice('to', to, EXPORTS)]}"
        source = StackRun(run) if StackRun(run).begun else Run.open(run)
        from convcvx.network import export as exports  # torch: a refusal does not wait for it
        from convcvx.network.preprocess import ImageTransform
        from convcvx.network.two_layer import two_layer_cnn
        from convcvx.stack.network import stacked_cnn

        network = stacked_cnn(run) if isinstance(source, StackRun) else two_layer_cnn(source.model_file)
        difference = exports.export(network, network.image_shape, path, to)
        taken = ImageTransform(network.image_shape).description
        agree = f"to {difference:.1e}" if difference else "exactly"
        console.print(f"wrote {path}, whose scores agree {agree}\nit takes {taken}")
        answer = {"file": str(path), "to": to, "difference": difference, "image_shape": list(network.image_shape)}
        finish(answer | {"takes": taken, "status": "done"}, json_output)
