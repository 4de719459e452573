"""Which of what a checkpoint holds are the weights: below which key, behind which prefix, raw or averaged.

Training scripts save a dict of dicts. The weights lie below one of a few names, their exponential average below one of
some others; every name of a parameter may stand behind a prefix, that of a wrapper or of an attribute. The token table
is the one parameter that every Mobile-Former has under one name, so it tells the prefix.

Where both are there, the average is taken unless told otherwise: it is what the accuracy of such a run was measured
with, and what timm's own loader takes. One without BatchNorm statistics of its own is not taken: nothing was measured
with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mobileformer.files.metadata import DEFAULT_TASK, WeightsError, check_task

__all__ = ["KEY", "Contents", "find_weights"]

KEY = "mobileformer"  # below it a checkpoint of ours has what a safetensors file has as text metadata
_DESCRIBED = ("labels", "mean", "std", "input_size", "crop_fraction", "spatial_dynamic_relu")
_RAW = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params")
_AVERAGE = (
    "state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema", "params_ema",
    "averaged", "average",
)  # fmt: skip
_TOKENS = ("tokens", "tokens.weight")
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, beside the weights
_DEPTH = 4


@dataclass(slots=True)
class Contents:
    """What a file or a dict holds.

    state: {key: tensor} without prefixes. header: what it says of itself, as text. run: what the recipe of a training
    run says, as fields of `Metadata`. note: which of several weights these are, or "".
    """

    state: dict[str, Tensor]
    header: dict[str, str] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def find_weights(content: Any, *, name: str, average: bool | None = None) -> Contents:
    """The weights in what was read; `name` is how errors call it.

    average: the averaged ones, the raw ones, or None: the averaged ones where there are such that can be used.
    Raises WeightsError where there are no weights, none of those asked for, or a training run's of another task.
    """
    if not isinstance(content, Mapping):
        raise WeightsError(f"{name}: expected a dict of tensors, got {type(content).__name__}")
    if _is_run(content):
        check_task(content["recipe"].get("task", DEFAULT_TASK), name)
    raw_key, raw = _below(content, _RAW)
    average_key, averaged = _below(content, _AVERAGE)
    if raw is None and averaged is None:
        raw = content
    states = {False: raw, True: averaged}
    keys = {False: raw_key, True: average_key}
    if averaged is None:  # the average may also stand beside the weights, behind another prefix
        assert raw is not None
        states, keys = _by_prefix(_checked(raw, name), name, raw_key)
    states = {kind: _flat(state, name) for kind, state in states.items() if state is not None}
    usable = True in states and not _lacks_statistics(content, states)
    taken = average if average is not None else usable or False not in states
    if taken not in states:
        wanted, other = ("average", "raw") if taken else ("raw", "average")
        raise WeightsError(
            f"{name}: holds no {wanted} weights, only {other} ones ({keys[not taken] or 'its top level'})"
        )
    if taken and average and not usable:
        raise WeightsError(
            f"{name}: its average ({keys[True]}) has no BatchNorm statistics of its own yet, only the raw weights can "
            "be used"
        )
    note = ""
    if average is None and len(states) == 2:
        why = "" if usable else ", since the average has no BatchNorm statistics of its own yet"
        note = (
            f"{name}: holds raw weights ({keys[False]}) and their average ({keys[True]}); "
            f"the {'average is' if taken else 'raw ones are'} taken{why}"
        )
    return Contents(states[taken], _header(content), _run(content), note)


def _below(content: Mapping[Any, Any], names: Iterable[str]) -> tuple[str, Mapping[Any, Any] | None]:
    """(where, the innermost dict below the first of these names that is there)."""
    found = next((name for name in names if isinstance(content.get(name), Mapping)), None)
    if found is None:
        return "", None
    where, inner = found, content[found]
    for _ in range(_DEPTH):
        name = next((name for name in _RAW if isinstance(inner.get(name), Mapping)), None)
        if name is None:
            break
        where, inner = f"{where}.{name}", inner[name]
    return where, inner


def _checked(state: Mapping[Any, Any], name: str) -> dict[str, Tensor]:
    if not state:
        raise WeightsError(f"{name}: holds no weights")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{name}: expected tensors under text keys, got {type(value).__name__} under {key!r:.100}"
            )
    return dict(state)


def _by_prefix(
    state: dict[str, Tensor], name: str, where: str
) -> tuple[dict[bool, Mapping[Any, Any] | None], dict[bool, str]]:
    """({average or not: state}, {average or not: how it is called}) of a flat dict."""
    prefixes = _prefixes(state)
    if len(prefixes) < 2 or "" in prefixes:
        return {False: state}, {False: where}
    kinds: dict[bool, list[str]] = {False: [], True: []}
    for prefix in prefixes:
        kinds[any(word in prefix.lower() for word in ("ema", "average", "shadow", "swa"))].append(prefix)
    if any(len(found) > 1 for found in kinds.values()):
        raise WeightsError(f"{name}: holds several networks, behind {', '.join(prefixes)}: which one is meant?")
    return (
        {kind: {k: v for k, v in state.items() if k.startswith(found[0])} for kind, found in kinds.items()},
        {kind: f"{where or 'its keys'} behind {found[0]}" for kind, found in kinds.items()},
    )


def _prefixes(state: Mapping[str, Any]) -> list[str]:
    """What stands before the token table, wherever one is: "" or ending in a dot."""
    found = {}
    for key in state:
        token = next((token for token in _TOKENS if key == token or key.endswith(f".{token}")), None)
        if token is not None:
            found[key.removesuffix(token)] = None
    return list(found)


def _flat(state: Mapping[Any, Any], name: str) -> dict[str, Tensor]:
    """Tensors alone, without the prefix; a key that is not behind it keeps its name, for the checks to find."""
    tensors = _checked(state, name)
    prefixes = _prefixes(tensors)
    if len(prefixes) == 1 and prefixes[0]:
        if _COUNTER in tensors:
            del tensors[_COUNTER]
        return {key.removeprefix(prefixes[0]): value for key, value in tensors.items()}
    while prefix := next((p for p in _WRAPPERS if tensors and all(key.startswith(p) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _lacks_statistics(content: Mapping[Any, Any], states: Mapping[bool, Mapping[str, Tensor]]) -> bool:
    """Whether the average lacks them, or its norms never saw an image: its counters of batches are 0, the others' not.

    A run of ours estimates them at each evaluation, so before its first one there are none that fit.
    """
    if _is_run(content):
        return not content["progress"].get("validation")
    if False in states and not states[False].keys() <= states[True].keys():
        return True
    counters = {
        kind: [v for k, v in state.items() if k.endswith("num_batches_tracked")] for kind, state in states.items()
    }
    seen = {kind: any(bool((value > 0).any()) for value in values) for kind, values in counters.items()}
    return bool(counters[True]) and not seen[True] and seen.get(False, False)


def _header(content: Mapping[Any, Any]) -> dict[str, str]:
    header = content.get(KEY)
    if not isinstance(header, Mapping):
        return {}
    return {key: value for key, value in header.items() if isinstance(key, str) and isinstance(value, str)}


def _is_run(content: Mapping[Any, Any]) -> bool:
    """Whether this is the checkpoint that `mobileformer train` goes on from."""
    return all(isinstance(content.get(key), Mapping) for key in ("recipe", "progress", "model"))


def _run(content: Mapping[Any, Any]) -> dict[str, Any]:
    """What a training run's checkpoint says of its weights; in one from before it did, what its recipe says."""
    if not _is_run(content):
        return {}
    description = content.get("description")
    if isinstance(description, Mapping):
        told = {key: description.get(key) for key in _DESCRIBED}
        return {key: tuple(value) if isinstance(value, list) else value for key, value in told.items() if value}
    recipe, progress = content["recipe"], content["progress"]
    told: dict[str, Any] = {"crop_fraction": recipe.get("crop_fraction")}
    try:
        done = (progress["epoch"] - 1) / (recipe["epochs"] + recipe["cooldown_epochs"])
        sides = [side for start, side in recipe["sizes"] if max(done, 0) >= start]
        told["input_size"] = int(recipe["evaluation_size"] or sides[-1])
        told["mean"], told["std"] = (tuple(map(float, recipe[key])) for key in ("mean", "std"))
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError):
        pass  # of another version: what could be read is still true
    return {key: value for key, value in told.items() if value}
