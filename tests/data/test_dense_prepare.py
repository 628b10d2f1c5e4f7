"""Data sets with boxes and label maps: small made-up folders, prepared by the command and read back."""

import io
import json
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from evmamba_jax.data import __main__ as command
from evmamba_jax.data import dense_items
from evmamba_jax.data.coco_json import coco_categories
from evmamba_jax.data.decoding import decode
from evmamba_jax.data.dense import describe_dense, open_dense
from evmamba_jax.data.dense_prepare import prepare_boxes, prepare_label_maps
from evmamba_jax.data.label_maps import read_labels
from evmamba_jax.errors import UserError


def picture(seed: int, height: int, width: int, kind: str = "JPEG", orientation: int = 1) -> bytes:
    """Return a file of smooth noise."""
    cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if mode == "P":
        image.putpalette([7 * k % 256 for k in range(768)])
    image.save(buffer, "PNG")
    return buffer.getvalue()


def raw_png(depth: int, rows: list[bytes], width: int) -> bytes:
    """Return a grey PNG of any depth, from rows that are packed already."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, 0, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


SQUARE = [[2.0, 3.0, 12.0, 3.0, 12.0, 8.0, 2.0, 8.0]]


def annotation(number: int, image: int, **other) -> dict:
    known = {"category_id": 3, "bbox": [2.25, 3.5, 10.5, 5.125], "area": 50.5, "iscrowd": 0, "segmentation": SQUARE}
    return {"id": number, "image_id": image, **known, **other}


RLE = {"size": [20, 30], "counts": [100, 50, 450]}


def coco_content() -> dict:
    """Two categories with a gap; images that are listed against the order of their ids, the last without objects."""
    names = {7: "b.jpg", 4: "a.jpg", 9: "c.png"}
    return {
        "categories": [{"id": 8, "name": "owl"}, {"id": 3, "name": "cat"}],
        "images": [{"id": k, "file_name": name, "height": 20, "width": 30} for k, name in names.items()],
        "annotations": [
            annotation(21, 7),
            annotation(900100448263, 7, category_id=8, iscrowd=1, segmentation=RLE, bbox=[0, 0, 30, 20], area=50),
            annotation(20, 4, category_id=8),
        ],
    }


@pytest.fixture
def boxes(tmp_path):
    """A folder of three images, and its content, which a test may change before it prepares it."""
    folder = tmp_path / "images"
    folder.mkdir()
    for seed, name in enumerate(("a.jpg", "b.jpg", "c.png")):
        (folder / name).write_bytes(picture(seed, 20, 30, "PNG" if name == "c.png" else "JPEG"))
    return folder, coco_content()


def prepare_own(boxes, **options) -> Path:
    folder, content = boxes
    file = folder.parent / "own.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return prepare_boxes("own", {"train": (folder, file)}, folder.parent / "out", **options)


def refused(boxes) -> str:
    with pytest.raises(UserError) as caught:
        prepare_own(boxes)
    message = str(caught.value)
    assert "\n" not in message
    assert not (boxes[0].parent / "out").exists()
    return message


def run(*arguments, capsys) -> tuple[int, str, str]:
    code = command.main([*map(str, arguments)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err.splitlines()[-1] if captured.err else ""


def test_boxes_are_read_back_as_they_were(boxes, capsys):
    folder = prepare_own(boxes, shard_bytes=1)
    assert sorted(path.name for path in folder.iterdir()) == [
        "info.json",
        "train-00000-of-00003.array_record",
        "train-00001-of-00003.array_record",
        "train-00002-of-00003.array_record",
        "train-objects.npy",
        "train-sizes.npy",
    ]
    split = open_dense("own", folder.parent, "train")
    assert (split.kind, split.class_names, split.category_ids) == ("boxes", ("cat", "owl"), (3, 8))
    assert (len(split), split.most_objects, split.has_objects.tolist()) == (3, 2, [True, True, False])
    assert split.has_outlines
    assert split.sizes.dtype == np.int32
    assert split.sizes.tolist() == [[20, 30]] * 3
    first, second, third = (split[i] for i in range(3))
    assert [record["id"] for record in (first, second, third)] == ["a.jpg", "b.jpg", "c.png"]
    for record in (first, second, third):
        assert record["image"] == (boxes[0] / record["id"]).read_bytes()
    assert (second["image_id"], second["annotation_ids"].tolist()) == (7, [21, 900100448263])
    assert second["boxes"].dtype == np.float64
    assert second["boxes"].tolist() == [[2.25, 3.5, 12.75, 8.625], [0, 0, 30, 20]]
    assert (second["labels"].tolist(), second["crowd"].tolist()) == ([0, 1], [False, True])
    assert (second["area"].tolist(), second["segmentations"]) == ([50.5, 50], [SQUARE, RLE])
    assert (third["boxes"].shape, third["labels"].shape, third["segmentations"]) == ((0, 4), (0,), [])
    out = capsys.readouterr().out.splitlines()
    assert tuple(out) == split.findings
    assert split.findings[0] == "train: 3 images of 2 classes, 3 objects"
    assert any("1 object is a crowd" in line for line in out)
    assert any("1 image has no object to train on; it is kept to evaluate: images/c.png" in line for line in out)


def test_a_crowd_is_no_outline_to_learn_from(boxes):
    boxes[1]["annotations"] = [
        annotation(20, 4, segmentation=[]),
        annotation(21, 7, segmentation=RLE, iscrowd=1),
        annotation(22, 7, segmentation=[[1, 2, 3, 4]]),
    ]
    assert not open_dense("own", prepare_own(boxes).parent, "train").has_outlines


def test_slices(boxes):
    folder = prepare_own(boxes, shard_bytes=1)
    part = open_dense("own", folder.parent, "train[1:]")
    assert ([part[i]["id"] for i in range(len(part))], part.has_objects.tolist()) == (["b.jpg", "c.png"], [True, False])
    whole, most = (open_dense("own", folder.parent, split) for split in ("train", "train[:67%]"))
    assert (len(most), most.fingerprint != whole.fingerprint) == (2, True)
    with pytest.raises(UserError, match="own:1.0.0 has no split 'trian', did you mean 'train'"):
        open_dense("own", folder.parent, "trian")


# What is counted and said: a change of the content, and the line.
COUNTED = {
    "partly outside": ({"bbox": [25, 3, 10, 5]}, "1 box reaches over the border and is kept: annotation 50", True),
    "outside": ({"bbox": [31, 3, 10, 5]}, "1 object lies outside its image and is dropped: annotation 50", False),
    "thin": ({"bbox": [3, 3, 0.9, 5]}, "1 object has no area, or a side below 1 pixel", False),
    "no area": ({"area": 0}, "1 object has no area, or a side below 1 pixel", False),
    "short": ({"segmentation": [[1, 2, 3, 4]]}, "1 polygon has under 3 points", True),
    "odd": ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "1 polygon has under 3 points or half a point", True),
}


@pytest.mark.parametrize("case", COUNTED)
def test_what_is_counted(boxes, case):
    change, line, kept = COUNTED[case]
    boxes[1]["annotations"].append(annotation(50, 9, **change))
    split = open_dense("own", prepare_own(boxes).parent, "train")
    assert any(line in told for told in split.findings), split.findings
    assert split.has_objects.tolist() == [True, True, kept]
    assert split[2]["annotation_ids"].tolist() == [50] * kept
    if "segmentation" in change:
        assert split[2]["segmentations"] == [None]
    if "bbox" in change and kept:
        assert split[2]["boxes"].tolist() == [[25, 3, 35, 8]]


def test_whole_polygons_stay_where_others_are_short(boxes):
    boxes[1]["annotations"].append(annotation(50, 9, segmentation=[[1, 2, 3, 4], *SQUARE]))
    del boxes[1]["annotations"][0]["area"], boxes[1]["annotations"][0]["iscrowd"]
    split = open_dense("own", prepare_own(boxes).parent, "train")
    assert split[2]["segmentations"] == [SQUARE]
    assert (split[1]["area"][0], split[1]["crowd"][0]) == (10.5 * 5.125, False)


def lacking(entries, key):
    return [{k: value for k, value in entry.items() if k != key} for entry in entries]


REFUSED = {
    "duplicate image id": (
        lambda c: c["images"].append({**c["images"][0], "file_name": "d.jpg"}),
        "1 id is there twice: 7 in images[3] of own.json",
    ),
    "duplicate annotation id": (
        lambda c: c["annotations"].append(annotation(20, 9)),
        "1 id is there twice: 20 in annotations[3] of own.json",
    ),
    "duplicate file": (
        lambda c: c["images"].append({**c["images"][0], "id": 99}),
        "1 image file is named twice: b.jpg in own.json",
    ),
    "absent image": (
        lambda c: c["annotations"].append(annotation(50, 1234)),
        "1 annotation is for an image that is not listed: annotation 50 of own.json (image_id 1234)",
    ),
    "unknown category": (
        lambda c: c["annotations"].append(annotation(50, 9, category_id=5)),
        "1 annotation has an unknown category_id: annotation 50 of own.json (category_id 5; allowed: 3, 8)",
    ),
    "no bbox": (
        lambda c: c.update(annotations=lacking(c["annotations"], "bbox")),
        "3 entries are broken: annotations[0] of own.json lacks bbox, annotations[1]",
    ),
    "no category_id": (
        lambda c: c.update(annotations=lacking(c["annotations"], "category_id")),
        "annotations[0] of own.json lacks category_id",
    ),
    "NaN": (
        lambda c: c["annotations"].append(annotation(50, 9, bbox=[1, 2, float("nan"), 4])),
        "1 annotation has a broken bbox, area or iscrowd: annotation 50 of images/c.png (bbox [1, 2, nan, 4]",
    ),
    "text": (lambda c: c["annotations"].append(annotation(50, 9, bbox=["1", 2, 3, 4])), "a broken bbox"),
    "large id": (
        lambda c: c["images"].append({"id": 2**31, "file_name": "d.jpg", "height": 1, "width": 1}),
        "1 id is not a whole number from 0 to below 2**31 (annotations: 2**63): 2147483648 in images[3] of own.json",
    ),
    "fraction": (lambda c: c["annotations"][0].update(id=1.5), "1.5 in annotations[0] of own.json"),
    "other size": (
        lambda c: c["images"][0].update(width=31),
        "1 image has another size than the JSON says: images/b.jpg (31 x 20)",
    ),
    "foreign run lengths": (
        lambda c: c["annotations"][0].update(segmentation={"size": [30, 20], "counts": "abc"}),
        "1 annotation has a broken segmentation: annotation 21 of images/b.jpg",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(boxes, case):
    change, line = REFUSED[case]
    change(boxes[1])
    message = refused(boxes)
    assert message.startswith("own cannot be prepared: ")
    assert line in message


def test_all_bad_files_are_told_in_one_go(boxes):
    folder, content = boxes
    whole = (folder / "a.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "b.jpg").write_bytes(b"no image")
    content["images"] += [{"id": 100 + k, "file_name": f"gone{k}.jpg", "height": 9, "width": 9} for k in range(7)]
    content["annotations"][0]["category_id"] = 1
    message = refused(boxes)
    assert "2 images cannot be read: images/a.jpg (" in message
    assert "images/b.jpg (not an image file)" in message
    assert "7 image files are missing: images/gone0.jpg, images/gone1.jpg," in message
    assert "images/gone4.jpg, ...;" in message
    assert "1 annotation has an unknown category_id" in message


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "own.json cannot be read as JSON (Expecting"),
        ("[]", "own.json is not in COCO's format: it has no list 'images'"),
        ('{"images": [], "annotations": []}', "it has no list 'categories'"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}', "own.json lists no images"),
    ],
)
def test_other_json_is_refused(boxes, content, line):
    assert line in refused((boxes[0], content))


def test_other_categories_in_the_other_split_are_refused(boxes, tmp_path):
    folder, content = boxes
    (tmp_path / "a.json").write_text(json.dumps(content))
    content["categories"][0]["name"] = "dog"
    (tmp_path / "b.json").write_text(json.dumps(content))
    places = {"train": (folder, tmp_path / "a.json"), "validation": (folder, tmp_path / "b.json")}
    with pytest.raises(UserError, match="b.json has other categories than a.json: 'dog' with id 8 is in one of them"):
        prepare_boxes("own", places, tmp_path / "out")


def test_images_are_turned_as_the_json_has_them(boxes):
    """OpenCV turns by EXIF: so is an image read whose JSON has the turned size, and another is not."""
    folder, content = boxes
    for name, number in (("a.jpg", 4), ("b.jpg", 7)):
        (folder / name).write_bytes(picture(number, 20, 30, orientation=6))
    content["images"][0].update(height=30, width=20)  # b.jpg
    content["annotations"][1]["segmentation"] = None
    split = open_dense("own", prepare_own(boxes).parent, "train")
    assert [split[i]["upright"] for i in range(3)] == [False, True, True]
    for i in range(3):
        record = split[i]
        assert list(decode(record["image"], 3, upright=record["upright"]).shape[:2]) == split.sizes[i].tolist()
    assert any("1 image is read as it is stored, against its EXIF data: a.jpg" in line for line in split.findings)


def coco_folder(root: Path) -> Path:
    (root / "annotations").mkdir(parents=True)
    for year, numbers in (("train2017", (9, 25)), ("val2017", (139,))):
        (root / year).mkdir()
        for number in numbers:
            (root / year / f"{number:012d}.jpg").write_bytes(picture(number, 20, 30))
        categories = coco_categories()
        content = {
            "categories": [{"id": k, "name": n} for k, n in zip(*categories, strict=True)],
            "images": [{"id": k, "file_name": f"{k:012d}.jpg", "height": 20, "width": 30} for k in numbers],
            "annotations": [annotation(100 + k, k, category_id=90) for k in numbers],
        }
        (root / "annotations" / f"instances_{year}.json").write_text(json.dumps(content))
    return root


def test_the_command_prepares_coco(tmp_path, capsys):
    root, out = coco_folder(tmp_path / "coco"), tmp_path / "out"
    arguments = ("prepare", "coco", "--source", root, "--data-dir", out)
    code, told, _ = run(*arguments, capsys=capsys)
    assert code == 0
    assert "train: 2 images of 80 classes, 2 objects" in told
    assert f"coco is prepared in {out}/coco" in told
    split = open_dense("coco", str(out), "validation")
    assert (split.name, len(split.class_names)) == ("coco:1.0.0", 80)
    assert (split.class_names[0], split.category_ids[-1]) == ("person", 90)
    assert (split[0]["labels"].tolist(), split[0]["id"]) == ([79], "000000000139.jpg")
    assert len(open_dense("coco", out, "train+validation").sizes) == 3
    assert describe_dense("coco", out)[1:] == (2, str(out / "coco"))
    code, told, _ = run(*arguments, capsys=capsys)
    assert (code, told) == (0, f"coco is already prepared in {out}/coco; delete this folder to prepare it anew\n")


def test_coco_table():
    """Ids that COCO leaves out: 12, 26, 29, 30, 45, 66, 68, 69, 71, 83."""
    categories = coco_categories()
    assert set(range(1, 91)) - set(categories.ids) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert categories.ids == tuple(sorted(categories.ids))
    assert dict(zip(*categories, strict=True))[44] == "bottle"
    assert '"data/coco_classes.txt"' in (Path(__file__).parents[2] / "setup.py").read_text()


def ade_folder(root: Path) -> Path:
    for split, count in (("training", 2), ("validation", 1)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for k in range(count):
            (root / "images" / split / f"ADE_{k}.jpg").write_bytes(picture(k, 6, 8))
            labels = np.arange(48, dtype=np.uint8).reshape(6, 8) * 3 + k
            (root / "annotations" / split / f"ADE_{k}.png").write_bytes(png(labels))
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName", *(f"{k}\t0.1\t1\t1\t0\tname {k}, other" for k in range(1, 151))]
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    return root


def test_the_command_prepares_ade20k(tmp_path, capsys):
    root, out = ade_folder(tmp_path / "ADEChallengeData2016"), tmp_path / "out"
    code, told, _ = run("prepare", "ade20k", "--source", root, "--data-dir", out, capsys=capsys)
    assert (code, "train: 2 images of 150 classes" in told) == (0, True)
    split = open_dense("ade20k", out, "train")
    assert (split.kind, split.class_names[149], split.category_ids[149]) == ("label_maps", "name 150, other", 149)
    for i in range(2):
        record = split[i]
        assert record["id"] == f"ADE_{i}.jpg"
        assert record["image"] == (root / "images/training" / record["id"]).read_bytes()
        with Image.open(io.BytesIO(record["label_map"])) as image:
            assert (image.format, image.mode) == ("PNG", "L")
            found = np.asarray(image)
        official = (np.arange(48, dtype=np.uint8).reshape(6, 8) * 3 + i) - 1  # mmseg's way: 0 wraps around to 255
        np.testing.assert_array_equal(found, official)
    (root / "objectInfo150.txt").unlink()
    code, _, error = run("prepare", "ade20k", "--source", root, "--data-dir", tmp_path / "other", capsys=capsys)
    assert code == 2
    assert "objectInfo150.txt, the list of classes, cannot be read (No such file or directory)" in error


@pytest.fixture
def maps(tmp_path):
    """Two images, one in a folder of its own, with label maps of three classes."""
    for name in ("images/deep", "labels/deep"):
        (tmp_path / name).mkdir(parents=True)
    for k, stem in enumerate(("deep/a", "b")):
        (tmp_path / f"images/{stem}.jpg").write_bytes(picture(k, 4, 6))
        (tmp_path / f"labels/{stem}.png").write_bytes(png(LABELS))
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    return tmp_path


LABELS = np.array([[0, 1, 2, 1, 1, 255]] * 4, np.uint8)


def prepare_maps(maps: Path, **options) -> Path:
    places = {"train": (maps / "images", maps / "labels")}
    return prepare_label_maps("maps", places, maps / "classes.txt", maps / "out", **options)


FORMS = {
    "grey": png(LABELS),
    "palette": png(LABELS, "P"),
    "equal channels": png(np.repeat(LABELS[..., None], 3, 2)),
    "16 bits": raw_png(16, [struct.pack(">6H", *row) for row in LABELS.tolist()], 6),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_label_maps(maps, form):
    (maps / "labels/b.png").write_bytes(FORMS[form])
    split = open_dense("maps", prepare_maps(maps).parent, "train")
    assert [split[i]["id"] for i in range(2)] == ["b.jpg", "deep/a.jpg"]
    assert split.category_ids == (0, 1, 2)
    assert split.sizes.tolist() == [[4, 6]] * 2
    for i in range(2):
        np.testing.assert_array_equal(decode(split[i]["label_map"], 1)[..., 0], LABELS)


@pytest.mark.parametrize(
    ("depth", "row", "labels"),
    [(1, b"\x58", [0, 1, 0, 1, 1]), (2, b"\x1b\x40", [0, 1, 2, 3, 1]), (4, b"\x01\x2f\x50", [0, 1, 2, 15, 5])],
)
def test_grey_of_few_bits_is_not_stretched(depth, row, labels):
    assert read_labels(raw_png(depth, [row], 5)).tolist() == [labels]


BAD_MAPS = {
    "outside": (png(LABELS + 1), "1 label map has labels outside the list: labels/b.png (3; allowed: 0 to 2 and 255)"),
    "16 bits": (
        raw_png(16, [struct.pack(">6H", 0, 1, 2, 300, 256, 255)] * 4, 6),
        "labels/b.png (256, 300; allowed: 0 to 2 and 255)",
    ),
    "other size": (png(LABELS[:3]), "1 label map has another size than its image: labels/b.png (6 x 3)"),
    "colours": (
        png(np.random.default_rng(0).integers(0, 3, (4, 6, 3), np.uint8)),
        "1 label map cannot be read: labels/b.png (colours in place of labels",
    ),
    "truncated": (FORMS["grey"][:60], "1 label map cannot be read: labels/b.png ("),
    "no PNG": (picture(0, 4, 6), "labels/b.png (not a PNG file)"),
}


@pytest.mark.parametrize("case", BAD_MAPS)
def test_bad_label_maps_are_refused(maps, case):
    data, line = BAD_MAPS[case]
    (maps / "labels/b.png").write_bytes(data)
    with pytest.raises(UserError) as caught:
        prepare_maps(maps)
    assert line in str(caught.value)
    assert not (maps / "out").exists()


def test_zero_is_allowed_where_it_is_ignored(maps):
    (maps / "labels/b.png").write_bytes(png(np.full((4, 6), 4, np.uint8)))
    with pytest.raises(UserError, match="4; allowed: 1 to 3, 0 and 255"):
        prepare_maps(maps, ignore_zero=True)


def test_files_without_a_partner_are_refused(maps):
    (maps / "images/lone.jpg").write_bytes(picture(0, 4, 6))
    (maps / "labels/other.png").write_bytes(png(LABELS))
    (maps / "images/b.png").write_bytes(picture(0, 4, 6, "PNG"))
    (maps / "images/notes.txt").write_text("of no use")
    with pytest.raises(UserError) as caught:
        prepare_maps(maps)
    message = str(caught.value)
    assert "1 image has no label map: images/lone.jpg (wanted: labels/lone.png)" in message
    assert "1 label map has no image: labels/other.png" in message
    assert "1 image has the stem of another: images/b.png and b.jpg" in message


def test_what_is_counted_of_label_maps(maps):
    (maps / "images/notes.txt").write_text("of no use")
    (maps / "labels/b.png").write_bytes(png(np.full((4, 6), 255, np.uint8)))
    (maps / "classes.txt").write_text("sky\nroad\ncar\ntree")
    findings = open_dense("maps", prepare_maps(maps).parent, "train").findings
    assert findings == (
        "train: 2 images of 4 classes",
        "train: 1 file is left out for its name's ending: images/notes.txt",
        "train: 1 label map has only ignored pixels: labels/b.png",
        "train: 1 class has no pixel: tree (3)",
    )


@pytest.mark.parametrize(
    ("classes", "line"),
    [("a\n\nb\n", "line 2 is empty"), ("a\nb\na\n", "line 3 names 'a' again"), ("", "names 0 classes")],
)
def test_bad_lists_of_classes_are_refused(maps, classes, line):
    (maps / "classes.txt").write_text(classes)
    with pytest.raises(UserError, match=line):
        prepare_maps(maps)


def test_an_interrupted_preparation_goes_on(boxes, monkeypatch, capsys):
    """Two of three files are kept, bit by bit and untouched; the result is that of a preparation in one go."""
    written, record = [], dense_items.Item.features

    def features(item):
        if item.id == "c.png" and len(written) < 3:
            raise KeyboardInterrupt
        written.append(item.id)
        return record(item)

    monkeypatch.setattr(dense_items.Item, "features", features)
    folder = boxes[0].parent / "out" / "own"
    with pytest.raises(KeyboardInterrupt):
        prepare_own(boxes, shard_bytes=1)
    kept = sorted(folder.glob("*.array_record"))
    assert [path.name[:11] for path in kept] == ["train-00000", "train-00001"]
    assert not list(folder.glob("*.tmp"))
    with pytest.raises(UserError, match=r"own is unfinished \(2 files are written\): run `prepare` again"):
        open_dense("own", folder.parent, "train")
    with pytest.raises(UserError, match="is unfinished"):
        describe_dense("own", folder.parent)
    times = [path.stat().st_mtime_ns for path in kept]
    written.append("as many as let the last one pass")
    prepare_own(boxes, shard_bytes=1)
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert "going on: 2 of 3 files of own are there" in capsys.readouterr().err
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink()
    prepare_own(boxes, shard_bytes=1)
    assert whole == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_of_other_inputs_are_not_kept(boxes):
    folder = prepare_own(boxes, shard_bytes=1)
    first = open_dense("own", folder.parent, "train").fingerprint
    (folder / "info.json").unlink()
    (folder / "plan.json").write_text("{}")
    boxes[1]["annotations"][0]["area"] = 51
    prepare_own(boxes)
    split = open_dense("own", folder.parent, "train")
    assert (split[1]["area"][0], len(list(folder.glob("*.array_record")))) == (51, 1)
    assert split.fingerprint != first


def test_an_image_that_changes_meanwhile_is_refused(boxes, monkeypatch):
    check = dense_items.Checked.read
    monkeypatch.setattr(
        dense_items.Checked, "read", lambda file: (file.path.write_bytes(picture(99, 20, 30)), check(file))[1]
    )
    with pytest.raises(UserError, match="has changed since it was checked"):
        prepare_own(boxes)


def test_foreign_folders_and_names_are_refused(boxes):
    out = boxes[0].parent / "out" / "own"
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds 1 files of something else, the first is thesis.tex"):
        prepare_own(boxes)
    assert (out / "thesis.tex").read_text() == "years of work"
    with pytest.raises(UserError, match="--name '../own' is not allowed"):
        prepare_boxes("../own", {}, out)


def test_too_little_space_is_told_first(boxes, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="own needs .* GB in .* are free"):
        prepare_own(boxes)
    assert not list((boxes[0].parent / "out").glob("own/*.array_record"))


@pytest.mark.parametrize("file", ["train-00000-of-00001.array_record", "train-sizes.npy", "info.json"])
def test_damaged_sets_are_refused(boxes, file):
    folder = prepare_own(boxes)
    (folder / file).write_bytes(b"nothing")
    with pytest.raises(UserError, match=file):
        open_dense("own", folder.parent, "train")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["coco"], "coco needs --source: prepare coco --source DIR"),
        (["coco", "--train", "a"], "--train is not for coco"),
        (["digits", "--source", "a"], "--source is not for digits: prepare digits"),
        (["boxes", "--name", "x", "--train", "a", "--val", "a", "b"], "--train has 1 places where 2 are needed"),
        (["label_maps", "--name", "x", "--train", "a", "b", "--val", "a", "b"], "label_maps needs --classes"),
        (["coco", "--source", "/nowhere"], "/nowhere/train2017 is not a folder"),
    ],
)
def test_wrong_options_are_told(arguments, line, tmp_path, capsys):
    code, _, error = run("prepare", *arguments, "--data-dir", tmp_path, capsys=capsys)
    assert code == 2
    assert error.startswith("error: ")
    assert line in error


def test_the_command_prepares_own_sets(boxes, tmp_path, capsys):
    images, content = boxes
    (tmp_path / "own.json").write_text(json.dumps(content))
    pair = (images, tmp_path / "own.json")
    places = ("--train", *pair, "--val", *pair, "--data-dir", tmp_path / "sets")
    code, _, _ = run("prepare", "boxes", "--name", "birds", *places, capsys=capsys)
    assert (code, len(open_dense("birds", tmp_path / "sets", "validation"))) == (0, 3)


def test_the_command_prepares_own_label_maps(maps, capsys):
    pair = (maps / "images", maps / "labels")
    options = ("--classes", maps / "classes.txt", "--ignore-zero", "--data-dir", maps / "sets")
    code, _, _ = run(
        "prepare", "label_maps", "--name", "town", "--train", *pair, "--val", *pair, *options, capsys=capsys
    )
    split = open_dense("town", maps / "sets", "validation")
    assert (code, split.class_names) == (0, ("sky", "road", "car"))
    wanted = np.array([[255, 0, 1, 0, 0, 255]] * 4)
    np.testing.assert_array_equal(decode(split[0]["label_map"], 1)[..., 0], wanted)


def test_descriptions_without_data(tmp_path):
    names, length, _ = describe_dense("coco", tmp_path)
    assert (len(names), names[79], length) == (80, "toothbrush", 117_266)
    names, length, _ = describe_dense("ade20k", tmp_path)
    assert (len(names), length) == (150, 20_210)
    with pytest.raises(UserError, match="data.name='birds' is not prepared in .* prepare boxes --name birds"):
        describe_dense("birds", tmp_path)
    with pytest.raises(UserError, match="data.name='coco' is not prepared in .* prepare coco --source DIR"):
        open_dense("coco", tmp_path, "train")


class Coco(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS's coco/2017 in its fields, with two made-up images."""

    name = "coco"
    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2017", version=VERSION)]  # noqa: RUF012

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "image/filename": tfds.features.Text(),
                    "image/id": np.int64,
                    "objects": tfds.features.Sequence(
                        {
                            "area": np.int64,
                            "bbox": tfds.features.BBoxFeature(),
                            "id": np.int64,
                            "is_crowd": np.bool_,
                            "label": tfds.features.ClassLabel(names=list(coco_categories().names)),
                        }
                    ),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        sizes = {1: (20, 30), 2: (40, 50), 3: (16, 16)}
        for number, (height, width) in sizes.items():
            boxes = TFDS_BOXES.get(number, [])
            yield (
                number,
                {
                    "image": picture(number, height, width),
                    "image/filename": f"{number:012d}.jpg",
                    "image/id": number,
                    "objects": [
                        {
                            "area": 30,
                            "bbox": tfds.features.BBox(y0 / height, x0 / width, y1 / height, x1 / width),
                            "id": 10 * number + k,
                            "is_crowd": k == 1,
                            "label": 79 - k,
                        }
                        for k, (x0, y0, x1, y1) in enumerate(boxes)
                    ],
                },
            )


TFDS_BOXES = {1: [(3, 4, 12.5, 9), (0, 0, 30, 20)], 2: [(1, 2, 49, 39.25), (5, 6, 15, 26), (7, 7, 7.5, 20)]}


@pytest.fixture
def tfds_coco(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tfds.display_progress_bar(False)
    Coco(data_dir=tmp_path, config="2017", file_format="array_record").download_and_prepare(file_format="array_record")
    tfds.display_progress_bar(True)
    return tmp_path


def test_tfds_coco(tfds_coco):
    split = open_dense("coco/2017", tfds_coco, "train")
    assert (split.kind, split.name, split.category_ids[11]) == ("boxes", "coco/2017:1.1.0", 13)
    records = {record["image_id"]: (i, record) for i, record in ((i, split[i]) for i in range(3))}
    sizes = {number: split.sizes[i].tolist() for number, (i, _) in records.items()}
    assert sizes == {1: [20, 30], 2: [40, 50], 3: [16, 16]}
    for number, (i, record) in records.items():
        wanted = np.array(TFDS_BOXES.get(number, []), np.float64).reshape(-1, 4)[:2]  # the third is too thin
        np.testing.assert_allclose(record["boxes"], wanted, atol=1e-4)
        assert record["labels"].tolist() == [79, 78][: len(wanted)]
        assert record["crowd"].tolist() == [False, True][: len(wanted)]
        assert record["annotation_ids"].tolist() == [10 * number, 10 * number + 1][: len(wanted)]
        assert (record["id"], record["segmentations"]) == (f"{number:012d}.jpg", [None] * len(wanted))
        assert split.has_objects[i] == (number != 3)
    assert split.most_objects == 2
    assert not split.has_outlines
    assert "train: 1 objects lie outside or have a side below 1 pixel and are dropped" in split.findings
    assert set(split[0]) == {*BOX_FIELDS}
    assert describe_dense("coco/2017", tfds_coco)[1] == 3
    with pytest.raises(UserError, match=r"set data.name to one of \['coco/2017'\]"):
        open_dense("coco", tfds_coco, "train")


BOX_FIELDS = (
    "image",
    "id",
    "upright",
    "image_id",
    "boxes",
    "labels",
    "crowd",
    "area",
    "segmentations",
    "annotation_ids",
)


def test_tfds_sizes_are_kept_and_sliced(tfds_coco, monkeypatch):
    whole = open_dense("coco/2017", tfds_coco, "train")
    monkeypatch.setattr("evmamba_jax.data.dense.image_size", None)  # not called again
    part = open_dense("coco/2017", tfds_coco, "train[1:]")
    np.testing.assert_array_equal(part.sizes, whole.sizes[1:])
    assert part[0]["id"] == whole[1]["id"]


def test_boxes_have_the_fields_of_tfds(boxes):
    assert set(open_dense("own", prepare_own(boxes).parent, "train")[0]) == {*BOX_FIELDS}


KILLED = """
import os, signal, sys
from evmamba_jax.data import __main__ as command, dense_shards
write = dense_shards._write
def stop(path, items):
    write(path, items)
    if items[0].id.endswith("25.jpg"):
        os.kill(os.getpid(), signal.SIGKILL)
dense_shards._write = stop
import evmamba_jax.data.dense_prepare as prepare
whole = prepare.write_set
prepare.write_set = lambda dense, data_dir, shard_bytes: whole(dense, data_dir, 1)
sys.exit(command.main(sys.argv[1:]))
"""


def test_a_killed_command_leaves_no_half_set(tmp_path):
    root = coco_folder(tmp_path / "source")
    arguments = ["prepare", "coco", "--source", str(root), "--data-dir", str(tmp_path)]
    ended = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert b"Traceback" not in ended.stderr
    assert [path.name[:11] for path in (tmp_path / "coco").glob("*.array_record")] == ["train-00000"]
    with pytest.raises(UserError, match="is unfinished"):
        open_dense("coco", tmp_path, "train")
    assert command.main(arguments) == 0
    assert len(open_dense("coco", tmp_path, "train")) == 2
