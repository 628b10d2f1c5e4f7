"""Opening data sets: digits, Fashion-MNIST, TFDS folders in both formats, and every way to be wrong."""

import dataclasses
import gzip
import hashlib
import io
import json
import shutil
import struct
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from ml_collections import config_flags
from PIL import Image
from sklearn.datasets import load_digits

from evmamba_jax.data import __main__ as command
from evmamba_jax.data.config import DataConfig, resolve_data_dir
from evmamba_jax.data.sources import open_source
from evmamba_jax.errors import UserError


def opened(data_dir, split="train", name="digits"):
    return open_source(DataConfig(name=name, data_dir=str(data_dir)), split)


def pixels(record) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(record["image"])))


@pytest.fixture
def digits_copy(digits_dir, tmp_path):
    """A data_dir that a test may damage."""
    shutil.copytree(digits_dir / "digits", tmp_path / "digits")
    return tmp_path


def folder(data_dir):
    return data_dir / "digits" / "1.0.0"


def refused(data_dir, split="train", name="digits") -> str:
    """Return the one line with which the data set is refused."""
    with pytest.raises(UserError) as caught:
        opened(data_dir, split, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_digits_are_all_there_once(digits_dir):
    everything = load_digits()
    known = {
        image.tobytes(): label
        for image, label in zip(everything.images.astype(np.uint8), everything.target, strict=True)
    }
    seen = []
    for split, size in (("train", 1437), ("test", 360)):
        source = opened(digits_dir, split)
        assert len(source) == size
        assert source.num_classes == 10
        assert source.class_names == tuple("0123456789")
        for i in range(size):
            record = source[i]
            image = np.round(pixels(record) * (16 / 255)).astype(np.uint8)
            assert known[image.tobytes()] == record["label"]
            seen.append(image.tobytes())
        assert source[3]["id"] == f"{split}[3]"
    assert sorted(seen) == sorted(image.tobytes() for image in everything.images.astype(np.uint8))


def test_digits_split_is_stratified_and_fixed(digits_dir):
    source = opened(digits_dir, "test")
    records = [source[i] for i in range(360)]
    counts = np.bincount([record["label"] for record in records])
    assert (np.abs(counts - np.bincount(load_digits().target) * 360 / 1797) < 1).all()
    test_set = b"".join(sorted(pixels(record).tobytes() for record in records))
    assert hashlib.sha256(test_set).hexdigest()[:16] == "8ff22b7966af0573"


def test_slices(digits_dir):
    whole, part = opened(digits_dir), opened(digits_dir, "train[100:103]")
    assert len(part) == 3
    assert [part[i]["image"] for i in range(3)] == [whole[100 + i]["image"] for i in range(3)]
    assert len(opened(digits_dir, "train[:50%]")) == pytest.approx(718, abs=1)
    assert len(opened(digits_dir, "train+test")) == 1797


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("validation", r"digits:1.0.0 has no split 'validation'; there are ['test', 'train']"),
        ("tset", "did you mean 'test'?"),
        ("train[:x%]", "split 'train[:x%]'"),
        ("train[5:5]", "is empty"),
    ],
)
def test_unknown_splits(digits_dir, split, message):
    assert message in refused(digits_dir, split)


def test_a_missing_shard_is_named(digits_copy):
    shard = folder(digits_copy) / "digits-train.array_record-00000-of-00001"
    shard.unlink()
    assert f"1 of the 1 files of split 'train' are missing, the first is {shard.name}" in refused(digits_copy)
    assert len(opened(digits_copy, "test")) == 360


def test_a_truncated_shard_is_named(digits_copy):
    shard = folder(digits_copy) / "digits-train.array_record-00000-of-00001"
    shard.write_bytes(shard.read_bytes()[:-70000])
    assert str(shard) in refused(digits_copy)


def test_a_shard_with_other_records_is_named(digits_copy):
    shard = folder(digits_copy) / "digits-train.array_record-00000-of-00001"
    shutil.copy(folder(digits_copy) / "digits-test.array_record-00000-of-00001", shard)
    assert f"{shard} is incomplete: 360 records where dataset_info.json promises 1437" in refused(digits_copy)


def test_a_damaged_record_is_named(digits_copy):
    shard = folder(digits_copy) / "digits-train.array_record-00000-of-00001"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    shard.write_bytes(data)
    source = opened(digits_copy)
    with pytest.raises(UserError, match=r"record train\[\d+\] of digits:1.0.0 cannot be read"):
        [source[i] for i in range(len(source))]


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_a_folder_without_metadata_is_refused(digits_copy, file):
    (folder(digits_copy) / file).unlink()
    assert f"it has no {file}" in refused(digits_copy)


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "imagenet2012" / "train" / "n01440764").mkdir(parents=True)
    (tmp_path / "imagenet2012" / "train" / "n01440764" / "x.JPEG").write_bytes(b"x")
    assert "imagenet2012 is not a TFDS folder" in refused(tmp_path, name="imagenet2012")


def test_remains_of_an_interrupted_preparation_are_passed_over(tmp_path):
    (tmp_path / "digits" / "incomplete.ABC_1.0.0").mkdir(parents=True)
    (tmp_path / "digits" / "incomplete.ABC_1.0.0" / "shard").write_bytes(b"x")
    assert len(opened(tmp_path)) == 1437


def test_an_empty_split_is_refused(digits_copy):
    info_file = folder(digits_copy) / "dataset_info.json"
    info = json.loads(info_file.read_text())
    next(split for split in info["splits"] if split["name"] == "train")["shardLengths"] = ["0"]
    info_file.write_text(json.dumps(info))
    assert "split 'train' of digits:1.0.0" in refused(digits_copy)
    assert "is empty" in refused(digits_copy)


def test_a_data_set_of_another_kind_is_refused(digits_copy):
    features_file = folder(digits_copy) / "features.json"
    features = json.loads(features_file.read_text())
    features["featuresDict"]["features"]["class"] = features["featuresDict"]["features"].pop("label")
    features_file.write_text(json.dumps(features))
    message = refused(digits_copy)
    assert "not an image-classification data set" in message
    assert "'class': 'ClassLabel'" in message


def test_a_data_set_that_needs_a_config_lists_them(digits_copy):
    shutil.move(digits_copy / "digits", digits_copy / "moved")
    (digits_copy / "digits").mkdir()
    shutil.move(digits_copy / "moved", digits_copy / "digits" / "small")
    assert "['digits/small']" in refused(digits_copy)
    assert len(opened(digits_copy, name="digits/small")) == 1437


def test_versions(digits_copy):
    shutil.copytree(folder(digits_copy), digits_copy / "digits" / "0.9.0")
    assert len(opened(digits_copy, name="digits:0.9.0")) == 1437
    (digits_copy / "digits" / "1.0.0" / "features.json").unlink()
    assert "1.0.0 is not a prepared TFDS folder" in refused(digits_copy)  # the newest is meant


def test_missing_imagenet_says_what_where_and_how(tmp_path):
    message = refused(tmp_path, name="imagenet2012")
    assert f"looked for {tmp_path}/imagenet2012/5.1.0" in message
    assert "python -m evmamba_jax.data prepare imagenet2012 --train ILSVRC2012_img_train.tar" in message


def test_unknown_names(tmp_path):
    assert "did you mean 'digits'?" in refused(tmp_path, name="digit")
    assert "did you mean 'imagenette'?" in refused(tmp_path, name="imagenete")


def test_no_network(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", fail)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    message = refused(tmp_path, name="cifar10")
    assert "cifar10 is not prepared" in message
    assert "cannot be reached" in message


def test_a_download_that_fails(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("broken pipe\nand a long story")

    monkeypatch.setattr("evmamba_jax.data.sources._check_network", lambda builder: None)
    monkeypatch.setattr("tensorflow_datasets.core.DatasetBuilder.download_and_prepare", fail)
    assert refused(tmp_path, name="cifar10") == "TFDS could not prepare cifar10: ConnectionError: broken pipe"


@pytest.mark.skipif(find_spec("tensorflow") is not None, reason="TensorFlow is installed")
def test_a_data_set_that_needs_tensorflow(tmp_path, capsys):
    assert "TFDS needs tensorflow to prepare coco/2017" in refused(tmp_path, name="coco/2017")
    assert "TensorFlow" not in capsys.readouterr().out


def test_an_unusable_data_dir(tmp_path):
    (tmp_path / "file").write_text("")
    assert f"digits cannot be written to {tmp_path}/file/below" in refused(tmp_path / "file" / "below")


def test_a_full_disk(tmp_path, monkeypatch):
    """array_record reports it as a RuntimeError of its own."""

    class FullDisk:
        def __init__(self, *_):
            pass

        def write(self, record):
            raise RuntimeError("write() failed: No space left on device; writing shard\nsecond line")

    monkeypatch.setattr("array_record.python.array_record_module.ArrayRecordWriter", FullDisk)
    assert "No space left on device" in refused(tmp_path)
    assert not list((tmp_path / "digits").iterdir())


def test_data_dir_default(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "env"))
    assert resolve_data_dir("") == tmp_path / "env"
    assert resolve_data_dir(str(tmp_path / "given")) == tmp_path / "given"
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_data_dir("") == tmp_path / "tensorflow_datasets"


# --- TFRecord folders -------------------------------------------------------------------------------------------------


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum, a bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def framed(data: bytes) -> bytes:
    """Frame a record as TensorFlow does: length, masked checksum, data, masked checksum."""

    def masked(part: bytes) -> bytes:
        crc = crc32c(part)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def test_the_frame_is_tensorflows():
    # From RFC 3720, appendix B.4: the checksum of 32 zero bytes.
    assert crc32c(bytes(32)) == 0x8A9136AA


@pytest.fixture
def tfrecord_dir(digits_dir, tmp_path, monkeypatch):
    """The digits' first test images as TensorFlow users have them: two tfrecord shards of 4 and 3 records."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target = tmp_path / "digits" / "1.0.0"
    target.mkdir(parents=True)
    shutil.copy(folder(digits_dir) / "features.json", target)
    info = json.loads((folder(digits_dir) / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    info["splits"] = [split for split in info["splits"] if split["name"] == "test"]
    info["splits"][0]["shardLengths"] = ["4", "3"]
    (target / "dataset_info.json").write_text(json.dumps(info))
    records = opened(digits_dir, "test").records
    for shard, rows in enumerate((range(4), range(4, 7))):
        name = f"digits-test.tfrecord-0000{shard}-of-00002"
        (target / name).write_bytes(b"".join(framed(records[i]) for i in rows))
    return tmp_path


def test_tfrecord_folders_are_read_as_they_are(digits_dir, tfrecord_dir):
    expected = opened(digits_dir, "test")
    for _ in range(2):  # the second time from the index kept on disk
        source = opened(tfrecord_dir, "test")
        assert len(source) == 7
        assert [source[i] for i in (6, 0, 3, 4, 1, 2, 5)] == [expected[i] for i in (6, 0, 3, 4, 1, 2, 5)]
    assert len(list((tfrecord_dir / "cache" / "evmamba_jax").iterdir())) == 1
    part = opened(tfrecord_dir, "test[2:6]")
    assert [part[i]["image"] for i in range(4)] == [expected[i]["image"] for i in range(2, 6)]


def test_a_changed_tfrecord_shard_is_indexed_again(tfrecord_dir):
    opened(tfrecord_dir, "test")
    shard = folder(tfrecord_dir) / "digits-test.tfrecord-00001-of-00002"
    shard.write_bytes(shard.read_bytes()[:-5])
    assert f"{shard} is truncated or damaged: record 2 ends beyond the file" in refused(tfrecord_dir, "test")


def test_a_short_tfrecord_shard_is_named(tfrecord_dir):
    shard = folder(tfrecord_dir) / "digits-test.tfrecord-00001-of-00002"
    shard.write_bytes(framed(b"one record only"))
    assert f"{shard} is incomplete: 1 records where dataset_info.json promises 3" in refused(tfrecord_dir, "test")


def test_a_cache_that_cannot_be_written_costs_nothing(tfrecord_dir, monkeypatch):
    (tfrecord_dir / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tfrecord_dir / "file"))
    assert len(opened(tfrecord_dir, "test")) == 7


# --- Fashion-MNIST from Debian ----------------------------------------------------------------------------------------


@pytest.fixture
def fashion_files(tmp_path, monkeypatch):
    """Tiny idx.gz files with the names of Debian's."""
    source = tmp_path / "idx"
    source.mkdir()
    rng = np.random.default_rng(0)
    arrays = {}
    for stem, count in (("train", 7), ("t10k", 3)):
        images, labels = rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count, np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (source / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
        arrays[stem] = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    monkeypatch.setenv("FASHION_MNIST_DIR", str(source))
    return source, arrays


def test_fashion_mnist(fashion_files, tmp_path):
    _, arrays = fashion_files
    for split, stem in (("train", "train"), ("test", "t10k")):
        source = opened(tmp_path / "tfds", split, "fashion_mnist_debian")
        assert {pixels(source[i]).tobytes(): source[i]["label"] for i in range(len(source))} == arrays[stem]
    assert source.class_names[0] == "T-shirt/top"
    assert source.class_names[9] == "Ankle boot"


def test_fashion_mnist_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path))
    message = refused(tmp_path, name="fashion_mnist_debian")
    assert f"{tmp_path}/train-images-idx3-ubyte.gz is missing; apt-get install dataset-fashion-mnist" in message


def test_fashion_mnist_truncated(fashion_files, tmp_path):
    file = fashion_files[0] / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} is not a whole idx.gz file" in refused(tmp_path / "tfds", name="fashion_mnist_debian")
    assert not list((tmp_path / "tfds").glob("fashion_mnist_debian/*"))


# --- The configuration and the whole ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"on_corrupt": "ignore"}, "data.on_corrupt='ignore' is not allowed: it must be 'error' or 'skip'"),
        ({"image_size": 0}, "data.image_size=0"),
        ({"in_channels": 4}, "data.mean=(0.485, 0.456, 0.406)"),
        ({"crop_pct": 1.1}, "data.crop_pct=1.1 is not allowed: it must be above 0, up to 1"),
        ({"crop_mode": "border"}, "data.crop_mode='border' is not allowed: it must be 'center' or 'squash'"),
        ({"eval_interpolation": "random"}, "data.eval_interpolation='random'"),
        ({"interpolation": "nearest"}, "data.interpolation='nearest' is not allowed: it must be 'bicubic', 'bilinear'"),
        ({"color_jitter": -0.1}, "data.color_jitter=-0.1"),
        ({"auto_augment": "rand-m9", "color_jitter": 0.4}, "it must be 0 where auto_augment is set"),
        ({"repeated_aug": 0}, "data.repeated_aug=0 is not allowed: it must be 1 (off) or more"),
        ({"crop_scale": (0.5,)}, "data.crop_scale=(0.5,)"),
        ({"crop_scale": (0.5, 1.5)}, "data.crop_scale=(0.5, 1.5)"),
        ({"crop_ratio": (2.0, 1.0)}, "data.crop_ratio=(2.0, 1.0)"),
        ({"pad_crop": -1}, "data.pad_crop=-1 is not allowed: it must be 0 or more"),
        ({"pad_crop": 32, "image_size": 32}, "data.pad_crop=32 is not allowed: it must be below image_size=32"),
        (
            {"pad_crop": 4, "crop_scale": (0.5, 1.0)},
            "data.crop_scale=(0.5, 1.0) is not allowed: it must be left alone where pad_crop=4 replaces RandomResized",
        ),
        ({"pad_crop": 4, "crop_ratio": (1.0, 1.0)}, "data.crop_ratio=(1.0, 1.0) is not allowed: it must be left alone"),
        ({"mean": (0.5,)}, "data.mean=(0.5,) is not allowed: it must be in_channels=3 numbers"),
        ({"std": (0.0, 1.0, 1.0)}, "numbers above 0"),
        ({"num_workers": -1}, "data.num_workers=-1"),
        ({"hflip": 1.5}, "data.hflip=1.5"),
        ({"label_smoothing": 1.0}, "data.label_smoothing=1.0"),
        ({"mixup": -0.1}, "data.mixup=-0.1"),
    ],
)
def test_validate(change, message):
    DataConfig().validate()
    with pytest.raises(UserError) as caught:
        dataclasses.replace(DataConfig(), **change).validate()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tuples_survive_the_command_line():
    from absl import flags

    values = flags.FlagValues()
    arguments = ["program", "--data.crop_scale=0.5,1.0", "--data.mean=(0.1,0.2,0.3)", "--data.hflip=0"]
    holder = config_flags.DEFINE_config_dataclass("data", DataConfig(), flag_values=values, sys_argv=arguments)
    values(arguments)
    config = holder.value
    config.validate()
    assert (config.crop_scale, config.mean, config.hflip) == ((0.5, 1.0), (0.1, 0.2, 0.3), 0.0)


def test_the_command(tmp_path, capsys):
    assert command.main(["prepare", "digits", "--data-dir", str(tmp_path)]) == 0
    assert f"digits is prepared in {tmp_path}/digits/1.0.0" in capsys.readouterr().out
    assert command.main(["prepare", "digits", "--data-dir", str(tmp_path)]) == 0
    assert "already prepared" in capsys.readouterr().out
    assert command.main(["prepare", "digitz", "--data-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown data set")
    assert error.count("\n") == 1


NO_TENSORFLOW = """
import sys
from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.loader import eval_batches, train_batches
from evmamba_jax.data.sources import open_source
import evmamba_jax.data.device, evmamba_jax.data.imagenet
config = DataConfig(name="digits", data_dir=sys.argv[1], image_size=8, crop_pct=1.0)
with train_batches(config, open_source(config, "train"), seed=0, global_batch=4) as batches:
    next(batches)
with eval_batches(config, open_source(config, "test"), global_batch=4) as batches:
    next(batches)
assert not {"tensorflow", "torch"} & set(sys.modules)
"""


def test_no_tensorflow(tmp_path):
    """From preparing to a batch, nothing imports TensorFlow; and nothing is printed at the end."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", NO_TENSORFLOW, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == f"preparing digits in {tmp_path}\n"
