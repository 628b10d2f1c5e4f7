"""Iterative magnitude pruning: a run a level, each from an early state of the dense one with fewer weights.

The levels are runs like any other, in folders of their own: ``level_0``, the dense one, ``level_1``, and beside each
its controls, ``level_1_random`` and ``level_1_reinit``. What a level starts from is written as its first checkpoint,
so that a level that was killed is resumed as every run is, and one that has ended is not run again.

Sources: Frankle et al., Stabilizing the lottery ticket hypothesis (arXiv:1903.01611), for levels, rewinding and
controls; Renda et al. (arXiv:2003.02389) for ``reset="final"``, their rewinding of the learning rate. The folders are
open_lth's. Unlike there a rewound level takes over the optimizer's state too.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from evmamba_jax.checkpoints import Checkpoints
from evmamba_jax.reports.drawing import drawn
from evmamba_jax.reports.tickets import PICTURE, Ticket, draw_tickets, read_tickets, write_tickets
from evmamba_jax.reports.writer import Part
from evmamba_jax.storage import storage_errors
from evmamba_jax.training import loop
from evmamba_jax.training import mesh as meshes
from evmamba_jax.training.barrier import Line
from evmamba_jax.training.evaluator import Evaluator
from evmamba_jax.training.setup import Setup
from evmamba_jax.training.sparse import ITEM, rewind_step
from evmamba_jax.training.state import TrainState
from evmamba_jax.training.stopping import Stopped, Stopping


class Level(NamedTuple):
    """A run: its number, 0 for the dense one, and what it is besides the ticket itself."""

    number: int
    control: str = ""

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"level_{self.number}" + (f"_{self.control}" if self.control else "")


def train_levels(evaluator: Evaluator, setup: Setup, source: Any, workdir: Path) -> dict[str, float]:
    """Train all levels; return the figures of the last ticket.

    ``tickets.csv`` and ``tickets.png`` are written anew after each.

    Args:
        evaluator: of the run's task.
        setup: of the same task.
        source: the training split.
        workdir: the folder of all levels.
    """
    return Lottery(evaluator, setup, source, workdir).train()


class Lottery:
    """All levels of one work folder; arguments as :func:`train_levels` has them."""

    def __init__(self, evaluator: Evaluator, setup: Setup, source: Any, workdir: Path):
        self.evaluator, self.setup, self.source, self.workdir = evaluator, setup, source, workdir
        self.task, self.about = evaluator.task, evaluator.task.config.pruning
        self.start = rewind_step(evaluator.task.config, setup.in_steps)
        numbers, kinds = range(1, self.about.levels + 1), ("", *sorted(self.about.controls))
        self.levels = [Level(0), *(Level(number, control) for number in numbers for control in kinds)]
        self.line = Line(evaluator, setup, source)
        whole = meshes.replicated(setup.mesh)
        self.masks = jax.jit(lambda state: state.extra[ITEM]["masks"], out_shardings=whole)
        self.further = jax.jit(setup.sparse.further, out_shardings=whole)
        self.prune = jax.jit(setup.sparse.with_masks, out_shardings=setup.shardings)

    def train(self) -> dict[str, float]:
        """Train what has not ended; return the figures of the last ticket."""
        figures: dict[str, float] = {}
        with contextlib.ExitStack() as stack:
            loop.own(self.workdir, stack)
            tickets = {(ticket.level, ticket.control): ticket for ticket in read_tickets(self.workdir)}
            for place, level in enumerate(self.levels):
                folder = self.workdir / level.name
                self._minding(lambda level=level: self._begin(level))
                found = loop.train(
                    self.evaluator,
                    self.setup,
                    self.source,
                    folder,
                    keep_steps=(self.start,) if level.number == 0 else (),
                    part=self._part(place),
                )
                if not level.control:
                    figures = found
                if level not in tickets:
                    tickets[level] = self._minding(lambda level=level, found=found: self._ticket(level, found))
                    self._tell([tickets[one] for one in self.levels[: place + 1]])
        return figures

    def _minding(self, work: Any) -> Any:
        """Do what lies between two runs; a signal leaves it undone."""
        try:
            with Stopping() as stopping:
                return stopping.minding(work)
        except Stopped as stopped:
            if meshes.is_main():
                print(f"{stopped.signal.name}: nothing new to save in {self.workdir}; the same command goes on there")
            raise SystemExit(128 + stopped.signal) from None

    def _steps(self, level: Level) -> int:
        return self.setup.total_steps - (self.start if level.number and level.control != "reinit" else 0)

    def _part(self, place: int) -> Part:
        level = self.levels[place]
        begins = self.setup.total_steps - self._steps(level)  # its own count of steps does not begin at 0
        before, after = (sum(map(self._steps, levels)) for levels in (self.levels[:place], self.levels[place + 1 :]))
        words = f"level {level.number} of {self.about.levels}" + (f" ({level.control})" if level.control else "")
        return Part(words, before - begins, after)

    # What a level starts from.

    def _begin(self, level: Level) -> None:
        """Write the first checkpoint of a level, unless it has one."""
        if level.number == 0:
            return
        with Checkpoints(self.workdir / level.name / "checkpoints") as checkpoints:
            if not checkpoints.steps():
                state = self.first(level)
                step = int(state.step)
                checkpoints.save(step, state.items(), meta=loop.about(self.task, step, {}, None, self.source))

    def first(self, level: Level) -> TrainState:
        """Return the state from which a level starts; the levels before it have ended."""
        masks = self._masks(level)
        if level.control == "random":
            masks = self._shuffled(masks, level)
        if level.control == "reinit":
            return self.prune(self._other(level), masks)
        state = self._state(0, self.start)
        if self.about.reset == "final":
            late = self._state(level.number - 1)
            state = dataclasses.replace(state, model=late.model, ema=late.ema)
        return self.prune(state, masks)

    def _masks(self, level: Level) -> dict[str, np.ndarray]:
        """Return the ticket's masks, on this host."""
        late = self._state(level.number - 1)
        zeros = self.setup.sparse.zeros_further(jax.device_get(self.masks(late)), self.about.rate)
        return dict(jax.device_get(self.further(late, zeros)))

    def _shuffled(self, masks: dict[str, np.ndarray], level: Level) -> dict[str, np.ndarray]:
        """Return masks with as many zeros in each array, where chance has them."""
        rng = np.random.default_rng([self.task.config.seed, level.number])
        return {name: rng.permutation(masks[name].ravel()).reshape(masks[name].shape) for name in sorted(masks)}

    def _state(self, number: int, step: int | None = None) -> TrainState:
        """Return a ticket's state at a step, or its last."""
        abstract = self.setup.abstract_state.items()
        with Checkpoints(self.workdir / Level(number).name / "checkpoints") as checkpoints:
            if step is None:
                restored = checkpoints.restore(abstract)
                assert restored is not None  # the level has ended
                return TrainState.of_items(restored[1])
            return TrainState.of_items(checkpoints.restore_step(step, abstract))

    def _other(self, level: Level) -> TrainState:
        """Return a fresh state with other initial values."""
        config = dataclasses.replace(self.task.config, seed=self.task.config.seed + level.number, init_from="")
        task = type(self.task)(config, self.task.class_names)
        return Setup(task, self.setup.mesh, len(self.source)).first_state()

    # What a level found.

    def _ticket(self, level: Level, figures: dict[str, float]) -> Ticket:
        path = self.workdir / level.name / "checkpoints"
        with Checkpoints(path) as checkpoints:
            restored = checkpoints.restore(self.setup.abstract_state.items())
        assert restored is not None
        state = TrainState.of_items(restored[1])
        density = 1 - self.setup.sparse.figures(state)["sparsity"]
        ticket = Ticket(level.number, level.control, density, loop.best_of(self.task.chooses, figures))
        if level.number == 0 or level.control:
            return ticket
        return ticket._replace(barrier=self.line.barrier(self._state(level.number - 1).model, state.model))

    def _tell(self, tickets: list[Ticket]) -> None:
        if not meshes.is_main():
            return
        with storage_errors(self.workdir):
            write_tickets(self.workdir, tickets, self.task.chooses.name)
        drawn(PICTURE, lambda: draw_tickets(self.workdir, tickets, self.task.chooses.title))
        last = tickets[-1]
        barrier = f", barrier {last.barrier:.4f}" if last.barrier == last.barrier else ""
        print(
            f"{Level(last.level, last.control).name}: {100 * last.density:.2f} % of the weights are left, "
            f"{self.task.chooses.name} {last.figure:.2f}{barrier}; see {self.workdir / PICTURE}",
            flush=True,
        )
