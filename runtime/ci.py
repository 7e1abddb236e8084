"""Where a command's outcome goes: --junit, --markdown, --sarif, annotations; also where the command could not run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from runtime import files, outcome
from runtime.errors import PacklightError
from runtime.manifest import canonical
from runtime.outcome import Outcome

WRITERS: Mapping[str, Callable[[Outcome], str]] = MappingProxyType(
    {
        "--junit": outcome.junit,
        "--markdown": lambda told: told.page,
        "--sarif": lambda told: canonical(outcome.sarif(told)),
    }
)
COMMANDS = ("check", "compare", "eval", "export", "lint")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What was asked for: files by their flag, and whether a warning is a failure too."""

    places: Mapping[str, Path]
    strict: bool = False


def wanted(fail_on: str = "error", **places: Path | None) -> Wanted:
    """Refuse before the work what cannot be written after it.

    Args:
        fail_on: "error" or "warning".
        places: {junit, markdown, sarif: a file or None}.

    Raises:
        PacklightError: a place that cannot be written, another `fail_on`.
    """
    if fail_on not in ("error", "warning"):
        raise PacklightError("--fail-on", found=fail_on, expected="error or warning")
    named = {f"--{name}": place for name, place in places.items() if place is not None}
    for flag, place in named.items():
        files.require_file(place, flag)
    return Wanted(places=named, strict=fail_on == "warning")


def tell(told: Outcome, where: Wanted) -> int:
    """Write the outcome wherever it is wanted, annotate GitHub's job where this is one; the exit status."""
    held = outcome.strict(told) if where.strict else told
    for flag, place in where.places.items():
        files.write(place, WRITERS[flag](held), flag)
    if outcome.wants_annotations():
        sys.stderr.write(outcome.annotated(held))
    return held.status


def could_not_run(args: Sequence[str], said: str) -> None:
    """The same for a command line that ended early, maybe before its options were read: the files that it names are written.

    What cannot be written is left: the reason why the command ended is on stderr already.
    """
    command = next((each for each in args if not each.startswith("-")), "")
    if command not in COMMANDS:
        return
    rest = list(args)[list(args).index(command) + 1 :]
    subject = rest[0] if rest and not rest[0].startswith("-") else ""
    told = outcome.could_not_run(command, subject, said)
    for flag, writer in WRITERS.items():
        if (place := _given(rest, flag)) and not place.is_dir():
            try:
                files.write(place, writer(told), flag)
            except (PacklightError, ValueError):
                continue
    if outcome.wants_annotations():
        sys.stderr.write(outcome.annotated(told))


def _given(args: Sequence[str], flag: str) -> Path | None:
    """The file of `--flag FILE` or `--flag=FILE`."""
    for number, each in enumerate(args):
        if each == flag and number + 1 < len(args):
            return Path(args[number + 1])
        if each.startswith(f"{flag}=") and each != f"{flag}=":
            return Path(each.partition("=")[2])
    return None
