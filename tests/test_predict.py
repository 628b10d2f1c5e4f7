"""Predictions for a user's images: prepared as card or run say, named, drawn; mistakes told in one line."""

import csv
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
from official_weights import save_pth, weights
from PIL import Image

from evmamba_jax import predict
from evmamba_jax.arrays import fill, split
from evmamba_jax.checkpoints import Checkpoints, save_model
from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.imagenet import imagenet_classes
from evmamba_jax.data.transforms import eval_image
from evmamba_jax.models import abstract_model
from evmamba_jax.predict import Predictor, main
from evmamba_jax.weights import from_torch

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = [Path(sklearn.datasets.__file__).parent / "images" / name for name in ("china.jpg", "flower.jpg")]
SHAPES = json.loads((ROOT / "tests" / "golden" / "vim_tiny.json").read_text())["state_dict"]
SMALL = {"width": 8, "depths": [0, 0, 1, 0], "patch_size": 2}


@pytest.fixture(scope="module")
def pth(tmp_path_factory):
    """Return an official file of Vim-T, with weights by the rule."""
    path = tmp_path_factory.mktemp("official") / "tiny.pth"
    save_pth(path, {"model": weights(SHAPES)})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a run on grey images of 12x12 with three named classes, which has found its moving average better."""
    folder = tmp_path_factory.mktemp("run")
    items = {}
    for seed, part in enumerate(("model", "ema")):
        _, params, batch_stats = split(small(seed))
        items[part] = {"params": params, "batch_stats": batch_stats}
    data = DataConfig("digits", image_size=12, crop_pct=0.5, in_channels=1, mean=(0.3,), std=(0.4,), hflip=0.0)
    meta = {
        "model": "evmamba_t",
        "num_classes": 3,
        "class_names": ["cat", "dog", "bird"],
        "ema": True,
        "step": 7,
        "evaluated": 7,
        "figures": {"top1": 61.0, "ema_top1": 62.5},
        "config": {"data": vars(data), "model": {"options": SMALL}},
    }
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(7, items, meta=meta)
    return folder


def small(seed: int, channels: int = 1):
    model, rng = abstract_model("evmamba_t", num_classes=3, in_channels=channels, **SMALL), np.random.default_rng(seed)
    _, params, batch_stats = split(model)
    params, batch_stats = (
        {path: rng.normal(scale=0.3, size=array.shape).astype(np.float32) for path, array in part.items()}
        for part in (params, batch_stats)
    )
    fill(model, params, {path: np.abs(array) for path, array in batch_stats.items()})
    return model


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def told(out: str) -> dict[str, list[tuple[float, str]]]:
    """Return what the command printed: for each image share and class, the number with it."""
    found: dict[str, list[tuple[float, str]]] = {}
    weights, *lines, _ = out.splitlines()
    assert weights.startswith("weights: ")
    for line in lines:
        if line.startswith("  "):
            share, _, name = line.strip().partition("%")
            list(found.values())[-1].append((float(share), name.strip()))
        else:
            found[line] = []
    return found


def test_photographs_with_an_official_file(pth, tmp_path, monkeypatch, capsys):
    """Prepared in the test with Pillow and NumPy alone, as the model's card says."""
    monkeypatch.chdir(tmp_path)
    assert main(["--model", "vim_t", "--weights", str(pth), *map(str, PHOTOGRAPHS)]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0] == f"weights: {pth}, entry 'model'"
    assert said.splitlines()[-1] == "prediction.png shows them"

    images = []
    for path in PHOTOGRAPHS:  # 640 x 427
        resized = Image.open(path).resize((256 * 640 // 427, 256), Image.Resampling.BICUBIC)
        left = round((resized.width - 224) / 2)
        pixels = np.asarray(resized, np.float64)[16:240, left : left + 224] / 255
        images.append((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])
    model = abstract_model("vim_t")
    from_torch(model, weights(SHAPES))
    shares = softmax(np.float64(jax.jit(model.__call__)(jnp.float32(np.stack(images)))))
    for path, row in zip(PHOTOGRAPHS, shares, strict=True):
        order = np.argsort(-row)[:5]
        found = told(said)[str(path)]
        assert [name for _, name in found] == [f"{k}  {imagenet_classes()[k]}" for k in order]
        np.testing.assert_allclose([share for share, _ in found], 100 * row[order], atol=0.006)
    assert np.abs(shares[0] - shares[1]).max() > 0.002  # the two photographs differ in what is compared
    with Image.open(tmp_path / "prediction.png") as picture:
        assert picture.width > 1000


def test_a_run_brings_its_classes_its_crop_and_its_moving_average(folder, tmp_path, capsys):
    out = tmp_path / "new" / "drawn.png"
    assert main(["--weights", str(folder), "--top", "2", "--out", str(out), *map(str, PHOTOGRAPHS)]) == 0
    said = capsys.readouterr().out
    found = told(said)
    assert said.startswith(f"weights: {folder}/checkpoints/7, moving average (top-1 62.5 against 61)\n")
    names, average = ["cat", "dog", "bird"], jax.jit(small(1).__call__)
    for path in PHOTOGRAPHS:
        resized = Image.open(path).convert("L").resize((24 * 640 // 427, 24), Image.Resampling.BICUBIC)
        left = round((resized.width - 12) / 2)
        pixels = (np.asarray(resized)[6:18, left : left + 12, None] / 255 - 0.3) / 0.4
        shares = softmax(np.asarray(average(jnp.float32(pixels)[None]))[0])
        order = np.argsort(-shares)[:2]
        assert [name for _, name in found[str(path)]] == [f"{k}  {names[k]}" for k in order]
        np.testing.assert_allclose([share for share, _ in found[str(path)]], 100 * shares[order], atol=0.006)
    assert out.exists()


def test_embeddings_are_what_enters_the_head_and_a_sheet_shows_all(folder, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("e.npz", "sheet.png", "drawn.png", "answers.csv")}
    options = ("--embeddings", files["e.npz"], "--sheet", files["sheet.png"], "--csv", files["answers.csv"])
    arguments = map(str, ("--weights", folder, "--ema", "yes", "--out", files["drawn.png"], *options, *PHOTOGRAPHS))
    assert main(list(arguments)) == 0
    said = capsys.readouterr().out
    with np.load(files["e.npz"]) as kept:
        assert kept["images"].tolist() == list(map(str, PHOTOGRAPHS))
        embeddings = kept["embeddings"]
    assert f"embeddings of 2 images, {embeddings.shape[1]} numbers each" in said
    head = split(small(1)).params
    shares = softmax(embeddings @ np.asarray(head["head.kernel"]) + np.asarray(head["head.bias"]))
    with files["answers.csv"].open() as file:
        for row, wanted in zip(csv.DictReader(file), shares, strict=True):
            found = {int(row[f"class_{i}"]): float(row[f"probability_{i}"]) for i in (1, 2, 3)}
            np.testing.assert_allclose([found[k] for k in range(3)], wanted, atol=2e-6)
    with Image.open(files["sheet.png"]) as sheet:
        assert sheet.width == 12 * 102 + 6
        colours = np.unique(np.asarray(sheet.resize((300, 60))).reshape(-1, 3), axis=0)
    assert len(colours) > 100  # photographs, not blank cells


@pytest.mark.parametrize(("option", "ending"), [("sheet", "png"), ("embeddings", "npz")])
def test_files_of_another_kind_are_refused(folder, option, ending, capsys):
    assert main(["--weights", str(folder), f"--{option}", "some.txt", str(PHOTOGRAPHS[0])]) == 2
    assert capsys.readouterr().err == f"error: --{option} some.txt must end in .{ending}\n"


def test_images_go_through_the_model_in_batches(folder, monkeypatch):
    predictor = Predictor(folder)
    noise = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 1), dtype=np.uint8)
    images = noise // np.uint8([1, 2, 4, 8, 16])[:, None, None, None]
    whole = predictor(images)
    monkeypatch.setattr(predict, "BATCH", 2)
    chex.assert_trees_all_close(predictor(images), whole, rtol=1e-5)
    chex.assert_trees_all_close(np.concatenate([predictor(image[None]) for image in images]), whole, rtol=1e-5)
    chex.assert_trees_all_close(whole.sum(1), np.ones(5), rtol=1e-5)
    assert np.ptp(whole, 0).max() > 0.01


def test_names_of_the_classes(folder, tmp_path, capsys):
    """Given ones, those of the run, ImageNet's where there are 1000, else numbers."""
    _, params, batch_stats = split(small(0, channels=3))
    meta = {"model": "evmamba_t", "options": {"num_classes": 3, **SMALL}}  # as `convert` writes it
    save_model(tmp_path / "bare", params=params, batch_stats=batch_stats, meta=meta)
    assert Predictor(tmp_path / "bare").class_names == ("0", "1", "2")
    (tmp_path / "mine.txt").write_text("Katze\nHund\nVögel\n", encoding="utf-8")
    arguments = ["--weights", str(folder), "--out", str(tmp_path / "out.png"), str(PHOTOGRAPHS[0])]
    assert main(["--classes", str(tmp_path / "mine.txt"), *arguments]) == 0
    (found,) = told(capsys.readouterr().out).values()
    assert {name for _, name in found} == {"0  Katze", "1  Hund", "2  Vögel"}  # top 5 of three


def test_the_image_is_that_of_an_evaluation(folder):
    predictor = Predictor(folder)
    for path in PHOTOGRAPHS:
        expected = eval_image(path.read_bytes(), predictor.data)
        difference = predictor.view(path).astype(int) - expected
        assert np.abs(difference).max() == 0


def test_every_kind_of_image(pth, tmp_path):
    """What other programs show is what the model sees."""
    predictor = Predictor(pth, "vim_t", image_size=64)
    assert predictor.data.crop_pct == 0.875
    photograph = Image.open(PHOTOGRAPHS[1])
    plain = predictor.view(photograph).astype(int)
    assert plain.shape == (64, 64, 3)

    def seen(image: Image.Image, name: str, **options) -> np.ndarray:
        image.save(tmp_path / name, **options)
        return predictor.view(tmp_path / name).astype(int)

    exif = photograph.getexif()
    exif[0x112] = 6  # to be turned a quarter clockwise
    assert abs(seen(photograph.rotate(90, expand=True), "turned.png", exif=exif) - plain).max() == 0
    assert abs(seen(photograph.convert("CMYK"), "cmyk.jpg", quality=95) - plain).mean() < 4
    grey = np.asarray(photograph.convert("L"))
    expected = predictor.view(photograph.convert("L").convert("RGB"))
    np.testing.assert_array_equal(seen(Image.fromarray(grey), "grey.png"), expected)
    np.testing.assert_array_equal(seen(Image.fromarray(grey.astype(np.uint16) * 257), "grey16.png"), expected)

    half = Image.fromarray(np.where(np.arange(640) < 320, 255, 0).astype(np.uint8)[None].repeat(427, 0))
    clear = Image.new(
        "RGBA", photograph.size, (0, 0, 0, 0)
    )  # black below what is transparent, as many programs leave it
    clear.paste(photograph, mask=half)
    found = seen(clear, "clear.png")
    assert abs(found[:, :31] - plain[:, :31]).max() <= 1
    assert (found[:, 34:] == 255).all()
    palette = seen(clear.quantize(256), "palette.png")
    assert abs(palette[:, :31] - plain[:, :31]).mean() < 8
    assert (palette[:, 34:] == 255).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": "absent.jpg"}, "no image can be read: 'absent.jpg' cannot be read: No such file or directory"),
        ({"images": "text.jpg"}, "'text.jpg' cannot be read: not an image file"),
        ({"images": "cut.jpg"}, "'cut.jpg' cannot be read: image file is truncated"),
        ({"--top": "0"}, "--top is 0; it must be 1 or more"),
        ({"--out": "picture.jpg"}, "--out picture.jpg must end in .png"),
        ({"--out": "text.jpg/x.png"}, "cannot write in text.jpg"),
        ({"--image-size": "0"}, "data.image_size=0 is not allowed: it must be 1 or more"),
        ({"--image-size": "1"}, "image size 1x1 is too small"),
        ({"--classes": "absent.txt"}, "--classes absent.txt cannot be read: No such file or directory"),
        ({"--classes": "text.jpg"}, "there are 1 names of classes, but "),
        ({"--weights": "absent.pth"}, "'absent.pth' does not exist; give a file of official weights"),
        ({"--weights": "text.jpg", "--model": "evmamba_t"}, "'text.jpg' is no weight file: it starts with b'hello'"),
        ({"--weights": "other.pth"}, "other.pth does not say which model it is of; name it, e.g. --model evmamba_t"),
        ({"--weights": "other.pth", "--model": "evmamba_x"}, "unknown model 'evmamba_x', did you mean 'evmamba_"),
        ({"--weights": "other.pth", "--model": "evmamba_t"}, "other.pth does not fit model evmamba_t: the weights do"),
        ({"--model": "vmamba_t"}, "run holds the weights of evmamba_t, not of vmamba_t"),
    ],
)
def test_mistakes_are_told_in_one_line(folder, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "run")
    Path("text.jpg").write_text("hello")
    Path("cut.jpg").write_bytes(PHOTOGRAPHS[0].read_bytes()[:20_000])
    save_pth(Path("other.pth"), {"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)})
    options = {"--weights": "run", "--out": "out.png", "images": str(PHOTOGRAPHS[0])} | changes
    images = options.pop("images")
    assert main([*(word for option in options.items() for word in option), images]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not Path("out.png").exists()


def test_a_folder_with_a_bad_picture_is_answered_for_the_others(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("photos/below").mkdir(parents=True)
    for place in ("photos/a, b.jpg", "photos/below/é.jpg"):
        shutil.copy(PHOTOGRAPHS[0], place)
    shutil.copy(PHOTOGRAPHS[1], "photos/c.jpg")
    shutil.copy(PHOTOGRAPHS[1], "photos/d\n\x1b[2J.jpg")
    Path("photos/cut.jpg").write_bytes(PHOTOGRAPHS[0].read_bytes()[:20_000])
    Path("photos/notes.txt").write_text("hello")
    monkeypatch.setattr(predict, "BATCH", 2)
    assert main(["--weights", str(folder), "--csv", "new/found.csv", "--top", "2", "photos", "absent.png"]) == 0
    said = capsys.readouterr()
    found = told(said.out)
    assert list(found) == ["photos/a, b.jpg", "photos/below/é.jpg", "photos/c.jpg", r"photos/d\n\x1b[2J.jpg"]
    left_out = said.err.splitlines()
    assert left_out[0] == "left out: 2 of 6"
    assert "'photos/cut.jpg' cannot be read: image file is truncated" in left_out[1]
    assert "'absent.png' cannot be read: No such file" in left_out[2]
    with open("new/found.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", *(f"{what}_{i}" for i in (1, 2) for what in ("class", "name", "probability"))]
    assert rows[3]["image"] == "photos/d\n\x1b[2J.jpg"  # a table gives every name back
    for row in rows[:3]:
        for i, (share, name) in enumerate(found[row["image"]], 1):
            assert f"{row[f'class_{i}']}  {row[f'name_{i}']}" == name
            assert 100 * float(row[f"probability_{i}"]) == pytest.approx(share, abs=0.006)
    assert Path("prediction.png").exists()


def test_a_folder_without_images_is_a_mistake(folder, tmp_path, capsys):
    assert main(["--weights", str(folder), "--out", str(tmp_path / "x.png"), str(tmp_path)]) == 2
    assert f"there are no images in the folder {tmp_path}" in capsys.readouterr().err


def test_the_classes_of_an_official_file_are_counted(tmp_path):
    shapes = SHAPES | {"head.weight": (7, SHAPES["head.weight"][1]), "head.bias": (7,)}
    save_pth(tmp_path / "seven.pth", weights(shapes))
    assert Predictor(tmp_path / "seven.pth", "vim_t").class_names == tuple("0123456")
