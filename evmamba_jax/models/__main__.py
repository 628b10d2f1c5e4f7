"""Command: ``python -m evmamba_jax.models [NAME|PATTERN ...]`` prints the models' cards."""

import argparse
import dataclasses
import sys
import textwrap

from evmamba_jax import cli
from evmamba_jax.models.registry import VARIANTS, ModelCard, list_models, model_card

_TITLES = ("model", "parameters", "FLOPs", "published", "top-1", "input", "crop", "licence", "source of the weights")
_NUMBERS = _TITLES[1:7]


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.models") -> int:
    """Run the command with ``argv``; return the exit code, 2 for a user's mistake."""
    parser = cli.Parser(
        prog=prog,
        description="Parameters, multiply-adds, published accuracy, and source and licence of the official weights.",
    )
    parser.add_argument("models", nargs="*", metavar="NAME|PATTERN", help="e.g. vmamba_t, or 'vmamba*' (default: all)")
    parser.add_argument("--markdown", action="store_true", help="the README's table, in the order of the families")
    return cli.main(lambda: _print_cards(parser.parse_args(argv)))


def _print_cards(options: argparse.Namespace) -> None:
    models = options.models
    # What matches nothing is taken for a name, and refused as one.
    cards = [model_card(name) for given in models or ["*"] for name in list_models(given) or [given]]
    if options.markdown:
        print(markdown([variant.card for variant in VARIANTS.values() if variant.card and variant.card in cards]))
        return
    print(card_text(cards[0]) if models == [cards[0].name] else table(list(dict.fromkeys(cards))))


def table(cards: list[ModelCard]) -> str:
    """Return the cards as lines, one a model, with aligned columns, and below them how images are normalised."""
    rows = [_TITLES, *map(_row, cards)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            text.rjust(width) if title in _NUMBERS else text.ljust(width)
            for title, text, width in zip(_TITLES, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    ways = dict.fromkeys((card.mean, card.std, card.interpolation) for card in cards)
    return "\n".join([*lines, "", *(f"normalisation: mean {m}, std {s}; {i} resizing" for m, s, i in ways)])


def markdown(cards: list[ModelCard]) -> str:
    """Return the table of the README."""
    head = ["| model | parameters | FLOPs | published top-1, ImageNet-1K | input |", "|---|---|---|---|---|"]
    rows = [
        f"| `{card.name}` | {card.parameters:,} | {card.flops / 1e9:.2f} G | {card.top1} "
        f"| {card.input_size[0]}x{card.input_size[1]} |"
        for card in cards
    ]
    return "\n".join([*head, *rows])


def card_text(card: ModelCard) -> str:
    """Return a card with all that it says, one line a field."""
    lines = []
    for field in dataclasses.fields(card):
        value = getattr(card, field.name)
        if value is None or value == "":
            continue
        if isinstance(value, tuple):
            text = "x".join(map(str, value)) if field.name == "input_size" else ", ".join(map(str, value))
        elif field.name == "paper":
            text = f"https://arxiv.org/abs/{value}"
        elif isinstance(value, float | int) and value > 1000:
            text = f"{value:,.0f}"
        else:
            text = str(value)
        hanging = " " * 18
        title = field.name.replace("_", " ").ljust(len(hanging))
        lines.append(textwrap.fill(title + text, 120, subsequent_indent=hanging, break_on_hyphens=False))
    return "\n".join(lines)


def _row(card: ModelCard) -> tuple[str, ...]:
    published = "" if card.published_flops is None else _giga(card.published_flops, 1)
    return (
        card.name,
        f"{card.parameters / 1e6:.2f}M",
        _giga(card.flops, 2),
        published,
        f"{card.top1:.1f}",
        "x".join(map(str, card.input_size)),
        f"{card.crop:g}",
        card.licence,
        card.source,
    )


def _giga(flops: float, digits: int) -> str:
    return f"{flops / 1e9:.{digits}f}G"


if __name__ == "__main__":
    sys.exit(main())
