"""Processes that answer requests, a line of JSON each: sides of a comparison that need an environment each."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evmamba_jax.errors import UserError


class Server:
    """A process that answers.

    Args:
        command: its program and arguments; it reads requests from its input and prints its replies, a line each.
        environment: variables of the process.

    Raises:
        UserError: there is no such program.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
        pipe = subprocess.PIPE
        self._command = " ".join(command)
        try:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=dict(environment))
        except OSError as error:
            raise UserError(f"{command[0]} cannot be run: {error.strerror}") from error

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the reply to a request.

        Raises:
            UserError: the process has ended, or what it prints is no reply.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UserError(f"{self._command} has stopped with code {self.process.wait()}; any message stands above")
        try:
            return json.loads(line)
        except ValueError as error:
            raise UserError(f"{self._command} answered {line.strip()[:80]!r}, which is no JSON") from error

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def answer(reply: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer requests until the input ends. ``reply`` may print: what it prints goes to the errors."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(reply(json.loads(line))), file=replies, flush=True)
