"""The model on the Hugging Face hub: `from_pretrained`, `save_pretrained`, `push_to_hub`.

    from mobileformer.hub import Model
    Model.from_weights("mine.safetensors").push_to_hub("me/mine")
    model = Model.from_pretrained("me/mine")

A repository, or a folder, holds

    model.safetensors  what `mobileformer.save_weights` writes: `load_model`, `mobileformer predict` and
                       `mobileformer convert ... --fold` take it as it is
    config.json        what that file says of itself, for the hub and for eyes
    README.md          the model card
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mobileformer.files.metadata import Metadata, check, describe
from mobileformer.files.replacing import replacing
from mobileformer.models import Model as _Model
from mobileformer.network.classifier import unwrap
from mobileformer.weights.card import card_text
from mobileformer.weights.load import load_weights, read_metadata, save_weights
from mobileformer.weights.stem import adapt_numbers

try:
    from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin, constants, hf_hub_download
except ImportError as error:
    raise ImportError(f"mobileformer.hub needs huggingface_hub ({error}): pip install 'mobileformer[hub]'") from error

__all__ = ["Model"]

_TOLD = ("labels", "mean", "std", "input_size", "crop_fraction")


class Model(
    _Model,
    PyTorchModelHubMixin,
    library_name="mobileformer",
    pipeline_tag="image-classification",
    tags=["mobile-former"],
    paper_url="https://arxiv.org/abs/2108.05895",
):
    """`mobileformer.Model` that reads and writes repositories of the Hugging Face hub, and folders like them.

    =============  ======================================================================================
    argument       meaning
    =============  ======================================================================================
    labels         one name a class, in order
    mean, std      one number a channel, what the input is normalised with (pixels in [0, 1]); for 3
                   channels ImageNet's when not given
    input_size     side of the square that the weights were trained for, in pixels
    crop_fraction  what that square is of the short side of the resized image, in (0, 1]
    =============  ======================================================================================

    The others are the model's. Raises ValueError for an argument out of range, and when there are not as many labels
    as classes or numbers as channels.

    `from_pretrained(name_or_folder, **arguments)` gives the model in evaluation mode; arguments stand in place of what
    the folder says, for instance `use_fused=False`. `num_classes=N, strict=False` gives it a new last layer for N
    classes. `map_location` is the device. Whatever dtype the file has, the parameters are float32. Raises as
    `load_weights`, and as huggingface_hub for what cannot be fetched.

    `save_pretrained(folder)` and `push_to_hub(name)` write the three files; a README.md that is there already stays.
    `model_card_kwargs` is for the head of the card, `license` and `datasets` above all.
    """

    same_numbers = True

    def __init__(
        self,
        variant: str = "294m",
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        use_fused: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        spatial_dynamic_relu: bool = False,
        labels: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_size: int | None = None,
        crop_fraction: float | None = None,
    ) -> None:
        super().__init__(
            variant,
            num_classes=num_classes,
            in_chans=in_chans,
            use_fused=use_fused,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            spatial_dynamic_relu=spatial_dynamic_relu,
        )
        told = describe(self, labels=labels, mean=mean, std=std, input_size=input_size, crop_fraction=crop_fraction)
        self.labels, self.mean, self.std = told.labels, told.mean, told.std
        self.input_size, self.crop_fraction = told.input_size, told.crop_fraction

    @classmethod
    def from_model(cls, model: _Model, **told: Any) -> Model:
        """A model with a copy of these weights; labels, mean, std, input_size and crop_fraction as arguments.

        Dropout and stochastic depth, which no file holds, are 0. Raises TypeError for anything but a model,
        RuntimeError for one whose layers are others.
        """
        source = unwrap(model)
        made = cls.from_metadata(source, use_fused=source.use_fused, **told)
        made.to(device=source.tokens.device, dtype=source.tokens.dtype).load_state_dict(source.state_dict())
        return made.train(source.training)

    @classmethod
    def from_weights(cls, path: str | os.PathLike[str], **arguments: Any) -> Model:
        """The model that a file of weights describes, ours or a published checkpoint, in evaluation mode.

        Arguments stand in place of what the file says. Raises as `load_weights`.
        """
        return cls._from_file(path, strict=True, **arguments)

    @property
    def metadata(self) -> Metadata:
        """What its file says of it."""
        return describe(self, **self._told())

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Write the three files to a repository of the hub. Arguments, and what is raised, are huggingface_hub's."""
        kwargs["model_card_kwargs"] = {"repo_id": repo_id, **(kwargs.get("model_card_kwargs") or {})}
        return super().push_to_hub(repo_id, **kwargs)

    def generate_model_card(self, repo_id: str | None = None, **head: Any) -> ModelCard:
        """The card: what the network is, what it takes and gives, what it costs, how to load it."""
        data = self._hub_mixin_info.model_card_data.to_dict()
        text = card_text(self.metadata, sum(p.numel() for p in self.parameters()), repo_id)
        return ModelCard(f"---\n{ModelCardData(**{**data, **head}).to_yaml()}\n---\n\n{text}")

    def _told(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _TOLD}

    def _save_pretrained(self, save_directory: Path) -> None:
        save_weights(self, save_directory / constants.SAFETENSORS_SINGLE_FILE, **self._told())
        config = {name: value for name, value in _arguments(self.metadata).items() if value is not None}
        with replacing(save_directory / constants.CONFIG_NAME) as temporary:
            temporary.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str | torch.device = "cpu",
        strict: bool = True,
        **model_kwargs: Any,
    ) -> Model:
        if os.path.isdir(model_id):
            path = os.path.join(model_id, constants.SAFETENSORS_SINGLE_FILE)
        else:
            path = hf_hub_download(
                model_id,
                constants.SAFETENSORS_SINGLE_FILE,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                token=token,
                local_files_only=local_files_only,
            )
        return cls._from_file(path, strict=strict, **model_kwargs).to(map_location)

    @classmethod
    def _from_file(cls, path: str | os.PathLike[str], *, strict: bool, **arguments: Any) -> Model:
        told = _arguments(read_metadata(path))
        asked = {**told, **arguments}
        if asked["num_classes"] != told["num_classes"]:
            if strict:
                raise ValueError(
                    f"num_classes: {path} holds {told['num_classes']}, asked for {asked['num_classes']}; "
                    "strict=False gives the model a last layer of its own"
                )
            if len(asked["labels"] or ()) != asked["num_classes"]:
                asked["labels"] = None  # those of the layer that is left out
        if asked["in_chans"] != told["in_chans"]:
            if strict:
                raise ValueError(
                    f"in_chans: {path} holds {told['in_chans']}, asked for {asked['in_chans']}; "
                    "strict=False adapts the first convolution"
                )
            for key in ("mean", "std"):
                if asked[key] == told[key] and asked[key] is not None:
                    asked[key] = adapt_numbers(asked[key], asked["in_chans"])
        # Before a model is made: config.json, whose words are among the arguments, is anybody's text.
        check(Metadata(**{key: asked[key] for key in told}))
        model = cls(**asked)
        load_weights(model, path, allow_new_head=not strict, allow_new_channels=not strict)
        return model.eval()


def _arguments(metadata: Metadata) -> dict[str, Any]:
    """What a file says, as a `Model` takes it. The task is no argument: it is what the class is for, with no others."""
    return {name: value for name, value in asdict(metadata).items() if name not in ("task", "arguments")}
