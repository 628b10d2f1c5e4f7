"""The command line of a training: a config, values to replace in it, a work folder."""

import dataclasses
import operator
import typing
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from evmamba_jax import packaged
from evmamba_jax.config import Config
from evmamba_jax.errors import UserError, nearest


def parse_command(argv: list[str]) -> tuple[Config, Path]:
    """Read ``--config NAME|FILE[:VARIANT] --config.NAME=VALUE ... --workdir DIR``.

    Args:
        argv: the program's name and its arguments.

    Returns:
        The configuration, and the work folder (``runs/`` + the file's name and variant when not given).

    Raises:
        UserError: an unknown flag, name or variant, a value of the wrong type, a file that cannot be loaded.
    """
    argv = _with_file(argv)
    without_overrides = [argument for argument in argv if not _is_override(argument)]
    config, *_ = _parse(without_overrides)  # a task may have a Config with further fields
    _check_names(argv, type(config))
    argv, unset = _without_nones(argv, type(config))
    config, workdir, rest = _parse(_with_words(argv, type(config)))
    for name in unset:
        part, _, field = name.rpartition(".")
        setattr(operator.attrgetter(part)(config) if part else config, field, None)
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; options look like --config.optim.lr=1e-3, see --help")
    return config, workdir


def _parse(argv: list[str]) -> tuple[Config, Path, list[str]]:
    """Return the configuration, the work folder and the arguments that no flag takes."""
    values = flags.FlagValues()
    file = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    workdir = flags.DEFINE_string("workdir", None, "work folder", flag_values=values)
    try:
        rest = values(argv)[1:]
        name = config_flags.get_config_filename(values["config"]) if values["config"].present else ""
        if not name:
            raise UserError(f"--config (not given): name a file or one of {', '.join(packaged.names())}; see --help")
        flags.FLAGS.mark_as_parsed()  # grain reads absl's global flags
        config = file.value
    except Exception as error:  # absl's own kinds, and whatever the user's file raises, which absl wraps in a traceback
        raise UserError(_in_one_line(error)) from error
    if not isinstance(config, Config):
        raise UserError(f"--config {name}: get_config() returned a {type(config).__name__}; it must return a Config")
    return config, Path(workdir.value or Path("runs") / Path(name.replace(".py:", "_")).stem), rest


def settings(config: Config) -> list[str]:
    """Return every value of a config as the argument that would set it."""
    values = {name: operator.attrgetter(name)(config) for name, kind in _fields(type(config)) if not _has_parts(kind)}
    written = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else value  # noqa: E731
    return [f"--config.{name}={written(value)}" for name, value in values.items()]


def _with_file(argv: list[str]) -> list[str]:
    """Put the file in the place of the name of a packaged config."""
    given = list(argv)
    for place, argument in enumerate(given):
        option, equals, value = argument.partition("=")
        if option in ("--config", "-config"):
            if equals:
                given[place] = f"{option}={packaged.find(value)}"
            elif place + 1 < len(given):
                given[place + 1] = packaged.find(given[place + 1])
    return given


def _with_words(argv: list[str], kind: type[Config]) -> list[str]:
    """Put several words, ``a,b``, as Python writes them, which is what absl reads."""
    words = {name for name, field in _fields(kind) if field == tuple[str, ...]}
    given = []
    for argument in argv:
        option, equals, value = argument.partition("=")
        if equals and _is_override(argument) and option.lstrip("-").removeprefix("config.") in words:
            argument = f"{option}={tuple(word.strip() for word in value.split(',') if word.strip())!r}"
        given.append(argument)
    return given


def _without_nones(argv: list[str], kind: type[Config]) -> tuple[list[str], list[str]]:
    """Return the arguments without those that set a field to None, which absl cannot read; and these fields' names."""
    optional = {f"--config.{name}=None": name for name, field in _fields(kind) if type(None) in typing.get_args(field)}
    unset = [argument for argument in argv if argument in optional]
    return [argument for argument in argv if argument not in unset], [optional[argument] for argument in unset]


def _is_override(argument: str) -> bool:
    return argument.startswith(("--config.", "-config."))


def _in_one_line(error: BaseException) -> str:
    if not isinstance(error, flags.Error) or "Traceback" in str(error):
        while error.__context__:
            error = error.__context__
    text = " ".join(str(error).split())
    understood = isinstance(error, UserError | flags.Error)
    return text if understood else f"--config cannot be loaded: {type(error).__name__}: {text}"


def _check_names(argv: list[str], kind: type[Config]) -> None:
    """Name the first override that no field answers to, and the nearest that does."""
    known = dict(_fields(kind))
    for argument in argv[1:]:
        if _is_override(argument):
            name = argument.lstrip("-").split("=", 1)[0].removeprefix("config.")
            if name not in known:
                part = name.rpartition(".")[0]
                beside = [key for key in known if part and key.startswith(f"{part}.")] or known
                raise UserError(
                    f"unknown config key {name!r}{nearest(name, beside)}; --help says where the names are listed"
                )
            if _has_parts(known[name]):
                inner = [key for key in known if key.startswith(name + ".")]
                hint = f"set its parts, e.g. --config.{inner[0]}=..." if inner else "change it in the config file"
                raise UserError(f"config key {name!r} cannot be set as a whole; {hint}")


def _has_parts(kind: type) -> bool:
    """Return whether a field cannot be set as a whole."""
    return typing.get_origin(kind) is dict or dataclasses.is_dataclass(kind)


def _fields(kind: type, prefix: str = "") -> typing.Iterator[tuple[str, type]]:
    for name, field in typing.get_type_hints(kind).items():
        yield prefix + name, field
        if dataclasses.is_dataclass(field):
            yield from _fields(typing.cast(type, field), f"{prefix}{name}.")
