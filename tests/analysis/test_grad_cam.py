"""Grad-CAM of every family, against finite differences in float64 over the entries of the map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from evmamba_jax.analysis import grad_cam
from evmamba_jax.analysis.gradcam import class_of, main
from evmamba_jax.arrays import fill, split
from evmamba_jax.checkpoints import save_model
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model

STAGED = {"width": 8, "depths": (0, 0, 0, 1)}
WINDOWS = {"stem_width": 4, "window_size": (2, 2, 2, 2), "num_heads": (2, 2, 2, 2)}
PLAIN = {"width": 8, "depth": 3, "image_size": 32, "patch_size": 8, "d_state": 2}
# Name, options, stage, and how many blocks of a plain model have run when its map is taken.
CASES = [
    ("vmamba_t", STAGED, 2, None),
    ("evmamba_t", STAGED, -1, None),
    ("msvmamba_n", STAGED, 2, None),
    ("mambavision_t", STAGED | WINDOWS, -1, None),
    ("vim_t", PLAIN | {"stride": 8}, -1, 2),  # after the last block the head sees the class token alone
    ("course_vim", PLAIN | {"dt_rank": 2}, -1, 3),
]


def built(name, options):
    model, rng = abstract_model(name, num_classes=3, in_channels=1, **options), np.random.default_rng(0)
    _, params, stats = split(model)
    params = {path: 0.4 * rng.normal(size=array.shape) for path, array in params.items()}
    fill(model, params, {path: rng.uniform(0.5, 1.5, array.shape) for path, array in stats.items()})
    return model


def map_and_rest(model, image, stage, end):
    """Return the map of an image, what stands beside it, and the function from maps to logits, written out again."""
    if end is None:
        number = stage % 4
        (x,) = model.features(image[None])[number]

        def rest(maps):
            x = maps
            if number < 3:
                x = model.stages[number].downsample(x)
                for later in range(number + 1, 4):
                    x = model.stages[later](x)
                    x = x if later == 3 else model.stages[later].downsample(x)
            return model.head(model.norm(x).mean((1, 2)))

        return x, rest
    given = {"grid": model._grid(image[None])} if type(model).__name__ == "Vim" else {}
    tokens = model.tokens(image[None])
    for block in model.blocks[:end]:
        tokens = block(tokens, None, **given)
    own = tokens.shape[1] % 2 == 1  # 16 patches, and the class token in their middle
    patches = jnp.concatenate([tokens[:, :8], tokens[:, 9:]], 1) if own else tokens

    def rest(maps):
        x = maps.reshape(len(maps), 16, -1)
        if own:
            x = jnp.concatenate([x[:, :8], jnp.broadcast_to(tokens[:, 8:9], (len(x), 1, 8)), x[:, 8:]], 1)
        for block in model.blocks[end:]:
            x = block(x, None, **given)
        if type(model).__name__ == "CourseVim":
            return model.head(model.norm(x.mean(1)))
        return model.head(model.norm(x[:, 8]) if own else model.norm(x).mean(1))

    return patches.reshape(4, 4, 8), rest


@pytest.mark.parametrize(("name", "options", "stage", "end"), CASES)
def test_the_map_that_finite_differences_find(name, options, stage, end):
    side = 64 if end is None else 32  # at least 2x2 pixels
    images = np.random.default_rng(1).normal(size=(2, side, side, 1))
    with jax.enable_x64(True):
        model = built(name, options)
        structure, arrays = nnx.split(model)

        @jax.jit
        def differences(arrays, image):
            x, rest = map_and_rest(nnx.merge(structure, arrays), image, stage, end)
            steps = 1e-5 * jnp.eye(x.size).reshape(-1, *x.shape)
            logits = rest(jnp.concatenate([x[None], x + steps, x - steps]))
            more, less = jnp.split(logits[1:], 2)
            return x, logits[0], (more - less) / 2e-5

        found = grad_cam(model, images, [2, 0], stage=stage, batch_size=2)
        for number, image in enumerate(images):
            x, logits, slopes = (np.asarray(array) for array in differences(arrays, image))
            np.testing.assert_allclose(found.logits[number], logits, rtol=1e-9, atol=1e-9)
            gradient = slopes[:, found.classes[number]].reshape(x.shape)
            wanted = np.maximum((x * gradient.mean((0, 1))).sum(-1), 0)
            assert wanted.max() > 1e-4
            np.testing.assert_allclose(found.maps[number], wanted, rtol=1e-6, atol=1e-9)
    assert found.classes.tolist() == [2, 0]


def test_without_a_class_each_image_has_its_most_probable():
    images = np.random.default_rng(1).normal(size=(7, 8, 8, 1)).astype(np.float32)
    model = tiny()
    model.head.bias[...] -= jax.jit(model.__call__)(images).mean(0)  # so that none leads everywhere
    found = grad_cam(model, images, stage=0, batch_size=2)
    np.testing.assert_allclose(found.logits, jax.jit(model.__call__)(images), rtol=1e-4, atol=1e-4)
    assert found.classes.tolist() == found.logits.argmax(-1).tolist()
    assert len(set(found.classes.tolist())) > 1
    np.testing.assert_array_equal(found.maps, grad_cam(model, images, found.classes, stage=0, batch_size=2).maps)


def tiny():
    return built("evmamba_t", STAGED | {"depths": (0, 0, 0, 0)})


IMAGES = np.ones((2, 8, 8, 1), np.float32)


@pytest.mark.parametrize(
    ("model", "images", "options", "told"),
    [
        (tiny, IMAGES, {"class_index": 3}, "there is no class 3; allowed: 0 to 2"),
        (
            tiny,
            IMAGES,
            {"class_index": [0, 1, 2]},
            r"class_index is int64 of shape \(3,\); one integer, or one for",
        ),
        (tiny, IMAGES, {"stage": 4}, "there is no stage 4; allowed: 0 to 3"),
        (tiny, IMAGES[:0], {}, "there are no images: give at least one"),
        (tiny, IMAGES[:, :3], {}, "image size 3x8 is too small"),
        (tiny, IMAGES * [[[[1]]], [[[np.nan]]]], {"batch_size": 1}, "logits or map of image 1 are no numbers"),
        (tiny, np.uint8(IMAGES), {}, "images must be normalised floats"),
        (lambda: jnp.sin, IMAGES, {}, "Grad-CAM is for the classifiers of this library, not for "),
        (lambda: abstract_model("vim_t", num_classes=0), IMAGES, {}, "the model has no head"),
    ],
)
def test_what_cannot_be_is_refused(model, images, options, told):
    with pytest.raises(UserError, match=told) as caught:
        grad_cam(model(), images, **options)
    assert "\n" not in str(caught.value)


def test_a_class_by_its_name_a_synonym_or_its_number():
    names = ["tench, Tinca tinca", "crane", "goldfish", "crane", "7"]
    known = ["tench, tinca tinca", "TINCA TINCA", "Goldfish", "3", "7"]
    assert [class_of(given, names) for given in known] == [0, 0, 2, 3, 4]
    for given, told in (
        ("crane", "several classes are called 'crane': give a number, one of 1, 3"),
        ("goldfsh", "there is no class 'goldfsh', did you mean 'goldfish'?; allowed: a number from 0 to 4, or a name"),
        ("5", "there is no class '5'; allowed: a number from 0 to 4, or a name"),
    ):
        with pytest.raises(UserError) as caught:
            class_of(given, names)
        assert str(caught.value) == told


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a converted model of grey images with three named classes."""
    folder = tmp_path_factory.mktemp("converted")
    _, params, stats = split(tiny())
    options = STAGED | {"depths": [0, 0, 0, 0], "in_channels": 1}
    data = {"image_size": 32, "in_channels": 1, "mean": (0.5,), "std": (0.25,)}
    config = {"data": data, "model": {"options": options}}
    meta = {"model": "evmamba_t", "num_classes": 3, "class_names": ["cat", "dog", "bird"], "config": config}
    params, stats = ({path: np.float32(array) for path, array in part.items()} for part in (params, stats))
    save_model(folder, params=params, batch_stats=stats, meta=meta)
    return folder


def test_the_command_names_class_and_probability(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(folder), "--class", "dog"]) == 0
    weights, china, flower, drawn = capsys.readouterr().out.splitlines()
    assert weights.startswith(f"weights: {folder}")
    assert drawn == "drawn: grad_cam.png"
    shares = []
    for line, name in ((china, "china.jpg"), (flower, "flower.jpg")):
        assert name in line
        assert ": 1 dog, " in line
        shares.append(float(line.partition("dog, ")[2].partition("%")[0]) / 100)
    with Image.open("grad_cam.png") as picture:
        assert picture.width > 2 * picture.height
    views = []
    for line in (china, flower):
        with Image.open(line.partition(": ")[0]) as picture:
            grey = picture.convert("L").resize((36 * 640 // 427, 36), Image.Resampling.BICUBIC)
        views.append(np.asarray(grey.crop((10, 2, 42, 34)), np.float32)[..., None])
    logits = np.float64(jax.jit(tiny().__call__)((np.stack(views) / 255 - 0.5) / 0.25))
    exponentials = np.exp(logits)
    np.testing.assert_allclose(shares, exponentials[:, 1] / exponentials.sum(-1), atol=6e-4)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--class", "fish"], "there is no class 'fish'; allowed: a number from 0 to 2, or a name"),
        (["--stage", "9"], "there is no stage 9; allowed: 0 to 3, or -1 for the last"),
        (["--size", "2"], "image size 2x2 is too small: height and width must be at least 4"),
        (["nothing.png"], "no image can be read: 'nothing.png' cannot be read: No such file or directory"),
        (["--out", "cam.pdf"], "argument --out: cam.pdf must end in .png"),
    ],
)
def test_a_mistake_is_one_line(arguments, told, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(folder), *arguments]) == 2
    assert f"error: {told}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
