"""The ``offramp`` command; `main` is what the installed script calls."""

from __future__ import annotations

import sys

_EXTRA = ("click", "rich")


def main() -> None:
    """Run the command and leave the process with its exit code.

    0: done; 2: the user's input was at fault, said in one sentence on stderr; 130: interrupted; 1: a bug.
    """
    try:
        from offramp.cli.app import run  # noqa: PLC0415 - only here can a missing click be answered with a sentence
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        sys.stderr.write(
            f"offramp: the command needs {missing}: install it with `pip install offramp[cli]`\n"
        )
        sys.exit(2)
    sys.exit(run())
