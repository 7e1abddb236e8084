"""The process that confined.run starts: take a limit of memory upon itself, then run the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Take the limit upon this process, and run the command line."""
    most = int(arguments[0])
    if most:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from runtime import cli

    cli.main(list(arguments[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
