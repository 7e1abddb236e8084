from __future__ import annotations

import json as stdlib_json
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from runtime import drift, gate, outcome, views
from runtime import printable as shown
from runtime.errors import BundleError
from runtime.printable import MOST, code, printable, xml
from tests.runtime import test_gate

HOSTILE = [
    "\x1b[2J\x1b[1;1Hverdict: met",  # clear the screen, write at its top
    "\x1b]0;title\x07\x1b]8;;http://x\x1b\\link",  # OSC: the window's title, a link
    "\x9b31m",  # CSI in one byte
    "\u202etem\u202c \u2066x",  # bidi
    "a\nexit 0\r\nmet",
    "\udfff\ud800",  # halves of a character
    "\x00\ufffe\uffff\ufdd0",  # no character of XML
    "<script>&amp;\"']]>",
    "| yes |\n| a | 99 | 1 | yes |",
    "``` [met](http://x) ![](http://y) @team #1 <img src=x>",
    "a" + "\u0301" * 300,
    "x" * 100_000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_line_for_a_terminal_is_printable_and_ends(text: str) -> None:
    line = printable(text)
    assert line.isprintable() and len(line) <= MOST
    line.encode("utf-8")


def test_long_message_keeps_its_beginning_and_what_to_do() -> None:
    said = str(BundleError("model", found="y" * 4000, do="export again"))
    assert len(said) == MOST and said.startswith("model: found yyy") and said.endswith("yyy; export again")


def test_letters_of_every_language_are_left_as_they_are() -> None:
    for text in ("café", "模型", "שלום", "e\u0301", "µ · ±", "👍"):
        assert printable(text) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_json_for_a_terminal_is_the_same_value(text: str) -> None:
    for given in ({"name": text}, {text: [text, 1]}):
        said = shown.json(stdlib_json.dumps(given, ensure_ascii=False, indent=1))
        assert stdlib_json.loads(said) == given
        assert said.replace("\n", "").isprintable()


@pytest.mark.parametrize("text", HOSTILE)
def test_xml_is_well_formed_whatever_a_name_is(text: str) -> None:
    found = ET.fromstring(f'<a name="{xml(text)}"/>').attrib["name"]
    assert found == printable(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_of_a_name_is_one_cell_of_code(text: str) -> None:
    cell = code(text)
    assert cell[0] == cell[-1] == "`" and "`" not in cell[1:-1]
    assert "\n" not in cell and "|" not in cell.replace("\\|", "")


@pytest.mark.parametrize("text", HOSTILE)
def test_names_of_a_bundle_forge_neither_junit_markdown_nor_terminal(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = tuple(replace(each, name=text) for each in test_gate.judge().drift.outputs)
    made = test_gate.judge(min_snr_db=30.0)
    made = replace(
        made,
        drift=drift.Drift(batches=1, outputs=outputs),
        notes=(text,),
        lines=tuple(replace(line, what=text, cause=text, met=False) for line in made.lines),
        cpu=replace(made.cpu, name=text),
    )
    suite = ET.fromstring(outcome.junit(gate.outcome(made, text)))
    assert [case.get("name") for case in suite.iter("testcase")] == [printable(text), "note 1"]
    plain = gate.markdown(test_gate.judge(min_snr_db=30.0), "tiny").splitlines()
    assert len(gate.markdown(made, text).splitlines()) == len(plain) + 1  # the note
    views.show(views.verdict(made, text))
    views.show_json(made.to_json())
    assert all(line.isprintable() for line in capsys.readouterr().out.split("\n"))
