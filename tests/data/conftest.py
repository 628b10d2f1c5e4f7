"""Small real data sets for the tests of the input pipeline."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.sources import Source, prepare


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory) -> Path:
    """A data_dir that holds the digits; not to be written to."""
    folder = tmp_path_factory.mktemp("tfds")
    prepare("digits", folder)
    return folder


@pytest.fixture
def numbered() -> Callable[..., Source]:
    """Makes a source of n grey 8x8 PNGs whose labels and pixels say which they are, some of them corrupt."""

    def make(n: int, corrupt: tuple[int, ...] = ()) -> Source:
        records = []
        for i in range(n):
            buffer = io.BytesIO()
            Image.fromarray(np.full((8, 8), i, np.uint8)).save(buffer, "PNG")
            data = buffer.getvalue()
            records.append(example(data[: len(data) // 2] if i in corrupt else data, i, f"number_{i}.png"))
        return Source(name="numbers", split="all", class_names=tuple(map(str, range(n))), records=records)

    return make


@pytest.fixture
def small() -> DataConfig:
    """The settings that fit the numbered images."""
    return DataConfig(image_size=8, crop_pct=1.0, in_channels=1, mean=(0.5,), std=(0.5,), num_threads=2)


def example(image: bytes, label: int, file_name: str | None = None) -> bytes:
    """Serialise a record as TFDS does."""
    proto = tf_example_pb2.Example()
    proto.features.feature["image"].bytes_list.value.append(image)
    proto.features.feature["label"].int64_list.value.append(label)
    if file_name is not None:
        proto.features.feature["file_name"].bytes_list.value.append(file_name.encode())
    return proto.SerializeToString()
