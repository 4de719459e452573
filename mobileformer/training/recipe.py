"""Recipes: every number a training run is made of, in one flat table. The shipped ones are TOML files beside this.

Here are the keys of every task; those of one task alone stand with it, in its own kind of recipe.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from mobileformer.config import MIN_SIZE, VARIANTS
from mobileformer.files.metadata import DEFAULT_TASK
from mobileformer.files.reading import read_regular
from mobileformer.files.replacing import replacing
from mobileformer.training.lookup import named

__all__ = ["MAX_SIZE", "Recipe", "RecipeError", "check_rising", "read_recipe", "recipe_names", "write_recipe"]


class RecipeError(ValueError):
    """A recipe, or a value of one, that cannot be used; the message names the key."""


# Bounds that no run comes near, but numbers that are not meant: sizes and counts that would take all memory, rates
# that no float32 holds.
MAX_SIZE = 4096
_RATE, _COUNT = 1e38, 2**20
_LARGEST = 2**20  # bytes of a recipe


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run does, but for the data and where its files go: the keys that every task has.

    `Recipe(task=..., ...)` is the kind of recipe that the task has, with its own keys besides these: for classification
    a `mobileformer.tasks.classification.ClassificationRecipe`.

    ======================  ===================================================================================
    key                     meaning
    ======================  ===================================================================================
    task                    what the network is to answer, see `mobileformer.tasks`
    variant                 the network; with initial weights, "" takes theirs
    epochs                  passes over the data on the cosine, the warm-up counted in
    warmup_epochs           the first of them rise from `warmup_learning_rate`
    cooldown_epochs         more of them afterwards, at `minimum_learning_rate`
    schedule                "epoch": the rate changes between epochs, as published; "step": with every update
    global_batch            images of one update of the weights, over all processes
    micro_batch             images of one forward pass in one process, and so of one BatchNorm
    drops                   epochs at which the rate becomes a tenth; where there are none, it follows a cosine
    learning_rate ..        AdamW; the decay skips tensors of one dimension and names that end in ".bias"
    clip_norm               the gradient's largest 2-norm; 0 is no clipping
    drop_path               stochastic depth
    average_decay           exponential average of the parameters, 0 is off; BatchNorm's statistics are then
                            estimated again on `average_images` training images
    sizes                   [[share of the epochs done, side in pixels], ..]: the side from there on
    flip                    probability of a left-right flip
    interpolation           of the resize: "bilinear", "bicubic" or "random"
    mean, std               one number a channel, of pixels in [0, 1]; [] is ImageNet's for 3 channels, and for
                            other counts is measured on the training images
    evaluation_size         side in pixels; 0 is the one trained at: a network is poor at another size
    evaluate_every          epochs between two looks at the validation split; the last is always looked at
    freeze                  "" or "features": only what the task puts on them is trained, BatchNorm elsewhere stays
    precision               "float32", or "bfloat16" under autocast
    compile                 torch.compile
    seed                    of everything that is random
    ======================  ===================================================================================
    """

    task: str = DEFAULT_TASK
    variant: str = "294m"
    epochs: int = 450
    warmup_epochs: int = 3
    cooldown_epochs: int = 10
    schedule: Literal["epoch", "step"] = "epoch"
    drops: list[int] = field(default_factory=list)
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
    drop_path: float = 0.0
    average_decay: float = 0.0
    average_images: int = 4096
    sizes: list[list[float]] = field(default_factory=lambda: [[0.0, 224]])
    flip: float = 0.5
    interpolation: Literal["bilinear", "bicubic", "random"] = "random"
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    evaluation_size: int = 0
    evaluate_every: int = 1
    freeze: Literal["", "features"] = ""
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    seed: int = 42

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "epochs": (1, _COUNT),
        "warmup_epochs": (0, _COUNT),
        "cooldown_epochs": (0, _COUNT),
        "drops": (0, _COUNT),
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
        "drop_path": (0, 1 - 1e-9),
        "average_decay": (0, 1 - 1e-9),
        "average_images": (1, 2**31),
        "flip": (0, 1),
        "mean": (-1000, 1000),
        "std": (1e-6, 1000),
        "evaluation_size": (0, MAX_SIZE),
        "evaluate_every": (1, _COUNT),
        "seed": (0, 2**32 - 1),
    }

    def __new__(cls, **keys: Any) -> Self:
        kind: Any = _kind(keys.get("task", DEFAULT_TASK)) if cls is Recipe else cls
        return object.__new__(kind)

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for each in dataclasses.fields(self):
            key = each.name
            value = _converted(key, kinds[key], getattr(self, key))
            object.__setattr__(self, key, value)
            if key == "task" and value != each.default:
                raise RecipeError(f"task: expected {each.default!r} in a {type(self).__name__}, got {_shown(value)}")
            if key in self.ranges:
                low, high = self.ranges[key]
                numbers = value if isinstance(value, list) else [value]
                if not all(low <= number <= high for number in numbers):
                    raise RecipeError(f"{key}: expected {low:g} to {high:g}, got {_shown(value)}")
        self.check()

    def check(self) -> None:
        """Raise RecipeError for values that do not go together; each by itself is of its type and in its range."""
        if self.variant and self.variant not in VARIANTS:
            raise RecipeError(f"variant: expected one of {', '.join(VARIANTS)}, got {_shown(self.variant)}")
        if self.warmup_epochs > self.epochs:
            raise RecipeError(f"warmup_epochs: expected at most epochs = {self.epochs}, got {self.warmup_epochs}")
        if self.global_batch % self.micro_batch:
            raise RecipeError(
                f"global_batch: expected a multiple of micro_batch = {self.micro_batch}, got {self.global_batch}"
            )
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
    values |= dict(overrides) if isinstance(overrides, Mapping) else dict(map(_parsed, overrides))
    kind = _kind(values.get("task", DEFAULT_TASK))
    known = [each.name for each in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise RecipeError(f"{key}: no such key in a recipe; there are {', '.join(known)}")
    return kind(**values)


def write_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Every key with its value, as TOML that `read_recipe` reads back. The file appears whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(
            "".join(f"{key} = {json.dumps(value)}\n" for key, value in dataclasses.asdict(recipe).items()),
            encoding="utf-8",
        )


def check_rising(key: str, pair: list[float]) -> None:
    """Raise RecipeError unless these are two numbers, the first of them no larger."""
    if len(pair) != 2 or pair[0] > pair[1]:
        raise RecipeError(f"{key}: expected two rising numbers, got {_shown(pair)}")


def _kind(task: Any) -> type[Recipe]:
    """The kind of recipe that a task has."""
    try:
        return named(_converted("task", str, task)).recipe_type
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(str(error)) from None


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
