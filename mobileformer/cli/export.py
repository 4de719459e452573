"""`mobileformer export`: a trained network as a file for another runtime, checked there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mobileformer.cli.output import MAX_SIZE, CommandError, JsonOption, command, note, print_json, print_table
from mobileformer.cli.weights import WeightsOption, chosen_weights, open_metadata, open_model

if TYPE_CHECKING:
    from mobileformer.export import Report

__all__ = ["export"]

BY_ENDING = {".onnx": "onnx", ".pt2": "torch-export", ".pte": "executorch"}


def export(
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="Ending .onnx, .pt2 (torch-export, aotinductor) or .pte (executorch).")
    ],
    weights: WeightsOption = None,
    to: Annotated[
        Literal["onnx", "torch-export", "aotinductor", "executorch"] | None,
        typer.Option(
            help="The runtime; else by the ending: .onnx onnx, .pt2 torch-export, .pte executorch.", show_default=False
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=32,
            max=MAX_SIZE,
            help="Side of the image that is traced; of executorch the largest; else the weights' own, or 224.",
        ),
    ] = None,
    opset: Annotated[int | None, typer.Option(min=18, max=25, help="Of ONNX; 20.", show_default=False)] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Load the file in its runtime and compare it with the model.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the network for ONNX Runtime and OpenVINO, torch.export, AOTInductor or ExecuTorch.

    BatchNorm is folded, weights are float32, the batch is free. The file is then loaded in its runtime and compared
    with the model at other batches and another size; one that differs is deleted and the exit code is 1.
    """
    with command(as_json):
        if target.exists() and not force:
            raise CommandError(f"{target}: exists already; --force overwrites it")
        if not target.absolute().parent.is_dir():
            raise CommandError(f"{target}: the folder {target.parent} does not exist")
        runtime = to or _runtime(target)
        report = _export(target, chosen_weights(weights), runtime, size, opset, check)
        if not check:
            note(f"{target}: not checked: nothing has loaded it yet (--no-check)")
        if as_json:
            print_json(_document(report))
        else:
            _show(report)


def _runtime(target: Path) -> str:
    """What reads a file of this ending. Two runtimes share .pt2: it is the one that needs no compiler."""
    if target.suffix.lower() not in BY_ENDING:
        raise typer.BadParameter(
            f"{target}: expected an ending of {', '.join(BY_ENDING)}, or --to RUNTIME", param_hint="OUT"
        )
    return BY_ENDING[target.suffix.lower()]


def _export(target: Path, weights: Path, to: str, size: int | None, opset: int | None, check: bool) -> Report:
    from mobileformer.export import ExportError, export_model

    model, metadata = open_model(weights), open_metadata(weights)
    note(f"{target}: writing" + (", which takes minutes" if to in ("aotinductor", "executorch") else ""))
    try:
        return export_model(
            model,
            target,
            to,
            size=size or metadata.input_size or 224,
            opset=opset,
            check=check,
            labels=metadata.labels,
            mean=metadata.mean,
            std=metadata.std,
            input_size=metadata.input_size,
            crop_fraction=metadata.crop_fraction,
        )
    except (ExportError, OSError, ValueError) as error:
        raise CommandError(f"{target}: {error}") from error


def _document(report: Report) -> dict[str, Any]:
    return {
        "out": str(report.path),
        "target": report.target,
        "variant": report.metadata.variant,
        "num_classes": report.metadata.num_classes,
        "takes": report.takes,
        "bytes": report.path.stat().st_size,
        **report.facts,
        "checked": bool(report.checks),
        "checks": [
            {"runtime": check.runtime, "shape": list(check.shape), "difference": check.difference}
            for check in report.checks
        ],
    }


def _show(report: Report) -> None:
    document = _document(report)
    checks = document.pop("checks")
    rows = [
        (key, ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value)
        for key, value in document.items()
    ]
    print_table("", ("what", "is"), rows)
    if checks:
        rows = [(check.runtime, "x".join(map(str, check.shape)), f"{check.difference:.1e}") for check in report.checks]
        print_table("", ("checked in", "input", "largest difference over largest logit"), rows)
