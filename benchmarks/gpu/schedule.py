"""What a run on a card does, in which order, and how long each part is to take: what tells most comes first.

A lent card is there for minutes. So whole networks beside what people would use instead come before operators, what
says where the time goes before both, and whatever is left of the time goes to the rest. Seconds are estimates made
without a card; a section that needs less leaves it to the next, one that needs more is cut and keeps what it has.
"""

from __future__ import annotations

from typing import NamedTuple

MINUTES = 9.0


class Part(NamedTuple):
    """A section: its name, the seconds that it is given, what it does."""

    name: str
    seconds: int
    does: str


PARTS = (
    Part("machine", 15, "copy, matrix products, microseconds of the host for a launch"),
    Part("build", 75, "the CUDA library: the one that is there where it loads on this card, else built for it"),
    Part("smoke", 45, "logits, a training step, each operator on each backend, graphs: some sixty tests"),
    Part("profile", 20, "kernels of to_inference at batch 1 and 256, and of a training step"),
    Part("models", 130, "294m in bfloat16, then the networks of others, then torch.compile with graphs"),
    Part("operators", 80, "those of 294m in bfloat16, channels_last: eager, Triton, CUDA C++"),
    Part("sweep", 60, "eight kernels at other tiles, warps and stages, with registers and resident programs"),
    Part("counters", 40, "Nsight Compute on six kernels, where it is installed"),
    Part("more-models", 30, "float32 and the other sizes"),
    Part("more-operators", 20, "float32, contiguous and the other sizes"),
    Part("check", 20, "all other tests, memcheck and racecheck"),
)
ON_THE_CARD = ("machine", "profile", "models", "operators", "sweep", "more-models", "more-operators")
COMPILED_BEFOREHAND = ("smoke", "profile", "models", "operators")  # what `gpu.warm` compiles for


def seconds() -> int:
    """Of all sections together."""
    return sum(part.seconds for part in PARTS)


def ends(name: str, minutes: float) -> float:
    """Seconds from the start by which a section has to be done; more time than planned goes to the last three."""
    at, spare = 0.0, max(0.0, 60 * minutes - seconds())
    scale = min(1.0, 60 * minutes / seconds())
    for number, part in enumerate(PARTS):
        at += scale * part.seconds + (spare / 3 if number >= len(PARTS) - 3 else 0.0)
        if part.name == name:
            return at
    raise ValueError(f"name: expected one of {', '.join(part.name for part in PARTS)}, got {name!r}")


def told(minutes: float, names: list[str]) -> list[str]:
    """The plan as lines: section, seconds, what it does, when it has to be done."""
    chosen = [part for part in PARTS if part.name in names]
    lines = [f"plan: {sum(part.seconds for part in chosen)} s of the {60 * minutes:.0f} s that there are"]
    return lines + [
        f"  {part.name:15}{part.seconds:4} s, done by {ends(part.name, minutes):4.0f} s: {part.does}" for part in chosen
    ]
