"""Small data sets on disk, as their kinds are laid out, and sources that break."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from mobileformer.data import ImageError


def picture(number: int, *, mode: str = "RGB", size: tuple[int, int] = (12, 10)) -> Image.Image:
    """One even colour for each number, so that a pixel tells which image it is from."""
    return Image.new(mode, size, number if mode == "L" else (number, 255 - number, number // 2))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_folder(root: Path, *, classes: tuple[str, ...] = ("cat", "dog"), each: int = 3) -> Path:
    for split in ("train", "val"):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(each):
                picture(10 * label + number).save(folder / f"{number}.png")
    return root


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return (0x0800 | array.ndim).to_bytes(4, "big") + sizes + array.tobytes()


def write_idx(
    root: Path, *, name: str = "{stem}-{kind}-idx{rank}-ubyte.gz", labels: int = 10, each: int = 2, side: int = 6
) -> Path:
    """`each` images of every label in both splits; the first pixel is the label, the second tells the split."""
    root.mkdir(parents=True, exist_ok=True)
    for number, stem in enumerate(("train", "t10k")):
        y = np.tile(np.arange(labels, dtype=np.uint8), each)
        x = np.zeros((len(y), side, side), np.uint8)
        x[:, 0, 0], x[:, 0, 1] = y, number
        for kind, rank, array in (("images", 3, x), ("labels", 1, y)):
            content = idx(array)
            file = root / name.format(stem=stem, kind=kind, rank=rank)
            file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return root


def write_shard(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


class Numbers:
    """`length` grey images of 4 x 4 pixels; image k shows k, its class is k modulo 10, and `broken` ones raise."""

    channels = 1
    classes = tuple(map(str, range(10)))

    def __init__(self, length: int, broken: frozenset[int] = frozenset()) -> None:
        self.length, self.broken = length, broken

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index in self.broken:
            raise ImageError(f"image {index}: broken")
        return picture(index % 256, mode="L", size=(4, 4)), index % 10


def annotation(number: int, image: int, category: int, box: object, **more: object) -> dict[str, object]:
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0} | more


def coco_document(images: list[dict[str, object]], annotations: list[object], **more: object) -> dict[str, object]:
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]  # ids with gaps, not in order
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories} | more


def coco_image(number: int, width: int = 40, height: int = 30, **more: object) -> dict[str, object]:
    return {"id": number, "file_name": f"{number}.png", "width": width, "height": height} | more


def write_coco(root: Path, document: dict[str, object], *, file: str = "train.json", folder: str = "train") -> Path:
    """The annotations, and an image for each that they name."""
    for path in (root / file, root / folder / "x"):
        path.parent.mkdir(parents=True, exist_ok=True)
    for image in document["images"]:  # type: ignore[attr-defined]
        picture(image["id"] % 256, size=(image["width"], image["height"])).save(root / folder / image["file_name"])
    (root / file).write_text(json.dumps(document))
    return root
