"""ImageNet from its tars, in miniature: 1000 real synset names, real photographs."""

import io
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorflow_datasets.core.shuffle import Shuffler

from evmamba_jax.data import __main__ as command
from evmamba_jax.data import imagenet
from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.imagenet import imagenet_classes, in_words, prepare_imagenet, synsets, validation_labels
from evmamba_jax.data.sources import open_source
from evmamba_jax.errors import UserError
from tests.mini_imagenet import encode, make_tar, make_train_tar, make_validation_tar, photograph

COUNTS = {"train_images": 2000, "validation_images": 50}


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    make_train_tar(folder / "train.tar")
    make_validation_tar(folder / "val.tar")
    return folder


@pytest.fixture(scope="module")
def prepared(tars, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    assert prepare_imagenet(tars / "train.tar", tars / "val.tar", data_dir, **COUNTS) == data_dir / "imagenet2012/5.1.0"
    return data_dir


def opened(data_dir, split):
    return open_source(DataConfig(data_dir=str(data_dir)), split)


def test_train_records(prepared):
    source = opened(prepared, "train")
    assert len(source) == 2000
    assert source.num_classes == 1000
    assert list(source.class_names) == imagenet_classes()
    assert synsets() == sorted(synsets())
    for i in range(0, 2000, 7):
        record = source[i]
        wnid, number = record["id"].removesuffix(".JPEG").split("_")
        assert record["label"] == synsets().index(wnid)
        assert record["image"] == photograph(int(number) % 100)


def test_validation_labels_belong_to_their_names(prepared):
    source = opened(prepared, "validation")
    assert len(source) == 50
    names = set()
    for i in range(50):
        record = source[i]
        number = int(record["id"].removesuffix(".JPEG").removeprefix("ILSVRC2012_val_"))
        assert synsets()[record["label"]] == validation_labels()[number - 1]
        assert record["image"] == photograph(1000 + number)
        names.add(number)
    assert names == set(range(1, 51))


def test_the_classes_in_words():
    """The first, the last and some that everybody knows; "crane" is a bird and a machine in WordNet, too."""
    words = imagenet_classes()
    assert len(words) == 1000
    known = {
        0: "tench, Tinca tinca",
        1: "goldfish, Carassius auratus",
        134: "crane",
        207: "golden retriever",
        281: "tabby, tabby cat",
        517: "crane",
        998: "ear, spike, capitulum",
        999: "toilet tissue, toilet paper, bathroom tissue",
    }
    assert {k: words[k] for k in known} == known
    assert [word for word, count in Counter(words).items() if count > 1] == ["crane"]
    assert all(word == word.strip() and "_" not in word for word in words)
    assert in_words(["n02123045", "cat", "n01440764"]) == ("tabby, tabby cat", "cat", "tench, Tinca tinca")


def test_the_classes_are_shipped_with_their_licence():
    root = Path(__file__).parents[2]
    shipped = (root / "setup.py").read_text()
    assert '"data/imagenet_classes.txt"' in shipped
    assert (root / "evmamba_jax" / "data" / "imagenet_classes.txt").is_file()
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in (root / "NOTICE").read_text()


def test_known_validation_labels():
    """The first three of ILSVRC2012_validation_ground_truth: snake, ski, Shetland sheepdog."""
    assert validation_labels()[:3] == ["n01751748", "n09193705", "n02105855"]
    assert len(validation_labels()) == 50_000
    assert set(validation_labels()) == set(synsets())


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_order_is_tfdss_own(prepared, tmp_path, split):
    """TFDS's shuffler, given the names, puts them into the order in which we wrote the records."""
    source = opened(prepared, split)
    names = [source[i]["id"] for i in range(len(source))]
    shuffler = Shuffler(dirpath=tmp_path, hash_salt=split)
    for name in sorted(names):
        shuffler.add(name, name.encode())
    assert names == [data.decode() for _, data in shuffler]


def refused(train, val, data_dir, **counts) -> str:
    with pytest.raises(UserError) as caught:
        prepare_imagenet(train, val, data_dir, **(COUNTS | counts))
    assert "\n" not in str(caught.value)
    assert not (data_dir / "imagenet2012").exists()
    return str(caught.value)


def test_one_missing_validation_image_is_refused(tars, tmp_path):
    make_validation_tar(tmp_path / "val.tar", missing=17)
    message = refused(tars / "train.tar", tmp_path / "val.tar", tmp_path / "out")
    assert "lacks 1 images, the first is ILSVRC2012_val_00000017.JPEG" in message


def test_an_unexpected_validation_file_is_refused(tars, tmp_path):
    make_validation_tar(tmp_path / "val.tar", images=51)
    message = refused(tars / "train.tar", tmp_path / "val.tar", tmp_path / "out")
    assert "holds 1 unexpected files, the first is ILSVRC2012_val_00000051.JPEG" in message


def test_missing_synsets_are_refused(tars, tmp_path):
    make_train_tar(tmp_path / "train.tar", classes=997)
    message = refused(tmp_path / "train.tar", tars / "val.tar", tmp_path / "out")
    assert "lacks 3 of the 1000 synsets, the first is n13054560.tar" in message


def test_a_wrong_count_is_refused(tars, tmp_path):
    message = refused(tars / "train.tar", tars / "val.tar", tmp_path / "out", train_images=2001)
    assert "holds 2000 images where 2001 are expected" in message


def test_swapped_tars_are_refused(tars, tmp_path):
    assert "is not the whole validation tar" in refused(tars / "val.tar", tars / "train.tar", tmp_path / "out")


@pytest.mark.parametrize("which", ["train.tar", "val.tar"])
def test_truncated_tars_are_refused(tars, tmp_path, which):
    data = (tars / which).read_bytes()
    (tmp_path / which).write_bytes(data[: len(data) // 2])
    other = {"train.tar": tars / "train.tar", "val.tar": tars / "val.tar"} | {which: tmp_path / which}
    message = refused(other["train.tar"], other["val.tar"], tmp_path / "out")
    assert str(tmp_path / which) in message


def test_not_a_tar(tars, tmp_path):
    (tmp_path / "val.tar").write_bytes(b"<html>please log in</html>" * 100)
    assert "damaged or not a tar" in refused(tars / "train.tar", tmp_path / "val.tar", tmp_path / "out")


def test_too_little_disk_space(tars, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    message = refused(tars / "train.tar", tars / "val.tar", tmp_path / "out")
    assert "imagenet2012 needs" in message
    assert "are free" in message


def test_cmyk_and_png_images_are_encoded_anew(tmp_path):
    rgb = Image.open(io.BytesIO(photograph(0)))
    kinds = {"cmyk": encode(rgb.convert("CMYK"), "JPEG"), "png": encode(rgb, "PNG"), "rgb": photograph(0)}
    kinds["grey"] = encode(rgb.convert("L"), "JPEG")
    make_tar(tmp_path / "mixed.tar", {f"{kind}.JPEG": data for kind, data in kinds.items()})
    for member in imagenet._members(tmp_path / "mixed.tar"):
        kind = member.name.removesuffix(".JPEG")
        image = imagenet.TarImage(member.name, "n01440764", tmp_path / "mixed.tar", member.offset_data, member.size)
        data = imagenet._read(image)
        if kind in ("rgb", "grey"):
            assert data == kinds[kind]
            continue
        got = Image.open(io.BytesIO(data))
        assert (got.format, got.mode) == ("JPEG", "RGB")
        difference = np.asarray(got, int) - np.asarray(Image.open(io.BytesIO(kinds[kind])).convert("RGB"), int)
        assert np.abs(difference).mean() < 3


def test_an_unreadable_training_image_stops_the_preparation(tars, tmp_path):
    inner = io.BytesIO()
    make_tar(inner, {"n01440764_1.JPEG": b"no image at all"})
    files = {"n01440764.tar": inner.getvalue()}
    for synset in synsets()[1:]:
        buffer = io.BytesIO()
        make_tar(buffer, {f"{synset}_1.JPEG": photograph(0) if synset == "n01443537" else b"\xff\xd8"})
        files[f"{synset}.tar"] = buffer.getvalue()
    make_tar(tmp_path / "train.tar", files)
    with pytest.raises(UserError, match="is not a readable image"):
        prepare_imagenet(tmp_path / "train.tar", tars / "val.tar", tmp_path / "out", **COUNTS | {"train_images": 1000})
    assert not list((tmp_path / "out" / "imagenet2012").iterdir())


def run(*arguments: str, capsys) -> tuple[int, str]:
    code = command.main(["prepare", "imagenet2012", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.err or captured.out


def test_the_command_refuses(tars, prepared, tmp_path, capsys):
    code, message = run("--data-dir", tmp_path, capsys=capsys)
    assert (code, message.count("\n")) == (2, 1)
    assert "is made from its two tars: python -m evmamba_jax.data prepare imagenet2012 --train" in message

    arguments = ("--train", tmp_path / "none.tar", "--val", tars / "val.tar", "--data-dir", tmp_path)
    code, message = run(*arguments, capsys=capsys)
    assert (code, message.count("\n")) == (2, 1)
    assert f"error: {tmp_path}/none.tar does not exist" in message

    # The miniature is not ImageNet, and the command has no way around that.
    arguments = ("--train", tars / "train.tar", "--val", tars / "val.tar", "--data-dir", tmp_path)
    code, message = run(*arguments, capsys=capsys)
    assert (code, message.count("\n")) == (2, 1)
    assert "not the whole validation tar of 50000 images: it lacks 49950 images" in message
    assert not (tmp_path / "imagenet2012").exists()

    code, message = run("--data-dir", prepared, capsys=capsys)
    assert code == 0
    assert f"imagenet2012 is already prepared in {prepared}/imagenet2012/5.1.0" in message


INTERRUPTED = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background hands down that it is ignored
from evmamba_jax.data import __main__ as command, imagenet
read = imagenet._read
def slow(image):
    time.sleep(0.005)
    return read(image)
imagenet._read = slow
whole = imagenet.prepare_imagenet
command.prepare_imagenet = lambda *a: whole(*a, train_images=2000, validation_images=50)
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_leaves_nothing(tars, tmp_path, number, code):
    arguments = [
        "prepare",
        "imagenet2012",
        "--train",
        tars / "train.tar",
        "--val",
        tars / "val.tar",
        "--data-dir",
        tmp_path,
    ]
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, *map(str, arguments)], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("imagenet2012/incomplete.*/*")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == code, errors
    assert b"Traceback" not in errors
    assert not list((tmp_path / "imagenet2012").iterdir())
