"""Tasks: what the training loop does not know. One file a task."""

from evmamba_jax.tasks.base import Collector, Figure, Moment, Task
from evmamba_jax.tasks.registry import register, task_of

__all__ = ["Collector", "Figure", "Moment", "Task", "register", "task_of"]
