"""Lines of text -> batches of token numbers, with the `tokenizer.json` that the recipe's `[text]` names.

One line is one sample; blank lines are none. Files are UTF-8, read line by line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from exporter.data import files
from exporter.data.files import File
from exporter.data.group import Left, by_name, grouped, require_filled, size
from exporter.data.table import Table
from exporter.errors import CalibrationError, RecipeError
from runtime.manifest import Tensor

SUFFIXES = (".txt",)
LONGEST = 1 << 20  # tokens of a line
TOKENIZER_BYTES = 64 << 20
USUAL = {"ids": "input_ids", "attention_mask": "attention_mask", "token_type_ids": "token_type_ids"}
PADS = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>")  # where tokenizer.json says nothing of padding

Encode = Callable[[Sequence[str]], dict[str, Any]]


class Text(Table):
    """`[text]`: how lines become token numbers.

    tokenizer: a tokenizer.json; a relative path begins at the recipe's folder. max_length: tokens at most, the rest of a
    line is cut off; the graph's own length if that is fixed, else what tokenizer.json says. padding: to the longest line
    of the batch, to max_length (the default where the graph's length is fixed), or none. pad: the token to pad with,
    where tokenizer.json names none. ids, attention_mask, token_type_ids: the graph's inputs that take them; if not
    given, those of the usual names that the graph has. batch: lines a batch.
    """

    tokenizer: str = Field(min_length=1)
    max_length: int | None = Field(default=None, ge=1, le=LONGEST)
    padding: Literal["longest", "max_length", "none"] | None = None
    pad: str | None = Field(default=None, min_length=1)
    ids: str | None = Field(default=None, min_length=1)
    attention_mask: str | None = Field(default=None, min_length=1)
    token_type_ids: str | None = Field(default=None, min_length=1)
    batch: int | None = Field(default=None, ge=1)


def inputs(asked: Text, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """{"ids": the graph's input, ...} for what the graph takes.

    Raises:
        RecipeError: an input that the graph does not have, or no way to tell which one takes the ids.
    """
    names = [tensor.name for tensor in tensors]
    found: dict[str, Tensor] = {}
    for kind, usual in USUAL.items():
        if (named := getattr(asked, kind)) is not None:
            found[kind] = by_name(tensors, named, f"[text]:{kind}")
        elif usual in names:
            found[kind] = by_name(tensors, usual, f"[text]:{kind}")
    if "ids" not in found and len(names) == 1:
        found["ids"] = tensors[0]
    if "ids" not in found:
        raise RecipeError(
            "missing key 'ids'", found=f"a model with inputs {', '.join(names)}", expected="the one that takes token ids",
            where="[text]",
        )  # fmt: skip
    for kind, tensor in found.items():
        if tensor.dtype not in ("int64", "int32"):
            raise RecipeError(
                kind, found=f"input {tensor.name!r} of dtype {tensor.dtype}", expected="an input of int64 or int32",
                where="[text]",
            )  # fmt: skip
    return found


def batches(
    found: Iterable[File], asked: Text, folder: Path, tensors: Sequence[Tensor], left: Left
) -> Iterator[Mapping[str, Any]]:
    """Batches of lines, read one by one.

    Raises:
        RecipeError, CalibrationError: see `encoder`; a file that is not UTF-8, naming the line.
    """
    takes = inputs(asked, tensors)
    require_filled(tensors, [tensor.name for tensor in takes.values()], "[text]")
    encode = encoder(asked, folder, tensors)
    for group in grouped(_lines(found), size(asked.batch, takes["ids"], "text"), left):
        yield encode(group)


def _lines(found: Iterable[File]) -> Iterator[str]:
    for file in found:
        with files.opened(file) as stream:
            for number, raw in enumerate(stream, start=1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise CalibrationError(
                        f"{file.name}: line {number}", found=str(error).partition(":")[0], expected="UTF-8"
                    ) from error
                if line:
                    yield line


def encoder(asked: Text, folder: Path, tensors: Sequence[Tensor], rows: int | None = None) -> Encode:
    """A function from lines to {input: integers [lines, tokens]}; rows: lines a batch, if another table says it.

    Raises:
        RecipeError: a file that is no tokenizer.json, padding that it has no token for or no length of.
    """
    takes = inputs(asked, tensors)
    tokenizer, path = _tokenizer(asked, folder)
    graph_length = takes["ids"].shape[1] if len(takes["ids"].shape) > 1 else None
    fixed = graph_length if isinstance(graph_length, int) else None
    most = asked.max_length or fixed
    padding = asked.padding or ("longest" if fixed is None else "max_length")
    if most is not None:
        tokenizer.enable_truncation(most)
    alone = size(asked.batch if rows is None else rows, takes["ids"], "text").rows == 1
    _pad(tokenizer, asked, padding, most, alone)

    def encode(lines: Sequence[str]) -> dict[str, Any]:
        try:
            encoded = tokenizer.encode_batch([str(line) for line in lines])
        except BaseException as error:  # the library raises Exception itself, and its panics are none
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise CalibrationError(f"{path}: cannot encode {lines[0][:40]!r}", found=_said(error)) from error
        lengths = sorted({len(line.ids) for line in encoded})
        if len(lengths) > 1:
            raise CalibrationError(
                f"lines from {lines[0][:40]!r} on", found=f"{lengths[0]} and {lengths[-1]} tokens in one batch",
                expected="one length", do='take padding = "longest", or batch = 1',
            )  # fmt: skip
        values = {
            "ids": [line.ids for line in encoded],
            "attention_mask": [line.attention_mask for line in encoded],
            "token_type_ids": [line.type_ids for line in encoded],
        }
        return {tensor.name: np.array(values[kind], tensor.dtype) for kind, tensor in takes.items()}

    return encode


def _tokenizer(asked: Text, folder: Path) -> tuple[Any, str]:
    from tokenizers import Tokenizer

    remote = files.is_remote(asked.tokenizer)
    file = files.at(asked.tokenizer if remote else folder / asked.tokenizer)
    content = files.contents(file).read(TOKENIZER_BYTES + 1)
    if len(content) > TOKENIZER_BYTES:
        raise RecipeError(
            "tokenizer", found="a larger file", expected=f"at most {TOKENIZER_BYTES} bytes", where="[text]"
        )
    try:
        return Tokenizer.from_str(content.decode("utf-8")), files.shown(asked.tokenizer)
    except BaseException as error:  # the library raises Exception itself, and its panics are none
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise RecipeError(
            f"tokenizer {files.shown(asked.tokenizer)!r}", found=_said(error),
            expected="a tokenizer.json of the tokenizers library", where="[text]",
        ) from error  # fmt: skip


def _pad(tokenizer: Any, asked: Text, padding: str, most: int | None, alone: bool) -> None:
    """Make the tokenizer pad as asked; what its file says of the length is not asked for, of the token it is."""
    if padding == "none":
        tokenizer.no_padding()
        return
    if padding == "max_length" and most is None:
        raise RecipeError("missing key 'max_length'", expected="a length, with padding = 'max_length'", where="[text]")
    said = tokenizer.padding or {}
    known = {"pad_id": said["pad_id"], "pad_token": said["pad_token"]} if said and asked.pad is None else None
    for token in [asked.pad] if asked.pad is not None else PADS:
        if known is None and (number := tokenizer.token_to_id(token)) is not None:
            known = {"pad_id": number, "pad_token": token}
    if known is None and asked.pad is None and padding == "longest" and alone:
        tokenizer.no_padding()  # one line is its batch's longest
        return
    if known is None:
        raise RecipeError(
            "pad", found=f"no token {asked.pad!r}" if asked.pad else "no padding token in tokenizer.json",
            expected="a token of its vocabulary", do='name one with pad = "...", or take padding = "none" and batch = 1',
            where="[text]",
        )  # fmt: skip
    tokenizer.enable_padding(
        direction=said.get("direction", "right"),
        pad_type_id=said.get("pad_type_id", 0),
        length=most if padding == "max_length" else None,
        **known,
    )


def _said(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__
