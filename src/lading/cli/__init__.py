"""Run lading from a shell: one sub-command per file of this folder.

Knows the parser and the exit codes only; each command file adds its own arguments and imports what it needs when it
runs, so that ``lading inspect`` never waits for torch. Exit codes: 0 done, 1 refused (the error is printed on standard
error in one paragraph), 2 wrong usage or no room for a plan, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lading.cli import capture, embed, generate, inspect, plan, search
from lading.errors import LadingError, printable

_COMMANDS = (inspect, plan, generate, embed, search, capture)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the command, return its exit code."""
    parser = argparse.ArgumentParser(prog="lading", description="Load, place and run PyTorch models that do not fit.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except LadingError as error:
        print(f"lading {arguments.command}: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"lading {arguments.command}: interrupted", file=sys.stderr)
        return 130
    return code
