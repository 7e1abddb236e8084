from __future__ import annotations

import pytest

from runtime import cli


def call(*args: object) -> int:
    """Run the command line in this process; its exit status."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(arg) for arg in args])
    return int(stop.value.code or 0)
