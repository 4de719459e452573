"""Checkpoints as training scripts write them: weights below keys and behind prefixes, raw and averaged."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_support import recipe_model
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from weights_support import states_equal, unchanged

from mobileformer import Model, WeightsError, load_model, load_weights, official_state_dict, read_metadata
from mobileformer.weights.stem import adapt_channels

SMALL = "26m"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def raw() -> Model:
    return recipe_model(SMALL, dtype=torch.float32)


@pytest.fixture(scope="module")
def mean(raw: Model) -> Model:
    """Other parameters than `raw` has, under the same norms."""
    model = Model(SMALL).eval()
    model.load_state_dict({k: v * 0.5 if v.is_floating_point() else v + 1 for k, v in raw.state_dict().items()})
    return model


def behind(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


ONE: dict[str, Callable[[State], dict]] = {
    "model": lambda s: {"model": s, "optimizer": {"state": {}}, "epoch": 3},
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": 0.5},
    "net": lambda s: {"net": s, "acc": 91.0},
    "nested twice": lambda s: {"model": {"state_dict": behind("module.", s)}},
    "module.": lambda s: behind("module.", s),
    "backbone.": lambda s: {"state_dict": behind("backbone.", s)},
    "model.": lambda s: {"state_dict": behind("model.", s), "hyper_parameters": {"lr": 0.1}},
    "a prefix of nobody's": lambda s: behind("student.encoder._orig_mod.", s),
    "state_dict_ema": lambda s: {"state_dict_ema": s},
    "model_ema": lambda s: {"model_ema": behind("module.", s), "epoch": 1},
    "ema": lambda s: {"ema": {"module": s, "decay": 0.99}},
}


NAMINGS = ("published", "ours")


@pytest.mark.parametrize(
    ("form", "names"), [(form, names) for number, form in enumerate(ONE) for names in NAMINGS[: 1 + (number % 4 == 1)]]
)
def test_weights_are_found_wherever_they_lie(raw: Model, tmp_path: Path, form: str, names: str) -> None:
    state = dict(raw.state_dict() if names == "ours" else official_state_dict(raw))
    path = tmp_path / "c.pth"
    torch.save(ONE[form](state), path)
    assert read_metadata(path).variant == SMALL
    assert states_equal(raw, load_model(path))
    for source in (path, ONE[form](state)):
        fresh = Model(SMALL)
        load_weights(fresh, source)
        assert states_equal(raw, fresh)


def test_the_counter_of_an_averaged_model_is_no_weight(raw: Model) -> None:
    fresh = Model(SMALL)
    load_weights(fresh, AveragedModel(raw).state_dict())
    assert states_equal(raw, fresh)


def test_what_is_not_behind_the_prefix_is_named(raw: Model) -> None:
    state = {**behind("backbone.", dict(raw.state_dict())), "neck.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"unexpected: neck\.weight"):
        load_weights(Model(SMALL), state)


BOTH: dict[str, Callable[[State, State], dict]] = {
    "timm": lambda r, a: {"state_dict": r, "state_dict_ema": a},
    "deit": lambda r, a: {"model": r, "model_ema": a, "optimizer": {}},
    "ema": lambda r, a: {"state_dict": r, "ema": {"module": a}},
    "prefixes": lambda r, a: {"state_dict": behind("model.", r) | behind("ema_model.module.", a)},
}


@pytest.mark.parametrize("form", BOTH)
def test_of_two_the_average_is_taken_and_told(raw: Model, mean: Model, tmp_path: Path, form: str) -> None:
    path = tmp_path / "c.pth"
    torch.save(BOTH[form](dict(raw.state_dict()), dict(mean.state_dict())), path)
    with pytest.warns(UserWarning, match=r"c\.pth: holds raw weights .* and their average .*; the average is taken"):
        assert states_equal(load_model(path), mean)
    assert states_equal(load_model(path, average=True), mean)
    assert states_equal(load_model(path, average=False), raw)
    fresh = Model(SMALL)
    with pytest.warns(UserWarning, match="the average is taken"):
        load_weights(fresh, path)
    assert states_equal(fresh, mean)
    load_weights(fresh, path, average=False)
    assert states_equal(fresh, raw)


def test_timms_door_takes_the_same(raw: Model, mean: Model, tmp_path: Path) -> None:
    pytest.importorskip("mobileformer.timm", exc_type=ImportError)
    import timm

    path = tmp_path / "c.pth"
    torch.save(BOTH["timm"](dict(raw.state_dict()), dict(mean.state_dict())), path)
    theirs = timm.create_model("mobileformer_26m", checkpoint_path=str(path))
    assert states_equal(theirs, load_model(path, average=True))


@pytest.mark.parametrize("fault", ["without statistics", "parameters alone"])
def test_an_average_that_fits_no_norms_is_not_taken(raw: Model, mean: Model, fault: str) -> None:
    average = dict(mean.state_dict())
    seen = {key: torch.ones_like(v) if key.endswith("tracked") else v for key, v in raw.state_dict().items()}
    if fault == "parameters alone":
        average = {key: value for key, value in average.items() if key in dict(mean.named_parameters())}
    else:
        average = {k: torch.zeros_like(v) if k.endswith("tracked") else v for k, v in average.items()}
    fresh = Model(SMALL)
    with pytest.warns(UserWarning, match="the raw ones are taken, since the average has no BatchNorm statistics"):
        load_weights(fresh, {"state_dict": seen, "state_dict_ema": average})
    assert all(torch.equal(value, seen[key]) for key, value in fresh.state_dict().items())
    with pytest.raises(WeightsError, match="no BatchNorm statistics of its own"):
        load_weights(fresh, {"state_dict": seen, "state_dict_ema": average}, average=True)


def test_what_is_asked_for_and_not_there_is_refused(raw: Model) -> None:
    state, model = dict(raw.state_dict()), Model(SMALL)
    with pytest.raises(WeightsError, match=r"holds no average weights, only raw ones \(model\)"):
        load_weights(model, {"model": state}, average=True)
    with pytest.raises(WeightsError, match=r"holds no raw weights, only average ones \(ema\)"):
        load_weights(model, {"ema": state}, average=False)
    with pytest.raises(WeightsError, match=r"several networks, behind teacher\., student\."):
        load_weights(model, behind("teacher.", state) | behind("student.", state))
    with pytest.raises(ValueError, match="average: expected True, False or None, got 'yes'"):
        load_weights(model, state, average="yes")  # type: ignore[arg-type]


# Channels


@pytest.mark.parametrize(("have", "want"), [(1, 3), (3, 1), (3, 4), (2, 5), (4, 3), (3, 3)])
def test_the_stem_is_adapted_only_where_asked(have: int, want: int) -> None:
    torch.manual_seed(0)
    source, model = Model(SMALL, in_chans=have), Model(SMALL, in_chans=want)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if have != want:
        with pytest.raises(WeightsError, match=r"stem.conv.weight is .*allow_new_channels=True"):
            load_weights(model, source.state_dict())
        assert unchanged(model, before)
    load_weights(model, official_state_dict(source), allow_new_channels=True)
    old, new = source.stem.conv.weight, model.stem.conv.weight
    for channel in range(want):
        expected = old.sum(1) if want == 1 else old[:, channel % have] * (have / want)
        torch.testing.assert_close(new[:, channel], expected)
    rest = {key for key in before if key != "stem.conv.weight"}
    assert all(torch.equal(model.state_dict()[key], source.state_dict()[key]) for key in rest)
    if 1 in (have, want):  # a grey image in all channels is the same to both
        grey = torch.randn(1, 1, 32, 32)
        old_out, new_out = (m.eval()(grey.expand(-1, m.in_chans, -1, -1)) for m in (source, model))
        torch.testing.assert_close(old_out, new_out, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("have", "want"), [(1, 3), (3, 1), (3, 5), (4, 3)])
def test_the_stem_is_adapted_as_timm_does(have: int, want: int) -> None:
    pytest.importorskip("mobileformer.timm", exc_type=ImportError)
    from timm.models import adapt_input_conv

    weight = torch.randn(8, have, 3, 3)
    torch.testing.assert_close(adapt_channels(weight, want), adapt_input_conv(want, weight, base_chans=have))


# Other dtypes in files


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_of_any_width_is_converted(raw: Model, tmp_path: Path, dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in raw.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    loaded = load_model(tmp_path / "w.safetensors")
    assert all(torch.equal(v, state[k].to(v.dtype)) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_what_is_no_floating_point_is_refused(raw: Model, tmp_path: Path, dtype: torch.dtype) -> None:
    state = {**raw.state_dict(), "tokens": raw.tokens.detach().to(dtype)}
    torch.save(state, tmp_path / "w.pth")
    for read in (lambda: load_model(tmp_path / "w.pth"), lambda: load_weights(Model(SMALL), state)):
        with pytest.raises(WeightsError, match=f"wrong dtype: tokens is {re.escape(str(dtype))}"):
            read()
