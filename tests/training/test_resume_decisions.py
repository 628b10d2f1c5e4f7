"""What a resumed run may change, field by field."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from evmamba_jax.errors import UserError
from evmamba_jax.training import resume
from evmamba_jax.training.config import Config, Duration

# Written down a second time: a decision that changes by accident is seen here.
REFUSED = {
    "task",
    "model.name",
    "data.name",
    "data.train_split",
    "data.in_channels",
    "data.balanced",
    "data.repeated_aug",
    "optim.name",
    "tune.method",
    "tune.freeze",
    "tune.lora_rank",
    "tune.lora_alpha",
    "tune.lora_targets",
    "pruning.method",
    "pruning.score",
    "pruning.scope",
    "pruning.structure",
    "pruning.multiple_of",
    "pruning.schedule",
    "pruning.initial",
    "pruning.final",
    "pruning.begin",
    "pruning.end",
    "pruning.every",
    "pruning.factors",
    "pruning.limit",
    "pruning.length",
    "pruning.on_ticket",
    "pruning.rate",
    "pruning.rewind",
    "pruning.reset",
    "seed",
    "batch_size",
}
AFTER_THE_SHAPES = {"model.options"}
SWITCHES = {"optim.weight_decay", "optim.clip_norm", "optim.ema_decay"}


def leaves(values, prefix=""):
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Duration):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, values, field.name


NAMES = [name for name, *_ in leaves(Config())]
NAMES_OF_CLASSES = ("cat", "dog")


class Numbers(list):
    name, split = "numbers:1.0.0", "train"


def other(value):
    """Return a value of the same type that is another."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, Duration):
        return Duration(steps=value.steps + 7)
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, tuple):
        return tuple(number / 2 for number in value) if value and isinstance(value[0], float) else (*value, "x")
    return {"width": 8} if isinstance(value, dict) else value + 1


def stored(config, **facts):
    return {
        "config": json.loads(config.to_json()),
        "class_names": list(NAMES_OF_CLASSES),
        "data": {"examples": 3} | facts,
    }


def resumed(config, meta, source=None, class_names=NAMES_OF_CLASSES):
    task = SimpleNamespace(config=config, class_names=class_names)
    resume.check_settings(meta, task, Numbers([1, 2, 3]) if source is None else source, "runs/one")
    resume.check_model(meta, task, "runs/one")


def test_every_field_has_a_decision_and_nothing_else_has():
    assert list(resume.DECISIONS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_field_is_refused_or_free(name):
    config = Config()
    owner, last = next((owner, last) for found, owner, last in leaves(config) if found == name)
    meta = stored(config)
    setattr(owner, last, other(getattr(owner, last)))
    if name in REFUSED | AFTER_THE_SHAPES:
        with pytest.raises(
            UserError, match=rf"config\.{name} is .*, but the run in runs/one was started with"
        ) as caught:
            resumed(config, meta)
        assert "\n" not in str(caught.value)
    else:
        resumed(config, meta)


@pytest.mark.parametrize("name", sorted(SWITCHES))
def test_what_gives_the_state_a_part_cannot_be_turned_on_or_off(name):
    config = Config()
    owner, last = next((owner, last) for found, owner, last in leaves(config) if found == name)
    on = stored(config)
    setattr(owner, last, 0.0)
    off = stored(config)
    with pytest.raises(UserError, match=rf"config\.{name} is 0.0, but"):
        resumed(config, on)
    setattr(owner, last, 0.5)
    with pytest.raises(UserError, match=rf"config\.{name} is 0.5, but .* was started with 0.0"):
        resumed(config, off)


def test_the_same_configuration_goes_on_whatever_an_older_checkpoint_knows():
    config = Config()
    meta = stored(config)
    resumed(config, meta)
    del meta["config"]["data"]["repeated_aug"], meta["data"], meta["class_names"]
    resumed(config, meta)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("cat", "dig"), "class 1 of the data is 'dig', but the run in runs/one was started with 'dog'"),
        (("cat", "dog", "eel"), r"class 2 of the data is 'eel', but .* with none \(2 classes, now 3\)"),
        (("cat",), r"class 1 of the data is none, but .* with 'dog'"),
    ],
)
def test_other_classes_are_refused(names, message):
    with pytest.raises(UserError, match=message):
        resumed(Config(), stored(Config()), class_names=names)


def test_other_data_is_refused():
    source = Numbers([1, 2])
    with pytest.raises(UserError, match=r"numbers:1.0.0, split train, has 2 examples, but .* started with 3"):
        resumed(Config(), stored(Config()), source)
    source = Numbers([1, 2, 3])
    source.fingerprint = "b"
    assert resume.data_facts(source) == {"examples": 3, "fingerprint": "b"}
    with pytest.raises(UserError, match=r"the contents of numbers:1.0.0, split train, are not those"):
        resumed(Config(), stored(Config(), fingerprint="a"), source)
    resumed(Config(), stored(Config(), fingerprint="b"), source)
    resumed(Config(), stored(Config(), fingerprint=None), source)


def test_a_run_cannot_be_shorter_than_it_is():
    resume.check_length(3, 3, "runs/one")
    with pytest.raises(UserError, match=r"config\.duration is 2 steps, but the run in runs/one has made 3"):
        resume.check_length(3, 2, "runs/one")
