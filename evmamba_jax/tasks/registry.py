"""Tasks by the names that ``config.task`` gives them."""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

from evmamba_jax.config import Config
from evmamba_jax.errors import UserError, nearest
from evmamba_jax.tasks.base import Task

_TASKS: dict[str, type[Task]] = {}
_NO_TASKS = {"base", "composed", "opening", "registry"}  # files of this folder


def register(name: str) -> Callable[[type[Task]], type[Task]]:
    """Enter the decorated class as the task of a name; a file of this folder enters one under its own name."""

    def enter(kind: type[Task]) -> type[Task]:
        _TASKS[name] = kind
        return kind

    return enter


def kind_of(name: str) -> type[Task]:
    """Return the task of a name; raises a UserError for an unknown one."""
    files = {module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])} - _NO_TASKS
    if name in files - _TASKS.keys():  # a task's own libraries are loaded with it, not with every other
        importlib.import_module(f"evmamba_jax.tasks.{name}")
    if name not in _TASKS:
        known = sorted(files | _TASKS.keys())
        raise UserError(f"config.task is {name!r}{nearest(name, known)}; allowed: {', '.join(known)}")
    return _TASKS[name]


def task_of(config: Config) -> type[Task]:
    """Return the task that a configuration names, after both have checked the configuration.

    Raises:
        UserError: an unknown task, or a value that cannot be.
    """
    config.validate()
    kind = kind_of(config.task)
    kind.validate(config)
    return kind
