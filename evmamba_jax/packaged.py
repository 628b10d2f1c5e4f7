"""The configs that come with the library, by name; nothing here imports JAX."""

import textwrap
from pathlib import Path

from evmamba_jax.errors import UserError, nearest


def folder() -> Path:
    """Return the folder of the configs: the wheel has them inside the package, a clone beside it."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """Return the names, e.g. ``digits``; after them those of files in folders below, ``folder/name``."""
    found = (path.relative_to(folder()).with_suffix("").as_posix() for path in folder().rglob("*.py"))
    return sorted(found, key=lambda name: ("/" in name, name))


def find(config: str) -> str:
    """Return the file, with the variant after a colon, that a value of ``--config`` stands for.

    Args:
        config: ``path.py`` or the name of a packaged config, either with ``:variant``.

    Raises:
        UserError: there is neither a packaged config nor a file of that name.
    """
    path, colon, variant = config.partition(".py:")
    is_file = bool(colon) or config.endswith(".py")
    if not is_file:
        path, colon, variant = config.partition(":")
    path = Path(path.removesuffix(".py") + ".py")
    name = path.with_suffix("").as_posix()
    if not is_file and name in names():
        path = folder() / path
    if not path.is_file():
        if is_file:
            raise UserError(f"--config {config}: there is no file {path}{nearest(path.stem, names())}; see --help")
        known = ", ".join(names())
        raise UserError(f"--config {config}: no packaged config is called so{nearest(name, names())}; allowed: {known}")
    return f"{path}{colon and ':'}{variant}"


def help_text() -> str:
    """Return what the help of a command says that takes ``--config``."""
    listed = textwrap.fill(", ".join(names()), 98, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return f"""\
configuration:
  --config NAME|FILE[:VARIANT]   a packaged config by its name, or a Python file with get_config()
  --config.KEY=VALUE             replace a value; `evmamba train --config NAME --help` lists all keys

packaged configs:
{listed}"""
