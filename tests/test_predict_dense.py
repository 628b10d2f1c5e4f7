"""Label maps and boxes of a user's pictures, against the models called by themselves; mistakes told in one line."""

import csv
import json
from argparse import Namespace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
from official_weights import save_pth, weights_of
from PIL import Image

from evmamba_jax import dense
from evmamba_jax.answers import LabelMaps, Picture
from evmamba_jax.arrays import fill, merge, split
from evmamba_jax.checkpoints import Checkpoints
from evmamba_jax.data import opencv
from evmamba_jax.data.outlines import to_mask
from evmamba_jax.dense import DensePredictor
from evmamba_jax.detection import create_detector
from evmamba_jax.detection.masks import paste
from evmamba_jax.errors import UserError
from evmamba_jax.predict import main
from evmamba_jax.segmentation import to_original, whole
from evmamba_jax.tasks.segmentation import Segmentation, SegmentationConfig
from evmamba_jax.weights import from_torch
from evmamba_jax.weights.__main__ import main as weights_main

PHOTOGRAPH = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"
BACKBONE = {"width": 8, "depths": (0, 0, 1, 0), "d_state": 2}
NAMES = ("sky", "wall", "tree", "sea")
MEAN, STD = (np.array(each, np.float32) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def configuration() -> SegmentationConfig:
    config = SegmentationConfig()
    config.model.name, config.model.dtype, config.model.options = "evmamba_t", "float32", BACKBONE
    config.segmenter.width = config.segmenter.aux_width = 8
    config.data.name, config.data.scale, config.data.image_size = "town", (96, 64), 64
    return config


def random_arrays(model, seed):
    rng = np.random.default_rng(seed)
    _, params, stats = split(model)
    draw = lambda array: rng.normal(scale=0.3, size=array.shape).astype(np.float32)  # noqa: E731
    return {k: draw(a) for k, a in params.items()}, {k: 0.5 + np.abs(draw(a)) for k, a in stats.items()}


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """Return a run that has found its moving average better, and the model with that."""
    folder, config = tmp_path_factory.mktemp("runs") / "town", configuration()
    task = Segmentation(config, NAMES)
    parts = {part: random_arrays(task.model, seed) for seed, part in enumerate(("model", "ema"))}
    meta = {"model": "evmamba_t", "step": 7, "evaluated": 7, "ema": True, "figures": {"mIoU": 10.0, "ema_mIoU": 12.0}}
    meta |= {"chooses": {"figure": "mIoU", "higher": True}, "config": json.loads(config.to_json()), **task.meta()}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        items = {part: {"params": params, "batch_stats": stats} for part, (params, stats) in parts.items()}
        checkpoints.save(7, items, meta=meta)
    model = merge(*split(task.model))
    fill(model, *jax.tree.map(jnp.asarray, parts["ema"]))
    return folder, model


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """Return the file of a detector as mmengine writes it, what was converted of it, and the model itself."""
    folder = tmp_path_factory.mktemp("detector")
    model = create_detector("retinanet", backbone="evmamba_t", num_classes=3, width=16, backbone_options=BACKBONE)
    official = weights_of(model)
    official["bbox_head.retina_cls.bias"] = np.full(27, -2.0, np.float32)
    from_torch(model, official)
    beside = {"meta": {"epoch": 12, "cfg": "model = dict()"}, "message_hub": {"log_scalars": {}}}
    save_pth(folder / "detector.pth", {**beside, "state_dict": official, "optimizer": {"state": {}}})
    options = [f"backbone.{name}={value}" for name, value in BACKBONE.items()] + ["data.scale=(128,96)"]
    flags = [word for option in options for word in ("--option", option)]
    given = ["--model", "retinanet:evmamba_t", "--torch", str(folder / "detector.pth")]
    assert weights_main(["convert", *given, *flags, "--out", str(folder / "converted")]) == 0
    return folder, official, model


def resized(path, scale):
    image = np.asarray(Image.open(path).convert("RGB"))
    return opencv.resize_bilinear(image, *opencv.keep_ratio_size(*image.shape[:2], scale)), image.shape[:2]


def normalized(image):
    return jnp.asarray((image.astype(np.float32) / 255 - MEAN) / STD)[None]


def photographs(folder):
    """Write photographs of two sizes, one that is to be turned, one that is damaged, and a line of pixels."""
    photograph = Image.open(PHOTOGRAPH)
    (folder / "below").mkdir(parents=True)
    photograph.resize((150, 200)).save(folder / "a.png")
    exif = Image.Exif()
    exif[0x112] = 6  # a quarter clockwise
    photograph.resize((140, 90)).save(folder / "below" / "turned.jpg", exif=exif)
    (folder / "cut.jpg").write_bytes(PHOTOGRAPH.read_bytes()[:20_000])
    photograph.resize((3000, 1)).save(folder / "line.png")
    return folder


def test_a_run_draws_label_maps_of_any_pictures(segmenter, tmp_path, capsys):
    folder, model = segmenter
    photos, maps, out = photographs(tmp_path / "photos"), tmp_path / "maps", tmp_path / "out.png"
    files = ["--maps", str(maps), "--out", str(out), "--csv", str(tmp_path / "found.csv")]
    assert main(["--weights", str(folder), *files, "--top", "2", str(photos)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"weights: {folder}/checkpoints/7, moving average (mIoU 12 against 10)\n")
    assert "left out: 2 of 4" in said.err
    assert "line.png': 3000 x 1 pixels are too long a strip" in said.err

    image, size = resized(photos / "a.png", (96, 64))
    logits = jax.jit(lambda model, image: to_original(whole(model, image), size))(model, normalized(image))
    with Image.open(maps / "a.png") as found:
        assert (found.mode, found.size) == ("P", (150, 200))
        pixels = np.asarray(found)
    assert (pixels == np.asarray(logits)[0].argmax(-1)).mean() > 0.999
    shares = np.bincount(pixels.ravel(), minlength=4) / pixels.size
    assert np.count_nonzero(shares > 0.02) > 1  # otherwise there is nothing to compare
    lines = said.out.splitlines()
    told = lines[lines.index(f"{photos}/a.png") + 1 :][:2]
    best = np.argsort(-shares)[:2]
    assert [line.split() for line in told] == [[f"{shares[k]:.2%}", str(k), NAMES[k]] for k in best]
    with (tmp_path / "found.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["image"] == str(photos / "a.png")]
    assert {int(row["class"]): row["share"] for row in rows} == {k: f"{shares[k]:.6f}" for k in np.flatnonzero(shares)}
    with Image.open(maps / "below" / "turned.png") as turned:
        assert turned.size == (90, 140)
    with Image.open(out) as drawing:
        assert drawing.width > 1000


def test_a_converted_detector_finds_boxes_in_pixels_of_the_picture(detector, tmp_path, capsys):
    folder, _, model = detector
    photos, out, names = photographs(tmp_path / "photos"), tmp_path / "found.json", tmp_path / "names.txt"
    names.write_text("cat\ndog\nbird\n")
    files = [
        "--csv",
        str(tmp_path / "found.csv"),
        "--json",
        str(out),
        "--out",
        str(tmp_path / "drawn.png"),
        "--classes",
        str(names),
    ]
    picture = str(photos / "a.png")
    assert (
        main(["--weights", str(folder / "converted"), "--score", "0.1", *map(str, files), "--top", "1", picture]) == 0
    )
    image, (height, width) = resized(photos / "a.png", (128, 96))
    sizes = jnp.asarray([image.shape[:2]])
    padded = np.zeros((1, -(-image.shape[0] // 32) * 32, -(-image.shape[1] // 32) * 32, 3), np.float32)
    padded[:, : image.shape[0], : image.shape[1]] = normalized(image)
    found = jax.jit(lambda model, images: model.detect(images, sizes))(model, jnp.asarray(padded))
    scale = np.array([width / image.shape[1], height / image.shape[0]] * 2)
    boxes, scores, labels = np.asarray(found.boxes[0]) * scale, np.asarray(found.scores[0]), np.asarray(found.labels[0])
    rows = json.loads(out.read_text())
    sure = scores >= 0.1
    assert 5 < len(rows) == sure.sum()
    assert [row["category_name"] for row in rows] == [("cat", "dog", "bird")[k] for k in labels[sure]]
    np.testing.assert_allclose([row["score"] for row in rows], scores[sure], rtol=1e-4)
    wanted = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)[sure]
    np.testing.assert_allclose([row["bbox"] for row in rows], wanted, atol=0.02)
    assert {row["file_name"] for row in rows} == {picture}
    assert wanted[:, 0].max() > image.shape[1]  # the picture's pixels, not the network's
    with (tmp_path / "found.csv").open() as file:
        table = [[float(row[name]) for name in ("x", "y", "width", "height")] for row in csv.DictReader(file)]
    np.testing.assert_allclose(table, wanted, atol=0.07)
    said = capsys.readouterr().out.splitlines()
    assert f"  and {len(rows) - 1} more" in said
    assert said[-1] == f"{out}: {len(rows)} boxes of 1 images"


def test_a_converted_detector_finds_masks_in_pixels_of_the_picture(tmp_path):
    """Of an official Mask R-CNN the file alone tells widths and classes; outlines are those of masks pasted whole."""
    sizes = {"num_classes": 3, "width": 16, "fc_width": 24, "proposals": 20}
    model = create_detector("mask_rcnn", backbone="evmamba_t", **sizes, backbone_options=BACKBONE)
    official = weights_of(model)
    from_torch(model, official)
    save_pth(tmp_path / "detector.pth", {"state_dict": official})
    options = [f"backbone.{name}={value}" for name, value in BACKBONE.items()]
    flags = [word for option in [*options, "data.scale=(128,96)", "proposals=20"] for word in ("--option", option)]
    given = ["--model", "mask_rcnn:evmamba_t", "--torch", str(tmp_path / "detector.pth")]
    assert weights_main(["convert", *given, *flags, "--out", str(tmp_path / "converted")]) == 0
    picture, out, drawn = tmp_path / "a.png", tmp_path / "found.json", tmp_path / "drawn.png"
    Image.open(PHOTOGRAPH).resize((150, 112)).save(picture)
    asked = ["--score", "0.2", "--json", str(out), "--out", str(drawn), str(picture)]
    assert main(["--weights", str(tmp_path / "converted"), *asked]) == 0

    image, (height, width) = resized(picture, (128, 96))
    assert image.shape == (96, 128, 3)
    found = jax.device_get(jax.jit(lambda model, images: model.detect(images))(model, normalized(image)))
    boxes = found.boxes[0] * np.float32([width / 128, height / 96] * 2)
    sure = found.scores[0] >= 0.2
    rows = json.loads(out.read_text())
    assert len(rows) == sure.sum() >= 2
    np.testing.assert_allclose([row["score"] for row in rows], found.scores[0][sure], rtol=1e-4)
    values = paste(found.masks[0][sure], boxes[sure], height, width)
    masks = np.array([to_mask(row["segmentation"], height, width) for row in rows], bool)
    clear = np.abs(values - 0.5) > 1e-3
    np.testing.assert_array_equal(masks[clear], values[clear] > 0.5)
    assert clear.mean() > 0.99
    assert 0.01 < masks.mean() < 0.99
    with Image.open(drawn) as drawing:
        assert drawing.width > 500


def test_further_sizes_are_padded_to_few(segmenter, monkeypatch):
    predictor = DensePredictor(segmenter[0])
    photograph = np.asarray(Image.open(PHOTOGRAPH))
    views = [photograph[:200, : 150 + 10 * i] for i in range(4)]
    exact = predictor(views[3])
    monkeypatch.setattr(dense, "EXACT_SIZES", 1)
    found = predictor.each(views)
    assert [one.shape for one in found] == [view.shape[:2] for view in views]
    np.testing.assert_array_equal(found[3], exact)  # its size is known already
    assert predictor.bucketed == 3
    assert predictor._answers._cache_size() == 2  # one shape of the evaluation's, one bucket for all others
    assert "3 pictures" in predictor.remarks()[0]


@pytest.mark.parametrize(
    ("which", "options", "message"),
    [
        ("boxes", ["--maps", "maps"], "--maps is for a model that finds label maps, and {weights} finds boxes"),
        ("boxes", ["--classes", "two.txt"], "there are 2 names of classes, but {weights} tells 3 classes apart"),
        ("boxes", ["--score", "1.5"], "--score is 1.5; it must be from 0.05 to 1"),
        ("boxes", ["--model", "upernet:evmamba_t"], "{weights} holds the weights of retinanet:evmamba_t, not of uper"),
        ("maps", ["--image-size", "64"], "--image-size is for a model that names classes, and {weights} finds label"),
        ("maps", ["--maps", "full"], "--maps full holds files already: name a new folder"),
        ("file", ["--model", "retinanett:evmamba_t"], "unknown head 'retinanett', did you mean 'retinanet'?"),
        ("file", ["--model", "upernet:evmamba_t"], "{weights} holds no upernet:evmamba_t: there is no array 'decode_"),
    ],
)
def test_mistakes_are_told_in_one_line(segmenter, detector, tmp_path, monkeypatch, capsys, which, options, message):
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("cat\ndog\n")
    Path("full").mkdir()
    Path("full/precious.png").touch()
    places = {"boxes": detector[0] / "converted", "maps": segmenter[0], "file": detector[0] / "detector.pth"}
    assert main(["--weights", str(places[which]), *options, str(PHOTOGRAPH)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message.format(weights=places[which]) in captured.err
    assert captured.err.count("\n") == 1
    assert not Path("prediction.png").exists()


def test_two_pictures_with_one_label_map_are_refused(tmp_path):
    options = {"weights": "town", "out": tmp_path / "out.png", "maps": tmp_path / "maps", "top": 5}
    others = dict.fromkeys(("csv", "json", "score", "sheet", "embeddings", "image_size"))
    found, image = LabelMaps(Namespace(**options, **others), NAMES), np.zeros((4, 6, 3), np.uint8)
    found.note(Picture(Path("x/a.png"), Path("a.png")), image, image[..., 0])
    with pytest.raises(UserError, match=r"x/a.png and y/a.jpg would have the same label map a.png"):
        found.note(Picture(Path("y/a.jpg"), Path("a.jpg")), image, image[..., 0])
