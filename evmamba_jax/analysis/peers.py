"""Models of other libraries beside ours: the process that measures them, and its mistakes in one line."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evmamba_jax.analysis.speed import OutOfMemory
from evmamba_jax.errors import UserError
from evmamba_jax.measuring.servers import Server

WORKER = Path(__file__).with_name("peer.py")
_MAKE = "python -m venv peers && peers/bin/python -m pip install torch torchvision timm makes an environment"


class Peers:
    """The models of another environment, in a process that sleeps while ours measures.

    Args:
        python: the interpreter of that environment.
        models: ``timm:NAME``, or ``official:FOLDER:NAME``.
        threads: that it computes with on a CPU.
        device: "cpu" or "cuda".
        worker: the program that answers; see :mod:`evmamba_jax.analysis.peer`.

    Attributes:
        versions: of Python and its packages there.

    Raises:
        UserError: no such Python, an environment without torch or timm, an unknown model.
    """

    def __init__(self, python: str, models: Sequence[str], *, threads: int, device: str, worker: Path = WORKER):
        for model in models:
            kind, _, name = model.partition(":")
            if kind not in ("timm", "official") or not name:
                raise UserError(f"--peers {model}: give timm:NAME, or official:FOLDER:NAME")
        self._python, self._worker = python, worker
        self._greeting = {"threads": threads, "device": device}
        self._server: Server | None = None
        try:
            self.versions: dict[str, str] = self._ask(do="hello", **self._greeting)["versions"]
            for model in models:
                self._ask(do="check", model=model)
        except UserError:
            self.close()
            raise

    def load(self, model: str, **case: Any) -> int | None:
        """Build a model there and make a step; return the bytes of its peak, None on a CPU, where torch tells none.

        Args:
            model: as the class takes it.
            **case: batch, size, dtype and mode.

        Raises:
            OutOfMemory: there is not enough; a process that died of it starts again with the next model.
            UserError: it cannot be built.
        """
        return self._ask(do="load", model=model, **case)["bytes"]

    def measure(self, model: str, steps: int) -> float:
        """Return the mean seconds of so many steps of a loaded model; errors as for :meth:`load`."""
        return self._ask(do="time", model=model, steps=steps)["seconds"]

    def cost(self, model: str, steps: int) -> dict[str, float]:
        """Return what a step costs, as :func:`evmamba_jax.analysis.peer.cost_of` tells; errors as for :meth:`load`."""
        return self._ask(do="cost", model=model, steps=steps)

    def drop(self) -> None:
        """Forget the models that are loaded."""
        if self._server:
            self._ask(do="drop")

    def close(self) -> None:
        """End the process."""
        if self._server:
            self._server.process.kill()  # it keeps nothing, and may be in the middle of a long step
            self._server.close()
            self._server = None

    def _ask(self, **request: Any) -> dict[str, Any]:
        server = self._server or self._start()
        try:
            answer = server.ask(**request)
        except UserError as error:
            self.close()
            if request["do"] in ("hello", "check"):
                raise UserError(f"--peer-python {self._python} does not answer as Python does: {error}") from error
            raise OutOfMemory("its process ended, as where memory runs out") from error
        if "error" in answer:
            if answer["kind"] == "memory":
                raise OutOfMemory("out of memory")
            if answer["kind"] == "environment":
                raise UserError(f"--peer-python {self._python}: {answer['error']}; {_MAKE}")
            raise UserError(f"--peers {request['model']}: {answer['error']}")
        return answer

    def _start(self) -> Server:
        # What stands in these is of this environment, not of the other.
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        try:
            self._server = Server([self._python, str(self._worker)], variables)
        except UserError as error:
            raise UserError(f"--peer-python: {error}") from error
        if hasattr(self, "versions"):  # it has died and starts again
            self._ask(do="hello", **self._greeting)
        return self._server
