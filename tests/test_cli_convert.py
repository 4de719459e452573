"""`mobileformer convert`, `info` and `export` on checkpoints of other forms."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_support import NAMES, make_files, run, run_json
from tiny_support import tiny_variants
from weights_support import states_equal

import mobileformer
from mobileformer.training.average import Average
from mobileformer.training.recipe import read_recipe
from mobileformer.training.state import Progress, save_state

pytestmark = pytest.mark.filterwarnings("ignore::mf_kernels.KernelFallbackWarning")


@pytest.fixture(scope="module", autouse=True)
def variants() -> Iterator[None]:
    """The weights are of small networks."""
    with tiny_variants():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("convert"), "tiny")


def stopped_run(
    path: Path, *, evaluated: bool, averaged: bool = True, description: dict | None = None
) -> tuple[mobileformer.Model, mobileformer.Model]:
    """(raw, average) whose run's checkpoint is written."""
    recipe = read_recipe("fashion-mnist", ["variant=tiny_ungrouped", "mean=[0.2]", "std=[0.3]"])
    raw = mobileformer.Model(recipe.variant, num_classes=4, in_chans=1).eval()
    average = Average(raw, 0.99).model
    with torch.no_grad():
        raw.tokens.mul_(2)
    progress = Progress(epoch=int(evaluated), validation={"top1": 50.0} if evaluated else {})
    save_state(
        path, recipe, progress, model=raw.state_dict(), optimizer={"state": {}},
        average=average.state_dict() if averaged else None, description=description,
    )  # fmt: skip
    return raw, average


@pytest.mark.parametrize("evaluated", [False, True])
def test_the_checkpoint_of_a_stopped_run_becomes_weights(tmp_path: Path, evaluated: bool) -> None:
    checkpoint, out = tmp_path / "checkpoint.pt", tmp_path / "out.safetensors"
    raw, average = stopped_run(checkpoint, evaluated=evaluated)
    told = run("convert", checkpoint, out).stderr
    assert f"the {'average is' if evaluated else 'raw ones are'} taken" in told
    assert states_equal(mobileformer.load_model(out), average if evaluated else raw)
    metadata = mobileformer.read_metadata(out)
    assert (metadata.num_classes, metadata.in_chans, metadata.mean, metadata.std) == (4, 1, (0.2,), (0.3,))
    assert metadata.input_size
    assert metadata.crop_fraction
    report = run_json("info", checkpoint)
    assert (report["form"], report["num_classes"]) == ("checkpoint of a training run", 4)
    run("convert", checkpoint, out, "--force", "--weights-of", "raw")
    assert states_equal(mobileformer.load_model(out), raw)
    if not evaluated:
        failure = run_json("convert", checkpoint, out, "--force", "--weights-of", "average", code=1)
        assert "no BatchNorm statistics of its own" in failure["error"]


def test_what_a_run_knows_of_its_data_becomes_the_weights_text(tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "checkpoint.pt", tmp_path / "out.safetensors"
    told = {"labels": ["b", "ä", "c", "d"], "mean": [0.25], "std": [0.5], "input_size": 80, "crop_fraction": 0.9}
    network = {"variant": "tiny_ungrouped", "num_classes": 4, "in_chans": 1, "spatial_dynamic_relu": False}
    stopped_run(checkpoint, evaluated=False, description={**network, **told})
    run("convert", checkpoint, out)
    metadata = mobileformer.read_metadata(out)
    assert {key: getattr(metadata, key) for key in told} == {
        k: tuple(v) if isinstance(v, list) else v for k, v in told.items()
    }
    stopped_run(checkpoint, evaluated=False, description={**network, **told, "labels": 7})
    assert "does not fit" in run_json("convert", checkpoint, out, "--force", code=1)["error"]


def test_a_run_without_an_average(tmp_path: Path) -> None:
    raw, _ = stopped_run(tmp_path / "checkpoint.pt", evaluated=False, averaged=False)
    assert states_equal(mobileformer.load_model(tmp_path / "checkpoint.pt"), raw)


def test_there_and_back_keeps_what_the_file_says(folder: Path, tmp_path: Path) -> None:
    between, back = tmp_path / "b.pth.tar", tmp_path / "c.safetensors"
    report = run_json("convert", folder / "named.safetensors", between)
    assert report["labels"]
    run("convert", between, back)
    first = folder / "named.safetensors"
    assert mobileformer.read_metadata(back) == mobileformer.read_metadata(first)
    assert mobileformer.read_metadata(back).labels == tuple(NAMES)
    assert states_equal(mobileformer.load_model(back), mobileformer.load_model(first))


def test_a_published_file_takes_names(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    run("convert", folder / "plain.safetensors", tmp_path / "b.pth", "--labels", tmp_path / "names.txt")
    assert mobileformer.read_metadata(tmp_path / "b.pth").labels == tuple(NAMES)


def test_writing_through_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    link, target = tmp_path / "w.safetensors", tmp_path / "store" / "kept.bin"
    link.symlink_to(target)
    for force in ([], ["--force"]):  # what it points to is not there yet; is there
        run("convert", folder / "plain.safetensors", link, *force)
        assert link.is_symlink()
        assert not target.is_symlink()
        assert mobileformer.read_metadata(target).num_classes == 7
    assert [entry.name for entry in target.parent.iterdir()] == ["kept.bin"]


def test_export_goes_by_the_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    class Asked(ValueError):
        pass

    def export_model(model: mobileformer.Model, path: Path, target: str, **_: object) -> None:
        asked.append((model.variant, target))
        raise Asked("stops here")

    monkeypatch.setattr("mobileformer.export.export_model", export_model)
    for name in ("b.pte", "b.ONNX", "b.pt2"):
        assert "stops here" in run("export", tmp_path / name, code=1).stderr
    run("export", tmp_path / "b.pt2", "--to", "aotinductor", code=1)
    runtimes = ["executorch", "onnx", "torch-export", "aotinductor"]
    assert asked == [("52m", runtime) for runtime in runtimes]
    assert "expected an ending of .onnx, .pt2, .pte" in run("export", tmp_path / "b.bin", code=2).stderr


def test_weights_of_other_channels_are_adapted_for_fine_tuning(folder: Path) -> None:
    from mobileformer.tasks.classification import Classification

    class Colour:
        classes = ("a", "b")
        channels = 3

    recipe = read_recipe("finetune", [])
    with pytest.warns(UserWarning, match=r"takes 1 channels, the data has 3: the first convolution is adapted"):
        task = Classification(Colour(), recipe, folder / "grey.safetensors", use_fused=False)
    grey = mobileformer.load_model(folder / "grey.safetensors")
    torch.testing.assert_close(task.model.stem.conv.weight, grey.stem.conv.weight.expand(-1, 3, -1, -1) / 3)
    assert (task.recipe.mean, task.recipe.std) == ([0.25] * 3, [0.5] * 3)
