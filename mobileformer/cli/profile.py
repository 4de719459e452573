"""`mobileformer bench --profile`: where the engine spends its time, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from mobileformer.cli.output import CommandError, print_table

__all__ = ["profile", "show_stages"]

Dtype = Literal["float32", "bfloat16"]


def profile(variant: str, *, batch: int, size: int, dtype: Dtype, repeats: int, image: Path | None) -> dict[str, Any]:
    """Every stage's least time of a call in `repeats`, on one thread; weights are random.

    Raises CommandError where the engine cannot run, with the reason.
    """
    import torch

    from mobileformer.cli.bench import photo_tensor
    from mobileformer.inference import Engine, fold, library
    from mobileformer.measure import lively_weights_, machine
    from mobileformer.model import Model

    reason = library.status()["reason"]
    if reason is not None:
        raise CommandError(f"the engine does not run here: {reason}")
    torch.manual_seed(0)
    model = Model(variant, use_fused=False).eval()
    lively_weights_(model)
    engine = Engine(fold(model), dtype)
    one = torch.randn(3, size, size) if image is None else photo_tensor(image, size)
    x = one.expand(batch, -1, -1, -1).contiguous().numpy()
    engine.profile(x, 2)
    rows = engine.profile(x, repeats)
    total = sum(seconds for _, seconds, _ in rows)
    return {
        "variant": variant,
        "batch": batch,
        "size": size,
        "dtype": dtype,
        "isa": engine.isa,
        "repeats": repeats,
        "machine": machine("cpu"),
        "total_ms": 1e3 * total,
        "stages": [
            {
                "name": name,
                "ms": 1e3 * seconds,
                "share": seconds / total,
                "gflop_per_s": 2 * multiply_adds / seconds / 1e9 if seconds else None,
            }
            for name, seconds, multiply_adds in rows
        ],
    }


def show_stages(report: dict[str, Any], caption: str) -> None:
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
