"""What a causal model's folder has beside its weights: tokenizer, chat template, the tokens that begin a text and end an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.causal.architecture import Decoder
from exporter.errors import TraceError

TOKENIZER, CONFIG, GENERATION, TEMPLATE = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """tokenizer: of the library tokenizers, and `file` its bytes; template: the chat template, "" where there is none."""

    tokenizer: Any
    file: bytes
    template: str
    begin: tuple[int, ...]
    end: tuple[int, ...]


def is_causal(folder: Path) -> bool:
    """Whether a folder is a causal language model's, by the class that its config.json names."""
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        return False
    return any(str(each).endswith("ForCausalLM") for each in named)


def words(folder: Path, config: Any, decoder: Decoder) -> Words:
    """Read them.

    Raises:
        TraceError: no tokenizer.json, one that the library refuses, or that has more tokens than the model.
    """
    from tokenizers import Tokenizer

    file = folder / TOKENIZER
    if not file.is_file():
        raise TraceError(
            str(folder), found=f"no {TOKENIZER}", expected="the tokenizer beside the weights",
            do="save it: AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
        )  # fmt: skip
    content = file.read_bytes()
    try:
        tokenizer = Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises Exception itself
        raise TraceError(str(file), found=str(error)[:120], expected="a tokenizer.json of tokenizers") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    last = max(tokenizer.get_vocab().values(), default=-1)
    if last >= decoder.vocabulary:
        raise TraceError(
            str(file), found=f"token {last}", expected=f"0 to {decoder.vocabulary - 1}, the rows of the embedding",
            do="take the tokenizer that the model was trained with",
        )  # fmt: skip
    settings = _json(folder / CONFIG)
    return Words(
        tokenizer=tokenizer,
        file=content,
        template=_template(folder, settings),
        begin=_begin(tokenizer, settings, config, decoder),
        end=_end(folder, config),
    )


def _begin(tokenizer: Any, settings: dict[str, Any], config: Any, decoder: Decoder) -> tuple[int, ...]:
    """Those that the tokenizer puts before a text by itself; else bos, where its settings ask for it or Gemma was trained so."""
    if found := tokenizer.encode("").ids:
        return tuple(found)
    bos = getattr(config, "bos_token_id", None)
    asked = settings.get("add_bos_token", decoder.model_type.startswith("gemma"))
    return (int(bos),) if asked and bos is not None else ()


def _end(folder: Path, config: Any) -> tuple[int, ...]:
    found = _json(folder / GENERATION).get("eos_token_id", getattr(config, "eos_token_id", None))
    if found is None:
        return ()
    return tuple(map(int, found)) if isinstance(found, list) else (int(found),)


def _template(folder: Path, settings: dict[str, Any]) -> str:
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    found = settings.get("chat_template") or ""
    if isinstance(found, list):  # several, each with a name
        named = {each.get("name"): each.get("template", "") for each in found}
        found = named.get("default", "")
    return str(found)


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise TraceError(str(file), found=str(error)[:120], expected="JSON") from error
    return found if isinstance(found, dict) else {}
