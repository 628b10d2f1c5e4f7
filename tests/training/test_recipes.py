"""What the files in configs/ say about themselves."""

import dataclasses
import functools
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from evmamba_jax import create_model
from evmamba_jax.analysis import count_parameters
from evmamba_jax.arrays import split
from evmamba_jax.errors import UserError
from evmamba_jax.models import list_models, model_card
from evmamba_jax.tasks import task_of
from evmamba_jax.training.config import Duration
from evmamba_jax.training.mesh import make_mesh
from evmamba_jax.training.optimizer import decayed_by
from evmamba_jax.training.setup import Setup
from evmamba_jax.weights import places, to_torch
from evmamba_jax.weights.convert import table

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = [path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob("[a-z]*.py")]
NAMES = sorted(".".join(path.parts) for path in FILES if path.stem != "finetune")  # whose data are the user's
EXAMPLES = {
    "imagenet2012": 1_281_167,
    "cifar10": 50_000,
    "digits": 1437,
    "fashion_mnist_debian": 60_000,
    "stamps": 5122,
    "digit_scenes": 4000,
    "stamp_scenes": 3000,
    "coco": 117_266,  # training images that have objects
}


def told(config) -> str:
    """Return the sentence in which a docstring gives the length of a run."""
    if config.duration.steps:
        images = config.duration.steps * config.batch_size
        return f"{config.duration.steps:,} iterations of {config.batch_size} images, {images:,} in all"
    steps = config.duration.in_steps(EXAMPLES[config.data.name] // config.batch_size)
    images = steps * config.batch_size
    epochs = f"{config.duration.epochs:g} epoch{'s' * (config.duration.epochs != 1)}"
    return f"{epochs}: {steps:,} steps of {config.batch_size:,} images, {images:,} in all"


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_say_what_the_card_and_the_recipe_say(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    task_of(config)  # checks it
    text = " ".join(module.__doc__.split())
    assert told(config) in text
    if name in list_models():
        card = model_card(name)
        assert f"{card.input_size[0]} px. Published top-1: {card.top1} (" in text
        assert set(re.findall(r"arXiv:(\d{4}\.\d{5})", text)) <= {card.paper}
    if name == "digits_detection":
        assert told(module.get_config("mask_rcnn")) in text
    if name in ("evmamba_t", "evmamba_s"):
        for variant in ("paper", "readme"):
            other = module.get_config(variant)
            steps = 300 * (1_281_167 // other.batch_size)
            assert f"as ``:paper`` and ``:readme`` {steps:,} steps of {other.batch_size:,}" in text


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "stamps", "experiments.vmamba_init"])
def test_small_recipes_fit_together(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    kind = task_of(config)
    class_names, examples, _ = kind.describe(config)
    assert (len(class_names), examples) == (10, EXAMPLES[config.data.name])
    setup = Setup(kind(config, class_names), make_mesh(config), examples)
    assert f"{setup.total_steps:,} steps of" in told(config)
    rates = [float(setup.schedule(step)) for step in range(0, setup.total_steps, 10)]
    assert max(rates) == pytest.approx(config.optim.lr, rel=1e-3)
    assert rates[0] < 0.01 * config.optim.lr  # a warm-up
    assert rates[-1] < 0.01 * config.optim.lr


# Rate, decay, drop path of the backbone, images a step, side of the crops, width of the head, bfloat16: written down a
# second time, off the official files and, of EfficientVMamba, off the specification.
OFFICIAL = {
    "upernet_vmamba_t": (6e-5, 0.01, 0.2, 16, 512, 512, False),
    "upernet_vmamba_t_s2l5": (6e-5, 0.01, 0.2, 16, 512, 512, False),
    "upernet_vmamba_s": (6e-5, 0.01, 0.3, 16, 512, 512, False),
    "upernet_vmamba_s_640": (6e-5, 0.01, 0.3, 16, 640, 512, False),
    "upernet_vmamba_b": (6e-5, 0.01, 0.6, 16, 512, 512, False),
    "upernet_vmamba_t_v0": (6e-5, 0.01, 0.3, 16, 512, 512, False),
    "upernet_vmamba_s_v0": (6e-5, 0.01, 0.3, 16, 512, 512, False),
    "upernet_vmamba_b_v0": (6e-5, 0.01, 0.3, 16, 512, 512, False),
    "upernet_msvmamba_n": (6e-5, 0.01, 0.3, 16, 512, 512, False),
    "upernet_msvmamba_m": (6e-5, 0.01, 0.3, 16, 512, 512, False),
    "upernet_msvmamba_t": (6e-5, 0.01, 0.2, 16, 512, 512, False),
    "upernet_mambavision_t": (5e-5, 0.01, 0.2, 16, 512, 512, True),
    "upernet_mambavision_s": (6e-5, 0.01, 0.2, 16, 512, 512, True),
    "upernet_mambavision_b": (5e-5, 0.01, 0.2, 16, 512, 512, True),
    "upernet_mambavision_l3_640": (8e-5, 0.05, 0.2, 16, 640, 512, False),
    "upernet_evmamba_t": (6e-5, 0.01, 0.2, 16, 512, 256, True),
    "upernet_evmamba_s": (6e-5, 0.01, 0.2, 16, 512, 384, True),
    "upernet_evmamba_b": (6e-5, 0.01, 0.2, 16, 512, 512, True),
    "upernet_evmamba_t_640": (6e-5, 0.01, 0.2, 16, 640, 256, True),
    "upernet_evmamba_s_640": (6e-5, 0.01, 0.2, 16, 640, 384, True),
    "upernet_evmamba_b_640": (6e-5, 0.01, 0.2, 16, 640, 512, True),
    "upernet_vim_t": (2e-4, 0.1, 0.1, 32, 512, 192, False),
    "upernet_vim_s": (1e-4, 0.05, 0.1, 32, 512, 384, False),
    "retinanet_evmamba_t": (1e-4, 1e-4, 0.2, 16, 224, 208, True),
    "retinanet_evmamba_s": (1e-4, 1e-4, 0.2, 16, 224, 224, True),
    "retinanet_evmamba_b": (1e-4, 1e-4, 0.2, 16, 224, 256, True),
    "retinanet_vmamba_t": (1e-4, 1e-4, 0.2, 16, 224, 256, False),
    "retinanet_vmamba_s": (1e-4, 1e-4, 0.3, 16, 224, 256, False),
    "retinanet_vmamba_b": (1e-4, 1e-4, 0.6, 16, 224, 256, False),
    "retinanet_msvmamba_n": (1e-4, 1e-4, 0.2, 16, 224, 256, False),
    "retinanet_msvmamba_m": (1e-4, 1e-4, 0.2, 16, 224, 256, False),
    "retinanet_msvmamba_t": (1e-4, 1e-4, 0.2, 16, 224, 256, False),
    "mask_rcnn_evmamba_t": (1e-4, 0.05, 0.2, 16, 224, 128, True),
    "mask_rcnn_evmamba_s": (1e-4, 0.05, 0.2, 16, 224, 256, True),
    "mask_rcnn_evmamba_b": (1e-4, 0.05, 0.2, 16, 224, 256, True),
    "mask_rcnn_vmamba_t": (1e-4, 0.05, 0.2, 16, 224, 256, False),
    "mask_rcnn_vmamba_t_s2l5": (1e-4, 0.05, 0.2, 16, 224, 256, False),
    "mask_rcnn_vmamba_s": (1e-4, 0.05, 0.3, 16, 224, 256, False),
    "mask_rcnn_vmamba_b": (1e-4, 0.05, 0.6, 16, 224, 256, False),
    "mask_rcnn_vmamba_t_v0": (1e-4, 0.05, 0.2, 16, 224, 256, False),
    "mask_rcnn_vmamba_s_v0": (1e-4, 0.05, 0.2, 16, 224, 256, False),
    "mask_rcnn_vmamba_b_v0": (1e-4, 0.05, 0.2, 16, 224, 256, False),
    "mask_rcnn_msvmamba_n": (1e-4, 0.05, 0.2, 16, 224, 256, False),
    "mask_rcnn_msvmamba_m": (1e-4, 0.05, 0.2, 16, 224, 256, False),
    "mask_rcnn_msvmamba_t": (1e-4, 0.05, 0.2, 16, 224, 256, False),
    "mask_rcnn_evmamba_t_3x": (1e-4, 0.05, 0.2, 16, 224, 128, True),
    "mask_rcnn_evmamba_s_3x": (1e-4, 0.05, 0.2, 16, 224, 256, True),
    "mask_rcnn_evmamba_b_3x": (1e-4, 0.05, 0.2, 16, 224, 256, True),
    "mask_rcnn_vmamba_t_3x": (1e-4, 0.05, 0.2, 16, 224, 256, False),
    "mask_rcnn_vmamba_t_s2l5_3x": (1e-4, 0.05, 0.2, 16, 224, 256, False),
    "mask_rcnn_vmamba_s_3x": (1e-4, 0.05, 0.3, 16, 224, 256, False),
    "mask_rcnn_vmamba_t_v0_3x": (1e-4, 0.05, 0.2, 16, 224, 256, False),
    "mask_rcnn_vmamba_s_v0_3x": (1e-4, 0.05, 0.2, 16, 224, 256, False),
    "mask_rcnn_msvmamba_m_3x": (1e-4, 0.05, 0.2, 16, 224, 256, False),
    "mask_rcnn_msvmamba_t_3x": (1e-4, 0.05, 0.2, 16, 224, 256, False),
    "cascade_mask_rcnn_mambavision_t": (1e-4, 0.05, 0.2, 16, 224, 256, True),
    "cascade_mask_rcnn_mambavision_s": (1e-4, 0.05, 0.2, 16, 224, 256, True),
    "cascade_mask_rcnn_mambavision_b": (2e-4, 0.05, 0.2, 16, 224, 256, True),
    "vim_cascade_vim_t": (1e-4, 0.1, 0.1, 64, 224, 256, True),
    "vim_cascade_vim_s": (1e-4, 0.1, 0.1, 64, 224, 256, True),
}


def dense(name):
    folder = "segmentation" if name.startswith("upernet") else "detection"
    return importlib.import_module(f"configs.{folder}.{name}").get_config()


@pytest.mark.parametrize("name", OFFICIAL)
def test_dense_recipes_are_the_official_settings(name):
    config = dense(name)
    head = config.segmenter if config.task == "segmentation" else config.detector
    optim, data = config.optim, config.data
    settings = (optim.lr, optim.weight_decay, config.model.drop_path_rate, config.batch_size, data.image_size)
    assert (*settings, head.width, config.model.dtype == "bfloat16") == OFFICIAL[name]
    assert (optim.betas, optim.eps, optim.clip_norm, optim.ema_decay, optim.min_lr) == ((0.9, 0.999), 1e-8, 0, 0, 0)
    assert config.init_from == ("" if "msvmamba" in name else "official")
    card = model_card(config.model.name)
    assert (card.checkpoint is None) == (config.init_from == "")  # of the others "official" has an address
    if head.name == "vim_cascade":
        return  # test_vims_detector_is_trained_as_detectron2_does
    vim, retinanet, rcnn = "vim_" in name, name.startswith("retinanet"), "mask_rcnn" in name
    boxes, long = retinanet or rcnn, name.endswith("_3x") or name.startswith("cascade")
    epochs = Duration(epochs=36 if long else 12)
    assert config.duration == (epochs if boxes else Duration(steps=60_000 if vim else 160_000))
    assert optim.warmup == Duration(steps=500 if retinanet else 1000 if rcnn else 1500)
    assert optim.warmup_lr / optim.lr == pytest.approx(1e-3 if boxes else 1e-6)
    assert optim.no_decay == ("nothing" if retinanet else "vectors" if vim else "norm_names")
    drops = (27, 33) if long else (8, 11)
    assert (optim.schedule, optim.milestones) == (("milestones", drops) if boxes else ("poly", ()))
    assert (optim.warmup_prefix, optim.lr_changes) == (not vim, "step")
    assert data.scale == ((1333, 800) if boxes else (4 * data.image_size, data.image_size))
    if boxes:
        assert head.name == (name.partition("cnn_")[0] + "cnn" if rcnn else "retinanet")
        assert data.augment == ("multi_scale" if long else "one_scale")
        assert head.fc_width == (512 if "mask_rcnn_evmamba_t" in name else 1024 if name.startswith("mask") else None)
    evaluated = 1000 if vim else 5000 if "_l3_" in name else 10_000 if "mambavision" in name else 16_000
    assert config.eval_every == (Duration(epochs=1) if boxes else Duration(steps=evaluated))


def test_every_dense_config_has_its_settings_written_down():
    assert {f"{'segmentation' if n.startswith('u') else 'detection'}.{n}" for n in OFFICIAL} == {
        name for name in NAMES if name.startswith(("segmentation.", "detection."))
    }


def upernet_size(channels, width, classes=150, aux=256, pools=4):
    """Return the parameters of UperNet's two heads; a convolution has no bias, its BatchNorm two vectors."""
    conv = lambda i, o, side=1: side * side * i * o + 2 * o  # noqa: E731
    *fine, last = channels
    head = pools * conv(last, width) + conv(last + pools * width, width, 3)
    head += sum(conv(c, width) + conv(width, width, 3) for c in fine) + conv(4 * width, width, 3)
    return head + (width + 1) * classes + conv(channels[2], aux, 3) + (aux + 1) * classes


def retinanet_size(channels, width, classes=80, anchors=9):
    """Return the parameters of RetinaNet's pyramid and head; every convolution has a bias."""
    conv = lambda i, o, side=3: side * side * i * o + o  # noqa: E731
    pyramid = sum(conv(c, width, 1) + conv(width, width) for c in channels[1:])
    pyramid += conv(channels[-1], width) + conv(width, width)
    return pyramid + 8 * conv(width, width) + conv(width, anchors * classes) + conv(width, anchors * 4)


# The official backbones with their out norms, counted in a run of the official code; and millions as published.
@pytest.mark.parametrize(
    ("name", "backbone", "width", "size", "published"),
    [
        ("upernet_evmamba_t", 6_109_332, 48, upernet_size, 14),
        ("retinanet_evmamba_s", 10_761_584, 64, retinanet_size, 19.0),
    ],
)
def test_the_sizes_of_efficientvmamba_with_heads(name, backbone, width, size, published):
    config = dense(name)
    kind = task_of(config)
    task = SimpleNamespace(config=config, class_names=kind.describe(config).class_names)
    task.about = config.segmenter if config.task == "segmentation" else config.detector
    task.create = functools.partial(kind.create, task)
    parameters = count_parameters(nnx.eval_shape(functools.partial(kind.build_model, task)))
    assert parameters == backbone + size([width * 2**i for i in range(4)], task.about.width)
    assert abs(parameters / 1e6 - published) < 0.5


@pytest.mark.parametrize("name", ["upernet_evmamba_t", "upernet_vim_t"])
def test_dense_recipes_fit_together(name):
    config = dense(name)
    config.model.options |= {"width": 8} | ({"depth": 4} if "vim" in name else {"depths": (1, 1, 1, 1)})
    config.segmenter.width = config.segmenter.aux_width = 8
    kind = task_of(config)
    class_names, examples, _ = kind.describe(config)
    setup = Setup(kind(config, class_names), make_mesh(config, jax.devices()[:1]), examples)
    assert (len(class_names), examples) == (150, 20_210)
    rates = [float(setup.schedule(step)) for step in (0, 1499, 1500, setup.total_steps - 1)]
    vim = "vim" in name
    scaled = [1e-6, (1499 / 1500) * (1 - 1499 / 60_000), 1 - 1500 / 60_000, 1 / 60_000] if vim else [1e-6, 1, 1, 0]
    assert rates == pytest.approx([config.optim.lr * scale for scale in scaled], rel=1e-4, abs=1e-12)
    embedding = setup.tuning.scales["backbone.patch_embed.kernel" if vim else "backbone.patch_embed.proj.kernel"]
    assert embedding == pytest.approx(0.92**25 if vim else 1)
    assert setup.tuning.scales["decode_head.classifier.conv.kernel"] == 1


def vim_decay_rate(name, rate, layers):
    """Return the factor of a parameter's learning rate, by its official name."""
    layer = layers + 1
    if name.startswith("backbone."):
        if ".pos_embed" in name or ".patch_embed" in name:
            layer = 0
        elif ".layers." in name:
            layer = int(name.partition(".layers.")[2].partition(".")[0]) + 1
    return rate ** (layers + 1 - layer)


def test_vims_detector_is_trained_as_detectron2_does():
    """Rates by layer, decay and schedule, against Vim's get_vim_lr_decay_rate and Detectron2's formulas."""
    config = dense("vim_cascade_vim_t")
    assert dataclasses.replace(dense("vim_cascade_vim_s"), model=config.model) == config
    config.model.options |= {"width": 8, "depth": 4}
    config.detector.width = config.detector.fc_width = 8
    kind = task_of(config)
    about = kind.describe(config)
    assert about.examples == EXAMPLES["coco"]
    setup = Setup(kind(config, about.class_names), make_mesh(config, jax.devices()[:1]), about.examples)
    model = setup.task.model
    params = split(model).params
    wanted = {row.ours: vim_decay_rate(row.official, 0.837, 4) for row in table(model) if row.ours in params}
    assert set(wanted.values()) == {0.837**k for k in range(6)}
    assert dict(setup.tuning.scales) == pytest.approx(wanted)
    mask = decayed_by(config.optim, model)(params)
    assert [name for name, decayed in mask.items() if not decayed] == ["backbone.pos_embed"]
    assert setup.total_steps == 184_375
    steps = np.array([0, 100, 249, 250, 163_888, 163_889, 177_545, 177_546, 184_374])
    warm = np.where(steps < 250, 0.001 + 0.999 * steps / 250, 1)
    drops = 0.1 ** ((steps >= 163_889).astype(int) + (steps >= 177_546))
    rates = [float(setup.schedule(step)) for step in steps]
    assert rates == pytest.approx(1e-4 * warm * drops, rel=1e-5)
    assert (config.eval_every, config.save_every) == (Duration(steps=5000), Duration(steps=5000))
    assert (config.data.augment, config.data.scale) == ("large_scale_jitter", (1024, 1024))


def test_vims_segmenter_starts_from_the_released_classifier(tmp_path, monkeypatch, caplog):
    """The classifier has another grid of positions, a class token and a head."""
    small = {"width": 8, "depth": 4}
    classifier = create_model("vim_t", **small, rngs=nnx.Rngs(1))
    released = tmp_path / "vim.safetensors"
    save_file({name: np.ascontiguousarray(array) for name, array in to_torch(classifier).items()}, released)
    monkeypatch.setattr(places, "_official", lambda name: {"vim_t": places.Found(released, str(released))}[name])
    config = dense("upernet_vim_t")
    config.model.options |= small
    config.segmenter.width = config.segmenter.aux_width = 8
    kind = task_of(config)
    params = kind(config, kind.describe(config).class_names).load(config.init_from).params
    assert "resized from 14x14 to 32x32" in caplog.text
    assert params["backbone.pos_embed"].shape == (1, 32 * 32, 8)
    for name, array in split(classifier).params.items():
        if name.startswith("blocks."):
            np.testing.assert_array_equal(params[f"backbone.{name}"], array)
    assert params["decode_head.fuse.conv.kernel"].shape == (3, 3, 32, 8)


VISION = ("mambavision", "sliding_window", "s4d", "s5", "attention_pool", "convnext")
NOT_THE_COURSES = (*VISION, "early_bird")  # the course's model has no channels to cut
VARIANTS = [
    (row, variant)
    for row in NAMES
    if row.startswith("experiments.") and row != "experiments.vmamba_init"
    for variant in ("", "digits", "course_digits", "notebook")
    if variant in ("", "digits") or not row.endswith(NOT_THE_COURSES)
]


@pytest.mark.parametrize(("row", "variant"), VARIANTS)
def test_every_row_of_the_experiments_fits_together(row, variant):
    config = importlib.import_module(f"configs.{row}").get_config(variant)
    task = task_of(config)(config, [str(k) for k in range(10)])
    setup = Setup(task, make_mesh(config, jax.devices()[:1]), EXAMPLES[config.data.name])
    assert setup.sparse.active == bool(config.pruning.method)
    assert (config.model.name == "course_vim") == ("course" in variant or variant == "notebook")


def test_an_unknown_word_is_said():
    with pytest.raises(UserError, match="has the word 'cifar'; allowed, joined with '_': cifar10, cifar100, fashion"):
        importlib.import_module("configs.experiments.baseline").get_config("course_cifar")


def test_every_model_has_a_config_of_its_name():
    assert set(list_models()) <= set(NAMES)


@pytest.mark.parametrize("name", ["evmamba_t", "mambavision_l3_512", "vim_s"])
def test_fine_tuning_prepares_pictures_as_the_card_says(name):
    config = importlib.import_module("configs.finetune").get_config(name)
    task_of(config)  # checks it
    card = model_card(name)
    assert (config.model.name, config.data.image_size, config.data.mean) == (name, card.input_size[0], card.mean)
    assert (config.data.crop_pct, config.data.crop_mode) == (card.crop, card.crop_mode)


def test_fine_tuning_at_another_size_keeps_the_rest_of_the_recipe():
    config = importlib.import_module("configs.evmamba_t_384").get_config()
    base = importlib.import_module("configs.evmamba_t").get_config()
    assert (config.data.image_size, config.data.crop_mode, config.optim.lr) == (384, "squash", 4e-5)
    assert config.data.auto_augment == base.data.auto_augment
    assert (config.model, config.seed) == (base.model, base.seed)
