"""How every command ends: its exit code, and one line where something is wrong."""

import sys
from collections.abc import Callable

from evmamba_jax.errors import UserError


def main(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code.

    Returns:
        What ``command`` returns (None is 0); 2 for a user's mistake, told as ``error: ...``; 130 after Ctrl-C, told as
        ``interrupted``. A ``SystemExit``, such as argparse's, goes its way.
    """
    try:
        return command() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
