"""Work folders of runs that were never trained: a checkpoint with initial values, and the configuration."""

import json
from pathlib import Path

import jax.numpy as jnp

from evmamba_jax.arrays import split
from evmamba_jax.checkpoints import Checkpoints
from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.dense_config import DetectionData, SegmentationData
from evmamba_jax.tasks import task_of
from evmamba_jax.tasks.detection import DetectionConfig, DetectorConfig
from evmamba_jax.tasks.segmentation import SegmentationConfig, SegmenterConfig
from evmamba_jax.training.config import Config, ModelConfig

DIGITS, PETS = tuple(map(str, range(10))), ("cat", "dog", "bird")


def classifier() -> Config:
    """Return the configuration of a classifier of few grey images of 8x8, without a scan."""
    options = {"width": 8, "depths": (0, 0, 1, 0), "patch_size": 2}
    about = {"image_size": 8, "crop_pct": 1.0, "in_channels": 1, "mean": (0.3,), "std": (0.38,), "num_threads": 2}
    data = DataConfig("digits", train_split="train[:240]", eval_split="test[:80]", **about)
    return Config(model=ModelConfig("evmamba_t", 0.0, "float32", options), data=data, batch_size=32)


_BACKBONE = ModelConfig("evmamba_t", 0.0, "float32", {"width": 8, "depths": (0, 0, 1, 0)})
_SCENES = {"name": "digit_scenes", "eval_split": "test", "image_size": 128, "scale": (128, 128), "hflip": 0.0}


def segmenter() -> SegmentationConfig:
    """Return the configuration of a segmenter of scenes of digits, without a scan."""
    data = SegmentationData(**_SCENES, eval_padding="buckets")
    return SegmentationConfig(model=_BACKBONE, data=data, segmenter=SegmenterConfig(width=8, aux_width=8), batch_size=2)


def detector(name: str = "retinanet", **more) -> DetectionConfig:
    """Return the configuration of a detector of scenes of digits, without a scan."""
    about = DetectorConfig(name=name, width=8, octave_base_scale=2.0, detections=20, **more)
    data = DetectionData(**_SCENES, eval_padding="buckets", max_objects=8)
    return DetectionConfig(model=_BACKBONE, data=data, detector=about, batch_size=2)


def likely(path: str, array):
    """Return the initial values of a RetinaNet, but for biases by which it finds something everywhere."""
    return array * 0 - 1.5 if path == "head.cls.bias" else array


def save_run(folder: Path, config, class_names, seed: int = 0, change=None) -> Path:
    """Write the work folder of a run whose model has initial values of a seed, which ``change`` may change by path."""
    config.seed = seed
    task = task_of(config)(config, class_names)
    _, params, batch_stats = split(task.build_model())
    params = {path: jnp.asarray(change(path, array)) for path, array in params.items()} if change else params
    meta = {"model": config.model.name, "step": 1, "config": json.loads(config.to_json()), **task.meta()}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(1, {"model": {"params": params, "batch_stats": batch_stats}}, meta=meta)
    return folder
