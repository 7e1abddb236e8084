"""The model's own chat template: messages -> text, by jinja2 in its sandbox (extra `[chat]`).

A template is a program from a stranger: it reads no attribute that begins with an underscore, changes nothing that it is given,
and is held to STEPS and LONGEST characters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runtime.errors import BundleError, InputError, install
from runtime.language_manifest import TEMPLATE

if TYPE_CHECKING:
    from runtime.language import LanguageModel

ROLES = ("system", "user", "assistant", "tool")
STEPS = 100_000  # rounds of loops and calls of one template
LONGEST = 4_000_000  # characters of what a template gives


def render(model: LanguageModel, messages: Sequence[Mapping[str, str]]) -> str:
    """The conversation as the model's template writes it, up to where the answer begins.

    Raises:
        BundleError: no template in the bundle, one that is no template, or no jinja2.
        InputError: messages that are none, or that the template refuses; a template that does what the sandbox forbids.
    """
    file = model.path / TEMPLATE
    if TEMPLATE not in model.manifest.files:
        raise BundleError(
            str(file), path=str(file), found="no chat template", expected="a model made for conversations",
            do="give it a text to go on with: generate(text), packlight run BUNDLE --prompt TEXT",
        )  # fmt: skip
    _require_messages(messages)
    try:
        from jinja2 import TemplateError
        from jinja2.exceptions import SecurityError
    except ImportError as error:
        raise BundleError(str(file), path=str(file), found="no package jinja2", do=install("chat")) from error
    given = {
        "messages": [dict(each) for each in messages],
        "add_generation_prompt": True,
        "bos_token": _token(model, model.manifest.begin),
        "eos_token": _token(model, model.manifest.end),
    }
    try:
        template = _sandbox().from_string(model.text(file.name))
        return _joined(template.generate(given), str(file))
    except SecurityError as error:
        raise InputError(f"{file}: the chat template does what is forbidden", found=str(error)[:200]) from error
    except (TemplateError, TypeError, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise InputError(f"{file}: the chat template refuses the messages", found=str(error)[:200]) from error


def _require_messages(messages: Sequence[Mapping[str, str]]) -> None:
    if not messages:
        raise InputError("messages", found="none", expected='[{"role": "user", "content": "..."}]')
    for each in messages:
        if not isinstance(each, Mapping) or each.get("role") not in ROLES or not isinstance(each.get("content"), str):
            raise InputError("messages", found=repr(each)[:80], expected=f"a role of {', '.join(ROLES)}, and a content")


def _sandbox() -> Any:
    """transformers' settings of jinja2 (blocks leave no blank lines, `raise_exception`, `tojson`), with every step counted."""
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    left = STEPS

    def count() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"more than {STEPS} steps; a loop without an end")

    def counted(items: Any) -> Iterator[Any]:
        for item in items:
            count()
            yield item

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def _parse(self, *given: Any) -> nodes.Template:
            parsed = super()._parse(*given)
            for loop in parsed.find_all(nodes.For):
                loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None)
            return parsed

        def call(self, *given: Any, **named: Any) -> Any:
            count()
            return super().call(*given, **named)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(each) if hasattr(each, "__len__") else abs(each) for each in (left, right)]
            if operator == "**" or sizes[0] * sizes[1] > LONGEST:
                raise ValueError(f"{operator} of {sizes[0]} and {sizes[1]}")
            return super().call_binop(context, operator, left, right)

    found = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    found.globals["raise_exception"] = _refuse
    found.filters["counted"] = counted
    found.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    return found


def _refuse(said: str) -> None:
    raise ValueError(said)


def _joined(parts: Iterator[str], where: str) -> str:
    text = ""
    for part in parts:
        text += part
        if len(text) > LONGEST:
            raise InputError(f"{where}: the chat template", found=f"more than {LONGEST} characters", expected="fewer")
    return text


def _token(model: LanguageModel, ids: Sequence[int]) -> str:
    return (model.tokenizer.id_to_token(ids[0]) or "") if ids else ""
