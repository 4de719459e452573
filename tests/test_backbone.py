"""The backbone: the maps that it hands on, and weights that follow the seed whatever a network adds behind it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from golden_support import recipe_image
from torch import Tensor, nn

from mobileformer import VARIANTS, Model
from mobileformer.files.metadata import Metadata, describe
from mobileformer.measure.difference import lively_weights_
from mobileformer.network.backbone import Backbone
from mobileformer.network.classifier import Classifier


def backbone_of(model: Model) -> Backbone:
    """A backbone by itself, with the classifier's weights."""
    backbone = Backbone(model.variant, in_chans=model.in_chans, use_fused=model.use_fused).to(model.tokens.dtype)
    own = backbone.state_dict()
    backbone.load_state_dict({key: value for key, value in model.state_dict().items() if key in own})
    return backbone.train(model.training)


def lively(variant: str, *, use_fused: bool = True) -> Model:
    model = Model(variant, use_fused=use_fused).double().eval()
    lively_weights_(model)
    return model


def by_hooks(model: Model, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What every block of a whole network gives."""
    given: list[tuple[Tensor, Tensor]] = []
    hooks = [block.register_forward_hook(lambda m, args, out: given.append(out)) for block in model.blocks]
    model(x)
    for hook in hooks:
        hook.remove()
    return given


@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_are_those_of_the_last_block_of_each_stride(variant: str) -> None:
    model, x = lively(variant, use_fused=False), torch.randn(1, 3, 70, 97, dtype=torch.float64)
    with torch.no_grad():
        given = by_hooks(model, x)
        maps, tokens = backbone_of(model).maps(x)
        features, after = model.forward_features(x)
    sizes = [(math.ceil(70 / stride), math.ceil(97 / stride)) for stride in (4, 8, 16, 32)]
    assert [tuple(m.shape[2:]) for m in maps] == sizes
    last = {tuple(y.shape[2:]): y for y, _ in given}  # by size, of which the last one stays
    assert all(torch.equal(m, last[size]) for m, size in zip(maps, sizes, strict=True))
    assert [m.shape[1] for m in maps] == [stage.channels for stage in model.config.stages]
    assert torch.equal(tokens, given[-1][1])
    assert torch.equal(maps[-1], features)
    assert torch.equal(model.mobile_to_former(maps[-1], tokens), after)


@pytest.mark.parametrize("variant", ["26m", "294m"])
def test_fused_maps_are_the_plain_ones(variant: str) -> None:
    model, x = lively(variant), recipe_image(2, 64, 64, seed=5)
    plain = lively(variant, use_fused=False)
    with torch.no_grad():
        maps, tokens = model.maps(x)
        expected, expected_tokens = plain.maps(x)
    for actual, truth in zip([*maps, tokens], [*expected, expected_tokens], strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-9, atol=1e-9)


def test_gradients_reach_every_parameter_but_the_last_tokens() -> None:
    backbone = Backbone("26m").train()
    backbone.set_grad_checkpointing()
    maps, tokens = backbone.maps(torch.randn(2, 3, 64, 64))
    (sum(m.square().mean() for m in maps) + tokens.square().mean()).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_a_backbone_begins_the_state_of_every_network() -> None:
    with torch.device("meta"):
        own, whole = Backbone("96m").state_dict(), Model("96m").state_dict()
    assert list(own) == list(whole)[: len(own)]
    assert all(key.startswith(("mobile_to_former.", "head.")) for key in list(whole)[len(own) :])


def test_a_backbone_by_itself_is_initialised() -> None:
    torch.manual_seed(0)
    backbone = Backbone("52m")
    assert 0.9 < backbone.tokens.std().item() < 1.1
    assert not any(m.bias.any() for m in backbone.modules() if isinstance(m, nn.Linear))


class Detector(Backbone):
    """As one that adds parts is written."""

    def __init__(self, variant: str) -> None:
        super().__init__(variant, initialise=False)
        self.boxes = nn.Linear(self.config.feature_channels, 4)
        self.initialise()


@pytest.mark.parametrize(("variant", "seed"), [("26m", 0), ("96m", 7)])
@pytest.mark.parametrize("kind", [Classifier, Model, Detector])
def test_the_same_seed_gives_the_same_weights_in_every_release(kind: type[Backbone], variant: str, seed: int) -> None:
    """Layers draw as they are made, in the order of the state dict; then the tokens; then every linear layer again."""
    torch.manual_seed(seed)
    network = kind(variant)
    torch.manual_seed(seed)
    expected: dict[str, Tensor] = {}
    linear = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            made = nn.Conv2d(
                module.in_channels, module.out_channels, module.kernel_size, groups=module.groups, bias=False
            )
            std = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            expected[f"{name}.weight"] = nn.init.normal_(made.weight, std=std)
        elif isinstance(module, nn.Linear):
            linear.append((name, nn.Linear(module.in_features, module.out_features)))
    expected["tokens"] = torch.randn(network.tokens.shape)
    for name, made in linear:
        expected[f"{name}.weight"] = nn.init.normal_(made.weight, std=0.01)
    state = network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert {key for key in state if state[key].ndim > 1} == set(expected)


def test_a_network_is_made_from_what_is_told_of_it() -> None:
    metadata = Metadata("26m", num_classes=5, in_chans=1, spatial_dynamic_relu=True, labels=tuple("abcde"))
    with torch.device("meta"):
        model = Model.from_metadata(metadata, use_fused=False)
        again = Classifier.from_metadata(model, num_classes=2)
    assert type(model) is Model
    assert describe(model) == dataclasses.replace(metadata, labels=None)
    assert not model.use_fused
    assert type(again) is Classifier
    assert (again.num_classes, again.in_chans, again.spatial_dynamic_relu, again.use_fused) == (2, 1, True, True)


def test_what_is_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"in_chans: expected an integer of at least 1, got 0"):
        Backbone(in_chans=0)
    with pytest.raises(ValueError, match=r"drop_path_rate: expected a number in \[0, 1\), got 1.0"):
        Backbone(drop_path_rate=1.0)
    with pytest.raises(ValueError, match=r"x: expected height and width of at least 32, got 31 x 64"):
        Backbone("26m").maps(torch.zeros(1, 3, 31, 64))
