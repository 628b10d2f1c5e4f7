"""Stamps on photographs: whole classes, no stamp in two splits, the same pictures every time."""

import io

import numpy as np
import pytest
from PIL import Image

from evmamba_jax.data import stamp_scenes
from evmamba_jax.data.__main__ import main
from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.dense import open_dense
from evmamba_jax.data.outlines import to_mask
from evmamba_jax.data.sources import open_source
from evmamba_jax.data.stamps import CLASSES, SIDE
from evmamba_jax.errors import UserError

STAMPS = 5  # a class


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Red squares on transparent paper, in the package's folders; one has a mirror image."""
    folder, square = tmp_path_factory.mktemp("package"), np.zeros((40, 60, 4), np.uint8)
    square[10:30, 20:40] = (255, 0, 0, 255)
    for place in CLASSES.values():
        (folder / place / "cartoon").mkdir(parents=True)
        for i in range(STAMPS):
            Image.fromarray(square).save(folder / place / ("" if i else "cartoon") / f"{i}.png")
        Image.fromarray(square[:, ::-1]).save(folder / place / "1_mirror.png")
    return folder


@pytest.fixture(scope="module")
def records(package, tmp_path_factory):
    """The records of each split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUXPAINT_STAMPS_DIR", str(package))
        config = DataConfig(name="stamps", data_dir=str(tmp_path_factory.mktemp("tfds")))
        sources = {split: open_source(config, split) for split in ("train", "validation", "test")}
        return {split: [source[i] for i in range(len(source))] for split, source in sources.items()}


def test_every_stamp_is_in_one_split(records):
    stamps = {split: {record["id"].rsplit("/", 1)[0] for record in found} for split, found in records.items()}
    counts = {split: len(found) for split, found in stamps.items()}
    assert counts == {"train": 3 * len(CLASSES), "validation": len(CLASSES), "test": len(CLASSES)}
    assert len(set.union(*stamps.values())) == STAMPS * len(CLASSES)  # disjoint, and none is left out
    assert not [name for name in set.union(*stamps.values()) if "mirror" in name]
    for found in records.values():
        for record in found:
            assert record["id"].startswith(list(CLASSES.values())[record["label"]] + "/")


def test_stamps_are_pasted_on_photographs(records):
    for record in records["train"][:20]:
        pixels = np.asarray(Image.open(io.BytesIO(record["image"]))).astype(int)
        assert pixels.shape == (SIDE, SIDE, 3)
        red = (pixels[..., 0] > 220) & (pixels[..., 1:].max(-1) < 40)
        assert 0.15 < red.mean() < 0.95  # from half of the side, turned, to nearly all
        assert pixels[~red].std() > 10  # a photograph


def test_pictures_of_a_stamp_differ(records):
    assert len({record["image"] for record in records["train"]}) == len(records["train"])


def test_the_package_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("TUXPAINT_STAMPS_DIR", str(tmp_path / "absent"))
    with pytest.raises(UserError, match="apt-get install tuxpaint-stamps-default, or set TUXPAINT_STAMPS_DIR"):
        open_source(DataConfig(name="stamps", data_dir=str(tmp_path)), "train")


def test_scenes_know_box_and_mask_of_every_stamp(package, tmp_path, monkeypatch):
    monkeypatch.setenv("TUXPAINT_STAMPS_DIR", str(package))
    monkeypatch.setattr(stamp_scenes, "LENGTHS", {"train": 4, "validation": 1, "test": 1})
    assert main(["prepare", "stamp_scenes", "--data-dir", str(tmp_path)]) == 0
    split = open_dense("stamp_scenes", tmp_path, "train")
    assert (split.class_names, len(split)) == (tuple(CLASSES), 4)
    counts = set()
    for record in (split[i] for i in range(4)):
        pixels = np.asarray(Image.open(io.BytesIO(record["image"]))).astype(int)
        masks = np.array([to_mask(outline, *pixels.shape[:2]) for outline in record["segmentations"]], bool)
        red = (pixels[..., 0] > 190) & (pixels[..., 1:].max(-1) < 90)
        seen = masks.any(0)
        assert (red & seen).sum() / (red | seen).sum() > 0.9  # what is left are soft edges
        assert masks.sum(0).max() == 1  # a pixel is of the stamp in front
        for mask, box in zip(masks, record["boxes"], strict=True):
            rows, columns = np.nonzero(mask)
            np.testing.assert_array_equal(box, [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        counts.add(len(masks))
    assert counts <= {2, 3, 4, 5}
    assert len(counts) > 1
