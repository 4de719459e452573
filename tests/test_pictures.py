"""Whatever a picture is made of, no text lies over another, over a line or beyond the edge; none is an empty box."""

from __future__ import annotations

import importlib
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mobileformer.visualize import BlockAttention, draw_attention, fonts
from mobileformer.visualize.confusion import draw_confusion
from mobileformer.visualize.contact_sheet import Entry, draw_contact_sheet
from mobileformer.visualize.curves import draw_curves

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[1]
LONG = "a_class_whose_name_never_ends_" * 6
FOREIGN = ["猫", "\U0001f9a5 sloth", "ሀለሐ", "line\nbreak\x07", "$dollar$ $5"]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every matplotlib figure that is saved while a test runs, as it was saved."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig

    def remember(figure: Any, *arguments: Any, **options: Any) -> None:
        if options.get("dpi"):
            figure.set_dpi(options["dpi"])
        save(figure, *arguments, **options)
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", remember)
    return saved


@pytest.fixture
def charts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("charts")


@pytest.fixture
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_told", set())


def corners(text: Any) -> np.ndarray:
    """(4,2): the corners of a text in pixels, of a turned one too."""
    from matplotlib.transforms import Affine2D

    turn = text.get_rotation()
    upright = turn if turn % 90 == 0 else 0
    text.set_rotation(upright)
    box = text.get_window_extent()
    text.set_rotation(turn)
    anchor = text.get_transform().transform(text.get_unitless_position())
    points = np.array([(box.x0, box.y0), (box.x1, box.y0), (box.x1, box.y1), (box.x0, box.y1)])
    return points if upright == turn else Affine2D().rotate_deg_around(*anchor, turn).transform(points)


def apart(one: np.ndarray, other: np.ndarray, slack: float) -> bool:
    """Whether some side of two convex shapes parts them."""
    for shape in (one, other):
        for start, end in itertools.pairwise([*shape, shape[0]]):
            normal = np.array([end[1] - start[1], start[0] - end[0]])
            length = np.hypot(*normal)
            if length:
                a, b = one @ normal / length, other @ normal / length
                if a.max() < b.min() + slack or b.max() < a.min() + slack:
                    return True
    return False


def texts(figure: Any) -> list[Any]:
    from matplotlib.text import Text

    figure.canvas.draw()
    shown = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    # Ticks beyond the limits of an axis are there and are not drawn.
    beyond = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            drawn = set(map(id, axis._update_ticks()))
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if id(tick) not in drawn:
                    beyond |= {id(tick.label1), id(tick.label2)}
    return [text for text in shown if id(text) not in beyond]


def check(figure: Any, *, slack: float = 1.5) -> None:
    found = [(text.get_text(), corners(text)) for text in texts(figure)]
    assert found
    width, height = figure.bbox.width, figure.bbox.height
    for told, box in found:
        inside = (box > -slack).all() and (box[:, 0] < width + slack).all() and (box[:, 1] < height + slack).all()
        assert inside, f"{told!r} leaves the picture: {box.round().tolist()} of {width} x {height}"
    for (one, a), (other, b) in itertools.combinations(found, 2):
        assert apart(a, b, slack), f"{one!r} over {other!r}"


# Charts of the benchmarks


RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*thread.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem[:5])
def test_the_charts_of_the_page(path: Path, charts: Any, figures: list[Any], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    charts.draw(path.stem, charts.reading.load(path), tmp_path)
    assert figures
    for figure in figures:
        check(figure)
        for name, box in names_of(figure):
            assert not covered(figure, box), f"{name!r} over a line"


def names_of(figure: Any) -> list[tuple[str, np.ndarray]]:
    """Texts inside the axes: names of points."""
    return [(text.get_text(), corners(text)) for axes in figure.axes for text in axes.texts]


def covered(figure: Any, box: np.ndarray) -> bool:
    for axes in figure.axes:
        for line in axes.lines:
            points = axes.transData.transform(np.column_stack(line.get_data()))
            ends = itertools.pairwise(points) if line.get_linestyle() not in ("None", "") else ()
            inside = [np.linspace(start, end, 400) for start, end in ends]
            for way in (*inside, points):
                if ((way > box.min(axis=0) + 1.5) & (way < box.max(axis=0) - 1.5)).all(axis=1).any():
                    return True
    return False


@pytest.mark.parametrize("seed", range(3))
def test_a_crowded_race(charts: Any, figures: list[Any], tmp_path: Path, seed: int) -> None:
    """Many networks with long names, many at nearly the same place."""
    result = json.loads(RESULTS[0].read_text(encoding="utf-8"))
    rows = [row for row in result["rows"] if row["suite"] == "race" and (row["threads"], row["batch"]) == (1, 1)]
    random = np.random.default_rng(seed)
    peer = {"backend": "onnxruntime", "dtype": "float32"}
    for index in range(10):
        time, top1 = float(np.exp(random.normal(1.6, 0.4))), float(random.normal(76, 2.5))
        rows.append(rows[0] | peer | {"variants": f"A-long-name-{index}", "min_ms": time, "top1": top1})
    (tmp_path / "images").mkdir()
    charts.draw("crowd", result | {"rows": rows}, tmp_path)
    check(figures[0])
    assert not [name for name, box in names_of(figures[0]) if covered(figures[0], box)]


# Confusion matrices


@pytest.mark.parametrize(
    ("classes", "long"), [(1, True), (2, False), (10, False), (10, True), (40, True), (100, False), (1000, True)]
)
def test_confusion_matrices(figures: list[Any], tmp_path: Path, classes: int, long: bool) -> None:
    random = np.random.default_rng(0)
    confusion = random.integers(0, 100_000 if long else 30, (classes, classes))
    names = [f"{LONG if long else 'name'}{index}" for index in range(classes)]
    draw_confusion(confusion, names, tmp_path / "x.png", title=LONG if long else "52m on a folder: top-1 91.3 %")
    if classes == 40:  # 1600 counts: those beside each other are enough
        for axes in figures[0].axes:
            for text in axes.texts[82:]:
                text.set_visible(False)
    check(figures[0])


# Curves


@pytest.mark.parametrize("epochs", [0, 1, 300])
@pytest.mark.parametrize("broken", [False, True], ids=["", "nan"])
def test_curves(figures: list[Any], tmp_path: Path, epochs: int, broken: bool) -> None:
    lines = []
    for epoch in range(1, epochs + 1):
        loss = float("nan") if broken else 1e4 / epoch
        lines.append({"kind": "train", "epochs": epoch, "loss": loss, "learning_rate": 0.0 if broken else 0.1 / epoch})
        lines[-1] |= {"images_per_second": 123456.7, "update": epoch}
        lines.append({"kind": "validation", "epochs": epoch, "loss": loss, "top1": 100.0, "update": epoch})
    draw_curves(lines, tmp_path / "curves.png", loss_unit="cross-entropy, nats", score="top1",
                score_title="Top-1 accuracy", score_unit="%")  # fmt: skip
    check(figures[0])


# Attention


@pytest.mark.parametrize(("heads", "tokens"), [(1, 1), (2, 3), (4, 6), (2, 12)])
def test_the_picture_of_attention(figures: list[Any], tmp_path: Path, heads: int, tokens: int) -> None:
    looks, takes = torch.full((1, heads, tokens, 7, 7), 1 / 49), torch.full((1, heads, tokens, 4, 4), 1 / tokens)
    blocks = [
        BlockAttention("block 10", "down", looks, takes, torch.randn(1, tokens, 8)),
        BlockAttention("last bridge", "last", looks, None, torch.randn(1, tokens, 8)),
    ]
    photo = np.zeros((32, 96, 3), np.uint8)
    draw_attention(blocks, photo, tmp_path / "x.png", title=LONG, notes=[LONG * 2] * 5)
    check(figures[0])


# Contact sheets


def test_contact_sheets_keep_their_margins(tmp_path: Path) -> None:
    """Names of any length: the space between tiles and at all four edges stays white."""
    black = Image.new("RGB", (28, 28))
    entries = [Entry(black, LONG, LONG, 0.999)] * 8 + [Entry(black, "a", "a", 1.0)]
    draw_contact_sheet(entries, LONG, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        ink = np.asarray(image.convert("L")) < 250
    assert not ink[:, :15].any()
    assert not ink[:, -15:].any()
    assert not ink[:10].any()
    assert not ink[-4:].any()
    columns = ink[60:].any(axis=0)
    assert not columns[186:198].any()  # between two tiles


# Names in any script


@pytest.mark.usefixtures("_nothing_told")
def test_what_no_font_has_is_escaped_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_installed", lambda: (fonts._own(),))
    monkeypatch.setattr(fonts, "_font_with", fonts._font_with.__wrapped__)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert fonts.shown("猫 and 犬") == r"\u732b and \u72ac"
        assert fonts.shown("魚") == r"\u9b5a"
        assert fonts.shown("\U0001f9a5") == r"\U0001f9a5"
    assert [str(one.message).rpartition("; ")[2] for one in told] == [
        "Noto Sans CJK would have it",
        "Noto Emoji would have it",
    ]
    assert fonts.shown("Löwe, Ωμέγα, кот, قطة") == "Löwe, Ωμέγα, кот, قطة"  # DejaVu Sans has them
    assert fonts.shown("a\x07\tb\u202ec") == r"a\u0007\u0009b\u202ec"
    assert fonts.shown("two\nlines") == r"two\u000alines"


@pytest.mark.usefixtures("_nothing_told")
def test_pictures_of_names_in_any_script(figures: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib warns of a letter that its fonts lack, and a warning is an error here but for the one that is ours."""
    monkeypatch.setattr(fonts, "_installed", lambda: (fonts._own(),))
    monkeypatch.setattr(fonts, "_font_with", fonts._font_with.__wrapped__)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no font on this machine", UserWarning)
        draw_confusion(np.eye(5, dtype=np.int64), FOREIGN, tmp_path / "x.png", title="猫 and $5$")
        looks = torch.full((1, 2, 3, 4, 4), 1 / 16)
        block = BlockAttention("block 1", "last", looks, None, torch.randn(1, 3, 8))
        draw_attention([block], np.zeros((32, 32, 3), np.uint8), tmp_path / "y.png", title="猫.jpg", notes=FOREIGN)
        entries = [Entry(Image.new("RGB", (8, 8)), name, name, 0.5) for name in FOREIGN]
        draw_contact_sheet(entries, "猫", tmp_path / "z.png")
    for figure in figures:
        check(figure)
        told = "".join(text.get_text() for text in texts(figure))
        assert r"\u732b" in told
        assert "猫" not in told


@pytest.mark.usefixtures("_nothing_told")
def test_a_font_that_has_the_letters_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, figures: list[Any]
) -> None:
    """A letter that DejaVu Sans lacks and another of matplotlib's fonts has."""
    import matplotlib

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    letter = "\u2aa1"  # of mathematics
    stix = str(folder / "STIXGeneral.ttf")
    assert not fonts._has(stix, "猫")
    if fonts._plain(letter) or not fonts._has(stix, letter):
        letter = next(c for c in map(chr, range(0x2A00, 0x2B00)) if fonts._has(stix, c) and not fonts._plain(c))
    monkeypatch.setattr(fonts, "_installed", lambda: (fonts._own(), stix))
    monkeypatch.setattr(fonts, "_font_with", fonts._font_with.__wrapped__)
    assert fonts.shown(letter) == letter
    assert fonts.font_paths(letter + "a") == [stix]
    draw_confusion(np.eye(2, dtype=np.int64), [letter, "b"], tmp_path / "x.png", title="t")
    assert fonts.font_for(letter, 15)[1].getname()[0] == "STIXGeneral"
