"""Recipes: every number a training run is made of, in one flat table. The shipped ones are TOML files beside this."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mobileformer.config import MIN_SIZE, VARIANTS
from mobileformer.files.reading import read_regular
from mobileformer.files.replacing import replacing

__all__ = ["Recipe", "RecipeError", "read_recipe", "recipe_names", "write_recipe"]


class RecipeError(ValueError):
    """A recipe, or a value of one, that cannot be used; the message names the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a run does, but for the data and where its files go.

    ======================  ===================================================================================
    key                     meaning
    ======================  ===================================================================================
    variant                 the network; with initial weights, "" takes theirs
    epochs                  passes over the data on the cosine, the warm-up counted in
    warmup_epochs           the first of them rise from `warmup_learning_rate`
    cooldown_epochs         more of them afterwards, at `minimum_learning_rate`
    schedule                "epoch": the rate changes between epochs, as published; "step": with every update
    global_batch            images of one update of the weights, over all processes
    micro_batch             images of one forward pass in one process, and so of one BatchNorm
    learning_rate ..        AdamW; the decay skips tensors of one dimension and names that end in ".bias"
    clip_norm               the gradient's largest 2-norm; 0 is no clipping
    label_smoothing, mixup  epsilon; alpha of the Beta distribution, 0 is off
    dropout, drop_path      before the last layer; stochastic depth
    average_decay           exponential average of the parameters, 0 is off; BatchNorm's statistics are then
                            estimated again on `average_images` training images
    sizes                   [[share of the epochs done, side in pixels], ..]: the side from there on
    crop                    "random-resized" (`crop_scale`, `crop_ratio`) or "shift" (by `shift` pixels, zeros)
    flip                    probability of a left-right flip
    interpolation           of the resize: "bilinear", "bicubic" or "random"
    randaugment             "" or a policy such as "m9-mstd0.5"
    erase, erase_mode       probability of one erased box; filled by "pixel" noise or a "constant" zero
    mean, std               one number a channel, of pixels in [0, 1]; [] is ImageNet's for 3 channels, and for
                            other counts is measured on the training images
    evaluation_size         side in pixels; 0 is the one trained at: a network is poor at another size
    crop_fraction           the centre crop's share of the resized short side
    evaluate_every          epochs between two looks at the validation split; the last is always looked at
    freeze                  "" or "features": only the classifier is trained, BatchNorm elsewhere stays as it is
    precision               "float32", or "bfloat16" under autocast
    compile                 torch.compile
    seed                    of everything that is random
    ======================  ===================================================================================

    Source of the seven published ones: the authors' README and timm 0.3.4's defaults.
    """

    variant: str = "294m"
    epochs: int = 450
    warmup_epochs: int = 3
    cooldown_epochs: int = 10
    schedule: Literal["epoch", "step"] = "epoch"
    global_batch: int = 1024
    micro_batch: int = 128
    learning_rate: float = 1e-3
    warmup_learning_rate: float = 1e-4
    minimum_learning_rate: float = 1e-5
    weight_decay: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float = 0.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    dropout: float = 0.0
    drop_path: float = 0.0
    average_decay: float = 0.0
    average_images: int = 4096
    sizes: list[list[float]] = field(default_factory=lambda: [[0.0, 224]])
    crop: Literal["random-resized", "shift"] = "random-resized"
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    shift: int = 0
    flip: float = 0.5
    interpolation: Literal["bilinear", "bicubic", "random"] = "random"
    randaugment: str = ""
    erase: float = 0.0
    erase_mode: Literal["pixel", "constant"] = "pixel"
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    evaluation_size: int = 0
    crop_fraction: float = 0.875
    evaluate_every: int = 1
    freeze: Literal["", "features"] = ""
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        for key, kind in get_type_hints(Recipe).items():
            value = _converted(key, kind, getattr(self, key))
            object.__setattr__(self, key, value)
            if key in _RANGES:
                low, high = _RANGES[key]
                numbers = value if isinstance(value, list) else [value]
                if not all(low <= number <= high for number in numbers):
                    raise RecipeError(f"{key}: expected {low:g} to {high:g}, got {_shown(value)}")
        if self.variant and self.variant not in VARIANTS:
            raise RecipeError(f"variant: expected one of {', '.join(VARIANTS)}, got {_shown(self.variant)}")
        if self.warmup_epochs > self.epochs:
            raise RecipeError(f"warmup_epochs: expected at most epochs = {self.epochs}, got {self.warmup_epochs}")
        if self.global_batch % self.micro_batch:
            raise RecipeError(
                f"global_batch: expected a multiple of micro_batch = {self.micro_batch}, got {self.global_batch}"
            )
        for key in ("crop_scale", "crop_ratio"):
            pair = getattr(self, key)
            if len(pair) != 2 or pair[0] > pair[1]:
                raise RecipeError(f"{key}: expected two rising numbers, got {_shown(pair)}")
        if len(self.mean) != len(self.std):
            raise RecipeError(
                f"mean, std: expected as many of one as of the other, got {len(self.mean)} and {len(self.std)}"
            )
        self._check_sizes()

    def _check_sizes(self) -> None:
        shape = all(
            len(pair) == 2 and 0 <= pair[0] < 1 and MIN_SIZE <= pair[1] <= MAX_SIZE and pair[1] % 1 == 0
            for pair in self.sizes
        )
        starts = [pair[0] for pair in self.sizes]
        if not self.sizes or not shape or starts[0] != 0 or starts != sorted(set(starts)):
            raise RecipeError(
                "sizes: expected [[0, side], [share of the epochs, side], ..] with rising shares below 1 and sides "
                f"of {MIN_SIZE} to {MAX_SIZE}, got {_shown(self.sizes)}"
            )
        if self.evaluation_size and self.evaluation_size < MIN_SIZE:
            raise RecipeError(f"evaluation_size: expected 0 or at least {MIN_SIZE}, got {self.evaluation_size}")

    @property
    def slots(self) -> int:
        """Micro-batches of one update, over all processes."""
        return self.global_batch // self.micro_batch

    @property
    def total_epochs(self) -> int:
        """Epochs on the cosine and after it."""
        return self.epochs + self.cooldown_epochs

    def evaluation_size_after(self, epochs: int) -> int:
        """Side of the image the network is evaluated at after so many epochs, in pixels."""
        return self.evaluation_size or self.size_at(epochs - 1)

    def size_at(self, epoch: int) -> int:
        """Side of a training image in this epoch, in pixels."""
        return int([side for start, side in self.sizes if epoch >= start * self.total_epochs][-1])


# Bounds that no run comes near, but numbers that are not meant: sizes and counts that would take all memory, rates
# that no float32 holds.
MAX_SIZE = 4096
_RATE, _COUNT = 1e38, 2**20
_LARGEST = 2**20  # bytes of a recipe
_RANGES = {
    "epochs": (1, _COUNT),
    "warmup_epochs": (0, _COUNT),
    "cooldown_epochs": (0, _COUNT),
    "global_batch": (1, _COUNT),
    "micro_batch": (1, _COUNT),
    "learning_rate": (0, _RATE),
    "warmup_learning_rate": (0, _RATE),
    "minimum_learning_rate": (0, _RATE),
    "weight_decay": (0, _RATE),
    "beta1": (0, 1 - 1e-9),
    "beta2": (0, 1 - 1e-9),
    "epsilon": (1e-30, 1),
    "clip_norm": (0, _RATE),
    "label_smoothing": (0, 1),
    "mixup": (0, 1000),
    "dropout": (0, 1 - 1e-9),
    "drop_path": (0, 1 - 1e-9),
    "average_decay": (0, 1 - 1e-9),
    "average_images": (1, 2**31),
    "crop_scale": (1e-4, 1),
    "crop_ratio": (1e-2, 1e2),
    "shift": (0, MAX_SIZE),
    "flip": (0, 1),
    "erase": (0, 1),
    "mean": (-1000, 1000),
    "std": (1e-6, 1000),
    "evaluation_size": (0, MAX_SIZE),
    "crop_fraction": (0.01, 1),
    "evaluate_every": (1, _COUNT),
    "seed": (0, 2**32 - 1),
}


def recipe_names() -> tuple[str, ...]:
    """Names of the shipped recipes."""
    return tuple(sorted(entry.name[:-5] for entry in _shelf().iterdir() if entry.name.endswith(".toml")))


def read_recipe(name_or_path: str | os.PathLike[str], overrides: Iterable[str] | Mapping[str, Any] = ()) -> Recipe:
    """A shipped recipe by name, or a TOML file by path, with some keys set to other values.

    overrides: "key=value" with the value as TOML has it (a word that is no TOML counts as text), or a dict.
    Raises RecipeError for an unknown name or key, a value of the wrong kind or range, or a broken file.
    """
    text = _text_of(name_or_path)
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # besides TOML's own, int's for 5000 digits
        raise RecipeError(f"{name_or_path}: not a TOML file: {_one_line(error)}") from error
    given = dict(overrides) if isinstance(overrides, Mapping) else dict(map(_parsed, overrides))
    known = [each.name for each in dataclasses.fields(Recipe)]
    for key in (*values, *given):
        if key not in known:
            raise RecipeError(f"{key}: no such key in a recipe; there are {', '.join(known)}")
    return Recipe(**{**values, **given})


def write_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Every key with its value, as TOML that `read_recipe` reads back. The file appears whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(
            "".join(f"{key} = {json.dumps(value)}\n" for key, value in dataclasses.asdict(recipe).items()),
            encoding="utf-8",
        )


def _shelf() -> Any:
    return files("mobileformer.training").joinpath("recipes")


def _text_of(name_or_path: str | os.PathLike[str]) -> str:
    name = os.fspath(name_or_path)
    if name in recipe_names():
        return _shelf().joinpath(f"{name}.toml").read_text(encoding="utf-8")
    if not name.endswith(".toml"):
        raise RecipeError(f"recipe: expected one of {', '.join(recipe_names())}, or a .toml file, got {name!r}")
    try:
        return read_regular(name, _LARGEST).decode("utf-8")
    except (OSError, ValueError) as error:
        raise RecipeError(f"{name}: {error}") from error


def _parsed(assignment: str) -> tuple[str, Any]:
    key, equals, text = assignment.partition("=")
    if not equals:
        raise RecipeError(f"{assignment}: expected key=value")
    try:
        return key.strip(), tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), text.strip()
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{key.strip()}: cannot be read as a value: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0].split("; use sys.")[0]


def _shown(value: Any) -> str:
    """A value as a message shows it: integers of more than 4300 digits have no text at all."""
    try:
        text = repr(value)
    except ValueError:
        return "an integer of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _converted(key: str, kind: Any, value: Any) -> Any:
    """`value` as the key's type, where nothing is lost by it."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise RecipeError(f"{key}: expected one of {', '.join(map(repr, get_args(kind)))}, got {_shown(value)}")
        return value
    if get_origin(kind) is list:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{key}: expected a list, got {_shown(value)}")
        return [_converted(key, get_args(kind)[0], each) for each in value]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise RecipeError(f"{key}: expected a float, got {_shown(value)}") from None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecipeError(f"{key}: expected {kind.__name__}, got {_shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{key}: expected a finite number, got {value!r}")
    return value
