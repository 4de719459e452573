"""What happens to an image on its way into the network: sizes, ranges, distributions, and where chance comes from."""

from __future__ import annotations

import math
import pickle
import random
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from mobileformer._torchvision import ensure_torchvision
from mobileformer.data import EvaluationTransform, TrainTransform, preprocess
from mobileformer.data import randaugment as module

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = {"flip": 0.0, "interpolation": "bilinear"}


def generator(*key: int) -> np.random.Generator:
    return np.random.default_rng((0, *key))


def ramp(width: int = 40, height: int = 30) -> Image.Image:
    """Red tells the column, green the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width) * 5, np.arange(height)[:, None] * 5
    return Image.fromarray(pixels)


def grey(side: int = 28) -> Image.Image:
    return Image.fromarray((np.arange(side * side) % 251).astype(np.uint8).reshape(side, side) // 2 + 100)


@pytest.fixture
def timm() -> ModuleType:
    try:
        ensure_torchvision()
    except ImportError as error:
        pytest.skip(f"torchvision is the other side of the comparison: {error}")
    return pytest.importorskip("timm.data.auto_augment")


# Training


@pytest.mark.parametrize("crop", ["random-resized", "shift"])
@pytest.mark.parametrize(("image", "mean"), [(ramp(), MEAN), (grey(), (0.3,))])
def test_result_is_of_the_size_and_decided_by_the_generator(
    crop: str, image: Image.Image, mean: tuple[float, ...]
) -> None:
    options = {"crop": crop, "shift": 2, "erase": 1.0}
    transform = TrainTransform(24, mean, mean, **options)
    assert transform.shape == (len(mean), 24, 24)
    results = [transform(image, generator(number)) for number in range(20)]
    for result in results:
        assert (result.shape, result.dtype) == (transform.shape, np.float32)
        assert np.isfinite(result).all()
    again = pickle.loads(pickle.dumps(transform))
    assert all(np.array_equal(result, again(image, generator(number))) for number, result in enumerate(results))
    assert len({result.tobytes() for result in results}) == 20


def test_without_chance_it_is_the_evaluation() -> None:
    image = grey()
    transform = TrainTransform(64, [0.3], [0.4], crop="shift", shift=0, **PLAIN)
    evaluation = EvaluationTransform(64, [0.3], [0.4], crop_fraction=1.0)
    np.testing.assert_allclose(transform(image, generator()), evaluation(image, generator()), rtol=0, atol=1e-6)


def test_shift_moves_by_whole_pixels_and_pads_with_zeros() -> None:
    image = grey(8)
    transform = TrainTransform(8, [0.0], [1.0], crop="shift", shift=2, **PLAIN)
    original = np.asarray(image)
    seen = set()
    for number in range(400):
        result = np.rint(transform(image, generator(number))[0] * 255)
        for dx in range(-2, 3):
            for dy in range(-2, 3):
                padded = np.pad(original, 2)[2 + dy : 10 + dy, 2 + dx : 10 + dx]
                if np.array_equal(result, padded):
                    seen.add((dx, dy))
    assert len(seen) == 25


def test_shift_takes_the_square_in_the_middle() -> None:
    transform = TrainTransform(30, MEAN, STD, crop="shift", **PLAIN)
    red = transform(ramp(40, 30), generator())[0] * STD[0] + MEAN[0]
    np.testing.assert_allclose(red[0] * 255, np.arange(5, 35) * 5, atol=1e-3)


def test_flip_turns_left_and_right_as_often_as_told() -> None:
    turned = 0
    transform = TrainTransform(8, [0.0], [1.0], crop="shift", flip=0.3, interpolation="bilinear")
    original = np.asarray(grey(8)) / np.float32(255)
    for number in range(1000):
        result = transform(grey(8), generator(number))[0]
        flipped = np.allclose(result, original[:, ::-1], atol=1e-6)
        assert flipped or np.allclose(result, original, atol=1e-6)
        turned += flipped
    assert 240 < turned < 360  # 300 +- 4 standard deviations


def test_random_interpolation_tosses() -> None:
    images = {}
    for name in ("bilinear", "bicubic", "random"):
        transform = TrainTransform(20, [0.0], [1.0], crop="shift", flip=0.0, interpolation=name)
        images[name] = [transform(grey(8), generator(number)).tobytes() for number in range(40)]
    (bilinear,), (bicubic,) = set(images["bilinear"]), set(images["bicubic"])
    assert set(images["random"]) == {bilinear, bicubic}


def box_of(result: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, width, height of the crop that the ramp tells, in its pixels."""
    red, green = result[0] * 51, result[1] * 51  # values 0 .. 1 at 5 a pixel
    width = (red[0, -1] - red[0, 0]) * len(red) / (len(red) - 1)
    height = (green[-1, 0] - green[0, 0]) * len(red) / (len(red) - 1)
    return red[0, 0], green[0, 0], width, height


def test_random_boxes_are_drawn_as_torchvision_draws_them(timm: ModuleType) -> None:
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    transform = TrainTransform(8, MEAN, STD)
    for width, height in ((500, 375), (200, 400), (900, 100)):
        image = Image.new("RGB", (width, height))
        theirs = np.array(
            [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)], float
        )
        ours = np.array([transform._random_box(width, height, generator(number)) for number in range(3000)], float)
        assert (ours[:, :2] >= 0).all()
        assert (ours[:, 2] <= width).all()
        assert (ours[:, 3] <= height).all()
        # theirs: top, left, height, width
        for mine, other in (
            (ours[:, 0], theirs[:, 1]),
            (ours[:, 1], theirs[:, 0]),
            (ours[:, 2] - ours[:, 0], theirs[:, 3]),
            (ours[:, 3] - ours[:, 1], theirs[:, 2]),
        ):
            assert same_distribution(mine, other)


def same_distribution(one: np.ndarray, other: np.ndarray) -> bool:
    """Kolmogorov and Smirnov's test of two samples, at a level of 0.001 %."""
    everything = np.sort(np.concatenate([one, other]))
    below = [np.searchsorted(np.sort(sample), everything, side="right") / len(sample) for sample in (one, other)]
    return np.abs(below[0] - below[1]).max() < math.sqrt(-math.log(1e-5 / 2) / 2 * (1 / len(one) + 1 / len(other)))


def test_the_comparison_tells_distributions_apart() -> None:
    rng = np.random.default_rng(0)
    assert same_distribution(rng.random(3000), rng.random(3000))
    assert not same_distribution(rng.random(3000), rng.random(3000) ** 1.2)


def test_random_crop_is_resized_from_its_box() -> None:
    image = ramp(50, 50)
    transform = TrainTransform(25, (0.0,) * 3, (1.0,) * 3, scale=(0.2, 0.5), **PLAIN)
    for number in range(20):
        box = transform._random_box(50, 50, generator(number))
        left, top, width, height = box_of(transform(image, generator(number)))
        assert abs(width - (box[2] - box[0])) < 2
        assert abs(height - (box[3] - box[1])) < 2
        assert abs(left - box[0]) < 1.5
        assert abs(top - box[1]) < 1.5


def erased(transform: TrainTransform, number: int) -> tuple[float, float] | None:
    """Share of the area and height / width of the box that differs from the even image."""
    changed = (transform(Image.new("L", (64, 64), 128), generator(number))[0] != 1).nonzero()
    if not len(changed[0]):
        return None
    height, width = (int(axis.max() - axis.min()) + 1 for axis in changed)
    assert len(changed[0]) == height * width
    return height * width / 64**2, height / width


def test_erasing_fills_a_box_as_timm_does(timm: ModuleType) -> None:
    from timm.data.random_erasing import RandomErasing

    transform = TrainTransform(64, [128 / 255 - 1], [1.0], crop="shift", flip=0.0, erase=0.4, erase_mode="constant")
    boxes = [erased(transform, number) for number in range(2000)]
    found = [box for box in boxes if box is not None]
    assert 700 < len(found) < 900
    random.seed(0)
    theirs = []
    erasing = RandomErasing(probability=1.0, mode="const", device="cpu")
    for _ in range(800):
        changed = (erasing(torch.ones(1, 64, 64))[0] == 0).nonzero()
        height, width = (changed.amax(0) - changed.amin(0) + 1).tolist()
        theirs.append((height * width / 64**2, height / width))
    for column in (0, 1):
        assert same_distribution(np.array(found)[:, column], np.array(theirs)[:, column])


def test_erased_pixels_are_noise_or_the_mean() -> None:
    options = {"crop": "shift", "flip": 0.0, "erase": 1.0}
    image = Image.new("RGB", (32, 32), "white")
    values = []
    for number in range(50):
        for mode in ("pixel", "constant"):
            result = TrainTransform(32, (0.5,) * 3, (0.5,) * 3, erase_mode=mode, **options)(image, generator(number))
            changed = result[result != 1]
            if mode == "constant":
                assert (changed == 0).all()
            else:
                values.append(changed)
    noise = np.concatenate(values)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size: expected at least 1"),
        ({"mean": (0.5,)}, "mean and std: expected 1 or 3 numbers each, got 1 and 3"),
        ({"std": (0.5, 0.0, 1.0)}, "std above 0"),
        ({"mean": (math.nan, 0.0, 1.0)}, "expected finite numbers"),
        ({"crop": "centre"}, "crop: expected one of random-resized, shift, got 'centre'"),
        ({"scale": (0.5, 1.5)}, r"scale: expected 0 < low <= high <= 1, got \(0.5, 1.5\)"),
        ({"scale": (0.0, 1.0)}, "scale: expected"),
        ({"ratio": (2.0, 1.0)}, "ratio: expected 0 < low <= high, got"),
        ({"ratio": (1.0, math.inf)}, "ratio: expected"),
        ({"shift": -1}, "shift: expected 0 pixels or more"),
        ({"flip": 1.5}, "flip: expected a probability"),
        ({"erase": math.nan}, "erase: expected a probability"),
        ({"erase_mode": "grey"}, "erase_mode: expected one of pixel, constant"),
        ({"interpolation": "nearest"}, "interpolation: expected one of bilinear, bicubic, random"),
        ({"randaugment": "rand-m9"}, "randaugment: unknown part 'rand' of 'rand-m9'"),
        ({"randaugment": "m9-mstdx"}, "unknown part 'mstdx'"),
        ({"randaugment": ""}, "unknown part ''"),
    ],
)
def test_training_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainTransform(**{"size": 8, "mean": MEAN, "std": STD, **options})  # type: ignore[arg-type]


def test_modes_that_do_not_fit_are_refused() -> None:
    for transform in (TrainTransform(8, MEAN, STD), EvaluationTransform(8, MEAN, STD)):
        with pytest.raises(ValueError, match="mode 'L' does not fit 3 means"):
            transform(grey(), generator())


# RandAugment


def test_randaugment_is_timms_with_the_published_policy(timm: ModuleType) -> None:
    transform = TrainTransform(32, MEAN, STD, crop="shift", randaugment="m9-mstd0.5", flip=0.0)
    augment = transform.augment
    assert augment is not None
    assert augment.library == "timm"
    operations = augment._apply.ops  # type: ignore[attr-defined]
    assert len(operations) == 15
    assert {(each.prob, each.magnitude, each.magnitude_std) for each in operations} == {(0.5, 9, 0.5)}
    assert operations[0].hparams["img_mean"] == (124, 116, 104)


@pytest.mark.parametrize(("image", "mean"), [(ramp(), MEAN), (grey(), (0.3,))])
def test_randaugment_depends_on_the_sample_alone(image: Image.Image, mean: tuple[float, ...], timm: ModuleType) -> None:
    transform = TrainTransform(24, mean, mean, crop="shift", flip=0.0, randaugment="m9-mstd0.5")
    other = pickle.loads(pickle.dumps(transform))
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    results = [transform(image, generator(number)) for number in range(60)]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002
    random.seed(2)
    assert all(np.array_equal(result, other(image, generator(number))) for number, result in enumerate(results))
    assert len({result.tobytes() for result in results}) > 30


@pytest.mark.parametrize(("image", "mean"), [(ramp(), MEAN), (grey(), (0.3,))])
def test_torchvision_stands_in_and_says_so(
    image: Image.Image, mean: tuple[float, ...], monkeypatch: pytest.MonkeyPatch, timm: ModuleType
) -> None:
    monkeypatch.setitem(sys.modules, "timm.data.auto_augment", None)
    with pytest.warns(UserWarning, match="timm cannot be imported, so torchvision's RandAugment stands in"):
        transform = TrainTransform(24, mean, mean, crop="shift", flip=0.0, randaugment="m9-mstd0.5")
    assert transform.augment is not None
    assert transform.augment.library == "torchvision"
    assert transform.augment._apply.magnitude == 9  # type: ignore[attr-defined]
    state = torch.get_rng_state()
    results = [transform(image, generator(number)) for number in range(40)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(np.array_equal(result, transform(image, generator(number))) for number, result in enumerate(results))
    assert len({result.tobytes() for result in results}) > 20


def test_randaugment_without_either_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("torchvision is not installed")

    monkeypatch.setattr("mobileformer._torchvision.ensure_torchvision", missing)
    for name in ("torchvision.transforms", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs timm or torchvision.*pip install 'mobileformer\[timm\]'"):
        module.RandAugment("m9", size=8, mean=MEAN, filters=())


# Evaluation


@pytest.mark.parametrize("fraction", [0.875, 1.0])
def test_evaluation_is_preprocess_without_chance(fraction: float) -> None:
    transform = pickle.loads(pickle.dumps(EvaluationTransform(24, MEAN, STD, crop_fraction=fraction)))
    assert transform.shape == (3, 24, 24)
    expected = preprocess(ramp(), size=24, mean=MEAN, std=STD, crop_fraction=fraction)
    for number in range(2):
        assert np.array_equal(transform(ramp(), generator(number)), expected)


@pytest.mark.parametrize("fraction", [0.0, 1.01, math.nan])
def test_evaluation_refuses_a_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match="crop_fraction: expected a number"):
        EvaluationTransform(24, MEAN, STD, crop_fraction=fraction)
