"""What others wrote (names, paths, a library's words), made fit for a terminal, a message, JSON, XML and Markdown.

A name in a bundle may hold escape sequences, a switch of the direction of writing, or the end of a line and a verdict of its
own. Whatever packlight prints or writes for people goes through here.
"""

from __future__ import annotations

import re

MOST = 500  # characters of a message
LESS = 300  # of its beginning are kept, where it is longer; its end says what to do
# Of more than this many signs above and below a letter, none are shown: they would run over the lines around
COMBINING = re.compile("[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]{5,}")


def printable(text: object, most: int = MOST) -> str:
    r"""The text on one line, at most `most` characters: what is not printable as \x1b, the middle of a long one left out."""
    given = str(text)
    if len(given) > 4 * most:  # before it is looked at sign by sign
        given = f"{given[: 2 * most]}…{given[-2 * most :]}"
    return middle(_escaped(" ".join(given.split())), most, LESS * most // MOST)


def lines(text: str) -> str:
    """The same for a text of several lines of ours, in which names stand: its line ends stay, and so does its length."""
    return "\n".join(map(_escaped, text.split("\n")))


def json(text: str) -> str:
    r"""JSON as text, with what is not printable inside its strings as \u001b: for a terminal the same value."""
    return "".join(sign if sign.isprintable() or sign == "\n" else _units(sign) for sign in text)


def xml(text: object) -> str:
    """The text as an attribute's value: well-formed whatever it was, for XML has no way to write some characters at all."""
    from html import escape  # here: `import runtime` need not load its table of entities

    return escape(printable(text))


def code(text: object) -> str:
    """The text as code in Markdown, in a table too: neither a link, a tag, a mention nor the end of a cell is made of it."""
    shown = printable(text).replace("`", "'").replace("|", "\\|")
    return f"`{shown}`" if shown.strip() else "` `"


def middle(text: str, width: int, left: int | None = None) -> str:
    """At most `width` characters, its middle left out: both ends of a node's name tell it from its neighbours."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2 if left is None else left
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def _escaped(line: str) -> str:
    if line.isascii() and line.isprintable():
        return line
    return COMBINING.sub("…", "".join(map(_sign, line)))


def _sign(sign: str) -> str:
    if sign.isprintable():
        return sign
    return " " if sign.isspace() else sign.encode("unicode_escape").decode()


def _units(sign: str) -> str:
    """A character as JSON writes it in ASCII: one unit of UTF-16, or two."""
    units = sign.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
