"""`mobileformer predict` and `convert`: right answers, and refusals that say why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_support import NAMES, expected, make_files, run, run_json
from tiny_support import tiny_variants

import mobileformer
from mobileformer.inference import library
from mobileformer.pretrained import sample_images, shipped_weights

# Without the compiled library the commands run on the reference and say so; the rest is the same.
pytestmark = pytest.mark.filterwarnings("ignore::mf_kernels.KernelFallbackWarning")


@pytest.fixture(scope="module", autouse=True)
def variants() -> Iterator[None]:
    """The weights are of a small network."""
    with tiny_variants():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("cli"), "tiny")


@pytest.mark.parametrize("weights", ["named.safetensors", "published.pth.tar"])
@pytest.mark.parametrize("path", [None, "--fused", "--no-fused"])
def test_predict_gives_the_probabilities_of_the_model(folder: Path, weights: str, path: str | None) -> None:
    image = folder / "images" / "b.png"
    options = () if path is None else (path,)
    report = run_json("predict", image, "--weights", folder / weights, "--size", 64, "--top-k", 3, *options)
    (answer,) = report["results"]
    assert report["fused"] == (path != "--no-fused")
    usual = "engine" if library.why_not() is None else "fused"
    assert report["path"] == {None: usual, "--fused": "fused", "--no-fused": "plain"}[path]
    assert answer["image"] == str(image)
    assert len(answer["predictions"]) == 3
    for row, (index, probability) in zip(answer["predictions"], expected(folder / weights, image), strict=False):
        assert row["class"] == index
        assert row["probability"] == pytest.approx(probability, abs=1e-5)
        assert row["label"] == (NAMES[index] if weights.startswith("named") else None)


def test_predict_prints_names_as_they_are(folder: Path) -> None:
    image = folder / "images" / "b.png"
    told = run("predict", image, "--weights", folder / "named.safetensors", "--size", 64, "--top-k", 9).stdout
    for name in NAMES:  # "bee [old]" would vanish if it were read as markup
        assert name in told
    _, probability = expected(folder / "named.safetensors", image)[0]
    assert f"{100 * probability:.2f} %" in told


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_predict_folder_in_batches(folder: Path, batch: int) -> None:
    weights = folder / "plain.safetensors"
    report = run_json("predict", folder / "images", "--weights", weights, "--size", 64, "--batch", batch)
    names = [Path(answer["image"]).name for answer in report["results"]]
    assert names == ["a.jpg", "b.png", "c.webp"]
    for answer in report["results"]:
        index, probability = expected(weights, Path(answer["image"]))[0]
        assert answer["predictions"][0]["class"] == index
        assert answer["predictions"][0]["probability"] == pytest.approx(probability, abs=1e-5)


def test_predict_reports_bad_files_and_does_the_rest(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "0_empty.png").touch()
    (tmp_path / "1_good.png").write_bytes((folder / "images" / "b.png").read_bytes())
    (tmp_path / "2_cut.jpg").write_bytes((folder / "images" / "a.jpg").read_bytes()[:900])
    arguments = (
        "predict",
        tmp_path,
        "nowhere.png",
        f"{tmp_path}/*.bmp",
        "--weights",
        folder / "plain.safetensors",
    )
    result = run(*arguments, "--size", 64, "--json", code=1)
    report = json.loads(result.stdout)
    assert report["failed"] == 4
    assert ["error" in answer for answer in report["results"]] == [True, False, True, True, True]
    assert len(report["results"][1]["predictions"]) == 5
    for words in (
        "0_empty.png: the file is empty",
        "2_cut.jpg: ",
        "nowhere.png: no such file",
        "*.bmp: no file",
    ):
        assert words in result.stderr
    assert "4 of 5 failed" in result.stderr


def test_predict_without_weights_takes_those_of_the_package(tmp_path: Path) -> None:
    """They were trained on these classes, never on these images; and it is said which weights they are."""
    samples = sample_images()
    for number, (picture, _) in enumerate(samples):
        picture.save(tmp_path / f"{number:02}.png")
    result = run("predict", tmp_path, "--json")
    assert "without --weights: the 52m in the package, trained on Fashion-MNIST" in result.stderr
    answers = json.loads(result.stdout)
    assert answers["weights"] == str(shipped_weights())
    guesses = [answer["predictions"][0]["label"] for answer in answers["results"]]
    assert sum(guess == truth for guess, (_, truth) in zip(guesses, samples, strict=True)) >= 10


def test_predict_grey_weights_take_colour_images(folder: Path) -> None:
    weights, image = folder / "grey.safetensors", folder / "images" / "b.png"
    (answer,) = run_json("predict", image, "--weights", weights, "--size", 64)["results"]
    index, probability = expected(weights, image)[0]
    assert answer["predictions"][0]["class"] == index
    assert answer["predictions"][0]["probability"] == pytest.approx(probability, abs=1e-5)
    failure = run_json("predict", image, "--weights", folder / "no_mean.safetensors", code=1)
    assert "normalised" in failure["error"]


def test_predict_refuses_weights_that_answer_with_nan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mobileformer.Model, "forward", lambda self, x: torch.full((len(x), 7), float("nan")))
    image = folder / "images" / "b.png"
    report = run_json("predict", image, "--weights", folder / "plain.safetensors", "--size", 64, "--fused", code=1)
    assert "not finite" in report["results"][0]["error"]
    assert "predictions" not in report["results"][0]


def test_predict_sees_what_the_weights_were_trained_for(folder: Path, tmp_path: Path) -> None:
    image, weights = folder / "images" / "b.png", tmp_path / "sized.safetensors"
    model = mobileformer.load_model(folder / "plain.safetensors")
    mobileformer.save_weights(model, weights, input_size=48, crop_fraction=1)
    for size, crop_fraction, options in ((48, 1.0, ()), (64, 1.0, ("--size", 64)), (224, 0.875, None)):
        file = folder / "plain.safetensors" if options is None else weights
        report = run_json("predict", image, "--weights", file, "--top-k", 7, *(options or ()))
        assert (report["size"], report["crop_fraction"]) == (size, crop_fraction)
        for row, (index, probability) in zip(
            report["results"][0]["predictions"], expected(file, image, size, crop_fraction), strict=True
        ):
            assert row["class"] == index
            assert row["probability"] == pytest.approx(probability, abs=1e-5)


def test_info_tells_what_a_file_says_of_itself(folder: Path, tmp_path: Path) -> None:
    ours, folded = tmp_path / "ours.safetensors", tmp_path / "folded.safetensors"
    model = mobileformer.load_model(folder / "plain.safetensors")
    mobileformer.save_weights(model, ours, labels=NAMES, input_size=48, crop_fraction=0.9, dtype=torch.float16)
    run("convert", ours, folded, "--fold")
    for file, form, dtype in ((ours, "describes itself", "float16"), (folded, "folded for inference", "float32")):
        report = run_json("info", file)
        assert (report["form"], report["dtype"], report["bytes"]) == (form, dtype, file.stat().st_size)
        assert (report["variant"], report["labels"]) == ("tiny", NAMES)
        assert (report["input_size"], report["crop_fraction"]) == (48, 0.9)
    told = run("info", folder / "published.pth.tar").stdout
    assert "published, or bare" in told
    assert "not told" in told
    assert "no.safetensors" in run_json("info", tmp_path / "no.safetensors", code=1)["error"]


def test_predict_labels(folder: Path, tmp_path: Path) -> None:
    weights, image = folder / "plain.safetensors", folder / "images" / "b.png"
    top = expected(weights, image)[0][0]
    (tmp_path / "lines.txt").write_text("\ufeff" + "\r\n".join(NAMES) + "\n", encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps(NAMES))
    for file in ("lines.txt", "list.json"):
        report = run_json("predict", image, "--weights", weights, "--size", 64, "--labels", tmp_path / file)
        assert report["results"][0]["predictions"][0]["label"] == NAMES[top]
    for name, content, words in (
        ("short.txt", "\n".join(NAMES[:6]), "expected 7 names, one for each class, found 6"),
        ("gap.txt", "a\n\nb\nc\nd\ne\nf", "not empty"),
        ("numbers.json", "[1, 2, 3, 4, 5, 6, 7]", "expected a list"),
        ("dict.json", json.dumps({str(i): name for i, name in enumerate(NAMES)}), "expected a list"),
        ("cut.json", "[1, ", "not valid JSON"),
        ("latin.txt", "\udce9", "utf-8"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogateescape")
        failure = run_json("predict", image, "--weights", weights, "--labels", tmp_path / name, code=1)
        assert words in failure["error"]
    failure = run_json("predict", image, "--weights", weights, "--labels", tmp_path / "none.txt", code=1)
    assert "none.txt" in failure["error"]


def test_predict_as_a_table_without_names(folder: Path, tmp_path: Path) -> None:
    weights, image = folder / "plain.safetensors", folder / "images" / "b.png"
    told = run("predict", image, "--weights", weights, "--size", 64, "--top-k", 1).stdout
    index, probability = expected(weights, image)[0]
    assert f" {index} " in told
    assert f"{100 * probability:.2f} %" in told
    result = run("predict", tmp_path / "none.png", "--weights", weights, code=1)
    assert result.stdout == ""
    assert "none.png: no such file" in result.stderr


def test_predict_refuses_weights_no_image_fits(folder: Path, tmp_path: Path) -> None:
    image = folder / "images" / "b.png"
    five = mobileformer.Model("tiny", num_classes=2, in_chans=5)
    mobileformer.save_weights(five, tmp_path / "five.safetensors", mean=[0.5] * 5, std=[0.5] * 5)
    failure = run_json("predict", image, "--weights", tmp_path / "five.safetensors", code=1)
    assert "takes 5 channels" in failure["error"]
    broken = mobileformer.Model("tiny", num_classes=2)
    broken.head.classifier.bias.data[0] = float("nan")
    mobileformer.save_weights(broken, tmp_path / "nan.safetensors")
    failure = run_json("predict", image, "--weights", tmp_path / "nan.safetensors", code=1)
    assert "not finite: head.classifier.bias" in failure["error"]


def test_predict_names_bad_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    for name in ("none.safetensors", "text.pth"):
        failure = run_json("predict", folder / "images" / "b.png", "--weights", tmp_path / name, code=1)
        assert name in failure["error"]


def test_convert_there_and_back(folder: Path, tmp_path: Path) -> None:
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pth.tar"
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    report = run_json("convert", folder / "published.pth.tar", ours, "--labels", tmp_path / "names.txt")
    assert (report["variant"], report["num_classes"], report["labels"]) == ("tiny", 7, True)
    metadata = mobileformer.read_metadata(ours)
    assert (metadata.variant, metadata.labels) == ("tiny", tuple(NAMES))
    assert run_json("convert", ours, back)["form"] == "published checkpoint"
    first = torch.load(folder / "published.pth.tar", weights_only=False)["state_dict"]
    second = torch.load(back, weights_only=True)["state_dict"]
    assert [key.removeprefix("module.") for key in first] == list(second)
    for key, value in first.items():
        assert torch.equal(second[key.removeprefix("module.")], value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "back.pth.tar",
        "names.txt",
        "ours.safetensors",
    ]


@pytest.mark.parametrize("variant", ["26m", "52m"])
def test_convert_tells_grouped_from_plain(tmp_path: Path, variant: str) -> None:
    model = mobileformer.Model(variant)
    torch.save(mobileformer.official_state_dict(model), tmp_path / "in.pth")
    assert run_json("convert", tmp_path / "in.pth", tmp_path / "out.safetensors")["variant"] == variant


def test_convert_keeps_labels_of_our_files(folder: Path, tmp_path: Path) -> None:
    run("convert", folder / "named.safetensors", tmp_path / "copy.safetensors")
    assert mobileformer.read_metadata(tmp_path / "copy.safetensors").labels == tuple(NAMES)


def test_convert_keeps_the_input_size(folder: Path, tmp_path: Path) -> None:
    from mobileformer.inference import FoldedNetwork

    source, copy, folded = (tmp_path / f"{name}.safetensors" for name in ("source", "copy", "folded"))
    model = mobileformer.load_model(folder / "plain.safetensors")
    mobileformer.save_weights(model, source, input_size=48, crop_fraction=0.9)
    run("convert", source, copy)
    run("convert", source, folded, "--fold")
    assert mobileformer.read_metadata(copy) == mobileformer.read_metadata(source) == FoldedNetwork.load(folded).metadata


def test_convert_overwrites_only_when_told(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    target.write_text("precious")
    assert "--force" in run_json("convert", folder / "published.pth.tar", target, code=1)["error"]
    assert target.read_text() == "precious"
    run("convert", folder / "published.pth.tar", target, "--force")
    assert mobileformer.read_metadata(target).variant == "tiny"


def test_convert_refuses_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    source, target = folder / "published.pth.tar", tmp_path / "out.safetensors"
    assert "says 52m" in run_json("convert", source, target, "--variant", "52m", code=1)["error"]
    state = dict(torch.load(source, weights_only=False)["state_dict"])
    del state["module.stem.0.weight"]
    torch.save(state, tmp_path / "lacks.pth")
    assert "--variant" in run_json("convert", tmp_path / "lacks.pth", target, code=1)["error"]
    named = run_json("convert", tmp_path / "lacks.pth", target, "--variant", "tiny", code=1)["error"]
    assert "missing: stem.0.weight" in named
    assert "nowhere.pth" in run_json("convert", tmp_path / "nowhere.pth", target, code=1)["error"]
    deep = tmp_path / "no" / "folder.safetensors"
    assert "folder" in run_json("convert", source, deep, code=1)["error"]
    assert not target.exists()


def test_convert_to_what_the_engine_runs(folder: Path, tmp_path: Path) -> None:
    from mobileformer.inference import FoldedNetwork, fold

    target = tmp_path / "folded.safetensors"
    report = run_json("convert", folder / "named.safetensors", target, "--fold")
    assert report["form"] == "mobileformer safetensors, folded for inference"
    assert (report["variant"], report["num_classes"], report["labels"]) == ("tiny", 7, True)
    network, expected_network = FoldedNetwork.load(target), fold(mobileformer.load_model(folder / "named.safetensors"))
    assert network.metadata.labels == tuple(NAMES)
    assert network.metadata.mean == mobileformer.read_metadata(folder / "named.safetensors").mean
    for name, array in expected_network.arrays.items():
        assert (network.arrays[name] == array).all(), name
    assert "--force" in run_json("convert", folder / "plain.safetensors", target, "--fold", code=1)["error"]
    names = tmp_path / "names.txt"
    names.write_text("\n".join(NAMES))
    run("convert", folder / "published.pth.tar", target, "--fold", "--labels", names, "--force")
    assert FoldedNetwork.load(target).metadata.labels == tuple(NAMES)


def test_convert_says_what_cannot_be_folded_or_unfolded(folder: Path, tmp_path: Path) -> None:
    assert (
        "cannot be folded" in run("convert", folder / "plain.safetensors", tmp_path / "a.pth", "--fold", code=2).stderr
    )
    target = tmp_path / "folded.safetensors"
    run("convert", folder / "plain.safetensors", target, "--fold")
    for command in (
        ("convert", target, tmp_path / "back.pth"),
        ("convert", target, tmp_path / "again.safetensors", "--fold"),
        ("predict", folder / "images" / "b.png", "--weights", target, "--fused"),
    ):
        assert "folded for inference" in run_json(*command, code=1)["error"]
    # A scale so large that the folded weight is beyond float32.
    model = mobileformer.load_model(folder / "plain.safetensors")
    model.stem.norm.weight.data.fill_(3e38)
    model.stem.norm.running_var.zero_()
    mobileformer.save_weights(model, tmp_path / "huge.safetensors")
    failure = run_json("convert", tmp_path / "huge.safetensors", tmp_path / "out.safetensors", "--fold", code=1)
    assert "not finite: stem.weight" in failure["error"]
    assert not (tmp_path / "out.safetensors").exists()
