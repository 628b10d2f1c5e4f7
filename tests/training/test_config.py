"""Every field of a configuration says what it may hold, and what it may not is refused by name before anything runs."""

import dataclasses
import json
import typing
from pathlib import Path

import numpy as np
import pytest
from tiny import get_config

from evmamba_jax import ranges
from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.dense_config import DetectionData, SegmentationData
from evmamba_jax.errors import UserError
from evmamba_jax.models.registry import VARIANTS
from evmamba_jax.tasks import task_of
from evmamba_jax.tasks.detection import DetectorConfig
from evmamba_jax.tasks.segmentation import SegmenterConfig
from evmamba_jax.training.config import Config, DistributedConfig, Duration, MeshConfig, ModelConfig, OptimConfig

KINDS = (
    *(Config, ModelConfig, OptimConfig, MeshConfig, DistributedConfig, Duration, DataConfig),
    *(SegmentationData, DetectionData, SegmenterConfig, DetectorConfig),
)
FAMILIES = sorted({type(variant.config) for variant in VARIANTS.values()}, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", [*KINDS, *FAMILIES], ids=lambda kind: kind.__name__)
def test_every_field_says_what_it_may_hold(kind):
    """By a rule, or by a type that has no value that could be wrong."""
    for name, hint in typing.get_type_hints(kind).items():
        if name not in {field.name for field in dataclasses.fields(kind)}:
            continue  # of the class
        settled = hint is bool or typing.get_origin(hint) in (dict, typing.Literal) or dataclasses.is_dataclass(hint)
        assert settled or ranges.has_rule(kind, name), f"{kind.__name__}.{name} says only {hint}"


NAN, INF = float("nan"), float("inf")
WRONG = {
    "model.drop_path_rate": (-0.5, 1.0, 2, NAN, "0.1", True, None),
    "model.dtype": ("float16", "float8", None, np.float32),
    "model.name": (3, None),
    "model.options": ([], {1: 2}),
    "optim.name": ("sgd", None, 3),
    "optim.betas": ((1.0, 0.9), (0.9, 1.5), (0.9,), 0.9, (0.9, "0.999"), (0.9, NAN), (-0.1, 0.9)),
    "optim.eps": (0, -1.0, NAN, "1e-8"),
    "optim.lr": (0, 0.0, -1.0, NAN, INF, "1e-3", True, None, (1e-3,)),
    "optim.min_lr": (-1.0, NAN, INF, 1.0),
    "optim.warmup_lr": (-1e-9, INF),
    "optim.weight_decay": (-1.0, NAN),
    "optim.clip_norm": (-1.0, INF),
    "optim.ema_decay": (-0.1, 1, 1.0, NAN),
    "optim.mesa": (-1.0, NAN),
    "optim.warmup_prefix": (1, "no", None),
    "optim.lr_changes": ("never",),
    "optim.no_decay": ("norm", None),
    "optim.schedule": ("step", None),
    "optim.milestones": ((0.0,), (8.0, -1.0), (8.0, NAN), 8.0),
    "optim.warmup": (5, None),
    "optim.warmup.steps": (-5, 2.5, 2**40, "10"),
    "optim.cooldown.epochs": (-1, NAN, INF),
    "mesh.data": (-2, 1.5),
    "mesh.fsdp": (0, -1, "2"),
    "distributed.num_processes": (-1,),
    "distributed.process_id": (-2, 0.5),
    "seed": (-1, 2**32, 0.5, "0", True),
    "batch_size": (0, -8, 8.0, "32", None),
    "accumulation": (0, -1),
    "duration.steps": (-1, 1.5),
    "duration.epochs": (-0.5, NAN, INF),
    "keep_last": (0, -1, 1.0),
    "keep_best": (-1, "1"),
    "init_from": (3, None, b"runs"),
    "eval_only": ("yes", 1),
    "data.name": ("", " ", 3),
    "data.data_dir": (3, None),
    "data.in_channels": (0, 2, 4, "3", True),
    "data.image_size": (0, -1, 8.5, "224"),
    "data.crop_pct": (0, 1.1, NAN),
    "data.crop_scale": ((0.5,), (0.5, 0.4), (0, 1), (0.5, NAN), 0.5),
    "data.crop_ratio": ((1.0, INF), (0.0, 1.0), (2.0, 1.0)),
    "data.pad_crop": (-1, 8, 1.5, None, True),
    "data.hflip": (-0.1, 1.5, NAN),
    "data.num_threads": (-1, 1.5),
    "data.num_workers": (-1,),
    "data.mean": ((0.5, 0.5), (2.0,), 0.5),
    "data.std": ((0.0,), (-0.5,), (NAN,), ("1",)),
    "data.mixup": (-0.1, INF),
    "data.mixup_batch": (-1, 0.5),
    "data.label_smoothing": (1.0, -0.1, NAN),
    "data.repeated_aug": (0, 1.5),
}


def with_value(name, value):
    config = get_config("convolutions")
    *path, last = name.split(".")
    owner = config
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, last, value)
    return config


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_what_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(UserError) as caught:
        with_value(name, value).validate()
    told = str(caught.value)
    assert name.split(".")[-1] in told
    assert "\n" not in told


def test_what_numpy_and_pathlib_have_for_numbers_and_places_is_taken_and_written():
    config = get_config("convolutions")
    config.optim.lr, config.batch_size, config.seed = np.float32(1e-3), np.int64(16), np.uint8(3)
    config.optim.betas, config.init_from, config.data.data_dir = [0.5, np.float64(0.75)], Path("a/b"), Path("c")
    config.validate()
    written = json.loads(config.to_json())
    assert (written["batch_size"], written["seed"], written["optim"]["betas"]) == (16, 3, [0.5, 0.75])
    assert written["optim"]["lr"] == pytest.approx(1e-3)
    assert (written["init_from"], written["data"]["data_dir"]) == ("a/b", "c")


def test_a_length_that_no_counter_holds_is_refused():
    with pytest.raises(UserError, match=r"is longer than the 2147483647 steps that can be counted"):
        Duration(epochs=1e12).in_steps(10_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": -8}, "width=-8 is not allowed: it must be 1 or more"),
        ({"widht": 8}, "unknown option 'widht' of model evmamba_t, did you mean 'width'"),
        ({"num_classes": 10}, "config.model.options has 'num_classes', which comes from the data"),
    ],
)
def test_options_of_the_model_are_looked_at_before_any_data(options, message):
    config = get_config("convolutions")
    config.model.options |= options
    with pytest.raises(UserError, match=message):
        task_of(config)


def test_a_process_beyond_the_last_is_refused():
    config = get_config("convolutions")
    config.distributed.num_processes, config.distributed.process_id = 2, 2
    with pytest.raises(UserError, match=r"process_id is 2; of num_processes=2 the last is 1"):
        config.validate()
