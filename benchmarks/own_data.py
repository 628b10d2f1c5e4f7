"""A folder of pictures: how fast it is listed, how soon a million files are ready again, and how fast it is read.

Reading is compared with the same pictures in array_record files, through the same loader, in turns. The disk is the
machine's own and its cache is warm.

    python benchmarks/own_data.py [--files 20000] [--runs 9] [--out FILE]
"""

import argparse
import io
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import sklearn.datasets
from array_record.python.array_record_module import ArrayRecordWriter
from lib.timing import interleaved
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from evmamba_jax.data import index as indices
from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.files import Found, Strings, open_files
from evmamba_jax.data.loader import train_batches
from evmamba_jax.data.pictures import open_split
from evmamba_jax.data.sources import Source
from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report

CLASSES, MILLION, BATCH, BATCHES = 100, 1_000_000, 32, 10


def photographs(count: int) -> list[bytes]:
    """Return JPEGs of 500 x 375 pixels, about 85 kB each, cut from scikit-learn's two."""
    images = [Image.fromarray(image) for image in sklearn.datasets.load_sample_images().images]
    rng, files = np.random.default_rng(0), []
    for i in range(count):
        left, top = rng.integers(0, 140), rng.integers(0, 52)
        buffer = io.BytesIO()
        images[i % 2].crop((left, top, left + 500, top + 375)).save(buffer, "JPEG", quality=92)
        files.append(buffer.getvalue())
    return files


def write(folder: Path, files: list[bytes]) -> DataConfig:
    for i, data in enumerate(files):
        path = folder / "train" / f"class{i % CLASSES:03}" / f"{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return DataConfig(name="folder", data_dir=str(folder), num_threads=2, held_out=0.0)


def listing(folder: Path, count: int) -> float:
    """Return files a second, of files that hold 3 kB each."""
    rng = np.random.default_rng(0)
    write(folder, [b"\xff\xd8\xff" + rng.bytes(3000) for _ in range(count)])
    files = open_files(folder)
    began = time.perf_counter()
    indices.open_index(files)
    return count / (time.perf_counter() - began)


def a_million(folder: Path) -> float:
    """Return the seconds until a split of a million files is ready, whose index is there."""
    for k in range(1000):
        (folder / "train" / f"class{k:03}").mkdir(parents=True)
    names = Strings.of(f"train/class{i // 1000:03}/{i:07}.jpg" for i in range(MILLION))
    rng, files = np.random.default_rng(0), open_files(folder)
    found = Found(names, np.full(MILLION, 3000), np.zeros((MILLION, 3), np.int64), files.find().stamp)
    digests = rng.integers(0, 256, (MILLION, 16), np.uint8)
    indices._save(files.home, indices.Index(found, digests, np.full(MILLION, indices.IMAGE, np.uint8)))
    began = time.perf_counter()
    source = open_split(DataConfig(name="folder", data_dir=str(folder), held_out=0.0), "train")
    seconds = time.perf_counter() - began
    assert len(source) == MILLION
    return seconds


def records(folder: Path, files: list[bytes]) -> Source:
    """Return the same pictures as a TFDS folder has them."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    writer = ArrayRecordWriter(str(folder / "train.array_record"), "group_size:1")
    for i, data in enumerate(files):
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(data)
        example.features.feature["label"].int64_list.value.append(i % CLASSES)
        writer.write(example.SerializeToString())
    writer.close()
    names = tuple(map(str, range(CLASSES)))
    return Source("records", "train", names, ArrayRecordDataSource(str(folder / "train.array_record")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    options = parser.parse_args()
    report = Report(
        "Your own pictures",
        options.out,
        machine=machine.cpu(),
        versions=machine.versions("Python", "array_record", "grain", "pillow", "simplejpeg"),
        date=machine.today(),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report.table("what", ("figure", "{:,.3g}"), "unit")
        report.row(
            f"listing and hashing {options.files:,} files of 3 kB", listing(folder / "small", options.files), "files/s"
        )
        shutil.rmtree(folder / "small")
        report.row("a million files, listed before", a_million(folder / "million"), "s")
        files = photographs(400)
        config = write(folder / "photos", files)
        sources = {"folder": open_split(config, "train"), "array_record": records(folder, files)}
        streams = {kind: train_batches(config, source, seed=0, global_batch=BATCH) for kind, source in sources.items()}

        def read(stream):
            for _ in range(BATCHES):
                next(stream)

        seconds = interleaved(
            {kind: lambda stream=stream: read(stream) for kind, stream in streams.items()}, options.runs
        )
        rates = {kind: BATCH * BATCHES / value for kind, value in seconds.items()}
        for stream in streams.values():
            stream.close()
        for kind, rate in rates.items():
            report.row(f"photographs of 85 kB, decoded and cropped, from {kind}", rate, "images/s")
        report.row("folder over array_record", rates["folder"] / rates["array_record"], "")


if __name__ == "__main__":
    main()
