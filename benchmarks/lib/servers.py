"""Sides of a comparison that need an environment each: processes that answer requests, a line of JSON each."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Server:
    """A process that answers.

    Args:
        python: its interpreter.
        script: what it runs, which calls :func:`answer`.
        side: what it is, and so the next: the arguments of ``--serve``.
        folder: where files are exchanged.
        environment: variables of the process.
    """

    def __init__(self, python: str, script: str, side: str, folder: Path, environment: Mapping[str, str]):
        command = [python, script, "--serve", side, str(folder)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=dict(environment))

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the reply to a request."""
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(self.process.args)} has stopped; its message stands above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def answer(reply: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer requests until the input ends. ``reply`` may print: what it prints goes to the errors."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(reply(json.loads(line))), file=replies, flush=True)
