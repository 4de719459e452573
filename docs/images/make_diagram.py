"""Draws docs/images/architecture.png: the network, one block of it, and which operator serves which part.

python docs/images/make_diagram.py

Shapes are read from the table of variants. Lengths are in inches, the origin is the lower left corner.
"""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from mobileformer import VARIANTS

VARIANT, SIDE = "294m", 224
WIDTH, HEIGHT = 12.73, 8.75
TARGET = Path(__file__).with_name("architecture.png")

INK, FAINT, PLAIN = "#1f2933", "#7b8794", "#eef1f4"
OPERATORS = {
    "mobile_to_former": "#f4b183",
    "former_to_mobile": "#9dc3e6",
    "dynamic_relu": "#a9d18e",
    "depthwise_conv2d": "#d5b8ea",
}


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str, color: str = PLAIN) -> None:
    """A filled box with its lower left corner at (x, y)."""
    shape = "round,pad=0,rounding_size=0.07"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=color, edgecolor=INK, linewidth=0.9))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=INK, linespacing=1.35)


def outline(ax: Axes, x: float, y: float, width: float, height: float) -> None:
    """The dashed frame around what one kernel computes when no gradient is needed."""
    shape = "round,pad=0,rounding_size=0.12"
    frame = FancyBboxPatch((x, y), width, height, boxstyle=shape, fill=False, edgecolor=INK, linewidth=1.3)
    frame.set_linestyle((0, (4, 3)))
    ax.add_patch(frame)


def line(ax: Axes, *points: tuple[float, float], color: str = INK, width: float = 1.2) -> None:
    ax.plot(*zip(*points, strict=True), color=color, linewidth=width, solid_joinstyle="round", zorder=0.5)


def arrow(ax: Axes, *points: tuple[float, float], color: str = INK, width: float = 1.2) -> None:
    """A line through the points with a head at the last one."""
    style = {"arrowstyle": "-|>", "color": color, "linewidth": width, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 10}
    if len(points) > 2:
        line(ax, *points[:-1], color=color, width=width)
    ax.annotate("", xy=points[-1], xytext=points[-2], arrowprops=style)


def note(ax: Axes, x: float, y: float, text: str, **options: str | float) -> None:
    ax.text(x, y, text, **{"ha": "left", "va": "center", "color": INK, "fontsize": 8.2} | options)


def network(ax: Axes, base: float) -> None:
    """The whole network: the map above, the tokens below, a bridge each way in every block with tokens."""
    config = VARIANTS[VARIANT]
    side = SIDE // 2
    stages = [("image", 3, SIDE, []), ("stem", config.stem_channels, side, [])]
    for block in config.blocks:
        side //= block.stride
        if block.kind == "lite":
            stages.append(("lite block", block.out_channels, side, []))
        elif block.kind == "down":
            stages.append(("", block.out_channels, side, [block]))
        else:
            stages[-1][3].append(block)
    note(ax, 0.3, base + 3.05, f"Mobile-Former {VARIANT}, {SIDE} × {SIDE}", fontsize=11.5, weight="bold")

    top, low, width, gap = base + 1.75, base + 0.2, 1.28, 0.27
    xs = [0.3 + i * (width + gap) for i in range(len(stages) + 1)]
    last = xs[len(stages) - 1]
    arrow(ax, (xs[1] + width / 2, low + 0.3), (xs[-1] + width / 2, low + 0.3), (xs[-1] + width / 2, top))
    for x, (name, channels, size, blocks) in zip(xs, stages, strict=False):
        widths = sorted({channels, *(block.out_channels for block in blocks)})
        shape = f"{' → '.join(map(str, widths))} × {size} × {size}"
        same = len(blocks) - 1
        what = f"down block,\n{same} same block{'s' if same > 1 else ''}" if blocks else name
        box(ax, x, top, width, 0.82, what)
        note(ax, x + width / 2, top + 1.0, shape, ha="center", color=FAINT)
        arrow(ax, (x + width, top + 0.41), (x + width + gap, top + 0.41))
        if blocks:
            middle = x + width / 2
            box(ax, middle - 0.42, low, 0.84, 0.6, "Former")
            arrow(ax, (middle - 0.18, top), (middle - 0.18, low + 0.6), color="#c55a11", width=1.8)
            arrow(ax, (middle + 0.18, low + 0.6), (middle + 0.18, top), color="#2e75b6", width=1.8)
    box(ax, xs[-1], top, width, 0.82, "pool, classifier")
    note(ax, xs[-1] + width / 2, top + 1.0, "1000 logits", ha="center", color=FAINT)
    box(ax, xs[1], low, width, 0.6, f"{config.num_tokens} tokens × {config.token_dim},\nlearned")
    # the last bridge, after the last block
    arrow(ax, (last + width + gap / 3, top + 0.41), (last + width + gap / 3, low + 0.3), color="#c55a11", width=1.8)
    first = xs[3] + width / 2
    middle_y = (top + low + 0.6) / 2
    note(ax, first - 0.3, middle_y, "Mobile to Former", ha="right", color="#c55a11")
    note(ax, first + 0.3, middle_y, "Former to Mobile", color="#2e75b6")
    note(ax, xs[-1] + width / 2 + 0.08, middle_y, "token 0", color=FAINT)


def block(ax: Axes) -> None:
    """One same block: convolutions above, tokens below, what the tokens give to the map between them."""
    note(ax, 0.3, 4.95, "A same block", fontsize=11.5, weight="bold")
    note(ax, 1.55, 4.94, "(a down block has the depthwise convolution first, with stride 2, and again after a 1 × 1)")
    y, height = 3.6, 0.62
    middle = y + height / 2
    conv, relu, deep = "1 × 1 conv\nBatchNorm", "dynamic\nReLU", "depthwise 3 × 3\nBatchNorm"
    row = [
        (1.15, 1.1, conv, PLAIN),
        (2.5, 1.0, relu, OPERATORS["dynamic_relu"]),
        (3.85, 1.2, deep, OPERATORS["depthwise_conv2d"]),
        (5.2, 1.0, relu, OPERATORS["dynamic_relu"]),
        (6.6, 1.1, conv, PLAIN),
        (8.75, 1.35, "Former\nto Mobile", OPERATORS["former_to_mobile"]),
    ]
    note(ax, 0.3, middle, "map")
    end = 0.68
    for x, width, text, color in row:
        arrow(ax, (end, middle), (x, middle))
        box(ax, x, y, width, height, text, color)
        end = x + width
    arrow(ax, (end, middle), (end + 0.6, middle))
    note(ax, end + 0.68, middle, "map")
    ax.plot(8.2, middle, "o", markersize=13, markerfacecolor="white", markeredgecolor=INK)
    ax.text(8.2, middle - 0.005, "+", ha="center", va="center", color=INK, fontsize=11)
    arrow(ax, (0.87, middle), (0.87, y + 1.08), (8.2, y + 1.08), (8.2, middle + 0.11))
    note(ax, 8.3, y + 0.94, "if the width stays", color=FAINT)
    outline(ax, 3.7, y - 0.12, 2.65, height + 0.24)
    note(ax, 5.05, y + 0.88, "depthwise_dynamic_relu", ha="center", family="monospace", fontsize=7.6)

    # tokens: the row below, and the bar of what they give to the map
    low = 1.1
    middle_low = low + height / 2
    note(ax, 0.3, middle_low, "tokens")
    parts = [
        (1.15, 0.8, "query", PLAIN),
        (2.2, 1.2, "Mobile\nto Former", OPERATORS["mobile_to_former"]),
        (4.05, 1.38, "gate, projection,\nadd, LayerNorm", PLAIN),
        (5.6, 0.62, "query", PLAIN),
        (6.39, 0.88, "attention", OPERATORS["mobile_to_former"]),
        (7.44, 1.13, "projection,\nadd, LayerNorm", PLAIN),
        (8.74, 1.13, "feed-forward,\nadd, LayerNorm", PLAIN),
    ]
    end = 0.92
    for x, width, text, color in parts:
        arrow(ax, (end, middle_low), (x, middle_low))
        box(ax, x, low, width, height, text, color)
        end = x + width
    arrow(ax, (end, middle_low), (end + 0.83, middle_low))
    note(ax, end + 0.91, middle_low, "tokens")
    arrow(ax, (0.87, middle), (0.87, 2.95), (2.8, 2.95), (2.8, low + height))
    bar = 2.2
    box(ax, 4.05, bar, 5.82, 0.42, "slopes of each dynamic ReLU (two layers, from token 0); key and value")
    arrow(ax, (9.99, middle_low), (9.99, bar + 0.21), (9.87, bar + 0.21))
    for x in (3.15, 5.7, 9.42):
        if x < 4.05:
            arrow(ax, (4.05, bar + 0.21), (x, bar + 0.21), (x, y))
        else:
            arrow(ax, (x, bar + 0.42), (x, y))
    note(ax, 5.78, 3.1, "slopes", color=FAINT)
    note(ax, 3.23, 3.1, "slopes", color=FAINT)
    note(ax, 9.5, 3.1, "key, value", color=FAINT)
    outline(ax, 3.9, low - 0.14, 6.25, bar + 0.42 - low + 0.28)
    note(ax, 10.25, bar + 0.2, "token_side", family="monospace", fontsize=7.6)


def legend(ax: Axes) -> None:
    x, y = 0.3, 0.25
    for name, color in OPERATORS.items():
        box(ax, x, y, 0.26, 0.2, "", color)
        note(ax, x + 0.34, y + 0.1, name, family="monospace", fontsize=7.8)
        x += 1.95
    box(ax, x, y, 0.26, 0.2, "")
    note(ax, x + 0.34, y + 0.1, "PyTorch")
    outline(ax, x + 1.2, y - 0.02, 0.34, 0.24)
    note(ax, x + 1.64, y + 0.1, "one kernel on CPU without gradients")


def main() -> None:
    mpl.rcParams.update({"font.family": "DejaVu Sans", "font.size": 8.4})
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=150, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    ax.axis("off")
    network(ax, 5.4)
    block(ax)
    legend(ax)
    temporary = TARGET.with_name(TARGET.name + ".tmp")
    figure.savefig(temporary, format="png", metadata={"Software": None})
    os.replace(temporary, TARGET)


if __name__ == "__main__":
    main()
