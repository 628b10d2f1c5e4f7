"""A box for every object: figures against loops, and a run of two steps with all that it leaves."""

import jax
import numpy as np
import pytest
import scene_runs

from configs import digits_detection
from evmamba_jax.arrays import merge, split
from evmamba_jax.data.dense import TfdsCocoSplit
from evmamba_jax.data.scenes import DigitScenes
from evmamba_jax.detection.evaluate import Found, Truth, average_precision
from evmamba_jax.errors import UserError
from evmamba_jax.tasks import detection, task_of
from evmamba_jax.training import mesh as meshes
from evmamba_jax.training.command import parse_command, settings
from evmamba_jax.training.evaluator import global_batch
from evmamba_jax.training.setup import Setup


def box(x, y, side=20):
    return [x, y, x + side, y + side]


def truth(boxes, labels):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return Truth(boxes, np.array(labels), np.zeros(len(boxes), bool), np.prod(boxes[:, 2:] - boxes[:, :2], 1))


def found(boxes, scores, labels):
    return Found(np.array(boxes, np.float32).reshape(-1, 4), np.array(scores), np.array(labels))


def test_average_precision_of_cases_known_by_hand():
    exact = average_precision([truth([box(0, 0)], [1])], [found([box(0, 0)], [0.9], [1])], 3)
    assert exact.figures["AP"] == pytest.approx(100)
    assert exact.by_class[1] == pytest.approx(100)
    assert np.isnan(exact.by_class[[0, 2]]).all()
    # An overlap of 18 * 20 / (22 * 20): right up to .8, wrong from .85 on, 7 of 10 thresholds.
    shifted = average_precision([truth([box(0, 0)], [1])], [found([box(2, 0)], [0.9], [1])], 3)
    assert shifted.figures["AP"] == pytest.approx(70)
    # One of two found, after a wrong one: precision .5 at the recalls up to a half, which are 51 of 101.
    half = average_precision(
        [truth([box(0, 0), box(40, 40)], [0, 0])], [found([box(80, 0), box(0, 0)], [0.9, 0.8], [0, 0])], 1
    )
    assert half.figures["AP50"] == pytest.approx(100 * 0.5 * 51 / 101)
    nothing = average_precision([truth([box(0, 0)], [1])], [found([], [], [])], 3)
    assert nothing.figures["AP"] == 0
    assert nothing.by_class[1] == 0


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (found([box(1, 0), box(40, 41)], [0.9, 0.5], [3, 4]), 0),
        (found([box(1, 0)], [0.9], [3]), 1),  # one is missed
        (found([box(1, 0), box(0, 0)], [0.9, 0.8], [3, 3]), 2),  # found twice, and one missed
        (found([box(1, 0), box(40, 41)], [0.9, 0.5], [4, 3]), 4),  # of the other's class
        (found([box(1, 0), box(40, 41), box(9, 9)], [0.9, 0.5, 0.1], [3, 4, 4]), 0),  # too unsure to be shown
    ],
)
def test_mistakes_of_an_image(answer, wrong):
    assert detection.mistakes(truth([box(0, 0), box(40, 40)], [3, 4]), answer) == wrong


def small():
    config = scene_runs.small(digits_detection.get_config())
    config.detector.width, config.detector.detections = 8, 5
    return config


def masked():
    config = scene_runs.small(digits_detection.get_config("mask_rcnn"))
    config.detector.width = config.detector.fc_width = 8
    config.detector.regions, config.detector.proposals, config.batch_size = 8, 12, 8
    return config


def test_any_mesh_draws_the_same_regions():
    """The losses of one global batch, its images on 1, 2, 4 and 8 devices."""
    config = masked()
    task = task_of(config)(config, DigitScenes("train").class_names)
    model = task.build_model()
    model.train()
    graphdef, *arrays = split(model)
    reader, source = task.reader(), DigitScenes("train")
    rows = [reader.train(reader.decode(source[i]), np.random.default_rng(i)) for i in range(8)]
    rows = {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def losses(arrays, batch):
        inputs = task.inputs(jax.random.key(0), batch)
        return task.loss(merge(graphdef, *arrays), inputs, jax.random.key(1), None)[1]

    found = []
    for devices in (1, 2, 4, 8):
        mesh = meshes.make_mesh(config, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            parts = jax.jit(losses)(arrays, global_batch(mesh, rows))
        found.append({name: float(loss) for name, loss in parts.items()})
    assert set(found[0]) == set(task.parts)
    assert all(loss > 0 for loss in found[0].values())
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade_mask_rcnn"])
def test_the_official_step_is_traced_for_coco_without_data(name):
    """What the preflight check compiles: every shape of 100 objects with masks in 800 x 1344 pixels."""
    config = detection.DetectionConfig()
    config.detector.name, config.batch_size = name, 8
    config.model.options = {"width": 8, "depths": (0, 0, 1, 0), "d_state": 2}
    kind = task_of(config)
    about = kind.describe(config)
    setup = Setup(kind(config, about.class_names), meshes.make_mesh(config), about.examples)
    step, (state, batch) = setup.step()
    assert batch["masks"].shape == (8, 100, 100, 1344)
    with jax.set_mesh(setup.mesh):
        after = jax.eval_shape(step, state, batch)
    assert set(setup.task.parts) < set(after.window)


def test_the_command_sets_numbers_back_to_the_official_ones():
    given = ["train_tpu.py", "--config", "digits_detection:mask_rcnn"]
    config, workdir = parse_command([*given, "--config.detector.regions=None", "--config.detector.fc_width=64"])
    assert (config.detector.regions, config.detector.fc_width, config.detector.proposals) == (None, 64, 100)
    assert workdir.name == "digits_detection_mask_rcnn"
    again, _ = parse_command([*given, *(line for line in settings(config) if ".detector." in line)])
    assert again.detector == config.detector


def test_mistakes_get_one_line(monkeypatch):
    config = masked()
    config.detector.name = "retinanet"
    config.detector.octave_base_scale = None
    with pytest.raises(UserError, match="fc_width is for detectors with regions, and 'retinanet' has none"):
        task_of(config)(config, DigitScenes("train").class_names)
    monkeypatch.setattr(DigitScenes, "has_outlines", TfdsCocoSplit.has_outlines)
    with pytest.raises(UserError, match=r"split test, has no outlines .* to one for boxes: retinanet$"):
        task_of(masked()).open_source(masked(), "test")
    config = small()
    config.detector.octave_base_scale = 0.0
    with pytest.raises(UserError, match="octave_base_scale=0.0 is not allowed"):
        task_of(config)
    config = small()
    config.data.augment, config.data.scale = "large_scale_jitter", (1333, 800)
    with pytest.raises(
        UserError, match=r"config.data.scale=\(1333, 800\) with .* must be the same, the side of a square"
    ):
        task_of(config)
    config = small()
    config.data.max_objects = 7
    with pytest.raises(UserError, match="max_objects is 7, and an image of digit_scenes/1.0.0, split test, has 8"):
        task_of(config).open_source(config, "test")
