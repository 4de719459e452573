"""What a run needs to go on where it was stopped, in one file."""

from __future__ import annotations

import dataclasses
import os
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from mobileformer.files.metadata import DEFAULT_TASK
from mobileformer.files.reading import NotRegularError, open_regular
from mobileformer.files.replacing import replacing
from mobileformer.training.recipe import Recipe

__all__ = [
    "FORMAT_VERSION",
    "Progress",
    "TrainingError",
    "describe_data",
    "load_state",
    "previous_of",
    "save_state",
]

FORMAT_VERSION = 1
Before = Literal["keep", "damaged", "other"]


class TrainingError(RuntimeError):
    """A run that cannot start or cannot go on; the message says where it stands and what is safe on disk."""


@dataclass(slots=True)
class Progress:
    """How far a run is. All that is random is drawn from the seed and these numbers, so they are its whole memory.

    epoch: epochs done. step: updates done in the epoch after them. updates: of the run. loss_sum, images: of this
    epoch so far. seconds: of training and evaluation, over all the times the run was started.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    loss_sum: float = 0.0
    images: int = 0
    seconds: float = 0.0
    broken: int = 0
    best: float = -1.0
    best_epoch: int = 0
    validation: dict[str, float] = field(default_factory=dict)


def previous_of(path: Path) -> Path:
    """Where the checkpoint before `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save_state(
    path: Path,
    recipe: Recipe,
    progress: Progress,
    *,
    model: dict[str, Any],
    optimizer: dict[str, Any],
    average: dict[str, Any] | None,
    data: dict[str, Any] | None = None,
    description: dict[str, Any] | None = None,
    before: Before = "keep",
) -> None:
    """Write a checkpoint whole, or leave the one before it.

    data: what identifies the images, compared by `load_state`. description: the fields of `Metadata` that weights made
    of this checkpoint have. before: what becomes of the file that is there: "keep" renames it to `previous_of(path)`,
    "damaged" loses it and leaves that one, "other" loses both, since they are of another run.
    """
    content = {
        "format": FORMAT_VERSION,
        "recipe": dataclasses.asdict(recipe),
        "progress": dataclasses.asdict(progress),
        "model": model,
        "optimizer": optimizer,
        "average": average,
        "data": data,
        "description": description,
    }
    previous = previous_of(path)
    with replacing(path) as temporary:
        torch.save(content, temporary)
        with open(temporary, "rb") as file:  # a rename may outlive its data in a power cut
            os.fsync(file.fileno())
        if before == "keep" and path.exists():
            os.replace(path, previous)  # `load_state` finds it there, should this process end before the next line
        elif before == "other":
            previous.unlink(missing_ok=True)


def load_state(
    path: Path, recipe: Recipe, data: dict[str, Any] | None = None, *, extend: bool = False
) -> dict[str, Any]:
    """Read a checkpoint of the same recipe; nothing in it is run, only tensors and plain values are read.

    Where the file is damaged or missing, the one before it is read, and "damaged" says in words what is wrong with the
    file; else it is None. data: what identifies the images now, compared where the file knows it. extend: `epochs` and
    `cooldown_epochs` may be other ones, as long as they are not fewer than are done.

    Raises TrainingError for damaged files, one of a later format, or one of another recipe or other data, naming what
    differs.
    """
    damaged = None
    try:
        content = _read(path)
    except _DamagedError as error:
        damaged = str(error)
        try:
            content = _read(previous_of(path))
        except _DamagedError as second:
            more = f"; {second}" if previous_of(path).exists() else ""
            raise TrainingError(f"{damaged}{more}; --fresh begins again, or give another output folder") from error
    saved, now = {"task": DEFAULT_TASK, **content["recipe"]}, dataclasses.asdict(recipe)
    longer = ("epochs", "cooldown_epochs") if extend else ()
    differing = [
        f"{key} {saved.get(key)!r} -> {now[key]!r}" for key in now if saved.get(key) != now[key] and key not in longer
    ]
    if differing:
        only = all(saved.get(key) == now[key] for key in now if key not in ("epochs", "cooldown_epochs"))
        raise TrainingError(
            f"{path}: belongs to a run of another recipe ({', '.join(differing)}); "
            + ("--extend goes on with it, " if only else "")
            + "give another output folder, or --fresh to begin again in this one"
        )
    if content["progress"].epoch > recipe.total_epochs:
        raise TrainingError(
            f"{path}: {content['progress'].epoch} epochs are done, more than epochs + cooldown_epochs = "
            f"{recipe.total_epochs}"
        )
    if data is not None and content.get("data") is not None and (what := _other_data(content["data"], data)):
        raise TrainingError(
            f"{path}: belongs to a run on other data: {what}; give another output folder, or --fresh to begin again in "
            "this one"
        )
    return {**content, "damaged": damaged}


def describe_data(training: Any, validation: Any) -> dict[str, Any]:
    """What identifies the images of a run: kind, classes, count, and for sources of ours a digest of their names."""
    return {"training": _describe(training), "validation": _describe(validation)}


class _DamagedError(Exception):
    """A file that is no whole checkpoint of a run."""


def _read(path: Path) -> dict[str, Any]:
    """What the file holds, of the right kinds. Torch's own words are left out: they advise to run what is in it."""
    try:
        with open_regular(path) as file:
            with zipfile.ZipFile(file) as archive:  # torch writes checksums, and does not look at them again
                if wrong := archive.testzip():
                    raise zipfile.BadZipFile(f"checksum of {wrong}")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        reason = str(error) if isinstance(error, NotRegularError) else f"{path}: {error.strerror or error}"
        raise _DamagedError(f"{reason}: a checkpoint that cannot be read") from error
    except pickle.UnpicklingError as error:
        raise _DamagedError(
            f"{path}: a checkpoint that cannot be read: damaged, or it holds more than weights and plain values; "
            "nothing in it was run"
        ) from error
    except Exception as error:  # a damaged stream can end in any error of the reader; none of them is ours
        raise _DamagedError(
            f"{path}: a checkpoint that cannot be read: empty, cut off or damaged ({type(error).__name__})"
        ) from error
    kinds = {"format": int, "recipe": dict, "progress": dict, "model": dict, "optimizer": dict,
             "average": dict | None}  # fmt: skip
    if not isinstance(content, dict):
        raise _DamagedError(f"{path}: a checkpoint that cannot be read: expected a run's, got {type(content).__name__}")
    for key, kind in kinds.items():
        if key not in content or not isinstance(content[key], kind):
            raise _DamagedError(f"{path}: a checkpoint that cannot be read: no checkpoint of a run, {key} is not right")
    if content["format"] > FORMAT_VERSION:
        raise TrainingError(f"{path}: format {content['format']}, this package reads up to {FORMAT_VERSION}; update it")
    try:
        content["progress"] = Progress(**content["progress"])
    except TypeError as error:
        raise _DamagedError(f"{path}: a checkpoint that cannot be read: progress is not right") from error
    return content


def _describe(source: Any) -> dict[str, Any]:
    kind = type(source).__name__
    digest = source.digest() if hasattr(source, "digest") else None
    return {"kind": kind, "classes": list(source.classes), "images": len(source), "digest": digest}


def _other_data(saved: Any, now: dict[str, Any]) -> str:
    """What differs, in words; empty for nothing."""
    for split, told in now.items():
        before = saved.get(split, {})
        for key, value in told.items():
            was = before.get(key)
            if was == value or was is None:
                continue
            if key == "classes":
                for names, others, word in ((was, value, "had"), (value, was, "has now")):
                    if extra := sorted(set(names) - set(others)):
                        return f"{split} {word} the class {extra[0]!r}"
                return f"the order of the classes in {split}"
            return f"names or order of the images in {split}" if key == "digest" else f"{split} {key} {was} -> {value}"
    return ""
