"""What the files in configs/ say about themselves."""

import importlib
import re
from pathlib import Path

import jax
import pytest

from evmamba_jax.errors import UserError
from evmamba_jax.models import list_models, model_card
from evmamba_jax.tasks import task_of
from evmamba_jax.training.mesh import make_mesh
from evmamba_jax.training.setup import Setup

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
}


def told(config) -> str:
    """Return the sentence in which a docstring gives the length of a run."""
    steps = int(config.duration.epochs) * (EXAMPLES[config.data.name] // config.batch_size)
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
