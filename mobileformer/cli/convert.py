"""`mobileformer convert`: a published checkpoint to our safetensors, and back; or folded, for the engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mobileformer.cli.output import CommandError, JsonOption, check_variant, command, print_json, print_table
from mobileformer.cli.weights import open_model, read_labels

if TYPE_CHECKING:
    from mobileformer import Metadata, Model

__all__ = ["convert"]

OFFICIAL_SUFFIXES = (".pth", ".pth.tar", ".pt")
FORMS = {
    "ours": "mobileformer safetensors",
    "folded": "mobileformer safetensors, folded for inference",
    "published": "published checkpoint",
}


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Weights, published or ours.")],
    target: Annotated[
        Path,
        typer.Argument(metavar="OUT", help=".safetensors writes ours; .pth, .pth.tar, .pt the published form."),
    ],
    variant: Annotated[
        str | None, typer.Option(callback=check_variant, help="What IN must be; else its shapes tell.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Class names to keep in OUT: one a line, or a list in a .json file."),
    ] = None,
    fold: Annotated[
        bool, typer.Option("--fold", help="Write what inference.Engine runs: norms folded in, no way back.")
    ] = False,
    weights_of: Annotated[
        Literal["raw", "average"] | None,
        typer.Option(
            help="Which weights of a checkpoint that has both; else the average, if it can be used.", show_default=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert weights: a published checkpoint to a safetensors file that describes itself, or back.

    With --fold the file is for mobileformer.inference.Engine, which needs no PyTorch: every BatchNorm is folded into
    the layer before it, so it can neither be trained nor converted back.

    IN may be the checkpoint.pt of a training run.

    Nothing in a checkpoint is run, only tensors are read. OUT appears whole or not at all.
    """
    with command(as_json):
        to_ours = _writes_ours(target)
        if fold and not to_ours:
            raise typer.BadParameter("the published form cannot be folded; write .safetensors", param_hint="--fold")
        if target.exists() and not force:
            raise CommandError(f"{target}: exists already; --force overwrites it")
        average = None if weights_of is None else weights_of == "average"
        form = "folded" if fold else "ours" if to_ours else "published"
        report = _convert(source, target, form, variant, labels, average)
        if as_json:
            print_json(report)
        else:
            print_table("", ("what", "is"), list(report.items()))


def _writes_ours(target: Path) -> bool:
    name = target.name.lower()
    if name.endswith(".safetensors"):
        return True
    if name.endswith(OFFICIAL_SUFFIXES):
        return False
    raise typer.BadParameter(
        f"{target}: expected the ending .safetensors, or one of {', '.join(OFFICIAL_SUFFIXES)}",
        param_hint="OUT",
    )


def _convert(
    source: Path,
    target: Path,
    form: Literal["ours", "folded", "published"],
    variant: str | None,
    labels: Path | None,
    average: bool | None,
) -> dict[str, str | int | bool]:
    from mobileformer import save_official_checkpoint, save_weights
    from mobileformer.inference import fold

    model, metadata = _read(source, variant, average)
    names = read_labels(labels, metadata.num_classes) if labels is not None else metadata.labels
    told: dict[str, Any] = {
        "labels": names,
        "mean": metadata.mean,
        "std": metadata.std,
        "input_size": metadata.input_size,
        "crop_fraction": metadata.crop_fraction,
    }
    try:
        if form == "ours":
            save_weights(model, target, **told)
        elif form == "folded":
            fold(model, **told).save(target)
        else:
            save_official_checkpoint(model, target, **told)
    except (OSError, ValueError) as error:
        raise CommandError(f"{target}: {error}") from error
    return {
        "in": str(source),
        "out": str(target),
        "form": FORMS[form],
        "variant": metadata.variant,
        "num_classes": metadata.num_classes,
        "in_chans": metadata.in_chans,
        "labels": names is not None,
    }


def _read(source: Path, variant: str | None, average: bool | None) -> tuple[Model, Metadata]:
    import mobileformer

    try:
        metadata = mobileformer.read_metadata(source)
        if variant not in (None, metadata.variant):
            raise CommandError(f"{source}: holds the variant {metadata.variant}, --variant says {variant}")
    except mobileformer.WeightsError as error:
        if variant is None:
            raise CommandError(f"{error} (with --variant NAME: which keys do not fit)") from error
        raise CommandError(_misfits(source, variant) or str(error)) from error
    except OSError as error:
        raise CommandError(str(error)) from error
    return open_model(source, average=average), metadata


def _misfits(source: Path, variant: str) -> str | None:
    """What keeps a file whose shapes fit no variant from being the one that was named."""
    import mobileformer

    try:
        mobileformer.load_weights(mobileformer.Model(variant), source)
    except mobileformer.WeightsError as error:
        return str(error)
    return None
