from __future__ import annotations

from pathlib import Path

import pytest

import runtime
from runtime import chat
from runtime.errors import BundleError, InputError
from runtime.language import LanguageModel
from tests.runtime import language

HELLO = [{"role": "user", "content": "hi"}]


def opened(folder: Path, template: str | None) -> LanguageModel:
    found = runtime.load(language.write(folder / "letters", template=template))
    assert isinstance(found, LanguageModel)
    return found


def test_template_is_given_what_transformers_gives_it(tmp_path: Path) -> None:
    model = opened(
        tmp_path,
        "{{ bos_token }}{% for message in messages %}\n  {% if message.role == 'user' %}\n[{{ message.content | trim }}]"
        "{{ loop.last }}\n  {% endif %}\n{% endfor %}{% if add_generation_prompt %}{{ eos_token }}{% endif %}",
    )
    assert chat.render(model, [*HELLO, {"role": "assistant", "content": "no"}, {"role": "user", "content": " a "}]) == (
        "^[hi]False\n[a]True\n$"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999999) %}{% endfor %}",
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 'a' * 99999999 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for a in %}",
        "{{ raise_exception('not like that') }}",
        "{% for a in range(90000) %}{{ 'a' * 90 }}{% endfor %}",
    ],
)
def test_template_that_loops_reads_attributes_or_refuses_is_an_error_of_ours(template: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="chat template"):
        chat.render(opened(tmp_path, template), HELLO)


def test_attributes_that_are_no_ones_business_are_empty(tmp_path: Path) -> None:
    assert chat.render(opened(tmp_path, "{{ messages[0]._secret }}{{ ''.__class__ }}x"), HELLO) == "x"


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"role": "boss", "content": "a"}], ["hi"]])
def test_messages_that_are_none_are_refused(messages: list[dict[str, str]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="messages"):
        chat.render(opened(tmp_path, language.TEMPLATE), messages)


def test_bundle_without_a_template_says_what_to_do_instead(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="found no chat template.*--prompt TEXT"):
        opened(tmp_path, None).chat(HELLO)
