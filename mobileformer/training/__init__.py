"""Training: recipes, one update, a run that can be stopped and goes on. `mobileformer train` is made of this.

    from mobileformer.training import Options, join, read_recipe, train

    recipe = read_recipe("finetune", {"epochs": 5, "sizes": [[0, 128]]})
    with join("cpu") as world:
        train(training, validation, recipe, Options(output=Path("run"), weights=Path("52m.safetensors")), world)

where training and validation are sources (`mobileformer.data.open_source`, or `adopt_source` around anything with a
length and `__getitem__`). What a network is trained for is the recipe's `task`: see `mobileformer.tasks`.
"""

from __future__ import annotations

from mobileformer.training.options import Options
from mobileformer.training.recipe import Recipe, RecipeError, read_recipe, recipe_names, write_recipe
from mobileformer.training.run import train
from mobileformer.training.schedule import decay_groups, learning_rate
from mobileformer.training.state import TrainingError
from mobileformer.training.stopping import Interrupted
from mobileformer.training.task import Figure, Task
from mobileformer.training.world import World, join

__all__ = [
    "Figure",
    "Interrupted",
    "Options",
    "Recipe",
    "RecipeError",
    "Task",
    "TrainingError",
    "World",
    "decay_groups",
    "join",
    "learning_rate",
    "read_recipe",
    "recipe_names",
    "train",
    "write_recipe",
]
