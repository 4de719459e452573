"""What the tests of the command line share: files to work on, running a command, what it should answer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from typer.testing import CliRunner, Result

import mobileformer
from mobileformer.cli import app
from mobileformer.data import load_image, sample_photo
from mobileformer.measure.difference import lively_weights_

# Small models in a shared machine: waiting for a second thread costs more than it gives.
torch.set_num_threads(1)

NAMES = ["ant", "bee [old]", "cat", "dog, large", "éléphant", "fox", "gnu"]


def make_files(folder: Path, variant: str = "26m") -> Path:
    """Weights of a network with 7 classes in several files, and images."""
    model = mobileformer.Model(variant, num_classes=7).eval()
    lively_weights_(model, seed=3)
    mobileformer.save_weights(model, folder / "plain.safetensors")
    mobileformer.save_weights(model, folder / "named.safetensors", labels=NAMES)
    state = {f"module.{key}": value for key, value in mobileformer.official_state_dict(model).items()}
    checkpoint = {
        "state_dict": state,
        "epoch": 449,
        "args": argparse.Namespace(lr=0.1),
        "optimizer": {"state": {}},
    }
    torch.save(checkpoint, folder / "published.pth.tar")
    grey = mobileformer.Model(variant, num_classes=7, in_chans=1).eval()
    lively_weights_(grey, seed=4)
    mobileformer.save_weights(grey, folder / "grey.safetensors", mean=[0.25], std=[0.5])
    mobileformer.save_weights(grey, folder / "no_mean.safetensors")
    images = folder / "images"
    (images / "deep").mkdir(parents=True)
    photo = Image.open(sample_photo())
    photo.save(images / "b.png")
    photo.rotate(90, expand=True).save(images / "deep" / "c.webp")
    photo.crop((100, 50, 200, 180)).save(images / "a.jpg")
    return folder


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    assert "internal error" not in result.stderr
    return result


def refusal(*arguments: object) -> str:
    """What a call that cannot be understood is told, in one line: the box around it folds wherever a path ends."""
    return " ".join(run(*arguments, code=2).stderr.replace("│", " ").split())


def run_json(*arguments: object, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", code=code).stdout)


def expected(weights: Path, image: Path, size: int = 64, crop_fraction: float = 0.875) -> list[tuple[int, float]]:
    """(class, probability), most probable first, in float64 on the plain path."""
    metadata = mobileformer.read_metadata(weights)
    model = mobileformer.load_model(weights, use_fused=False).double()
    array = load_image(image, size=size, mean=metadata.mean, std=metadata.std, crop_fraction=crop_fraction)
    with torch.no_grad():
        probabilities = model(torch.from_numpy(array)[None].double())[0].softmax(0)
    return sorted(enumerate(probabilities.tolist()), key=lambda pair: -pair[1])
