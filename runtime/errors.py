"""Everything packlight raises on purpose: one tree, each error one line and the fields it was made of.

PacklightError
├─ BundleError      a bundle is missing, damaged, not to be trusted, or newer than this runtime
├─ InputError       an input has the wrong name, dtype or shape
├─ DriftExceeded    the budget is not met
├─ Interrupted      Ctrl-C, and what was kept
└─ RecipeError, TraceError, CalibrationError, QuantizeError     the exporter's, in exporter/errors.py

    try:
        runtime.check(runtime.load("build/lite0")).require()
    except runtime.DriftExceeded as error:
        print(error.verdict.to_json())
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.printable import printable

if TYPE_CHECKING:
    from runtime.gate import Verdict


def install(extra: str) -> str:
    """What brings an extra: by packlight's name where an index has it, in the checkout where it was installed from there."""
    from importlib.metadata import PackageNotFoundError, distribution  # here: `import runtime` need not load it

    try:
        indexed = distribution("packlight").read_text("direct_url.json") is None
    except PackageNotFoundError:
        indexed = False
    return f"pip install 'packlight[{extra}]'" if indexed else f"pip install '.[{extra}]' in a checkout of packlight"


class PacklightError(Exception):
    """One line of at most 500 characters: `what: found ..., expected ...; do`, leaving out what was not given."""

    def __init__(self, what: str, *, found: str = "", expected: str = "", do: str = "") -> None:
        self.what, self.found, self.expected, self.do = what, found, expected, do
        sides = ", ".join(part for part in (found and f"found {found}", expected and f"expected {expected}") if part)
        line = f"{what}: {sides}" if sides else what
        super().__init__(printable(f"{line}; {do}" if do else line))

    def __reduce__(self) -> tuple[object, ...]:
        """For pickle, which would call the class with the whole line; a process that fails tells another one its error."""
        return _restored, (type(self), str(self), self.__dict__)


def _restored(kind: type[PacklightError], line: str, fields: dict[str, object]) -> PacklightError:
    error = kind.__new__(kind)
    error.args = (line,)
    error.__dict__.update(fields)
    return error


class BundleError(PacklightError):
    """A bundle is missing, damaged, not to be trusted, or newer than this runtime."""

    def __init__(self, what: str, *, path: str = "", found: str = "", expected: str = "", do: str = "") -> None:
        super().__init__(what, found=found, expected=expected, do=do)
        self.path = path


class InputError(PacklightError):
    """An input has the wrong name, dtype or shape; `name` is the input's."""

    def __init__(self, what: str, *, name: str = "", found: str = "", expected: str = "", do: str = "") -> None:
        super().__init__(what, found=found, expected=expected, do=do)
        self.name = name


class DriftExceeded(PacklightError):
    """The budget is not met; `verdict` holds every number."""

    def __init__(self, what: str, *, verdict: Verdict, found: str = "", expected: str = "", do: str = "") -> None:
        super().__init__(what, found=found, expected=expected, do=do)
        self.verdict = verdict


class Interrupted(PacklightError):
    """Ctrl-C in long work; the message says what was kept."""
