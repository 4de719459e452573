"""The picture and the page of attention, and the command that writes them."""

from __future__ import annotations

import base64
import html.parser
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import make_files, refusal, run, run_json
from PIL import Image

import mobileformer
from mobileformer.measure.difference import lively_weights_
from mobileformer.visualize import BlockAttention, attention_maps, draw_attention, write_page
from mobileformer.visualize.figures import TILE
from mobileformer.visualize.shades import OCTAVES, relative, shade_table, shades, underlay


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def blocks() -> list[BlockAttention]:
    model = mobileformer.Model("26m", num_classes=4).eval()
    lively_weights_(model, seed=1)
    return attention_maps(model, torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(0)))


def photo(height: int = 48, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def document(page: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S
    )
    assert found is not None
    return json.loads(found[1])


class Addresses(html.parser.HTMLParser):
    """What a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


# Colours


def test_the_scale_is_clear_at_uniform_and_opaque_at_its_ends() -> None:
    table = shade_table()
    assert table.shape == (256, 4)
    assert table[127:129, 3].max() <= 2
    assert table[[0, 255], 3].min() > 230
    luminance = table[:, :3] @ [0.299, 0.587, 0.114] * (table[:, 3] / 255) + 110 * (1 - table[:, 3] / 255)
    assert (np.diff(luminance) > -0.5).all()  # darker is less, lighter is more
    logs = np.array([-100, -OCTAVES, 0, OCTAVES, 100], dtype=np.float32)
    assert (shades(logs) == table[[0, 0, 128, 255, 255]]).all()


def test_weights_relative_to_uniform() -> None:
    logs = relative(np.array([0.0, 0.125, 0.25, 1.0]), 0.25)
    assert logs[1:].tolist() == [-1, 0, 2]
    assert np.isfinite(logs[0])
    assert logs[0] < -100


# The picture


@pytest.mark.parametrize("tokens", [3, 6])
def test_the_picture_shows_each_tile_where_it_belongs(tmp_path: Path, tokens: int) -> None:
    """One weight far above the others in one map: only its tile may glow. Both layouts, and the second sample."""
    pytest.importorskip("matplotlib")
    looks = torch.full((2, 2, tokens, 4, 4), 1 / 16)
    takes = torch.full((2, 2, tokens, 2, 2), 1 / tokens)
    plain, changed = tmp_path / "plain.png", tmp_path / "changed.png"
    block = BlockAttention("block 1", "down", looks, takes, torch.randn(2, tokens, 8))
    last = BlockAttention("last bridge", "last", looks, None, torch.randn(2, tokens, 8))
    draw_attention([block, last], photo(), plain, title="$one$ %", index=1)
    looks = looks.clone()
    looks[1, 1, 2] = 1e-6
    looks[1, 1, 2, 0, 0] = 1
    draw_attention(
        [BlockAttention("block 1", "down", looks, takes, block.tokens), last],
        photo(),
        changed,
        title="$one$ %",
        index=1,
    )
    pixels, before = pixels_of(changed), pixels_of(plain)
    assert pixels.shape == before.shape
    rows, columns = np.nonzero((pixels != before).any(axis=2))
    assert np.ptp(columns) < TILE
    assert np.ptp(rows) < TILE * 48 / 32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed.png", "plain.png"]


def test_a_picture_without_matplotlib_names_the_extra(
    blocks: list[BlockAttention], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'mobileformer\[plot\]'"):
        draw_attention(blocks, photo(), tmp_path / "x.png", title="")
    arguments = ("visualize", folder / "images" / "b.png", "--weights", folder / "plain.safetensors", "--size", 32)
    assert "mobileformer[plot]" in run_json(*arguments, "-o", tmp_path / "x.png", code=1)["error"]
    run_json(*arguments, "--html", tmp_path / "x.html")  # the page does without
    assert [path.name for path in tmp_path.iterdir()] == ["x.html"]


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    for draw, name in ((draw_attention, "x.png"), (write_page, "x.html")):
        with pytest.raises(ValueError, match="blocks: expected at least one"):
            draw([], photo(), tmp_path / name, title="")
    assert not list(tmp_path.iterdir())


# The page


def test_the_page_holds_the_maps(blocks: list[BlockAttention], tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_page(blocks, photo(), path, title="t", notes=["a", "b"], index=1)
    told = document(path)
    assert told["notes"] == ["a", "b"]
    assert len(told["blocks"]) == len(blocks)
    for block, kept in zip(blocks, told["blocks"], strict=True):
        for maps, attention in ((kept["looks"], block.mobile_to_former), (kept["takes"], block.former_to_mobile)):
            if attention is None:
                assert maps is None
                continue
            numbers = np.frombuffer(base64.b64decode(maps["numbers"]), "<u2").reshape(attention.shape[1:])
            weights = maps["uniform"] * 2.0 ** (numbers / told["steps"] - told["range"])
            np.testing.assert_allclose(weights, attention[1].numpy(), rtol=1e-3)
            assert maps["size"] == list(attention.shape[3:])
    for key, expected in (("photo", photo()), ("underlay", underlay(photo()))):
        kind, data = told[key].split(",")
        assert kind == "data:image/png;base64"
        (tmp_path / "photo.png").write_bytes(base64.b64decode(data))
        assert (pixels_of(tmp_path / "photo.png") == expected).all()


def test_the_page_asks_nobody_for_anything(blocks: list[BlockAttention], tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_page(blocks, photo(), path, title="t")
    text = path.read_text(encoding="utf-8")
    addresses = Addresses()
    addresses.feed(text)
    assert addresses.found == []
    text = re.sub(r'"(numbers|photo|underlay)": "[^"]*"', "", text)
    assert not re.findall(r"https?:|//[a-z]|@import|fetch\(|XMLHttpRequest|import\(", text)
    assert "default-src 'none'" in text  # and a browser holds it to that


def test_names_cannot_break_the_page(blocks: list[BlockAttention], tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    title = "</script><b>{{data}} {{title}} & <!-- ü"
    write_page(blocks, photo(), path, title=title, notes=[title])
    told = document(path)
    assert told["title"] == told["notes"][0] == title
    text = path.read_text(encoding="utf-8")
    assert text.count("</script>") == 2
    assert "<title>&lt;/script&gt;&lt;b&gt;{{data}} {{title}} &amp; &lt;!-- ü</title>" in text


# The command


@pytest.mark.parametrize("weights", ["named.safetensors", "grey.safetensors"])
def test_the_command_writes_both_and_says_by_which_path(folder: Path, tmp_path: Path, weights: str) -> None:
    pytest.importorskip("matplotlib")
    picture, page = tmp_path / "a.png", tmp_path / "a.html"
    arguments = ("visualize", folder / "images" / "a.jpg", "--weights", folder / weights, "--size", 49)
    report = run_json(*arguments, "-o", picture, "--html", page)
    assert (report["png"], report["html"], report["size"]) == (str(picture), str(page), 49)
    assert report["path"].startswith("the reference path in plain PyTorch")
    with Image.open(picture) as opened:
        assert opened.format == "PNG"
    assert "reference path" in " ".join(document(page)["notes"])
    assert document(page)["size"] == [49, 49]
    assert [block["name"] for block in report["blocks"]] == [f"block {i}" for i in range(1, 9)] + ["last bridge"]
    first, last = report["blocks"][0], report["blocks"][-1]
    assert (first["reads"], first["writes"], last["reads"], last["writes"]) == ([13, 13], [13, 13], [2, 2], None)
    for shares in first["former_to_mobile_share"]:
        assert sum(shares) == pytest.approx(1, abs=1e-6)
    assert all(1 / 169 - 1e-6 <= value <= 1 + 1e-6 for head in first["mobile_to_former_spread"] for value in head)
    assert [row[i] for i, row in enumerate(first["token_similarity"])] == pytest.approx([1, 1, 1], abs=1e-6)


def test_the_command_for_people(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    image, weights = folder / "images" / "b.png", folder / "plain.safetensors"
    result = run("visualize", image, "--weights", weights, "--size", 32)
    assert "last bridge" in result.stdout
    assert "reference path in plain PyTorch" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["b-attention.png"]
    (top,) = run_json("predict", image, "--weights", weights, "--size", 32, "--top-k", 1)["results"][0]["predictions"]
    assert f"class {top['class']} {100 * top['probability']:.1f} %" in result.stdout
    named = run("visualize", image, "--weights", folder / "named.safetensors", "--html", tmp_path / "page.html").stdout
    assert "Taken for: fox" in named
    assert "bee [old] 2" in named  # which would vanish if it were read as markup


def test_the_command_takes_the_weights_of_the_package(folder: Path, tmp_path: Path) -> None:
    result = run("visualize", folder / "images" / "b.png", "-o", tmp_path / "clothing.png")
    assert "trained on Fashion-MNIST" in result.stderr
    assert (tmp_path / "clothing.png").exists()


def test_the_command_refuses_what_it_cannot_do(folder: Path, tmp_path: Path) -> None:
    image, weights = folder / "images" / "b.png", folder / "plain.safetensors"
    arguments = ("visualize", image, "--weights", weights)
    assert "expected the ending .png" in refusal(*arguments, "-o", tmp_path / "x.jpg")
    assert "expected the ending .html" in refusal(*arguments, "--html", tmp_path / "x.htm")
    assert "is what is read" in refusal(*arguments, "-o", image)
    assert "does not exist" in run_json(*arguments, "-o", tmp_path / "no" / "x.png", code=1)["error"]
    lost = run_json("visualize", tmp_path / "lost.png", "--weights", weights, "-o", tmp_path / "x.png", code=1)
    assert "lost.png: no such file" in lost["error"]
    assert not list(tmp_path.iterdir())
