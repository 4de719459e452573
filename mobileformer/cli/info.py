"""`mobileformer info`: the seven variants, the kernels and the engine of this machine; or what a weight file says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mobileformer.cli.output import CommandError, JsonOption, command, note, print_json, print_table

__all__ = ["describe", "describe_weights", "info"]


def info(
    weights: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Weights, published, ours or folded.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The seven variants and their cost, kernels and engine of this machine and what is missing, the machine.

    With a weight file: what that says of itself.
    """
    with command(as_json):
        report = describe() if weights is None else describe_weights(weights)
        if as_json:
            print_json(report)
        elif weights is None:
            _show(report)
        else:
            rows = {key: value for key, value in report.items() if key != "arguments"} | (report["arguments"] or {})
            print_table("", ("what", "is"), [(key, _cell(value)) for key, value in rows.items()])


def describe() -> dict[str, Any]:
    """Everything `info` shows, as plain data."""
    import mobileformer
    from mf_kernels import status
    from mobileformer.inference import library
    from mobileformer.measure.machine import machine
    from mobileformer.race.published import COUNTERS, MADDS, TOP1_SOURCE

    return {
        "version": mobileformer.__version__,
        "variants": {
            name: {
                "parameters": _count_parameters(name),
                "madds_millions": MADDS[name],
                "published_top1_percent": config.published_top1,
            }
            for name, config in mobileformer.VARIANTS.items()
        },
        "madds_counters": COUNTERS,
        "top1_source": TOP1_SOURCE,
        "kernels": status(),
        "engine": library.status(),
        "machine": machine(),
    }


def describe_weights(path: Path) -> dict[str, Any]:
    """What a weight file says of itself, as plain data; what it does not say is None. Raises CommandError."""
    from mobileformer import WeightsError
    from mobileformer.inference import folded
    from mobileformer.weights.checkpoint import open_weights, read_header
    from mobileformer.weights.detectors import backbone_metadata

    try:
        header = read_header(path)
        is_folded = header.get("format") == folded.FORMAT
        metadata = folded.FoldedNetwork.load(path).metadata if is_folded else backbone_metadata(path)
        contents = open_weights(path)
    except (WeightsError, OSError) as error:
        raise CommandError(str(error)) from error
    if contents.note:
        note(contents.note)
    state = contents.state
    form = "published, or bare"
    if contents.run:
        form = "checkpoint of a training run"
    elif "format" in contents.header:
        form = "folded for inference" if is_folded else "describes itself"
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point()})
    return {
        "file": str(path),
        "form": form,
        "bytes": path.stat().st_size,
        "values": sum(value.numel() for value in state.values()),
        "parameters": sum(value.numel() for key, value in state.items() if not key.endswith(_STATISTICS)),
        "dtype": ", ".join(dtypes),
        **asdict(metadata),
    }


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm, which nothing trains


def _cell(value: object) -> str:
    """A value for people: lists without brackets, None as a word."""
    if value is None:
        return "not told"
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _count_parameters(variant: str) -> int:
    """Of the model with 3 channels and 1000 classes, on the meta device, where tensors take no memory."""
    import torch

    import mobileformer

    with torch.device("meta"):
        model = mobileformer.Model(variant, use_fused=False)
    return sum(parameter.numel() for parameter in model.parameters())


_WIDTH = 80  # of everything that `info` shows of a machine: it is read, and quoted in reports


def _show(report: dict[str, Any]) -> None:
    print_table(
        f"Mobile-Former {report['version']}",
        ("variant", "parameters", "MAdds,\nfvcore", "MAdds, conv\n+linear+matmul", "published\ntop-1"),
        [
            (
                name,
                f"{row['parameters']:,}".replace(",", " "),
                f"{row['madds_millions']['fvcore']:.1f} M",
                f"{row['madds_millions']['conv+linear+matmul']:.1f} M",
                f"{row['published_top1_percent']:.1f} %",
            )
            for name, row in report["variants"].items()
        ],
        caption="Parameters: counted here, 3 channels, 1000 classes. MAdds: one image of 224 x 224;\n"
        + "".join(f"{name}: {what}\n" for name, what in report["madds_counters"].items())
        + f"Top-1: {report['top1_source']}; not measured here.",
        width=_WIDTH,
    )
    _show_kernels(report["kernels"])
    engine = report["engine"]
    print_table(
        "Inference engine",
        ("what", "is"),
        [
            ("state", f"ready, built with {engine['built_with']}" if engine["available"] else "missing"),
            *([] if engine["available"] else [("why", engine["reason"])]),
            *[(name, ", ".join(engine[name])) for name in ("compiled", "runnable") if engine[name]],
            *([("runs", engine["isa"])] if engine["available"] else []),
        ],
        caption="runnable: instruction sets of this CPU; MF_ENGINE_ISA chooses one, otherwise the last runs.",
        width=_WIDTH,
    )
    print_table("Machine", ("what", "is"), list(report["machine"].items()), width=_WIDTH)


def _show_kernels(rows: list[dict[str, Any]]) -> None:
    """Operators beside kernels; and once for each kernel what it was built with, or why it is not there."""
    kernels = list(dict.fromkeys((row["device"], row["backend"]) for row in rows))
    states: dict[str, list[str]] = {}
    told: dict[tuple[str, str], list[str]] = {}  # (kernel, text) -> operators
    for row in rows:
        state = "used" if row["automatic"] else "ready" if row["available"] else "missing"
        states.setdefault(row["op"], []).append(state)
        text = row["built_with"] if row["available"] else row["reason"]
        told.setdefault((f"{row['device']} {row['backend']}", text), []).append(row["op"])
    columns = ("operator", *(f"{device}\n{backend}" for device, backend in kernels))
    print_table("Kernels", columns, [(op, *of_op) for op, of_op in states.items()], width=_WIDTH)
    print_table(
        "",
        ("kernel", "built with, or why not"),
        [
            (kernel, text if len(ops) == len(states) else f"{', '.join(ops)}: {text}")
            for (kernel, text), ops in told.items()
        ],
        width=_WIDTH,
    )
