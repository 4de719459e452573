"""Recipes: the shipped ones to the letter, and every wrong value refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from mobileformer import Model
from mobileformer.tasks.classification import ClassificationRecipe
from mobileformer.training import (
    Recipe,
    RecipeError,
    decay_groups,
    learning_rate,
    read_recipe,
    recipe_names,
    write_recipe,
)

# variant: learning rate, weight decay, dropout, mixup, RandAugment, erasing; the authors' README
PUBLISHED = {
    "508m": (1.0e-3, 0.20, 0.3, 0.2, "m9-mstd0.5", 0.2),
    "294m": (1.0e-3, 0.20, 0.3, 0.2, "m9-mstd0.5", 0.2),
    "214m": (0.9e-3, 0.15, 0.2, 0.2, "m9-mstd0.5", 0.2),
    "151m": (0.9e-3, 0.10, 0.2, 0.2, "m9-mstd0.5", 0.2),
    "96m": (0.8e-3, 0.10, 0.2, 0.0, "m9-mstd0.5", 0.0),
    "52m": (0.8e-3, 0.10, 0.2, 0.2, "", 0.0),
    "26m": (0.8e-3, 0.08, 0.1, 0.2, "m9-mstd0.5", 0.0),
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_recipes(variant: str) -> None:
    recipe = read_recipe(variant)
    rows = (recipe.learning_rate, recipe.weight_decay, recipe.dropout, recipe.mixup, recipe.randaugment, recipe.erase)
    assert rows == PUBLISHED[variant]
    assert (recipe.variant, recipe.global_batch, recipe.slots, recipe.epochs) == (variant, 1024, 8, 450)
    assert (recipe.warmup_epochs, recipe.warmup_learning_rate, recipe.cooldown_epochs) == (3, 1e-4, 10)
    assert (recipe.minimum_learning_rate, recipe.label_smoothing, recipe.erase_mode) == (1e-5, 0.1, "pixel")
    assert (recipe.crop, recipe.crop_scale, recipe.flip, recipe.sizes) == ("random-resized", [0.08, 1], 0.5, [[0, 224]])
    assert (recipe.drop_path, recipe.clip_norm, recipe.average_decay, recipe.schedule) == (0, 0, 0, "epoch")
    assert (recipe.beta1, recipe.beta2, recipe.epsilon) == (0.9, 0.999, 1e-8)


DETECTORS = ("retinanet-coco", "retinanet-tiny", "end-to-end-coco", "end-to-end-tiny")


def test_names() -> None:
    assert set(recipe_names()) == {*PUBLISHED, "fashion-mnist", "finetune", *DETECTORS}
    for name in recipe_names():
        read_recipe(name)


def test_overrides_and_round_trip(tmp_path: Path) -> None:
    recipe = read_recipe(
        "52m",
        ["epochs=7", "learning_rate=2e-3", "sizes=[[0, 64], [0.5, 96]]", "randaugment=m9-mstd0.5", "compile=true"],
    )
    assert (recipe.epochs, recipe.learning_rate, recipe.randaugment, recipe.compile) == (7, 2e-3, "m9-mstd0.5", True)
    assert recipe == read_recipe("52m", {key: getattr(recipe, key) for key in ("epochs", "learning_rate", "sizes",
                                                                             "randaugment", "compile")})  # fmt: skip
    write_recipe(recipe, tmp_path / "resolved.toml")
    assert read_recipe(tmp_path / "resolved.toml") == recipe
    assert [each.name for each in tmp_path.iterdir()] == ["resolved.toml"]


def test_a_recipe_is_of_its_tasks_kind(tmp_path: Path) -> None:
    for recipe in (Recipe(), Recipe(task="classification", mixup=0.5), read_recipe("294m", ["task=classification"])):
        assert isinstance(recipe, Recipe)
        assert type(recipe) is ClassificationRecipe
        assert recipe.task == "classification"
        assert pickle.loads(pickle.dumps(recipe)) == recipe == dataclasses.replace(recipe)
    assert Recipe(mixup=0.5) == ClassificationRecipe(mixup=0.5) != Recipe()
    write_recipe(Recipe(), tmp_path / "now.toml")
    lines = (tmp_path / "now.toml").read_text().splitlines()
    assert lines[0] == 'task = "classification"'
    (tmp_path / "before.toml").write_text("\n".join(lines[1:]))  # as recipes were written before there were tasks
    assert read_recipe(tmp_path / "before.toml") == read_recipe(tmp_path / "now.toml") == Recipe()


@pytest.mark.parametrize(
    ("task", "got"),
    [("segmentation", "'segmentation'"), ("", "''"), ("../x", "'../x'"), (3, "3"), ([], "[]"), (None, "None")],
)
def test_tasks_that_there_are_none_of(tmp_path: Path, task: Any, got: str) -> None:
    for make in (lambda: Recipe(task=task), lambda: read_recipe("294m", {"task": task})):
        with pytest.raises(RecipeError, match=r"^task: expected ") as told:
            make()
        assert str(told.value).endswith(f", got {got}")
    if task is not None:
        (tmp_path / "recipe.toml").write_text(f"task = {json.dumps(task)}")
        with pytest.raises(RecipeError, match=r"^task: expected "):
            read_recipe(tmp_path / "recipe.toml")
    with pytest.raises(RecipeError, match=r"^task: expected "):
        ClassificationRecipe(task=task)


def test_unknown_keys_are_told_the_right_ones(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("mixups = 0.2")
    for name, overrides in (("294m", ["mixups=0.2"]), (tmp_path / "recipe.toml", ())):
        with pytest.raises(RecipeError, match=r"^mixups: no such key in a recipe; there are task, .*epochs.*, mixup, "):
            read_recipe(name, overrides)


def test_every_key_is_explained() -> None:
    told = f"{Recipe.__doc__} {ClassificationRecipe.__doc__}"
    # "learning_rate .." stands for the optimizer's
    rest = {"warmup_learning_rate", "minimum_learning_rate", "weight_decay", "beta1", "beta2", "epsilon"}
    missing = [key for key in dataclasses.asdict(Recipe()) if key not in told]
    assert set(missing) <= rest


def test_size_by_epoch() -> None:
    recipe = read_recipe("fashion-mnist", {"epochs": 10, "sizes": [[0, 64], [0.7, 96]]})
    assert [recipe.size_at(epoch) for epoch in range(10)] == [64] * 7 + [96] * 3
    assert [recipe.evaluation_size_after(epochs) for epochs in (7, 8, 10)] == [64, 96, 96]
    assert dataclasses.replace(recipe, evaluation_size=128).evaluation_size_after(1) == 128


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("variant", "300m"), ("epochs", 0), ("epochs", 1.5), ("epochs", True), ("warmup_epochs", 451),
        ("schedule", "sometimes"), ("global_batch", 1000), ("learning_rate", -1.0), ("learning_rate", math.nan),
        ("learning_rate", "fast"), ("beta2", 1.0), ("clip_norm", -1), ("label_smoothing", 1.5), ("dropout", 1.0),
        ("sizes", []), ("sizes", [[0.1, 64]]), ("sizes", [[0, 64], [0, 96]]), ("sizes", [[0, 16]]),
        ("sizes", [[0, 64.5]]), ("sizes", 64), ("crop", "center"), ("crop_scale", [0.5]), ("crop_scale", [0.9, 0.1]),
        ("flip", 2), ("mean", [0.5]), ("crop_fraction", 0), ("evaluate_every", 0), ("freeze", "all"),
        ("precision", "float16"), ("compile", 1), ("seed", -1),
    ],
)  # fmt: skip
def test_wrong_values_are_named(key: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=key):
        read_recipe("294m", {key: value})


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"expected one of .*fashion-mnist.*got 'fashion'"):
        read_recipe("fashion")
    with pytest.raises(RecipeError, match="learning_rates: no such key"):
        read_recipe("294m", ["learning_rates=1"])
    with pytest.raises(RecipeError, match="epochs: expected key=value"):
        read_recipe("294m", ["epochs"])
    with pytest.raises(RecipeError, match=r"missing\.toml"):
        read_recipe(tmp_path / "missing.toml")
    (tmp_path / "broken.toml").write_text("epochs = ")
    with pytest.raises(RecipeError, match=r"broken\.toml: not a TOML file"):
        read_recipe(tmp_path / "broken.toml")


@pytest.mark.parametrize("schedule", [(450, 3, 10), (20, 0, 0), (5, 5, 2)])
def test_learning_rate_is_timms(schedule: tuple[int, int, int]) -> None:
    from mobileformer._torchvision import ensure_torchvision

    ensure_torchvision()
    scheduler = pytest.importorskip("timm.scheduler")
    epochs, warmup, cooldown = schedule
    recipe = Recipe(epochs=epochs, warmup_epochs=warmup, cooldown_epochs=cooldown, learning_rate=0.8e-3)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.learning_rate)
    theirs = scheduler.CosineLRScheduler(
        optimizer, t_initial=epochs, lr_min=recipe.minimum_learning_rate, warmup_t=warmup,
        warmup_lr_init=recipe.warmup_learning_rate, warmup_prefix=False, cycle_limit=1,
    )  # fmt: skip
    for epoch in range(epochs + cooldown):
        theirs.step(epoch)
        assert learning_rate(recipe, epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_decay_groups_are_timms() -> None:
    from mobileformer._torchvision import ensure_torchvision

    ensure_torchvision()
    optim = pytest.importorskip("timm.optim")
    model = Model("26m", num_classes=10)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def told(groups: list[dict[str, Any]]) -> dict[str, float]:
        return {names[id(each)]: group["weight_decay"] for group in groups for each in group["params"]}

    ours = told(decay_groups(model, 0.08))
    assert ours == told(optim.param_groups_weight_decay(model, 0.08))
    assert ours["tokens"] == 0.08
    assert set(ours) == set(names.values())
