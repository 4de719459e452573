"""The page of attention in a browser: a map lies over the whole photo, once, and the page fits its window."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mobileformer.visualize import BlockAttention, shades, write_page

HEADS, TOKENS, SPOT = 2, 6, (5, 6)  # the bright place: row, column of an 8 x 8 map
QUARTERS = ((40, 90), (150, 240))  # greys of the photo, no two alike

# Added to a copy of the page, so that Chromium's --dump-dom tells what it has laid out.
PROBE = """<script>
addEventListener("load", () => {
  const box = element => { const r = element.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; };
  const pressed = () => [...document.querySelectorAll('.bar [aria-pressed="true"], .grid [aria-pressed="true"]')]
    .map(element => element.title || element.firstChild.textContent);
  const told = { window: [innerWidth, document.documentElement.scrollWidth], pressed: pressed(), keys: {},
    tiles: [...document.querySelectorAll(".tile")].map(tile =>
      [...box(tile), tile.title, tile.getAttribute("aria-pressed"), tile.closest("section div[id]").id]),
    cut: [...document.querySelectorAll(".label, button, h1, h2, p, th, td")]
      .filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth && !e.matches(".tile")).map(e => e.textContent) };
  if (new URLSearchParams(location.search).has("keys")) for (const key of ["ArrowRight", "ArrowDown", "ArrowUp", "h"]) {
    document.dispatchEvent(new KeyboardEvent("keydown", { key }));
    told.keys[key] = pressed();
  }
  const probe = Object.assign(document.createElement("pre"), { id: "probe", hidden: true });
  probe.textContent = JSON.stringify(told);
  document.body.append(probe);
});
</script>"""


@dataclass(frozen=True)
class Seen:
    told: dict[str, Any]
    pixels: np.ndarray


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and os.environ.get("MOBILEFORMER_BROWSER_TESTS") == "1":
        pytest.fail("MOBILEFORMER_BROWSER_TESTS=1 and no chromium on the path")
    return found or pytest.skip("needs a browser: apt-get install chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    looks = torch.full((1, HEADS, TOKENS, 8, 8), 1e-4)
    looks[..., SPOT[0], SPOT[1]] = 1 - 63e-4
    takes = torch.full((1, HEADS, TOKENS, 4, 4), 1 / TOKENS)
    tokens = torch.randn(1, TOKENS, 8, generator=torch.Generator().manual_seed(0))
    names = [f"block {index}" for index in range(1, 10)]
    blocks = [BlockAttention(name, "same", looks, takes, tokens) for name in names]
    blocks.append(BlockAttention("last bridge", "last", looks, None, tokens))
    photo = np.repeat(np.array(QUARTERS, dtype=np.uint8).repeat(56, axis=0).repeat(56, axis=1)[..., None], 3, axis=2)
    path = tmp_path_factory.mktemp("page") / "page.html"
    note = "/a/folder/with/a/name/that/never/ends/" + "x" * 200
    write_page(blocks, photo, path, title="a_photo_" + "y" * 120, notes=["52m", note])
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    return path


def see(browser: str, page: Path, folder: Path, width: int, address: str) -> Seen:
    picture = folder / f"{width}.png"
    quiet = [
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--hide-scrollbars",
    ]
    quiet += ["--disable-component-update", "--disable-sync", "--no-sandbox"]
    quiet += ["--force-device-scale-factor=1"]
    command = [browser, "--headless", *quiet, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},2200"]
    command += ["--dump-dom", f"--screenshot={picture}", f"{page.as_uri()}{address}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    probe = re.search(r'<pre id="probe"[^>]*>(.*?)</pre>', done.stdout, re.S)
    assert probe is not None, done.stderr[-2000:]
    assert picture.exists(), done.stderr[-2000:]
    with Image.open(picture) as image:
        return Seen(json.loads(unescape(probe[1])), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("width", [500, 800, 1600])
def test_every_map_lies_over_the_photo(browser: str, page: Path, tmp_path: Path, width: int) -> None:
    """Chosen or not: the photo's four quarters are each a quarter of the tile, and what glows is where attention is."""
    seen = see(browser, page, tmp_path, width, "#head=1&token=2")
    assert f"{seen.told['pressed']}".count("head 1, token 2") == 2
    maps = [tile for tile in seen.told["tiles"] if tile[6] in ("looks", "takes") and tile[4].startswith("head")]
    assert len(maps) == 2 * HEADS * TOKENS
    looked = []
    for left, top, wide, high, title, pressed, section in maps:
        box = [round(v) for v in (left + 4, top + 4, left + wide - 4, top + high - 4)]  # without round corners
        if box[2] > width - 40:  # scrolled to, in a narrow window
            continue
        tile = seen.pixels[box[1] : box[3], box[0] : box[2]].astype(int)
        if section == "looks":  # bright at the spot, and there alone
            rows, columns = np.nonzero(tile[..., 0] > 215)
            middle = (np.mean(rows) / tile.shape[0] * 8, np.mean(columns) / tile.shape[1] * 8)
            assert middle == pytest.approx((SPOT[0] + 0.5, SPOT[1] + 0.5), abs=0.7), title
        else:  # uniform: the photo as it is, once
            for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
                grey = shades.underlay(np.full((1, 1, 3), QUARTERS[row][column], np.uint8))[0, 0, 0]
                for y, x in ((0.15, 0.15), (0.35, 0.35)):
                    place = tile[int((row / 2 + y) * tile.shape[0]), int((column / 2 + x) * tile.shape[1])]
                    assert np.abs(place - int(grey)).max() <= 6, (title, row, column, place, grey)
        looked.append((section, pressed))
    assert {("looks", "true"), ("takes", "true"), ("takes", "false")} <= set(looked)


@pytest.mark.parametrize("width", [500, 800, 1600])
def test_the_page_fits_its_window(browser: str, page: Path, tmp_path: Path, width: int) -> None:
    seen = see(browser, page, tmp_path, width, "")
    assert seen.told["window"] == [width, width]
    assert seen.told["cut"] == []


def test_keys_and_the_address_choose(browser: str, page: Path, tmp_path: Path) -> None:
    told = see(browser, page, tmp_path, 800, "?keys#block=8&head=1&token=5").told
    assert told["pressed"][:2] == ["block 9", "head 1, token 5"]
    assert told["keys"]["ArrowRight"][:2] == ["last bridge", "head 1, token 5"]
    assert told["keys"]["ArrowDown"][1] == "head 1, token 0"
    assert told["keys"]["ArrowUp"][1] == "head 1, token 5"
    assert told["keys"]["h"][1] == "head 0, token 5"
    wrong = see(browser, page, tmp_path, 800, "#block=99&head=-1&token=x").told
    assert wrong["pressed"][:2] == ["block 1", "head 0, token 0"]
