"""Commands that take weights from the official code and give them back.

``python -m evmamba_jax.weights convert --model evmamba_t --torch FILE --out DIR``
``python -m evmamba_jax.weights export --model evmamba_t --checkpoint DIR --out FILE.safetensors``
``python -m evmamba_jax.weights convert --model upernet:vmamba_t --torch FILE.pth --out DIR``
``python -m evmamba_jax.weights verify --data-dir DIR``
"""

import argparse
import ast
import importlib
import sys
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from evmamba_jax import cli
from evmamba_jax.checkpoints import save_model
from evmamba_jax.errors import UserError
from evmamba_jax.storage import local, written_whole
from evmamba_jax.weights.convert import to_torch
from evmamba_jax.weights.load import EMA_WORDS, Ema, Opened, Weights, is_composed, open_place

# These stand above this room: what evaluates, and what builds segmenters and detectors.
_VERIFY, _OPENING = "evmamba_jax.verify", "evmamba_jax.tasks.opening"
_PLACES = "official weights, a converted model, a training run, or one of its checkpoints"


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.weights") -> int:
    """Run the command with ``argv``; return the exit code, 2 for a user's mistake."""
    shared = cli.Parser(add_help=False)
    shared.add_argument(
        "--model",
        default="",
        metavar="NAME",
        help="e.g. evmamba_t, upernet:vmamba_t or retinanet:evmamba_t; not needed for a folder that names it",
    )
    shared.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the model that is not as the folder says or else as published; may be repeated. Of a model "
        "with heads those of its backbone are backbone.NAME, and those of its data data.NAME: data.scale=(2560,640)",
    )
    shared.add_argument(
        "--ema",
        choices=EMA_WORDS,
        default="better",
        help="whether to take a run's moving average (default: where its evaluation found it better)",
    )
    parser = cli.Parser(prog=prog, description="Official weights for our models, and ours for theirs.")
    commands = parser.add_subparsers(dest="command", required=True)
    to_ours = commands.add_parser("convert", parents=[shared], help="make a checkpoint without training state")
    to_ours.add_argument("--torch", required=True, metavar="FILE_OR_DIR", help=_PLACES)
    to_ours.add_argument("--out", required=True, metavar="DIR", help="folder for the checkpoint, new or empty")
    to_ours.add_argument(
        "--key", metavar="KEY", help="entry of an official file to take, e.g. model_ema (default: the weights)"
    )
    to_theirs = commands.add_parser("export", parents=[shared], help="make a safetensors file for the official code")
    to_theirs.add_argument("--checkpoint", required=True, metavar="FILE_OR_DIR", help=_PLACES)
    to_theirs.add_argument("--out", required=True, metavar="FILE", help="the .safetensors file, new")
    commands.add_parser("verify", add_help=False, help="count what released classifiers get right on ImageNet")
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["verify"]:
        return importlib.import_module(_VERIFY).main(arguments[1:], prog=f"{prog} verify")
    return cli.main(lambda: _run(parser.parse_args(arguments)))


def _run(args: argparse.Namespace) -> None:
    options, ema = dict(map(_option, args.option)), EMA_WORDS[args.ema]
    if args.command == "convert":
        weights = convert_file(args.torch, args.model, args.out, key=args.key, ema=ema, **options)
        print(f"weights: {weights.taken}")
        print(f"{args.out}: {args.model or weights.meta['model']} with these weights")
    else:
        weights = export_file(args.checkpoint, args.model, args.out, ema=ema, **options)
        print(f"weights: {weights.taken}")
        print(f"{args.out}: these weights under the official names")


def _option(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE; the value as Python writes it, or else as a word."""
    name, separator, value = text.partition("=")
    if not separator:
        raise UserError(f"--option {text!r} must be NAME=VALUE, e.g. num_classes=10")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def convert_file(
    place: str | PathLike[str],
    model_name: str,
    out: str | PathLike[str],
    *,
    key: str | None = None,
    ema: Ema = "better",
    **options: Any,
) -> Weights:
    """Write weights as an orbax checkpoint for ``create_model(model_name, pretrained=out)``; return what was taken.

    The folder of a segmenter or detector also has a configuration as a run's, so that ``predict`` takes it.

    Args:
        place: as for :func:`evmamba_jax.weights.load_weights`; a run gives a checkpoint without its training state.
        model_name: one of :func:`evmamba_jax.list_models`, or with heads before it, as "upernet:vmamba_t"; not needed
            for a folder that names it.
        out: folder for the checkpoint; new or empty.
        key: the entry of an official file to take, as for :func:`load_torch_file`.
        ema: as for :func:`load_weights`.
        **options: of the model; the place's own and the published ones hold for the rest. Of a model with heads see
            :func:`evmamba_jax.tasks.opening.open_composed`.

    Raises:
        UserError: ``out`` holds something already; otherwise as ``open_model``.
    """
    folder = local(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{str(out)!r} exists and is not an empty folder; name a new folder for the checkpoint")
    opened = _open(place, model_name, ema=ema, key=key, **options)
    weights = opened.weights
    of_run = {name: weights.meta[name] for name in ("num_classes", "class_names", "config") if name in weights.meta}
    origin = {"converted_from": Path(weights.place).name, "key": key}
    meta = {"model": opened.name, "options": opened.options, **of_run, **origin}
    save_model(folder, params=weights.params, batch_stats=weights.batch_stats, meta=meta)
    return weights


def export_file(
    place: str | PathLike[str], model_name: str, out: str | PathLike[str], *, ema: Ema = "better", **options: Any
) -> Weights:
    """Write weights as a .safetensors file whose names the official code loads; return what was taken.

    Args:
        place: as for :func:`evmamba_jax.weights.load_weights`.
        model_name: as for ``convert_file``.
        out: the file; must not exist.
        ema: as for :func:`load_weights`.
        **options: as for ``convert_file``.

    Raises:
        UserError: ``out`` exists or does not end in .safetensors; otherwise as ``open_model``.
    """
    path = local(out)
    if path.suffix != ".safetensors":
        raise UserError(f"{str(out)!r} must end in .safetensors, the one kind of file that is written")
    if path.exists():
        raise UserError(f"{str(out)!r} exists; name a new file")
    opened = _open(place, model_name, ema=ema, **options)
    with written_whole(path) as beside:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: np.ascontiguousarray(array) for name, array in to_torch(opened.model).items()}, beside)
    return opened.weights


def _open(place: str | PathLike[str], name: str, **how: Any) -> Opened:
    """Build the model of a place, with heads or without; errors as ``open_place``."""
    if not is_composed(place, name):
        return open_place(place, name, **how)
    opened = importlib.import_module(_OPENING).open_composed(place, name, **how)
    return Opened(opened.model, opened.name, {}, opened.weights)


if __name__ == "__main__":
    sys.exit(main())
