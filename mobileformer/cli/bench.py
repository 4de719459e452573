"""`mobileformer bench`: one network plain, fused and in other runtimes, timed in turns in one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mobileformer.cli.output import (
    MAX_BATCH,
    MAX_REPEATS,
    MAX_SIZE,
    MAX_THREADS,
    CommandError,
    DeviceOption,
    JsonOption,
    check_device,
    check_memory,
    check_variant,
    command,
    machine_line,
    note,
    print_json,
    print_table,
    progress,
)
from mobileformer.cli.weights import photo_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from mobileformer.race.trial import Trial

__all__ = ["bench", "show_rows"]


def bench(
    variant: Annotated[str, typer.Option(callback=check_variant, help="26m ... 508m.")] = "294m",
    batch: Annotated[
        int | None, typer.Option(min=1, max=MAX_BATCH, help="Images a call; 1, training 16.", show_default=False)
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=32, max=MAX_SIZE, help="Side of an image; 224, training 128.", show_default=False)
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=MAX_THREADS, help="CPU threads of PyTorch.")] = 1,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of weights and arithmetic.")] = "float32",
    device: DeviceOption = "cpu",
    repeats: Annotated[
        int, typer.Option(min=1, max=MAX_REPEATS, help="Rounds; every contender runs once in each.")
    ] = 20,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="A photo; else random numbers.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Training steps: forward, loss, backward, AdamW.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="With torch.compile (takes a while).")
    ] = True,
    others: Annotated[
        bool, typer.Option("--runtimes/--no-runtimes", help="With ONNX Runtime and OpenVINO, where installed.")
    ] = True,
    profiled: Annotated[
        bool, typer.Option("--profile", help="Instead: the engine's stages, with their share and GFLOP/s.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Time plain PyTorch in both layouts, torch.compile, the fused operators and other runtimes against each other.

    In turns, in one run: A B C A B C. First every contender's logits are compared with the float64 reference;
    one that is off is reported, not timed, and the exit code is 1. Weights are random: speed is the same.
    """
    with command(as_json):
        batch, size = batch or (16 if train else 1), size or (128 if train else 224)
        if train and batch < 4:
            raise typer.BadParameter(
                "training normalises over the batch: below 4 images rounding alone changes the result",
                param_hint="--batch",
            )
        if train and dtype != "float32":
            raise typer.BadParameter("training is measured in float32", param_hint="--dtype")
        device = check_device(device)
        check_memory(size, batch)
        if profiled:
            if train or device != "cpu" or threads > 1:
                raise typer.BadParameter(
                    "the engine's stages are of inference, on one thread of the CPU", param_hint="--profile"
                )
            stages = _profile(variant, _images(image, batch, size), dtype, repeats)
            print_json(stages) if as_json else _show_stages(stages, caption=machine_line(stages["machine"]))
            return
        report = measure(
            variant,
            batch=batch,
            size=size,
            threads=threads,
            dtype=dtype,
            device=device,
            repeats=repeats,
            image=image,
            train=train,
            compiled=compiled,
            others=others and not train and device == "cpu",
        )
        if as_json:
            print_json(report)
        else:
            what = "training step" if train else "inference"
            show_rows(
                f"{variant}, {what}, batch {batch}, {size} x {size}, {dtype}, {threads} thread(s), {device}",
                report["contenders"],
                caption=machine_line(report["machine"]),
            )
        if any(row["error"] for row in report["contenders"]):
            raise typer.Exit(1)


def measure(
    variant: str,
    *,
    batch: int,
    size: int,
    threads: int,
    dtype: str,
    device: str,
    repeats: int,
    image: Path | None,
    train: bool,
    compiled: bool,
    others: bool,
) -> dict[str, Any]:
    """Build, check and time the contenders; what was measured and on what, as plain data."""
    import torch

    from mobileformer.inference.threads import thread_count
    from mobileformer.measure.machine import machine
    from mobileformer.race.trial import EAGER, Trial

    x = _images(image, batch, size)
    if compiled:
        note("torch.compile takes a minute or more; --no-compile leaves it out")
    with thread_count(threads):
        trial = Trial(variant, x, dtype=getattr(torch, dtype), device=device, train=train)
        trial.add(*EAGER, *(["compile"] if compiled else []), "fused", *([] if train else ["fused inference"]))
        if others:
            _add_runtimes(trial)
        trial.check(lambda items: progress(items, "check"))
        trial.time(repeats, lambda rounds: progress(rounds, "rounds"))
        described = machine(device)
    return {
        "variant": variant,
        "what": "training step: forward, cross entropy, backward, AdamW" if train else "inference",
        "batch": batch,
        "size": size,
        "dtype": dtype,
        "device": device,
        "image": str(image) if image else None,
        "repeats": repeats,
        "speedup": "min of the faster eager layout / min of this contender",
        "machine": described,
        "contenders": trial.rows(),
    }


def _images(image: Path | None, batch: int, size: int) -> Tensor:
    """(batch, 3, size, size): a photo in every place, or random numbers."""
    import torch

    from mobileformer.race.trial import stack_photo

    if image is not None:
        return stack_photo(photo_tensor(image, size), batch)
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def _profile(variant: str, x: Tensor, dtype: Literal["float32", "bfloat16"], repeats: int) -> dict[str, Any]:
    from mobileformer.race.profile import profile

    try:
        return profile(variant, x, dtype=dtype, repeats=repeats)
    except RuntimeError as error:
        raise CommandError(str(error)) from error


def _add_runtimes(trial: Trial) -> None:
    """Those that are there and compute in the trial's dtype; of the others it is said why not."""
    from mobileformer.export import ExportError
    from mobileformer.race.trial import RUNTIMES

    for name in RUNTIMES:
        try:
            trial.add(name)
        except (ExportError, RuntimeError) as error:
            note(f"without {name}: {error}")


def show_rows(title: str, rows: list[dict[str, Any]], caption: str) -> None:
    """The contenders as a table; those that were not timed, as errors."""
    training = any(row["relative_gradient_difference"] is not None for row in rows)
    print_table(
        title,
        (
            "path",
            "min, ms",
            "median, ms",
            "against eager",
            "logits off float64 by",
            *(["gradients off by"] if training else []),
            "operators served by",
        ),
        [
            (
                row["name"],
                f"{row['min_ms']:.2f}",
                f"{row['median_ms']:.2f}",
                f"{row['speedup']:.2f}x" if row["speedup"] else "-",
                f"{row['logit_difference']:.1e}",
                *([f"{row['relative_gradient_difference']:.1e}"] if training else []),
                ", ".join(f"{count} {kernel}" for kernel, count in row["kernels"].items()) or "-",
            )
            for row in rows
            if not row["error"]
        ],
        caption=caption,
    )
    for row in rows:
        if row["error"]:
            note(f"error: {row['name']}: {row['error']}")


def _show_stages(report: dict[str, Any], caption: str) -> None:
    title = f"{report['variant']}, engine ({report['isa']}), batch {report['batch']}, {report['dtype']}, one thread"
    rows = [
        (
            stage["name"],
            f"{stage['ms']:.3f}",
            f"{stage['share']:.1%}",
            f"{stage['gflop_per_s']:.1f}" if stage["gflop_per_s"] is not None else "-",
        )
        for stage in report["stages"]
    ]
    rows.append(("sum of the stages", f"{report['total_ms']:.3f}", "", ""))
    print_table(title, ("stage", "ms", "share", "GFLOP/s"), rows, caption=caption)
