"""Your own pictures: folders, archives, tables; what is found, what is said, and that places stay what they are."""

import csv
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from evmamba_jax.data import index as indices
from evmamba_jax.data.__main__ import main
from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.decoding import CorruptImageError
from evmamba_jax.data.files import Folder, Strings
from evmamba_jax.data.listing import by_folders
from evmamba_jax.data.loader import eval_batches, train_batches
from evmamba_jax.data.pictures import open_pictures, open_split
from evmamba_jax.data.sources import describe, open_source
from evmamba_jax.errors import UserError


def picture(number):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


SPLIT = {
    f"{split}/{name}/{i}.png": picture(100 * k + i + start)
    for split, start, count in (("train", 0, 12), ("val", 50, 4))
    for k, name in enumerate(("cats", "dogs"))
    for i in range(count)
}


def of(place, **fields):
    fields = {"name": "folder", "image_size": 8, "num_threads": 1} | fields
    return DataConfig(data_dir=str(place), **fields)


@pytest.fixture
def photos(tmp_path):
    write(tmp_path / "photos", SPLIT)
    return tmp_path / "photos"


def labels(source):
    return {source[i]["id"]: source[i]["label"] for i in range(len(source))}


def test_a_folder_of_splits_and_classes(photos):
    source = open_source(of(photos), "train")
    assert source.class_names == ("cats", "dogs")
    assert labels(source) == {name: int("dogs" in name) for name in SPLIT if name.startswith("train")}
    assert source[3]["image"] == SPLIT[source[3]["id"]]
    assert len(open_source(of(photos), "validation")) == 8
    assert describe(of(photos)) == (("cats", "dogs"), 24, str(photos))


@pytest.mark.parametrize("name", ["val", "valid", "Validation", "VAL", "test"])
def test_the_split_to_evaluate_has_many_names(photos, name):
    (photos / "val").rename(photos / name)
    assert len(open_split(of(photos), "validation")) == 8


@pytest.mark.parametrize("outer", ["", "photos/", "a/b/"])
@pytest.mark.parametrize("kind", ["stored", "deflated", "tar"])
def test_archives_give_what_the_folder_gives(photos, tmp_path, kind, outer):
    place = tmp_path / f"archive.{'tar' if kind == 'tar' else 'zip'}"
    if kind == "tar":
        with tarfile.open(place, "w") as archive:
            archive.add(photos, outer or ".")
    else:
        method = zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(place, "w", method) as archive:
            for name, data in SPLIT.items():
                archive.writestr(outer + name, data)
            archive.writestr("__MACOSX/._x.png", b"rubbish")
    source, whole = open_split(of(place), "train"), open_split(of(photos), "train")
    assert labels(source) == {outer + name: label for name, label in labels(whole).items()}
    assert source.fingerprint == whole.fingerprint
    assert [source[i]["image"] for i in range(len(source))] == [whole[i]["image"] for i in range(len(whole))]
    again = pickle.loads(pickle.dumps(source))  # as worker processes get it
    assert again[5] == source[5]


def test_a_compressed_tar_and_a_missing_place_are_refused(photos, tmp_path):
    with tarfile.open(tmp_path / "p.tar.gz", "w:gz") as archive:
        archive.add(photos, ".")
    with pytest.raises(UserError, match=r"compressed tar has no random access"):
        open_split(of(tmp_path / "p.tar.gz"), "train")
    with pytest.raises(UserError, match="does not exist"):
        open_split(of(tmp_path / "none"), "train")
    with pytest.raises(UserError, match=r"needs data\.data_dir"):
        open_split(of(""), "train")


def test_classes_alone_are_shared_out_by_content(tmp_path):
    many = {f"{name}/{i}.png": picture(1000 * k + i) for k, name in enumerate("abc") for i in range(100)}
    write(tmp_path / "one", many)
    write(tmp_path / "two", many | {f"a/new{i}.png": picture(5000 + i) for i in range(50)} | {"d/x.png": picture(9)})
    shutil.copy(tmp_path / "one/a/7.png", tmp_path / "one/a/copy.png")

    def held_out(folder):
        return set(labels(open_split(of(tmp_path / folder), "validation")))

    one, two = held_out("one"), held_out("two")
    assert one - {"a/copy.png"} == {name for name in two if name in many}  # those that came moved none
    assert ("a/7.png" in one) == ("a/copy.png" in one)  # equal pictures stay together
    for name in "abc":
        assert 8 <= sum(one_.startswith(name) for one_ in one) <= 34  # 20 expected, 3.5 standard deviations
    assert set(labels(open_split(of(tmp_path / "one"), "train"))) == {*many, "a/copy.png"} - one
    with pytest.raises(UserError, match="no split 'validation'"):
        open_split(of(tmp_path / "one", held_out=0.0), "validation")


def test_what_is_wrong_is_said_with_counts_and_names(photos):
    write(
        photos,
        {
            "train/cats/again.png": SPLIT["train/cats/3.png"],
            "val/dogs/leak.png": SPLIT["train/cats/4.png"],
            "train/dogs/README.txt": b"taken in 2019",
            "train/.DS_Store": b"x",
            "train/birds/1.png": picture(77),
            "notes/a/1.png": picture(78),
            "train/loose.png": picture(79),
        },
    )
    (photos / "train/empty").mkdir()
    os.symlink(photos / "nowhere", photos / "train/cats/link.png")
    os.symlink(photos, photos / "train/cats/around")  # must not be walked for ever
    told = "\n".join(open_pictures(of(photos)).findings)
    for line in (
        "3 classes; pictures: 26 in train, 9 in validation",
        "1 file is not an image and is left out: train/dogs/README.txt",
        "1 link leads nowhere: train/cats/link.png",
        "1 folder is empty: train/empty",
        "1 picture is in train twice: train/cats/3.png = train/cats/again.png",
        "1 picture is in two splits, a leak: train/cats/4.png = val/dogs/leak.png",
        "1 picture is in two classes: train/cats/4.png = val/dogs/leak.png",
        "1 class has under 10 pictures to train on: birds (1)",
        "1 class has no picture in validation: birds",
        "the folder notes is no split, its files are left out (1)",
        "1 file lies in no class folder: train/loose.png",
    ):
        assert line in told
    assert "DS_Store" not in told


def test_the_command_says_it_too(photos, capsys):
    assert main(["check", str(photos)]) == 0
    assert f"{photos}: 2 classes; pictures: 24 in train, 8 in validation" in capsys.readouterr().out
    assert main(["check", str(photos / "train/cats")]) == 2
    assert "holds no pictures in train/CLASS/ and val/CLASS/, or in CLASS/" in capsys.readouterr().err


def test_links_to_folders_and_files_are_followed(photos, tmp_path):
    (tmp_path / "linked").mkdir()
    os.symlink(photos / "train", tmp_path / "linked/train")
    (tmp_path / "linked/val/cats").mkdir(parents=True)
    os.symlink(photos / "val/cats/1.png", tmp_path / "linked/val/cats/1.png")
    assert len(open_split(of(tmp_path / "linked"), "train")) == 24
    assert open_split(of(tmp_path / "linked"), "validation")[0]["image"] == SPLIT["val/cats/1.png"]


def test_files_that_cannot_be_read_stop_or_are_left_out(photos, monkeypatch):
    whole = Folder.read

    def failing(self, name, where):
        if name == "train/cats/3.png":
            raise PermissionError(13, "Permission denied")
        return whole(self, name, where)

    monkeypatch.setattr(Folder, "read", failing)
    with pytest.raises(UserError, match=r"1 file cannot be read: train/cats/3\.png; mend"):
        open_split(of(photos), "train")
    source = open_split(of(photos, on_corrupt="skip"), "train")
    assert len(source) == 23
    assert "1 file cannot be read and is left out: train/cats/3.png" in source.findings


def counting(monkeypatch):
    whole, read = Folder.read, []
    monkeypatch.setattr(Folder, "read", lambda self, name, where: read.append(name) or whole(self, name, where))
    return read


def test_the_index_is_kept_and_only_what_changed_is_read_again(photos, monkeypatch):
    read = counting(monkeypatch)
    before = open_split(of(photos), "train").fingerprint
    assert len(read) == 32
    assert open_split(of(photos), "train").fingerprint == before
    assert len(read) == 32
    write(photos, {"train/cats/3.png": picture(300), "train/dogs/new.png": picture(301)})
    os.remove(photos / "train/dogs/0.png")
    source = open_split(of(photos), "train")
    assert sorted(read[32:]) == ["train/cats/3.png", "train/dogs/new.png"]
    assert source.fingerprint != before
    (photos / ".evmamba-index.npz").write_bytes(b"rubbish")
    assert open_split(of(photos), "train").fingerprint == source.fingerprint


def test_the_index_goes_to_the_work_folder_where_the_place_is_not_writable(photos, tmp_path, monkeypatch):
    whole = indices.written_whole

    def refusing(path):
        if path.parent == photos:
            raise UserError("cannot write")
        return whole(path)

    monkeypatch.setattr(indices, "written_whole", refusing)
    read = counting(monkeypatch)
    for _ in range(2):
        open_split(of(photos), "train", tmp_path / "work")
    assert len(read) == 32
    assert not (photos / ".evmamba-index.npz").exists()
    (kept,) = (tmp_path / "work").iterdir()
    assert kept.name.startswith("index-photos-")


def test_a_file_that_changed_after_listing_is_a_corrupt_image(photos):
    source = open_split(of(photos), "train")
    (photos / "train/cats/0.png").write_bytes(b"short")
    with pytest.raises(CorruptImageError, match=r"train/cats/0\.png has changed"):
        source[0]
    os.remove(photos / "train/cats/0.png")
    with pytest.raises(CorruptImageError, match="No such file"):
        source[0]
    batches = eval_batches(of(photos), source, global_batch=4)
    with batches, pytest.raises(UserError, match=r"corrupt image in .*photos, split train: train/cats/0\.png"):
        next(batches)


def rows():
    return [{"path": name, "label": name.split("/")[1], "split": name.split("/")[0]} for name in SPLIT]


def table(path, records):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(records)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_tables(photos, suffix):
    path = table(photos / f"table{suffix}", rows())
    source, whole = open_split(of(path, name="table"), "train"), open_split(of(photos), "train")
    assert labels(source) == labels(whole)
    with zipfile.ZipFile(photos.parent / "with_table.zip", "w") as archive:
        for name in (path.name, *SPLIT):
            archive.write(photos / name, name)
    assert labels(open_split(of(photos.parent / "with_table.zip", name="table"), "train")) == labels(whole)


def test_a_table_without_splits_holds_out_and_numbers_are_sorted_as_numbers(photos):
    records = [{"path": name, "label": i % 12} for i, name in enumerate(SPLIT)]
    config = of(table(photos / "t.csv", records), name="table")
    assert open_split(config, "train").class_names == tuple(map(str, range(12)))
    assert len(open_split(config, "train")) + len(open_split(config, "validation")) == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "trian"}, r"row 2 has split 'trian', did you mean 'train'\?"),
        ({"path": ""}, "row 2 has no 'path'"),
        ({"label": "cats;dogs"}, r"1 picture has none or several labels, where one is needed .*: train/cats/1\.png"),
        ({"label": " "}, r"1 picture has none or several labels, where one is needed .*: train/cats/1\.png"),
        ({"path": "train/cats/none.png"}, r"1 file cannot be read: train/cats/none\.png"),
    ],
)
def test_a_row_that_cannot_be_is_named(photos, change, message):
    records = rows()
    records[1] |= change
    with pytest.raises(UserError, match=message):
        open_split(of(table(photos / "t.csv", records), name="table"), "train")


def test_a_row_without_a_label_matters_only_if_its_file_is_an_image(photos):
    write(photos, {"notes.txt": b"hello"})
    records = [*rows(), {"path": "notes.txt", "label": " ", "split": "train"}]
    source = open_split(of(table(photos / "t.csv", records), name="table"), "train")
    assert len(source) == 24
    assert "1 file is not an image and is left out: notes.txt" in source.findings


def test_columns_that_lack_and_tables_that_cannot_be_read(photos):
    with pytest.raises(UserError, match=r"row 1 has no 'path'; .* it has \['file', 'label'\]"):
        open_split(of(table(photos / "t.csv", [{"file": "x", "label": "a"}]), name="table"), "train")
    (photos / "t.jsonl").write_text("{broken")
    with pytest.raises(UserError, match=r"t\.jsonl cannot be read"):
        open_split(of(photos / "t.jsonl", name="table"), "train")
    (photos / "empty.csv").write_text("path,label\n")
    with pytest.raises(UserError, match="has no rows"):
        open_split(of(photos / "empty.csv", name="table"), "train")


def test_a_list_of_classes_decides_order_and_what_is_allowed(photos, tmp_path):
    (tmp_path / "classes.txt").write_text("wolves\ndogs\ncats\n")
    source = open_split(of(photos, classes=str(tmp_path / "classes.txt")), "train")
    assert source.class_names == ("wolves", "dogs", "cats")
    assert source[0]["label"] == 2
    (tmp_path / "classes.txt").write_text("cats\n")
    with pytest.raises(UserError, match=r"16 pictures have labels outside the 1 classes .*: train/dogs/0\.png"):
        open_split(of(photos, classes=str(tmp_path / "classes.txt")), "train")


def test_batches_of_pictures_are_the_same_on_any_number_of_hosts(photos):
    config = of(photos)
    source = open_split(config, "train")

    def batch(index, count):
        with train_batches(
            config, source, seed=0, global_batch=8, start_step=3, process_index=index, process_count=count
        ) as batches:
            return next(batches)

    whole, parts = batch(0, 1), [batch(i, 2) for i in range(2)]
    for name in whole:
        np.testing.assert_array_equal(whole[name], np.concatenate([part[name] for part in parts]))


def test_strings_come_back_whatever_their_bytes():
    names = ["", "a", "写真/é.png", os.fsdecode(b"\xff\xfe.png"), "b" * 300]
    packed = pickle.loads(pickle.dumps(Strings.of(names)))
    assert list(packed) == names
    assert [packed[i] for i in range(5)] == names
    assert packed[1:3] == names[1:3]


def test_one_class_folder_is_not_taken_for_a_wrapper():
    listing = by_folders(["cats/1.png", "cats/2.png"])
    assert [listing.label_sets[k] for k in listing.labels] == [("cats",), ("cats",)]


def test_parquet_tables(photos):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows()), photos / "table.parquet")
    source = open_split(of(photos / "table.parquet", name="table"), "train")
    assert labels(source) == labels(open_split(of(photos), "train"))
    (photos / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"broken\.parquet cannot be read"):
        open_split(of(photos / "broken.parquet", name="table"), "train")


@pytest.mark.parametrize("named", [True, False], ids=["class labels", "plain labels"])
@pytest.mark.parametrize("whole", [True, False], ids=["splits", "one table"])
def test_data_sets_saved_by_hugging_face(photos, tmp_path, named, whole):
    datasets.disable_progress_bars()

    def of_split(split):
        chosen = [name for name in SPLIT if name.startswith(split)]
        columns = {
            "image": [{"bytes": SPLIT[name], "path": None} for name in chosen],
            "label": [int("cats" in name) if named else name.split("/")[1] for name in chosen],
        }
        label = datasets.ClassLabel(names=["dogs", "cats"]) if named else datasets.Value("string")
        features = datasets.Features({"image": datasets.Image(), "label": label})
        return datasets.Dataset.from_dict(columns, features=features)

    saved = datasets.DatasetDict({split: of_split(split) for split in ("train", "val")}) if whole else of_split("train")
    saved.save_to_disk(str(tmp_path / "saved"))
    source = open_split(of(tmp_path / "saved", name="hf"), "train")
    assert source.class_names == (("dogs", "cats") if named else ("cats", "dogs"))
    expected = {SPLIT[name]: name.split("/")[1] for name in SPLIT if name.startswith("train")}
    found = {source[i]["image"]: source.class_names[source[i]["label"]] for i in range(len(source))}
    if whole:
        assert found == expected
    else:
        held_out = open_split(of(tmp_path / "saved", name="hf"), "validation")
        assert len(found) + len(held_out) == 24
        assert found.items() < expected.items()
    assert pickle.loads(pickle.dumps(source))[3] == source[3]
    assert main(["check", str(tmp_path / "saved")]) == 0


def test_a_folder_that_hugging_face_did_not_write(photos):
    with pytest.raises(UserError, match="is not what datasets' save_to_disk writes"):
        open_split(of(photos, name="hf"), "train")
