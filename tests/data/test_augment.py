"""RandAugment, colour jitter, repeated augmentation and the recipes' evaluation: against pixels that timm and
EfficientVMamba's own code recorded (tests/golden/training/make_augment.py), against Pillow, and against the laws worked
out by hand."""

import collections
import dataclasses
import hashlib
import importlib
import math
from pathlib import Path

import chex
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image
from test_loader import take
from test_transforms import encode

from evmamba_jax.data import augment
from evmamba_jax.data.augment import Geometry, Operation, RandAugment, color_jitter, rand_augment
from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.sources import open_source
from evmamba_jax.data.transforms import draw_resampling, eval_image, random_crop_box, train_image
from evmamba_jax.errors import UserError
from evmamba_jax.models import list_models, model_card

ROOT = Path(__file__).parents[2]
FILL = (124, 116, 104)
BICUBIC = Geometry(Image.Resampling.BICUBIC, FILL)
SETS = {"timm": augment.TIMM | augment.TIMM_INCREASING, "evmamba": augment.EFFICIENTVMAMBA}
BORDER = 1e-3  # pixels: what lies this near to the image's border is decided by the official single precision


@pytest.fixture(scope="module")
def golden():
    with np.load(ROOT / "tests/golden/training/augment.npz") as file:
        return {key: file[key] for key in file.files} | {"of": dict(zip(file["names"], file["pixels"], strict=True))}


def names(prefix: str) -> list[str]:
    with np.load(ROOT / "tests/golden/training/augment.npz") as file:
        return [str(name) for name in file["names"] if name.startswith(prefix)]


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg")).resize((224, 224), Image.Resampling.BICUBIC)


def apply(image: Image.Image, operation: Operation, magnitude: float, geometry: Geometry = BICUBIC) -> np.ndarray:
    return np.asarray(operation.apply(image, operation.argument(magnitude), geometry))


# --- Pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in names("timm/") + names("evmamba/") if "Skew" not in name])
def test_operations_give_the_official_pixels(golden, name):
    which, operation, magnitude, sign, interpolation = name.split("/")
    geometry = Geometry(Image.Resampling[interpolation.upper()], FILL)
    operation = SETS[which][operation.replace("PosterizeTpu", "Posterize")]
    got = apply(Image.fromarray(golden["image"]), operation, float(sign + magnitude), geometry)
    np.testing.assert_array_equal(got, golden["of"][name])


@pytest.mark.parametrize("name", names("evmamba/Skew"))
def test_skew_gives_the_official_pixels(golden, name):
    """The official matrix is single precision: a value may round the other way, and a pixel on the border may be black.

    The place that each pixel comes from is solved for here as there, from four corners, but in double precision.
    """
    _, _, magnitude, sign, _ = name.split("/")
    shift = math.ceil(24 * 0.3 * float(sign + magnitude) / 10)
    pushed = [(-shift, 0), (24, -shift), (24 + shift, 24), (0, 24 + shift)]
    corners = [(0, 0), (24, 0), (24, 24), (0, 24)]
    rows = []
    for (x, y), (u, v) in zip(pushed, corners, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    a, b, c, d, e, f, g, h = np.linalg.solve(np.array(rows, float), np.ravel(corners))
    y, x = np.mgrid[:24, :24] + 0.5
    source = np.stack([a * x + b * y + c, d * x + e * y + f]) / (g * x + h * y + 1)
    certain = (np.minimum(abs(source), abs(source - 24)) > BORDER).all(axis=0)
    got = apply(Image.fromarray(golden["image"]), augment.EFFICIENTVMAMBA["Skew"], float(sign + magnitude))
    assert certain.mean() > 0.9
    chex.assert_trees_all_close(got[certain].astype(int), golden["of"][name][certain].astype(int), atol=1)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (augment.autocontrast, ImageOps.autocontrast),
        (augment.equalize, ImageOps.equalize),
        (augment.invert, ImageOps.invert),
        (lambda i: augment.solarize(i, 26), lambda i: ImageOps.solarize(i, 26)),
        (lambda i: augment.posterize(i, 3), lambda i: ImageOps.posterize(i, 3)),
        (lambda i: augment.color(i, 1.81), lambda i: ImageEnhance.Color(i).enhance(1.81)),
        (lambda i: augment.contrast(i, 0.19), lambda i: ImageEnhance.Contrast(i).enhance(0.19)),
        (lambda i: augment.contrast(i, 1.81), lambda i: ImageEnhance.Contrast(i).enhance(1.81)),
        (lambda i: augment.brightness(i, 0.37), lambda i: ImageEnhance.Brightness(i).enhance(0.37)),
        (lambda i: augment.brightness(i, 1.81), lambda i: ImageEnhance.Brightness(i).enhance(1.81)),
        (lambda i: augment.sharpness(i, 0.19), lambda i: ImageEnhance.Sharpness(i).enhance(0.19)),
        (lambda i: augment.sharpness(i, 1.81), lambda i: ImageEnhance.Sharpness(i).enhance(1.81)),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_values_are_those_of_pillow(photo, ours, theirs, mode):
    flat = Image.new("RGB", (9, 9), (200, 3, 77))  # one value a channel: nothing to stretch or to spread
    for image in (photo.convert(mode), flat.convert(mode), photo.resize((5, 3)).convert(mode)):
        np.testing.assert_array_equal(np.asarray(ours(image)), np.asarray(theirs(image)))


MATRICES = {
    "ShearX": lambda argument, _: (1, argument, 0, 0, 1, 0),
    "ShearY": lambda argument, _: (1, 0, 0, argument, 1, 0),
    "TranslateXRel": lambda argument, side: (1, 0, argument * side, 0, 1, 0),
    "TranslateYRel": lambda argument, side: (1, 0, 0, 0, 1, argument * side),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_shears_and_translations_are_pillows_affine_transform(photo, name, mode, resample):
    """At 200 drawn magnitudes, and where coordinates fall on whole, half and quarter pixels and beyond the image."""
    rng = np.random.default_rng(0)
    operation = augment.TIMM[name]
    image = photo.resize((56, 56), Image.Resampling.BICUBIC).convert(mode)
    fill = FILL if mode == "RGB" else FILL[0]
    for magnitude in [0.0, -0.0, 10.0, -10.0, 5.0, 2.5, 10 / 3, -20.0, 40.0, *(rng.normal(0, 9, size=200))]:
        argument = operation.argument(magnitude)
        matrix = MATRICES[name](argument, 56)
        expected = image.transform((56, 56), Image.Transform.AFFINE, matrix, resample=resample, fillcolor=fill)
        got = operation.apply(image, argument, Geometry(resample, fill))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected), err_msg=f"{name} {magnitude}")


@pytest.mark.parametrize("slope", [0.1 + 0.2, 1 / 3, 0.25, 1.0, 2 / 56, -0.5])
def test_shears_by_whole_pixels_are_pillows(photo, slope):
    """Rounding may take the pixels of one row to both sides of a whole number: the result is Pillow's all the same."""
    image = photo.resize((56, 56))
    expected = image.transform((56, 56), Image.Transform.AFFINE, (1, slope, 0, 0, 1, 0), *BICUBIC[:1], 1, FILL)
    np.testing.assert_array_equal(np.asarray(augment.shear_x(image, slope, BICUBIC)), np.asarray(expected))


@pytest.mark.parametrize("side", [24, 49, 56])
def test_distort_below_twenty_is_pillows_mesh_of_one_tile(photo, side):
    image = photo.resize((side, side))
    mesh = [((0, 0, side, side), (0, 0, 0, side, side, side, side, 0))]
    expected = image.transform((side, side), Image.Transform.MESH, mesh, resample=Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(augment.distort(image, 19)), np.asarray(expected))


@pytest.mark.parametrize(("which", "name"), [(which, name) for which in SETS for name in SETS[which]])
def test_grey_images_are_colour_images_of_three_equal_channels(photo, which, name):
    grey = photo.resize((32, 32)).convert("L")
    operation = SETS[which][name]
    for magnitude in (9.2, -9.2) if operation.signed else (9.2,):
        got = apply(grey, operation, magnitude, Geometry(Image.Resampling.BICUBIC, 116))
        expected = apply(grey.convert("RGB"), operation, magnitude, Geometry(Image.Resampling.BICUBIC, (116,) * 3))
        np.testing.assert_array_equal(got[..., None].repeat(3, axis=-1), expected)


def test_threads_do_not_disturb_each_other(photo):
    from concurrent.futures import ThreadPoolExecutor

    images = [photo.resize((side, side)) for side in (40, 48, 56, 64)] * 25
    expected = [np.asarray(augment.shear_x(image, 0.27, BICUBIC)) for image in images]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda image: np.asarray(augment.shear_x(image, 0.27, BICUBIC)), images))
    chex.assert_trees_all_equal(got, expected)


# --- Laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        (
            augment.TIMM_INCREASING,
            {
                "Rotate": 27,
                "PosterizeIncreasing": 1,
                "SolarizeIncreasing": 26,
                "SolarizeAdd": 99,
                **dict.fromkeys(("ColorIncreasing", "ContrastIncreasing"), (0.19, 1.81)),
                **dict.fromkeys(("BrightnessIncreasing", "SharpnessIncreasing"), (0.19, 1.81)),
                **dict.fromkeys(("ShearX", "ShearY"), 0.27),
                **dict.fromkeys(("TranslateXRel", "TranslateYRel"), 0.405),
            },
        ),
        (
            augment.TIMM,
            {"Posterize": 3, "Solarize": 230, **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), 1.72)},
        ),
        (augment.EFFICIENTVMAMBA, {"Distort": 19, "Zoom": 0.36, "Blur": 0.45, "Skew": 0.27, "Posterize": 3}),
    ],
)
def test_arguments_at_magnitude_nine(operations, expected):
    for name, value in expected.items():
        _, argument, signed = operations[name]
        low, high = value if isinstance(value, tuple) else (-value, value)
        assert argument(9) == pytest.approx(high)
        if signed:
            assert argument(-9) == pytest.approx(low)


def test_the_sets_hold_the_official_operations(golden):
    assert len(augment.TIMM) == len(augment.TIMM_INCREASING) == 15
    assert len(augment.EFFICIENTVMAMBA) == 19
    recorded = collections.defaultdict(dict)
    for name in golden["of"]:
        which, operation, *rest = str(name).split("/")
        if which != "eval":
            signs = recorded[which].setdefault(operation.replace("PosterizeTpu", "Posterize"), set())
            signs.add(rest[1])
    for which, operations in SETS.items():
        assert set(operations) == set(recorded[which])
        for name, operation in operations.items():
            # Pillow squares the radius, so the official coin for Blur's sign decides nothing.
            assert operation.signed == (len(recorded[which][name]) == 2 and name != "Blur"), name


def recording(n: int, seen: list, signed: bool = True) -> tuple[Operation, ...]:
    """Operations that write down which they are, and with what they were called."""

    def make(index):
        return Operation(
            lambda image, argument, geometry: seen.append((index, argument, geometry)) or image, float, signed
        )

    return tuple(make(index) for index in range(n))


def within_5_sigma(count: int, trials: int, probability: float) -> bool:
    return abs(count - trials * probability) < 5 * math.sqrt(trials * probability * (1 - probability))


def test_draws_have_the_official_probabilities():
    seen, images = [], 20_000
    augmentation = dataclasses.replace(rand_augment("rand-m9-mstd0.5-inc1"), operations=recording(15, seen))
    rng = np.random.default_rng(0)
    for _ in range(images):
        augmentation(None, rng, "random", FILL)
    draws = 2 * images
    assert within_5_sigma(len(seen), draws, 0.5)
    for index, count in collections.Counter(index for index, _, _ in seen).items():
        assert within_5_sigma(count, draws, 0.5 / 15), index
    magnitudes = np.array([magnitude for _, magnitude, _ in seen])
    assert within_5_sigma(int((magnitudes < 0).sum()), len(seen), 0.5)
    # |m| is N(9, 0.5) clipped at 10, two standard deviations up.
    assert within_5_sigma(int((abs(magnitudes) == 10).sum()), len(seen), 0.02275)
    assert abs(magnitudes).max() == 10
    assert within_5_sigma(int((abs(magnitudes) < 9).sum()), len(seen), 0.5)
    assert within_5_sigma(int((abs(magnitudes) < 8.5).sum()), len(seen), 0.15866)
    bilinear = sum(geometry.resample == Image.Resampling.BILINEAR for _, _, geometry in seen)
    assert within_5_sigma(bilinear, len(seen), 0.5)
    assert {geometry.fill for _, _, geometry in seen} == {FILL}


def test_operations_are_drawn_with_replacement_and_applied_alone():
    """Two draws from two operations: the same one twice in a quarter of the images, none at all in another quarter."""
    augmentation = RandAugment(recording(2, seen := []), magnitude=9.0)
    rng, counts, images = np.random.default_rng(1), collections.Counter(), 8000
    for _ in range(images):
        seen.clear()
        augmentation(None, rng)
        counts[tuple(index for index, _, _ in seen)] += 1
    assert within_5_sigma(counts[()], images, 1 / 4)
    for single in ((0,), (1,)):
        assert within_5_sigma(counts[single], images, 1 / 4)
    for pair in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert within_5_sigma(counts[pair], images, 1 / 16)


def test_efficientvmambas_magnitudes_are_not_clipped():
    seen, rng = [], np.random.default_rng(0)
    augmentation = dataclasses.replace(rand_augment("evmamba-m9-mstd0.5"), operations=recording(19, seen, signed=False))
    for _ in range(5000):
        augmentation(None, rng)
    magnitudes = [magnitude for _, magnitude, _ in seen]
    assert max(magnitudes) > 10
    assert within_5_sigma(sum(m > 10 for m in magnitudes), len(seen), 0.02275)


def test_unsigned_operations_and_fixed_magnitudes_draw_nothing_more():
    seen = []
    augmentation = RandAugment(recording(3, seen, signed=False), magnitude=7.0, num_layers=4, probability=1.0)
    rng, expected = np.random.default_rng(3), np.random.default_rng(3)
    augmentation(None, rng, "bicubic", FILL)
    assert [index for index, _, _ in seen] == expected.integers(3, size=4).tolist()
    assert [(magnitude, geometry) for _, magnitude, geometry in seen] == [(7.0, BICUBIC)] * 4
    expected.random(4)
    assert rng.random() == expected.random()


@pytest.mark.parametrize(
    ("text", "operations", "magnitude", "std", "layers", "limits"),
    [
        ("rand-m9-mstd0.5-inc1", augment.TIMM_INCREASING, 9, 0.5, 2, (0, 10)),
        ("rand-m9-mstd0.5", augment.TIMM, 9, 0.5, 2, (0, 10)),
        ("rand-m9-n3-mstd0.5", augment.TIMM, 9, 0.5, 3, (0, 10)),
        ("rand-mstd1-n1-m7-inc0", augment.TIMM, 7, 1, 1, (0, 10)),
        ("rand-m15-mstd0.5-inc1", augment.TIMM_INCREASING, 15, 0.5, 2, (0, 10)),  # clipped after drawing, as in timm
        ("rand", augment.TIMM, 10, 0, 2, (0, 10)),
        ("evmamba-m9-mstd0.5", augment.EFFICIENTVMAMBA, 9, 0.5, 2, (-math.inf, math.inf)),
    ],
)
def test_texts_mean_what_they_mean_in_timm(text, operations, magnitude, std, layers, limits):
    expected = RandAugment(tuple(operations.values()), magnitude, std, limits, layers, 0.5)
    assert rand_augment(text) == expected


def test_magnitudes_above_ten_are_ten_in_timm():
    seen = []
    dataclasses.replace(rand_augment("rand-m15"), operations=recording(1, seen), probability=1.0)(
        None, np.random.default_rng(0)
    )
    assert {abs(magnitude) for _, magnitude, _ in seen} == {10.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("original-mstd0.5", "must begin with 'rand' or 'evmamba'"),
        ("RAND-m9", "must begin with"),
        ("rand-m9.5", "the part 'm9.5' is not one of m, mstd, n, inc with a number"),
        ("rand-m9-tweights", "the part 'tweights'"),
        ("rand-m9-w0", "the part 'w0'"),
        ("rand-m9-p0.3", "the part 'p0.3'"),
        ("rand-m9-mmax40", "the part 'mmax40'"),
        ("rand-m9-m8", "the part 'm8'"),
        ("rand-m9-n0", "the part 'n0'"),
        ("rand-m9-inc2", "the part 'inc2'"),
        ("rand-m9-mstd", "the part 'mstd'"),
        ("rand--m9", "the part ''"),
        (
            "evmamba-m9-inc1",
            "the part 'inc1' is not one of m, mstd, n with a number, each once, as in evmamba-m9-mstd0.5",
        ),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(UserError) as caught:
        DataConfig(auto_augment=text).validate()
    assert f"data.auto_augment={text!r}" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_color_jitter_is_pillows(photo):
    image = photo.resize((32, 32))
    rng, draws = np.random.default_rng(5), np.random.default_rng(5)
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    orders = set()
    for _ in range(40):
        order = draws.permutation(3)
        expected = image
        for index in order:
            expected = kinds[index](expected).enhance(draws.uniform(0.6, 1.4))
        np.testing.assert_array_equal(np.asarray(color_jitter(image, rng, 0.4)), np.asarray(expected))
        orders.add(tuple(order))
    assert len(orders) == 6


def test_strong_color_jitter_never_turns_negative():
    class Low:
        def permutation(self, n):
            return range(n)

        def uniform(self, low, high):
            assert (low, high) == (0.0, 2.5)
            return low

    assert not np.asarray(color_jitter(Image.new("RGB", (2, 2), (9, 8, 7)), Low(), 1.5)).any()


def test_random_interpolation_is_either_of_two():
    rng = np.random.default_rng(0)
    drawn = [draw_resampling("random", rng) for _ in range(4000)]
    assert within_5_sigma(sum(resample == Image.Resampling.BILINEAR for resample in drawn), 4000, 0.5)
    assert set(drawn) == {Image.Resampling.BILINEAR, Image.Resampling.BICUBIC}
    assert draw_resampling("bilinear", None) == Image.Resampling.BILINEAR
    assert draw_resampling("bicubic", None) == Image.Resampling.BICUBIC


# --- Whole images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_training_images_are_cropped_flipped_then_augmented(photo, interpolation):
    """Pillow's own steps, in timm's order, with the draws of the same generator."""
    config = DataConfig(image_size=48, interpolation=interpolation, auto_augment="rand-m9-mstd0.5-inc1")
    data = encode(np.asarray(photo))
    for seed in range(30):
        rng = np.random.default_rng(seed)
        top, left, height, width = random_crop_box(rng, 224, 224, (0.08, 1.0), (3 / 4, 4 / 3))
        resample = draw_resampling(interpolation, rng)
        expected = photo.crop((left, top, left + width, top + height)).resize((48, 48), resample)
        if rng.random() < 0.5:
            expected = ImageOps.mirror(expected)
        expected = rand_augment("rand-m9-mstd0.5-inc1")(expected, rng, interpolation, FILL)
        np.testing.assert_array_equal(train_image(data, config, np.random.default_rng(seed)), np.asarray(expected))


def test_color_jitter_changes_training_images(photo):
    data, rng = encode(np.asarray(photo)), np.random.default_rng
    plain = DataConfig(image_size=32)
    jittered = dataclasses.replace(plain, color_jitter=0.4)
    draws = rng(0)
    expected = train_image(data, plain, draws)  # leaves the generator where the jitter begins
    expected = np.asarray(color_jitter(Image.fromarray(expected), draws, 0.4))
    np.testing.assert_array_equal(train_image(data, jittered, rng(0)), expected)


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "evmamba-m9-mstd0.5"])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmented_images_stay_what_they_are(photo, text, channels):
    settings = {"mean": (0.5,), "std": (0.5,)} if channels == 1 else {}
    config = DataConfig(image_size=24, in_channels=channels, auto_augment=text, interpolation="random", **settings)
    config.validate()
    data, rng = encode(np.asarray(photo.resize((40, 32)))), np.random.default_rng(0)
    for _ in range(200):
        image = train_image(data, config, rng)
        chex.assert_shape(image, (24, 24, channels))
        assert image.dtype == np.uint8


@pytest.mark.parametrize(
    ("text", "digest"), [("rand-m9-mstd0.5-inc1", "223ed3ab77e1f27f"), ("evmamba-m9-mstd0.5", "3ebb6235849b85e7")]
)
def test_augmented_images_never_change(photo, text, digest):
    """The pixels of a given generator stay the same: a run can be repeated years later."""
    config = DataConfig(image_size=32, auto_augment=text)
    data, rng = encode(np.asarray(photo)), np.random.default_rng(0)
    images = np.stack([train_image(data, config, rng) for _ in range(64)])
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", names("eval/"))
def test_evaluation_gives_timms_pixels(golden, name):
    _, crop_mode, crop_pct, interpolation = name.split("/")
    config = DataConfig(image_size=24, crop_mode=crop_mode, crop_pct=float(crop_pct), eval_interpolation=interpolation)
    config.validate()
    np.testing.assert_array_equal(eval_image(encode(golden["wide"]), config), golden["of"][name])


# --- Repeated augmentation --------------------------------------------------------------------------------------------


def labels(batches) -> list[int]:
    return np.concatenate([batch["label"] for batch in batches]).tolist()


@pytest.mark.parametrize("views", [2, 3])
def test_each_image_comes_several_times_in_a_row(numbered, small, views):
    """Epochs of 10 examples: the first images of the epoch's order, ``views`` times each, cut off at 10."""
    source = numbered(10)
    order = np.array(labels(take(small, source, 10, seed=7, global_batch=4))).reshape(4, 10)
    got = labels(take(dataclasses.replace(small, repeated_aug=views), source, 10, seed=7, global_batch=4))
    assert got == order.repeat(views, axis=1)[:, :10].ravel().tolist()


def test_views_are_augmented_differently(digits_dir, small):
    config = dataclasses.replace(
        small,
        name="digits",
        data_dir=str(digits_dir),
        image_size=12,
        repeated_aug=3,
        auto_augment="rand-m9-mstd0.5-inc1",
    )
    (batch,) = take(config, open_source(config, "train"), 1, seed=0, global_batch=300)
    views = batch["label"].reshape(100, 3)
    assert (views == views[:, :1]).all()
    different = [len({image.tobytes() for image in images}) for images in batch["image"].reshape(100, 3, -1)]
    assert np.mean(different) > 2.95


def test_an_image_is_decoded_once_for_all_its_views(numbered, small):
    read = []

    class Noting(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    source = numbered(12)
    source = dataclasses.replace(source, records=Noting(source.records))
    config = dataclasses.replace(small, repeated_aug=3, num_threads=1)
    (batch,) = take(config, source, 1, seed=7, global_batch=12)
    assert read[:4] == batch["label"][::3].tolist()


def test_repeated_augmentation_does_not_depend_on_processes_and_resumes(digits_dir, small):
    config = dataclasses.replace(
        small, name="digits", data_dir=str(digits_dir), image_size=12, repeated_aug=3, auto_augment="evmamba-m9-mstd0.5"
    )
    source = open_source(config, "train")
    settings = {"seed": 11, "global_batch": 32}  # 1437 examples: step 44 crosses the end of the first epoch
    run = take(config, source, 4, start_step=43, **settings)
    chex.assert_trees_all_equal(run, take(config, source, 4, 4, start_step=43, **settings))
    chex.assert_trees_all_equal(run[2:], take(config, source, 2, start_step=45, **settings))
    workers = dataclasses.replace(config, num_workers=1)
    chex.assert_trees_all_equal(run[2:], take(workers, source, 2, start_step=45, **settings))


# --- Recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_models())
def test_recipes_augment_as_published_and_evaluate_as_the_card_says(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.validate()
    data, card = config.data, model_card(name)
    family = name.partition("_")[0]
    assert data.auto_augment == ("evmamba-m9-mstd0.5" if family == "evmamba" else "rand-m9-mstd0.5-inc1")
    assert data.repeated_aug == (3 if family == "vim" else 1)
    assert data.interpolation == ("random" if family == "mambavision" else "bicubic")
    assert (data.crop_pct, data.crop_mode, data.eval_interpolation) == (card.crop, card.crop_mode, card.interpolation)
    assert (data.image_size,) * 2 == card.input_size


@pytest.mark.parametrize("size", ["t", "s", "b"])
def test_efficientvmambas_other_recipes(size):
    get_config = importlib.import_module(f"configs.evmamba_{size}").get_config
    assert get_config("paper").data.auto_augment == "evmamba-m9-mstd0.5"
    assert get_config("readme").data.auto_augment == "rand-m9-mstd0.5-inc1"
