"""What a task is: all that the loop, the step, checkpoints and preflight do not know.

A task says which model there is and what weights it may start from; how records become examples (on the host) and
batches inputs (on the device); the loss; the sums of an evaluation, the metrics made of them, and which of these
chooses the best checkpoint; and what is drawn for the reader. Everything else is written once, for all tasks.
"""

import abc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from evmamba_jax.arrays import Variables
from evmamba_jax.config import Config
from evmamba_jax.data import sources
from evmamba_jax.data.readers import Reader
from evmamba_jax.errors import UserError
from evmamba_jax.reports.page import Section
from evmamba_jax.weights import Weights
from evmamba_jax.weights.load import Ema

Batch = Mapping[str, jax.Array]


class Figure(NamedTuple):
    """The metric by which checkpoints are compared.

    Attributes:
        name: as :meth:`Task.metrics` has it.
        higher: whether more is better.
        title: over its curve, with the unit.
    """

    name: str
    higher: bool
    title: str


class Moment(NamedTuple):
    """When in a run a loss is computed.

    Attributes:
        step: int32, updates made.
        steps_per_epoch: turns a ``Duration`` into steps.
        averaged: returns the moving average as a model in evaluation mode; None in a run without one.
    """

    step: jax.Array
    steps_per_epoch: int
    averaged: Callable[[], Any] | None


class Collector(abc.ABC):
    """What an evaluation keeps on the host, example by example: for pictures, or for metrics that are no sums."""

    @abc.abstractmethod
    def add(self, rows: Mapping[str, np.ndarray], answers: Any, own: slice) -> None:
        """Note one batch.

        Args:
            rows: this process's examples as the loader gives them; ``weight`` is 0 where one does not count.
            answers: what :meth:`Task.evaluate` answered for the examples of all processes, as NumPy arrays.
            own: the place of ``rows`` among them.
        """


class Task(abc.ABC):
    """One task of one configuration.

    Args:
        config: the run's.
        class_names: of the data set, in label order.

    Attributes:
        model: the model in evaluation mode, its arrays of shapes only.
        chooses: the figure that chooses the best checkpoint.
        parts: names of the loss's parts that :meth:`loss` returns and the log shows.
        head: pattern of the paths of the parameters that tell this task's answers from features.

    Raises:
        UserError: a model or image size that cannot be; class weights of another length.
    """

    chooses: Figure
    parts: tuple[str, ...] = ()
    head: str = "head.*"

    def __init__(self, config: Config, class_names: Sequence[str]):
        given = config.loss.class_weights
        if given and len(given) != len(class_names):
            raise UserError(
                f"config.loss.class_weights has {len(given)} numbers, and {config.data.name} has {len(class_names)} "
                "classes: give one a class, in label order"
            )
        self.config = config
        self.class_names = tuple(class_names)
        self.model = self.abstract_model()

    # The configuration.

    @classmethod  # noqa: B027
    def validate(cls, config: Config) -> None:
        """Raise a UserError for values that this task cannot work with, before anything is loaded."""

    def check_lengths(self, *, total_steps: int, steps_per_epoch: int) -> None:  # noqa: B027
        """Raise a UserError for lengths in the configuration that do not fit the run's."""

    # The model.

    @abc.abstractmethod
    def abstract_model(self) -> Any:
        """Return the model as an NNX module in evaluation mode, with ``jax.ShapeDtypeStruct`` for every array."""

    @abc.abstractmethod
    def build_model(self) -> Any:
        """Return the model with initial values drawn from ``config.seed``, the same on every process."""

    @abc.abstractmethod
    def load(self, place: str | os.PathLike[str], *, ema: Ema = "better") -> Weights:
        """Return the weights that a file or folder has for this model.

        Args:
            place: what ``config.init_from`` may name, or a work folder.
            ema: False takes the parameters of a run, True their moving average, "better" whichever was found better.

        Raises:
            UserError: nothing is there, or it does not fit.
        """

    def extra(self, model: Variables) -> dict[str, Any]:
        """Return the further items that the train state starts with, arrays by name."""
        return {}

    def meta(self) -> dict[str, Any]:
        """Return what checkpoints say of the task, so that its model can be built again."""
        return {"num_classes": len(self.class_names), "class_names": self.class_names}

    # The data.

    @classmethod
    def describe(cls, config: Config) -> sources.Description:
        """Return classes and size of the data without opening them, for the preflight check."""
        return sources.describe(config.data)

    @classmethod
    def open_source(cls, config: Config, split: str, work: Path | None = None) -> Any:
        """Open a split: a :class:`evmamba_jax.data.sources.Split` that also has ``class_names``.

        Where the source has ``findings``, lines about its data, a run prints them before it begins; its
        ``fingerprint``, if it has one, tells other data from these. ``work`` is where it may keep what it found.
        """
        return sources.open_source(config.data, split, work)

    @abc.abstractmethod
    def reader(self) -> Reader:
        """Return what makes examples of records, on the host."""

    def see(self, source: Any) -> None:  # noqa: B027
        """Note what the loss needs to know of the training split, before the step is traced."""

    def see_evaluated(self, source: Any) -> None:  # noqa: B027
        """Note the split that evaluations read, before the first of them, for collectors that look up its records."""

    # Training, traced into the step.

    @abc.abstractmethod
    def inputs(self, key: jax.Array, batch: Batch) -> Any:
        """Return what the loss takes of a batch: the device part of the augmentation.

        Args:
            key: of this step.
            batch: stacked examples for training; the same global batch on any mesh.

        Returns:
            A pytree of arrays whose first axis is the batch's.
        """

    @abc.abstractmethod
    def loss(self, model: Any, inputs: Any, key: jax.Array, moment: Moment) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the mean loss of some rows of the inputs, and its parts by the names in ``parts``.

        Args:
            model: in training mode; its batch statistics may change.
            inputs: these rows of what :meth:`inputs` returned.
            key: of these rows.
            moment: when in the run this is.

        Returns:
            Scalars of float32.
        """

    # Evaluation.

    @abc.abstractmethod
    def evaluate(self, model: Any, batch: Batch, *, detailed: bool) -> tuple[dict[str, Any], Any]:
        """Return sums and answers for a batch; traced.

        Args:
            model: in evaluation mode.
            batch: stacked examples for evaluation, with ``weight``, 0 where one does not count.
            detailed: also sum what :meth:`tables` needs.

        Returns:
            Arrays by name, which are added over all batches (``examples`` and ``corrupt`` come with them); and a pytree
            of arrays whose first axis is the batch's, for collectors.
        """

    def eval_batch(self, devices: int) -> int:
        """Return how many examples are evaluated at a time, on so many devices."""
        return self.config.batch_size

    def collector(self, *, pictures: bool) -> Collector | None:
        """Return what notes answers on the host, anew for each evaluation of each set of weights; None for nothing.

        Args:
            pictures: whether :meth:`pictures` will be called.
        """
        return None

    @abc.abstractmethod
    def metrics(self, sums: Mapping[str, Any], collector: Collector | None) -> dict[str, float]:
        """Return the figures of an evaluation by name.

        Args:
            sums: over all examples, NumPy arrays; ``examples`` is how many count.
            collector: after the last batch.
        """

    # For the reader.

    @abc.abstractmethod
    def told(self, figures: Mapping[str, float]) -> str:
        """Return an evaluation's figures in words; names of the moving average's begin with ``ema_``."""

    def sections(self, collector: Collector, whose: str) -> list[Section]:
        """Return what report.html says of the last evaluation, of the weights that ``whose`` names."""
        return []

    def pictures(self, folder: Path, collector: Collector) -> None:  # noqa: B027
        """Draw what the last evaluation of a run collected, of the better of parameters and moving average."""

    def tables(
        self, folder: Path, sums: Mapping[str, Any], collectors: Mapping[str, Any], best: str, whose: str, source: Any
    ) -> list[str]:
        """Write what an evaluation alone leaves in its folder.

        Args:
            folder: the work folder.
            sums: of ``model`` and, where there is one, ``ema``, with all details.
            collectors: of the same.
            best: which of these was found better.
            whose: the weights in words.
            source: the split that was evaluated.

        Returns:
            The names of the files.
        """
        return []
