"""`mobileformer info`: the seven variants, the kernels of this machine, the machine itself."""

from __future__ import annotations

from typing import Any

from mobileformer.cli.output import JsonOption, command, print_json, print_table

__all__ = ["info"]


def info(as_json: JsonOption = False) -> None:
    """The seven variants with their cost, which kernel serves which operator here and why not, and this machine."""
    with command(as_json):
        report = describe()
        if as_json:
            print_json(report)
        else:
            show(report)


def describe() -> dict[str, Any]:
    """Everything `info` shows, as plain data."""
    import mobileformer
    from mf_kernels import status
    from mobileformer.measure import machine
    from mobileformer.published import MADDS_COUNTERS, PUBLISHED, TOP1_SOURCE

    variants = {
        name: {
            "parameters": count_parameters(name),
            "madds_fvcore": PUBLISHED[name].madds_fvcore,
            "madds_core": PUBLISHED[name].madds_core,
            "published_top1": PUBLISHED[name].top1,
        }
        for name in mobileformer.VARIANTS
    }
    return {
        "version": mobileformer.__version__,
        "variants": variants,
        "madds_unit": "1e6 per 224 x 224 image",
        "madds_counters": MADDS_COUNTERS,
        "top1_source": TOP1_SOURCE,
        "kernels": status(),
        "machine": machine(),
    }


def count_parameters(variant: str) -> int:
    """Parameters of the real model with 1000 classes, counted on the meta device, where tensors have no memory."""
    import torch

    import mobileformer

    with torch.device("meta"):
        model = mobileformer.Model(variant, use_fused=False)
    return sum(parameter.numel() for parameter in model.parameters())


def show(report: dict[str, Any]) -> None:
    print_table(
        f"Mobile-Former {report['version']}",
        ("variant", "parameters", "MAdds (fvcore), M", "MAdds (conv+linear+matmul), M", "published top-1, %"),
        [
            (
                name,
                f"{row['parameters']:,}".replace(",", " "),
                f"{row['madds_fvcore']:.1f}",
                f"{row['madds_core']:.1f}",
                f"{row['published_top1']:.1f}",
            )
            for name, row in report["variants"].items()
        ],
        caption=f"MAdds of one 224 x 224 image. fvcore: {report['madds_counters']['fvcore']}.\n"
        f"Top-1: {report['top1_source']}. No accuracy was measured here.",
    )
    print_table(
        "Kernels",
        ("operator", "device", "backend", "state", "built with"),
        [
            (
                row["op"],
                row["device"],
                row["backend"],
                "available" if row["available"] else f"missing: {row['reason']}",
                row["built_with"] or "-",
            )
            for row in report["kernels"]
        ],
    )
    print_table("Machine", ("what", "is"), list(report["machine"].items()))
