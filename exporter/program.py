"""A .pt2 archive whose reading runs no code: its records, and what its JSON may say, held before torch reads any of it.

torch.export.load unpickles records, evaluates the expressions of symbolic sizes (sympy's parser is Python's eval), resolves
call targets by name, compiles guards and the names of inputs into Python, and imports modules that a tree's context names.
Each of these is held against a small grammar here; whatever is not in it is refused, since a list of what is bad has no end.
"""

from __future__ import annotations

import ast
import io
import json
import pickle  # noqa: TID251 (the name of torch.load's refusal; nothing is unpickled by us)
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from exporter.errors import TraceError

# what torch 2.8 and later write for a program of plain tensors
PLAIN_RECORD = re.compile(
    r"archive_format|archive_version|byteorder|\.data/.*|extra/.*|models/[^/]*\.json|data/sample_inputs/[^/]*\.pt"
    r"|data/(weights|constants)/([^/]*_config\.json|(weight|tensor)_\d+)"
)
PLAIN_TENSOR = re.compile(r"(weight|tensor)_\d+")
LONGEST, DEEPEST = 4000, 60  # characters of an expression; JSON values within each other
LARGEST_POWER = 64

# What a node may call: operators of ATen and prims, quantized ones, control flow, and arithmetic on sizes by name
TARGET = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed)\.[A-Za-z_]\w*\.[A-Za-z_]\w*"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|map_impl|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|pos|eq|ne|lt|le|gt|ge|getitem|and_|or_|not_|lshift|rshift)"
    r"|torch\._?sym_[a-z0-9_]+"
    r"|math\.(ceil|floor|trunc|sqrt|pow|exp|log|log2|log10|sin|cos|tan|asin|acos|atan|atan2|sinh|cosh|tanh)"
)
FILES = re.compile(
    r"torch\.ops\.aten\.(from_file|save|load|warn|print|format|_?import\w*)\b"
)  # of ATen, those that do more
# What an expression may call: sympy's own for sizes, and torch's
CALLS = re.compile(
    "Integer|Float|Rational|Symbol|Add|Mul|Pow|Max|Min|Mod|Abs|Not|And|Or|Xor|Eq|Ne|Lt|Le|Gt|Ge|Equality|Unequality|"
    "StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|Piecewise|ExprCondPair|floor|ceiling|sqrt|FloorDiv|ModularIndexing|"
    "Where|PythonMod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural|FloatPow|FloatTrueDiv|IntTrueDiv|"
    "IsNonOverlappingAndDenseIndicator|TruncToFloat|TruncToInt|RoundToInt|RoundDecimal|ToFloat|Identity|max|min"
)
POWERS = ("Pow", "PowByNatural", "FloatPow", "LShift", "RShift")
NAME = re.compile(r"[a-z]{1,3}\d+|True|False|true|false|oo|int_oo|pi")
METHODS = ("size", "stride", "storage_offset", "dim", "ndim", "shape")  # of an input, in a guard
NODES = (
    ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.keyword, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare,
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub, ast.UAdd, ast.Not, ast.And, ast.Or,
    ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Tuple,
)  # fmt: skip
IN_GUARDS = (ast.Subscript, ast.Attribute)

TREES = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
PLAIN_TEXT = re.compile(r"[A-Za-z0-9_.:]*")
# Keys whose texts name nothing: what a person reads, arguments of operators, and those that are looked at by themselves
FREE = frozenset({"as_string", "as_strings", "stack_trace", "torch_version", "hint", "doc"})


def require_plain(content: bytes, path: Path) -> None:
    """Let through only archives that torch.export.load reads without running anything.

    Raises:
        TraceError: a pickle, compiled code, an expression or a target that is not in the grammar.
        RuntimeError, ValueError, KeyError, TypeError: no such archive.
    """
    archive = torch._C.PyTorchFileReader(io.BytesIO(content))
    names = archive.get_all_records()
    if "archive_format" not in names:
        raise RuntimeError("no archive_format: not a program, or one of torch 2.7 or before")
    code = [name for name in names if not PLAIN_RECORD.fullmatch(name)]
    for name in names:
        if name.endswith("_config.json"):
            entries = json.loads(archive.get_record(name))["config"].values()
            code += [e["path_name"] for e in entries if e["use_pickle"] or not PLAIN_TENSOR.fullmatch(e["path_name"])]
        if name.startswith("data/sample_inputs/"):
            try:
                torch.load(io.BytesIO(archive.get_record(name)), weights_only=True)
            except pickle.UnpicklingError:
                code.append(name)
    if len(set(names)) != len(names):
        code.append("two records of one name")
    if code:
        raise _runs(path, f"a pickle or compiled code ({min(code)})")
    for name in names:
        if name.startswith("models/"):
            root = json.loads(archive.get_record(name), object_pairs_hook=_unique)
            if said := next(_faults(root), ""):
                raise _runs(path, said)


def _runs(path: Path, found: str) -> TraceError:
    return TraceError(
        str(path),
        found=f"{found}, which runs when it is read",
        expected="a program of plain tensors, sizes and operators",
        do="load it in a file.py that offers source(), or with --trust-source if you trust who wrote it",
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return dict(pairs)


def _faults(root: Any) -> Iterator[str]:
    """What of a model's JSON is not in the grammar."""
    if not isinstance(root, dict):
        raise ValueError("no model")
    for key in root.get("range_constraints") or {}:
        yield from _expression(key, "the name of a size")
    for guard in root.get("guards_code") or ():
        yield from _expression(guard, "a guard", guards=True)
    yield from _values(root.get("graph_module"), "graph_module", 0)


def _values(value: Any, key: str, depth: int) -> Iterator[str]:
    if depth > DEEPEST:
        yield "values too deep within each other"
    elif isinstance(value, dict):
        for name, each in value.items():
            if not PLAIN_TEXT.fullmatch(name) and key not in ("metadata", "custom"):
                yield f"the name {name[:80]!r}"
            elif name == "metadata" and isinstance(each, dict):
                yield from _metadata(each)
            else:
                yield from _values(each, name, depth + 1)
    elif isinstance(value, list):
        for each in value:
            yield from _values(each, key, depth + 1)
    elif isinstance(value, str):
        yield from _text(value, key)


def _metadata(about: dict[str, Any]) -> Iterator[str]:
    """Of a node's metadata torch looks up one thing by name: which function it came from."""
    for item in str(about.get("source_fn_stack") or "").split(";"):
        name = item.rpartition(",")[2]
        if not PLAIN_TEXT.fullmatch(name) or "__" in name:
            yield f"the function {name[:80]!r}"


def _text(value: str, key: str) -> Iterator[str]:
    if key in ("expr_str", "expr"):
        yield from _expression(value, "an expression")
    elif key in ("target", "as_operator"):
        plain = TARGET.fullmatch(value) and not FILES.match(value) and "__" not in value.rpartition("torch.ops.")[2]
        if not plain and not (key == "target" and _is_ours(value)):
            yield f"a call of {value[:80]!r}"
    elif key in ("in_spec", "out_spec"):
        yield from _tree(value)
    elif key not in FREE and not PLAIN_TEXT.fullmatch(value):
        yield f"the {key} {value[:80]!r}"


def _is_ours(target: str) -> bool:
    """Python's own operators in ATen, as __and__.Tensor; no attribute of an object is called so there."""
    return re.fullmatch(r"torch\.ops\.aten\.__i?(and|or|xor|lshift|rshift)__\.(Tensor|Scalar)", target) is not None


def _tree(text: str) -> Iterator[str]:
    """A tree of inputs or outputs: tuples, lists and dicts, whose context is their keys."""
    if not text:
        return
    _, *rest = json.loads(text, object_pairs_hook=_unique)
    while rest:
        node = rest.pop()
        if not isinstance(node, dict) or set(node) != {"type", "context", "children_spec"} or node["type"] not in TREES:
            yield f"a tree of {str(node.get('type') if isinstance(node, dict) else node)[:80]}"
            return
        context = json.loads(node["context"]) if node["context"] else None
        if not (context is None or (isinstance(context, list) and all(isinstance(k, str | int) for k in context))):
            yield f"a tree with {str(context)[:80]}"
        rest += node["children_spec"]


def _expression(text: Any, what: str, *, guards: bool = False) -> Iterator[str]:
    """An expression of numbers, sizes and the functions of CALLS; in guards also what an input's sizes are."""
    if not isinstance(text, str) or len(text) > LONGEST:
        yield f"{what} of more than {LONGEST} characters"
        return
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        yield f"{what} {text[:80]!r}"
        return
    named = {id(node.args[0]) for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_named(node)}
    for node in ast.walk(tree):
        if not _is_plain(node, named, guards):
            yield f"{what} {text[:80]!r}"
            return


def _is_named(node: ast.Call) -> bool:
    """Symbol('s0', ...) or Float('1.5', ...): the one argument that is a text."""
    return (
        isinstance(node.func, ast.Name) and node.func.id in ("Symbol", "Float")
        and bool(node.args) and isinstance(node.args[0], ast.Constant)
        and re.fullmatch(r"[\w.+-]{1,40}", str(node.args[0].value)) is not None
    )  # fmt: skip


def _is_plain(node: ast.AST, named: set[int], guards: bool) -> bool:
    if isinstance(node, ast.Constant):
        value = node.value
        return (
            id(node) in named
            or (isinstance(value, int | float) and abs(value) < 1 << 64)
            or (guards and _is_key(value))
        )
    if isinstance(node, ast.Name):
        return (
            bool(NAME.fullmatch(node.id))
            or CALLS.fullmatch(node.id) is not None
            or (guards and node.id in ("L", "int", "float"))
        )
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name):
            return CALLS.fullmatch(node.func.id) is not None and (
                node.func.id not in POWERS or _is_small(node.args[-1:])
            )
        return guards and isinstance(node.func, ast.Attribute)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _is_small([node.right])
    if guards and isinstance(node, ast.Attribute):
        return node.attr in METHODS and isinstance(node.value, ast.Subscript)
    return isinstance(node, (*NODES, *IN_GUARDS) if guards else NODES)


def _is_key(value: object) -> bool:
    return isinstance(value, str) and PLAIN_TEXT.fullmatch(value) is not None


def _is_small(exponent: list[ast.expr]) -> bool:
    """Whether a power is of a number that is written down and small: 9**9**9 is a number without end."""
    numbers = [each.value for node in exponent for each in ast.walk(node) if isinstance(each, ast.Constant)]
    return len(numbers) == 1 and isinstance(numbers[0], int | float) and abs(numbers[0]) <= LARGEST_POWER
