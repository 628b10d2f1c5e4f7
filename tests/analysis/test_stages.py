"""Maps of stages and levels against the models called by themselves; the level that a box comes from."""

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.colors import to_rgba
from PIL import Image
from saved_runs import DIGITS, classifier, detector, likely, save_run, segmenter

from evmamba_jax.analysis import stages
from evmamba_jax.analysis.__main__ import main
from evmamba_jax.analysis.stages import dense_stage_maps, stage_maps
from evmamba_jax.analysis.subjects import open_subject
from evmamba_jax.data.scenes import GROUND, scene
from evmamba_jax.detection.per_anchor import Raw
from evmamba_jax.reports.drawing import COLOURS
from evmamba_jax.tasks.opening import open_composed

MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))


def normal(image):
    return jnp.float32((image[None] / 255 - MEAN) / STD)


def opened(folder, config, change=None, names=DIGITS):
    """Return task and model of a run with initial values."""
    task, model, *_ = open_composed(save_run(folder, config, names, change=change))
    return task, model


def check(told, names, features, image):
    own = [told.maps[i] for i, name in enumerate(told.names) if name.startswith(names)]
    assert len(own) == len(features)
    for found, x in zip(own, features, strict=True):
        np.testing.assert_allclose(found, np.abs(np.asarray(x[0])).mean(-1), atol=1e-5)
    np.testing.assert_array_equal(told.image, image)


def test_stages_of_a_classifier(tmp_path):
    subject = open_subject(str(save_run(tmp_path / "a", classifier(), DIGITS)))
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 1), np.uint8)
    told = stage_maps(subject, image)
    check(told, "stage", jax.jit(subject.model.features)(jnp.float32((image[None] / 255 - 0.3) / 0.38)), image)
    assert told.names == ("stage 1", "stage 2", "stage 3", "stage 4")
    assert told.strides == [(2, 2), (4, 4), (8, 8), (8, 8)]
    assert told.found is None


def test_stages_of_a_segmenter_and_no_padding(tmp_path):
    task, model = opened(tmp_path / "a", segmenter(), names=(GROUND, *DIGITS))
    look, image = dense_stage_maps(task, model), scene("test", 0).image
    check(look(image), "stage", jax.jit(model.backbone.features)(normal(image)), image)
    image = image[:70]  # padded to 128 x 128
    told = look(image)
    assert told.image.shape == image.shape
    assert [own.shape for own in told.maps] == [(18, 32), (9, 16), (5, 8), (3, 4)]
    assert told.strides == [(stride, stride) for stride in (4, 8, 16, 32)]


def decoded(places, deltas):
    """Return the boxes that deltas lead to from anchors, float64 (N, 4), within an image of 128 x 128."""
    size = places[:, 2:] - places[:, :2]
    centre = places[:, :2] + size / 2 + deltas[:, :2] * size
    size = size * np.exp(np.clip(deltas[:, 2:], -np.log(62.5), np.log(62.5)))
    return np.clip(np.concatenate([centre - size / 2, centre + size / 2], 1), 0, 128)


def test_levels_of_a_retinanet(tmp_path, monkeypatch):
    config = detector(init_std=0.12)
    config.detector.detections = 100
    task, model = opened(tmp_path / "a", config, likely)
    image = scene("test", 0).image
    told = dense_stage_maps(task, model)(image)

    @jax.jit
    def parts(image):
        maps = model.backbone.features(image)
        levels = model.neck(maps)
        return maps, levels, model.head(levels)

    maps, levels, outputs = parts(normal(image))
    check(told, "stage", maps, image)
    check(told, "level", levels, image)
    logits, deltas = Raw(*outputs).by_anchor()
    places = model.anchors.boxes([level.shape[1:3] for level in levels])
    boxes = [decoded(*map(np.float64, (place, delta[0]))) for place, delta in zip(places, deltas, strict=True)]
    scores = [1 / (1 + np.exp(-np.float64(own[0]))) for own in logits]
    assert len(set(told.levels.tolist())) > 1
    for box, score, label, level in zip(*told.found[:3], told.levels, strict=True):
        apart = [
            (abs(own - box).max(1) + abs(of[:, label] - score)).min() for own, of in zip(boxes, scores, strict=True)
        ]
        assert apart[level] < 2e-3
        assert sum(distance < 2e-3 for distance in apart) == 1
    drawn = []
    monkeypatch.setattr(stages, "save", lambda figure, path: drawn.append(figure))
    stages.draw_stages(tmp_path / "s.png", [("scene", told)], "title", least=0.0)
    (figure,) = drawn
    frames = [patch for patch in figure.axes[0].patches if patch.get_edgecolor()[:3] != (1, 1, 1)]
    assert [frame.get_edgecolor() for frame in frames] == [to_rgba(COLOURS[level]) for level in told.levels]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"box of level {i}" for i in range(1, 6)]


def test_levels_of_a_mask_rcnn(tmp_path):
    """Boxes that are not refined are the regions themselves, whose level follows from their size."""
    still = lambda path, array: array * 0 if path.startswith("box_heads.0.reg") else array  # noqa: E731
    config = detector("mask_rcnn", fc_width=16, proposals=50)
    # Anchors of 96 pixels and more, cut at the image's border: regions on both sides of 112, where level 2 begins.
    config.detector.octave_base_scale, config.detector.detections = 24.0, 20
    task, model = opened(tmp_path / "a", config, still)
    told = dense_stage_maps(task, model)(scene("test", 1).image)
    assert told.names == (*(f"stage {i}" for i in range(1, 5)), *(f"level {i}" for i in range(1, 6)))
    x0, y0, x1, y1 = told.found.boxes.T
    expected = np.clip(np.floor(np.log2(np.sqrt((x1 - x0) * (y1 - y0)) / 56)), 0, 3)
    np.testing.assert_array_equal(told.levels, expected)
    assert len(set(told.levels.tolist())) > 1


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, maps = save_run(tmp_path / "a", classifier(), DIGITS), []
    draw = stages.draw_stages
    monkeypatch.setattr(stages, "draw_stages", lambda path, rows, *rest: (maps.extend(rows), draw(path, rows, *rest)))
    assert main(["stages", str(run)]) == 0
    said = capsys.readouterr().out
    assert [title for title, _ in maps] == ["china.jpg", "flower.jpg"]
    for line, own in zip(said.splitlines()[2:6], maps[0][1].maps, strict=True):
        assert f"mean {own.mean():8.3g}  largest {own.max():8.3g}" in line
    with Image.open("stages.png") as picture:
        assert picture.width > 900
    maps.clear()
    other = save_run(tmp_path / "b", segmenter(), (GROUND, *DIGITS))
    assert main(["stages", str(other)]) == 0
    assert [title for title, _ in maps] == ["test[0]", "test[1]"]
    capsys.readouterr()
    for arguments, words in (
        (["nowhere"], "nowhere"),
        ([str(run), "--score", "2"], "--score is 2"),
        ([str(other), "no.jpg"], "no.jpg"),
        ([str(run), "no.jpg"], "no.jpg"),
    ):
        assert main(["stages", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
