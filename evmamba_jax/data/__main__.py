"""``python -m evmamba_jax.data``: make a data set ready for training, or look through your own pictures.

python -m evmamba_jax.data prepare imagenet2012 --train ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar
python -m evmamba_jax.data prepare coco --source DIR_WITH_ANNOTATIONS_TRAIN2017_VAL2017
python -m evmamba_jax.data prepare ade20k --source ADEChallengeData2016
python -m evmamba_jax.data prepare stamp_scenes
python -m evmamba_jax.data prepare boxes --name NAME --train IMAGES JSON --val IMAGES JSON
python -m evmamba_jax.data prepare label_maps --name NAME --train IMAGES LABELS --val IMAGES LABELS --classes FILE
python -m evmamba_jax.data check photos
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from evmamba_jax import cli
from evmamba_jax.data.config import DataConfig, resolve_data_dir
from evmamba_jax.data.dense_prepare import prepare_ade20k, prepare_boxes, prepare_coco, prepare_label_maps
from evmamba_jax.data.dense_shards import INFO
from evmamba_jax.data.imagenet import prepare_imagenet
from evmamba_jax.data.pictures import kind_of, open_pictures
from evmamba_jax.data.sources import IMAGENET_COMMAND, find_folder, prepare
from evmamba_jax.data.stamp_scenes import prepare_stamp_scenes
from evmamba_jax.errors import UserError


def main(argv: Sequence[str] | None = None, prog: str = "python -m evmamba_jax.data") -> int:
    """Run the command.

    Args:
        argv: the arguments; None reads ``sys.argv``.
        prog: what the help calls the command.

    Returns:
        The exit code: 0, or 2 after a user's mistake, told in one line.
    """
    parser = cli.Parser(prog=prog, description="Make data sets ready for training.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="write a data set as TFDS array_record files")
    command.add_argument(
        "what",
        help="imagenet2012, digits, fashion_mnist_debian, stamps, or a TFDS name; coco, ade20k, stamp_scenes; boxes or "
        "label_maps of your own",
    )
    command.add_argument(
        "--train",
        type=Path,
        nargs="+",
        metavar="PLACE",
        help="imagenet2012: ILSVRC2012_img_train.tar; boxes: folder of images, JSON file in COCO's format; label_maps: "
        "folder of images, folder of PNG files with the same stems",
    )
    command.add_argument("--val", type=Path, nargs="+", metavar="PLACE", help="the same of the validation split")
    command.add_argument(
        "--source",
        type=Path,
        help="coco: the folder of annotations, train2017 and val2017; ade20k: the folder ADEChallengeData2016",
    )
    command.add_argument("--name", help="boxes and label_maps: what the data set is to be called")
    command.add_argument("--classes", type=Path, help="label_maps: a file of the classes, one a line in label order")
    command.add_argument(
        "--ignore-zero", action="store_true", help="label_maps: label 0 is ignored, line 1 of the classes is label 1"
    )
    command.add_argument("--data-dir", default="", help="default: $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    check = commands.add_parser(
        "check", help="say what is in a folder, zip, tar or table of pictures, and what is wrong"
    )
    check.add_argument(
        "place", help="a folder of train/CLASS/ and val/CLASS/, or of CLASS/; a zip or tar of it; a table"
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that unfinished folders are removed then, too
    return cli.main(lambda: _run(parser.parse_args(argv)))


def _run(arguments: argparse.Namespace) -> None:
    if arguments.command == "check":
        _check(arguments.place)
    else:
        _prepare(arguments)


def _check(place: str) -> None:
    config = DataConfig(name=kind_of(place), data_dir=place, on_corrupt="skip")
    for finding in open_pictures(config, several=None).findings:
        print(finding)


# What each form takes, how many places a split has, and how it is called; other names take none of these options.
_FORMS = {
    "imagenet2012": (("train", "val"), 1, IMAGENET_COMMAND),
    "coco": (("source",), 0, "prepare coco --source DIR"),
    "ade20k": (("source",), 0, "prepare ade20k --source ADEChallengeData2016"),
    "boxes": (("name", "train", "val"), 2, "prepare boxes --name NAME --train IMAGES JSON --val IMAGES JSON"),
    "label_maps": (
        ("name", "train", "val", "classes", "ignore_zero"),
        2,
        "prepare label_maps --name NAME --train IMAGES LABELS --val IMAGES LABELS --classes FILE [--ignore-zero]",
    ),
}
_OPTIONS = ("name", "train", "val", "source", "classes", "ignore_zero")


def _prepare(arguments: argparse.Namespace) -> None:
    what, data_dir = arguments.what, resolve_data_dir(arguments.data_dir)
    _check_options(arguments)
    if what in ("coco", "ade20k", "stamp_scenes", "boxes", "label_maps"):
        _prepare_dense(arguments, data_dir)
        return
    folder = find_folder(data_dir, what)
    if folder is not None:
        print(f"{what} is already prepared in {folder}")
        return
    if what == "imagenet2012":
        if not (arguments.train and arguments.val):
            raise UserError(f"imagenet2012 is made from its two tars: {IMAGENET_COMMAND}")
        prepare_imagenet(arguments.train[0], arguments.val[0], data_dir)
    else:
        prepare(what, data_dir)
    print(f"{what} is prepared in {find_folder(data_dir, what)}")


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that the data set does not take, and splits of another number of places."""
    taken, places, form = _FORMS.get(arguments.what, ((), 0, f"prepare {arguments.what} [--data-dir OUT]"))
    for option in _OPTIONS:
        value, told = getattr(arguments, option), "--" + option.replace("_", "-")
        if value and option not in taken:
            raise UserError(f"{told} is not for {arguments.what}: {form}")
        if option in ("train", "val") and value and len(value) != places:
            raise UserError(f"{told} has {len(value)} places where {places} are needed: {form}")
        if arguments.what != "imagenet2012" and option in taken and option != "ignore_zero" and not value:
            raise UserError(f"{arguments.what} needs {told}: {form}")


def _prepare_dense(arguments: argparse.Namespace, data_dir: Path) -> None:
    """Prepare a data set of boxes or label maps."""
    name = arguments.name or arguments.what
    if (data_dir / name / INFO).is_file():
        print(f"{name} is already prepared in {data_dir / name}; delete this folder to prepare it anew")
        return
    if arguments.what == "coco":
        folder = prepare_coco(arguments.source, data_dir)
    elif arguments.what == "stamp_scenes":
        folder = prepare_stamp_scenes(data_dir)
    elif arguments.what == "ade20k":
        folder = prepare_ade20k(arguments.source, data_dir)
    else:
        places = {"train": tuple(arguments.train), "validation": tuple(arguments.val)}
        if arguments.what == "boxes":
            folder = prepare_boxes(name, places, data_dir)
        else:
            folder = prepare_label_maps(name, places, arguments.classes, data_dir, ignore_zero=arguments.ignore_zero)
    print(f"{name} is prepared in {folder}")


if __name__ == "__main__":
    sys.exit(main())
