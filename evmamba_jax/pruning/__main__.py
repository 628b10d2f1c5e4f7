"""``python -m evmamba_jax.pruning cut --from RUN --out DIR``: take channels that are zero out of a model.

Prints what that saves, parameters and multiply-adds, the images a second of both models on this machine, and how far
their logits differ; writes nothing where they differ by more than 1e-4 of their rms.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evmamba_jax import cli
from evmamba_jax.arrays import split
from evmamba_jax.checkpoints import save_model
from evmamba_jax.counting import count_flops, count_parameters
from evmamba_jax.errors import UserError
from evmamba_jax.models.registry import input_size
from evmamba_jax.pruning.groups import channels, cut, zero_channels
from evmamba_jax.storage import local
from evmamba_jax.weights.load import EMA_WORDS, open_place

_LIMIT = 1e-4  # of the rms of the logits
_ROUNDS = 5


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.pruning") -> int:
    """Run the command with ``argv``; return the exit code, 2 for a user's mistake."""
    parser = cli.Parser(prog=prog, description="Sparse models made small.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("cut", help="take channels that are zero out of a model")
    command.add_argument("--from", dest="place", required=True, metavar="DIR", help="a run, or one of its checkpoints")
    command.add_argument("--out", required=True, metavar="DIR", help="folder for the smaller model, new or empty")
    command.add_argument("--ema", choices=EMA_WORDS, default="better", help="whether to take the moving average")
    command.add_argument("--image-size", type=int, metavar="N", help="side of the images to compare with (the run's)")
    command.add_argument("--batch-size", type=int, default=8, metavar="N", help="and how many (8)")
    return cli.main(lambda: _cut(parser.parse_args(argv)))


def _cut(args: argparse.Namespace) -> None:
    out: Path = local(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{args.out!r} exists and is not an empty folder; name a new folder for the smaller model")
    opened = open_place(args.place, ema=EMA_WORDS[args.ema])
    masks = zero_channels(split(opened.model).params, channels(opened.model))
    if not masks:
        raise UserError(
            f"{args.place} has no channel whose weights are all zero: train it with "
            "config.pruning.structure=channels; zeros among other weights cannot be cut out"
        )
    smaller = cut(opened.model, masks)
    meta = opened.weights.meta
    size = args.image_size or meta.get("config", {}).get("data", {}).get("image_size") or input_size(opened.name)[0]
    images = np.random.default_rng(0).standard_normal((args.batch_size, size, size, opened.model.in_channels))
    whole, small = (_measured(model, jnp.asarray(images, jnp.float32)) for model in (opened.model, smaller))
    apart = float(np.abs(whole[0] - small[0]).max() / np.sqrt((whole[0] ** 2).mean()))
    print(f"weights: {opened.weights.taken}")
    print(f"{'':<10}{'parameters':>14}{'multiply-adds':>16}{'images/s':>12}   on {jax.devices()[0].device_kind}")
    for word, model, (_, speed) in (("before", opened.model, whole), ("cut", smaller, small)):
        print(f"{word:<10}{count_parameters(model):>14,}{count_flops(model, size):>16,}{speed:>12.1f}")
    print(f"the logits of {args.batch_size} random images of {size} pixels differ by {apart:.1e} of their rms at most")
    if not apart <= _LIMIT:
        raise UserError(f"the logits differ by {apart:.1e} of their rms, more than {_LIMIT:g}: nothing was written")
    of_run = {name: meta[name] for name in ("num_classes", "class_names", "config") if name in meta}
    about = {"model": opened.name, "options": opened.options | {"inner": smaller.config.inner}, **of_run}
    _, params, stats = split(smaller)
    save_model(out, params=params, batch_stats=stats, meta=about)
    print(f"{args.out}: the smaller model")


def _measured(model: Any, images: jax.Array) -> tuple[np.ndarray, float]:
    """Return logits, and images a second, the best of some rounds."""
    forward = jax.jit(lambda x: model(x))
    logits = np.asarray(forward(images))
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(forward(images))
        seconds.append(time.perf_counter() - start)
    return logits, len(images) / min(seconds)


if __name__ == "__main__":
    sys.exit(main())
