"""Released classifiers on ImageNet's 50,000 validation images, beside what is published of them.

    python -m evmamba_jax.verify --data-dir DIR
    python -m evmamba_jax.verify --data-dir DIR --models evmamba_t 'vim_*'

``evmamba weights verify`` is the same. Images are prepared as each model's card says. The images are counted in parts;
those that are done are kept in a file, so that the command, started again, goes on where it was.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from evmamba_jax import cli
from evmamba_jax.config import Config, ModelConfig
from evmamba_jax.data.config import resolve_data_dir
from evmamba_jax.data.pictures import kind_of
from evmamba_jax.errors import UserError, nearest
from evmamba_jax.models import list_models, model_card
from evmamba_jax.models.registry import ModelCard
from evmamba_jax.preprocessing import of_card
from evmamba_jax.storage import local, owned, storage_errors, written_whole
from evmamba_jax.tasks import task_of
from evmamba_jax.training import mesh as meshes
from evmamba_jax.training.evaluator import Evaluator

PARTS, TABLE = "parts.jsonl", "table.md"
IMAGES = 50_000  # that the published figures count


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.verify") -> int:
    """Run the command with ``argv``; return the exit code, 2 for a user's mistake or a model that was left out."""
    parser = cli.Parser(prog=prog, description="Count what released classifiers get right on ImageNet's validation.")
    parser.add_argument(
        "--data-dir",
        default="",
        metavar="DIR",
        help="holds imagenet2012 as TFDS prepares it, or val/CLASS/ (default: $TFDS_DATA_DIR, ~/tensorflow_datasets)",
    )
    parser.add_argument(
        "--models", nargs="+", default=["*"], metavar="NAME", help="names or patterns, e.g. 'vim_*' (default: all)"
    )
    parser.add_argument("--out", default="runs/verify", metavar="DIR", help=f"for {TABLE} and {PARTS} (runs/verify)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (64)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the models (float32)")
    parser.add_argument("--part", type=int, default=5000, metavar="N", help="images between two savings (5000)")
    return cli.main(lambda: _run(parser.parse_args(argv)))


def _run(args: Any) -> None:
    names = _chosen(args.models)
    for option in ("batch_size", "part"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} is {getattr(args, option)}; it must be 1 or more")
    data_dir, out = resolve_data_dir(args.data_dir), local(args.out)
    data = "imagenet2012" if (data_dir / "imagenet2012").is_dir() or not args.data_dir else kind_of(str(data_dir))
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    configs = []
    for name in names:
        about = dataclasses.replace(of_card(model_card(name)), name=data, data_dir=str(data_dir))
        model = ModelConfig(name=name, dtype=args.dtype)
        configs.append(Config(model=model, data=about, batch_size=args.batch_size, init_from="official"))
    mesh = meshes.make_mesh(configs[0])
    source = task_of(configs[0]).open_source(configs[0], configs[0].data.eval_split)
    rows: list[_Row] = []
    with owned(out):
        for name, config in zip(names, configs, strict=True):
            card = model_card(name)
            row = _Row(card)
            try:
                for row in _counted(config, card, source, mesh, out / PARTS, args.part):
                    print(f"{name}: {row.examples:,.0f} of {row.images:,} images, {row.told}", flush=True)
            except UserError as error:
                row = _Row(card, reason=str(error))
                print(f"{name}: left out: {error}", file=sys.stderr, flush=True)
            rows.append(row)
            _write(rows, out / TABLE)
    print(f"{out / TABLE}: published and found")
    if left := [row.card.name for row in rows if row.reason]:
        raise UserError(f"{len(left)} of {len(rows)} models were left out, the lines above say why: {', '.join(left)}")


def _chosen(patterns: list[str]) -> list[str]:
    names: list[str] = []
    for pattern in patterns:
        found = list_models(pattern)
        if not found:
            known = list_models()
            near = nearest(pattern, known)
            raise UserError(f"--models {pattern!r} is no model's name or pattern{near}; allowed: {', '.join(known)}")
        names += [name for name in found if name not in names]
    return names


@dataclasses.dataclass(frozen=True)
class _Row:
    """What was found of a model so far: ``top1`` and ``top5`` of ``examples`` among ``images``, in per cent."""

    card: ModelCard
    weights: str = ""
    images: int = 0
    examples: float = 0
    top1: float = 0
    top5: float = 0
    reason: str = ""

    @property
    def told(self) -> str:
        return f"top-1 {self.top1:.2f} % (published {self.card.top1:g}), top-5 {self.top5:.2f} %"


def _counted(config: Config, card: ModelCard, source: Any, mesh: Mesh, kept: Path, length: int) -> Iterator[_Row]:
    """Yield the row of a model after each part of the images; parts that are kept are not counted again."""
    task = task_of(config)(config, source.class_names)
    weights = task.load(config.init_from, ema=False)
    with open(weights.place, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    evaluator, variables = Evaluator(task, mesh, source), None
    same = {"model": card.name, "weights": digest, "dtype": config.model.dtype, "data": _facts(source)}
    row = _Row(card, weights.place, len(source))
    for start in range(0, len(source), length):
        stop = min(start + length, len(source))
        part = same | {"start": start, "stop": stop}
        found = _found(kept, part)
        if found is None:
            if variables is None:
                variables = jax.device_put(weights.variables, meshes.replicated(mesh))
            evaluator.source = _Part(source, start, stop)
            figures = evaluator(variables, None).figures
            found = {name: figures[name] for name in ("examples", "top1", "top5")}
            with storage_errors(kept.parent), kept.open("a") as lines:
                lines.write(json.dumps(part | found) + "\n")
        both = row.examples + found["examples"]
        shares = {n: (getattr(row, n) * row.examples + found[n] * found["examples"]) / both for n in ("top1", "top5")}
        row = dataclasses.replace(row, examples=both, **shares)
        yield row


def _facts(source: Any) -> list[Any]:
    return [source.name, source.split, len(source), getattr(source, "fingerprint", None)]


def _found(kept: Path, part: dict[str, Any]) -> dict[str, float] | None:
    """Return the figures of a part if a line has them; a line that was cut off is passed over."""
    for line in kept.read_text().splitlines() if kept.exists() else ():
        try:
            known = json.loads(line)
        except ValueError:
            continue
        if {name: known.get(name) for name in part} == part:
            return known
    return None


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some examples of a source in a row."""

    source: Any
    start: int
    stop: int

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def split(self) -> str:
        return f"{self.source.split}[{self.start}:{self.stop}]"

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Any:
        return self.source[self.start + index]


def _write(rows: list[_Row], path: Path) -> None:
    """Write the table anew."""
    lines = [
        "| model | top-1 published | found | difference | top-5 published | found | images | weights |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        card, top5 = row.card, "" if row.card.top5 is None else f"{row.card.top5:g}"
        if row.reason:
            lines.append(f"| {card.name} | {card.top1:g} | | | {top5} | | | left out: {row.reason} |")
            continue
        found = f"{row.top1:.3f} | {row.top1 - card.top1:+.3f} | {top5} | {row.top5:.3f}"
        lines.append(f"| {card.name} | {card.top1:g} | {found} | {row.examples:,.0f} | {Path(row.weights).name} |")
    others = {row.images for row in rows if not row.reason} - {IMAGES}
    if others:
        words = ", ".join(f"{count:,}" for count in sorted(others))
        lines += ["", f"Published figures are of {IMAGES:,} images; here there are {words}, so they do not compare."]
    with storage_errors(path.parent), written_whole(path) as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
