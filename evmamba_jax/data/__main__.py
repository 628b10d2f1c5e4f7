"""``python -m evmamba_jax.data``: make a data set ready for training, or look through your own pictures.

python -m evmamba_jax.data prepare imagenet2012 --train ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar
python -m evmamba_jax.data check photos
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from evmamba_jax import cli
from evmamba_jax.data.config import DataConfig, resolve_data_dir
from evmamba_jax.data.imagenet import prepare_imagenet
from evmamba_jax.data.pictures import kind_of, open_pictures
from evmamba_jax.data.sources import IMAGENET_COMMAND, find_folder, prepare
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
    command.add_argument("name", help="imagenet2012, digits, fashion_mnist_debian, stamps, or a TFDS name")
    command.add_argument("--train", type=Path, metavar="TAR", help="imagenet2012 only: ILSVRC2012_img_train.tar")
    command.add_argument("--val", type=Path, metavar="TAR", help="imagenet2012 only: ILSVRC2012_img_val.tar")
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


def _prepare(arguments: argparse.Namespace) -> None:
    data_dir = resolve_data_dir(arguments.data_dir)
    folder = find_folder(data_dir, arguments.name)
    if folder is not None:
        print(f"{arguments.name} is already prepared in {folder}")
        return
    if arguments.name == "imagenet2012":
        if not (arguments.train and arguments.val):
            raise UserError(f"imagenet2012 is made from its two tars: {IMAGENET_COMMAND}")
        prepare_imagenet(arguments.train, arguments.val, data_dir)
    else:
        prepare(arguments.name, data_dir)
    print(f"{arguments.name} is prepared in {find_folder(data_dir, arguments.name)}")


if __name__ == "__main__":
    sys.exit(main())
