"""The hub: a folder that holds the model bit for bit, its card, and what goes over the wire (to a hub made up here)."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.hub_mixin
import pytest
import torch
from golden_support import recipe_model
from huggingface_hub import ModelCard
from tiny_support import tiny_variants
from torch import Tensor, nn
from weights_support import states_equal

import mobileformer
from mobileformer import WeightsError, hub
from mobileformer.data import sample_photo
from mobileformer.files.metadata import Metadata
from mobileformer.inference import Engine, fold
from mobileformer.measure.difference import lively_weights_
from mobileformer.race.published import MADDS
from mobileformer.weights.card import multiply_adds

TOLD = {"labels": ["tench", "great | white\nshark", "Bär"], "input_size": 64, "crop_fraction": 0.9}


@pytest.fixture(scope="module", autouse=True)
def variants() -> Iterator[None]:
    """What is saved and fetched is a small network."""
    with tiny_variants():
        yield


def small_model(**kwargs: Any) -> hub.Model:
    model = hub.Model("tiny", **{"num_classes": 3, **TOLD, **kwargs})
    lively_weights_(model)
    return model.eval()


def image(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `small_model` saves."""
    path = tmp_path_factory.mktemp("hub") / "saved"
    small_model().save_pretrained(path)
    return path


# A folder


def test_a_folder_gives_the_model_back_bit_for_bit(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    model, again = small_model(), hub.Model.from_pretrained(folder)
    assert states_equal(again, model)
    assert again.metadata == model.metadata
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(image()), model(image()))


@pytest.mark.parametrize("kwargs", [{"in_chans": 1, "mean": [0.3], "std": [0.4]}, {"spatial_dynamic_relu": True}])
def test_what_the_file_tells_comes_back(kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = small_model(labels=None, **kwargs)
    model.save_pretrained(tmp_path)
    again = hub.Model.from_pretrained(tmp_path)
    assert again.metadata == model.metadata
    assert states_equal(again, model)


def test_its_file_of_weights_is_ours(folder: Path) -> None:
    """`load_model` and the engine take it, and say what it says."""
    path = folder / "model.safetensors"
    plain = mobileformer.load_model(path)
    assert type(plain) is mobileformer.Model
    assert states_equal(plain, small_model())
    metadata = mobileformer.read_metadata(path)
    assert metadata == small_model().metadata
    assert (metadata.labels, metadata.input_size) == (tuple(TOLD["labels"]), 64)
    with torch.no_grad():
        expected = small_model()(image()).numpy()
    assert abs(Engine(fold(plain))(image().numpy()) - expected).max() < 1e-4
    assert abs(Engine(fold(small_model()))(image().numpy()) - expected).max() < 1e-4


def test_the_configuration_is_what_the_file_tells(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["variant"] == "tiny"
    assert config["labels"] == TOLD["labels"]
    assert config.keys() <= Metadata.__dataclass_fields__.keys()


def test_a_folder_without_a_configuration(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "model.safetensors", tmp_path)
    assert hub.Model.from_pretrained(tmp_path).metadata == small_model().metadata


def test_arguments_stand_in_place_of_what_the_folder_says(folder: Path) -> None:
    model = hub.Model.from_pretrained(folder, use_fused=False, drop_rate=0.25, labels=["a", "b", "c"])
    assert (model.use_fused, model.head.dropout.p, model.labels) == (False, 0.25, ("a", "b", "c"))
    assert states_equal(model, small_model())
    assert hub.Model.from_pretrained(folder, map_location="meta").tokens.device.type == "meta"


def test_another_number_of_classes_has_to_be_meant(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"num_classes: .* holds 3, asked for 5; strict=False"):
        hub.Model.from_pretrained(folder, num_classes=5)
    model = hub.Model.from_pretrained(folder, num_classes=5, strict=False)
    assert model.labels is None
    assert model(image()).shape == (2, 5)
    own, expected = model.state_dict(), small_model().state_dict()
    assert all(torch.equal(own[key], expected[key]) for key in own if not key.startswith("head.classifier"))


def test_what_does_not_belong_together_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "other/config.json").write_text(json.dumps({**config, "variant": "52m"}), encoding="utf-8")
    with pytest.raises(WeightsError, match="holds the variant tiny, the model is 52m"):
        hub.Model.from_pretrained(tmp_path / "other")
    (tmp_path / "other/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        hub.Model.from_pretrained(tmp_path / "other")


# Models and files that were there before


def test_from_a_model_and_from_files(tmp_path: Path) -> None:
    trained = recipe_model("tiny", dtype=torch.float32, num_classes=3, drop_rate=0.1)
    model = hub.Model.from_model(trained, **TOLD)
    assert states_equal(model, trained)
    assert model.labels == tuple(TOLD["labels"])
    with torch.no_grad():
        trained.tokens.zero_()
    assert model.tokens.any()
    mobileformer.save_weights(model, tmp_path / "ours.safetensors", labels=TOLD["labels"])
    mobileformer.save_official_checkpoint(model, tmp_path / "published.pth.tar")
    ours = hub.Model.from_weights(tmp_path / "ours.safetensors")
    published = hub.Model.from_weights(tmp_path / "published.pth.tar")
    assert states_equal(ours, model)
    assert states_equal(published, model)
    assert (ours.labels, published.labels) == (tuple(TOLD["labels"]), None)


def test_a_model_with_other_layers_is_refused() -> None:
    model = mobileformer.Model("tiny", num_classes=3)
    model.head.register_module("classifier", nn.Sequential(model.head.classifier))
    with pytest.raises(RuntimeError, match=r"head\.classifier"):
        hub.Model.from_model(model)
    with pytest.raises(TypeError, match=r"expected a mobileformer\.Model"):
        hub.Model.from_model(nn.Linear(2, 2))


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="labels: expected 3"):
        hub.Model("tiny", num_classes=3, labels=["one"])


def test_copies_and_pickles() -> None:
    model = small_model()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert states_equal(twin, model)
        assert twin.metadata == model.metadata
    assert model.to_inference().engine is not None


# The card


def test_the_card_says_what_the_model_is(folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "mobileformer"
    assert card.data.pipeline_tag == "image-classification"
    rows = dict(re.findall(r"^\| ([\w -]+) \| (.*) \|$", card.text, re.MULTILINE))
    assert rows["variant"] == "tiny"
    assert rows["classes"] == r"3: tench, great \| white shark, Bär"
    assert rows["parameters"] == "103 539"
    assert rows["input"].startswith("(B, 3, H, W)")
    assert rows["input"].endswith("trained for 64 x 64")
    assert "torch.utils.flop_counter" in rows["multiply-adds"]
    assert "64 x 64" in rows["multiply-adds"]


def test_the_head_of_the_card_is_anybodys(tmp_path: Path) -> None:
    """And a card that is there already stays."""
    model = small_model()
    model.save_pretrained(tmp_path, model_card_kwargs={"license": "mit", "datasets": ["mnist"]})
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.datasets) == ("mit", ["mnist"])
    (tmp_path / "README.md").write_text("mine\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine\n"


@pytest.mark.parametrize("kwargs", [{}, {"in_chans": 1, "mean": [0.5], "std": [0.5]}, {"in_chans": 2}])
def test_the_code_of_the_card_runs(kwargs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_model(**kwargs).save_pretrained(tmp_path / "saved")
    shutil.copy(sample_photo(), tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", Path("saved/README.md").read_text(encoding="utf-8"), re.DOTALL)
    made: dict[str, Any] = {}
    exec(code.replace("PATH_OR_REPOSITORY", "saved"), made)
    name = "logits" if kwargs.get("in_chans") == 2 else "probabilities"
    assert made[name].shape == (1, 3)
    assert torch.isfinite(made[name]).all()


def test_multiply_adds_are_those_of_the_table() -> None:
    counted = multiply_adds(Metadata("26m", num_classes=1000, in_chans=3), 224)
    assert counted == round(MADDS["26m"]["conv+linear+matmul"] * 1e6)


# The wire


@pytest.fixture
def repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that is a folder: what is uploaded lies there, and what is downloaded comes from there."""

    class Api:
        def __init__(self, token: str | None = None) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> SimpleNamespace:
            (tmp_path / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: Path, **kwargs: Any) -> str:
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)
            return f"sent: {kwargs['commit_message']}"

    def download(repo_id: str, filename: str, *, revision: str | None, **kwargs: Any) -> str:
        assert revision == "v1"
        return str(tmp_path / repo_id / filename)

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", download)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    return tmp_path


def test_pushed_and_fetched(repositories: Path) -> None:
    model = small_model()
    told = model.push_to_hub(
        "me/mine", token="secret", commit_message="First", model_card_kwargs={"license": "apache-2.0"}
    )
    assert told == "sent: First"
    card = ModelCard.load(repositories / "me/mine/README.md")
    assert card.data.license == "apache-2.0"
    assert 'Model.from_pretrained("me/mine")' in card.text
    again = hub.Model.from_pretrained("me/mine", revision="v1")
    assert states_equal(again, model)
    assert again.metadata == model.metadata
