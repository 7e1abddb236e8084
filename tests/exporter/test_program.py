"""A .pt2 archive is read only where reading it runs nothing."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import exporter
from exporter import program as programs
from exporter.errors import TraceError


class Model(torch.nn.Module):
    """Sizes that are products and sums; a text for an argument; a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        scaled = torch.nn.functional.interpolate(y[None, None], scale_factor=2.0)
        joined = torch.cat([x, y[: x.shape[0]]]).view(x.shape[0], -1)
        return {"a": torch.einsum("ij,kj->ik", self.linear(x), x) + self.shift, "b": scaled, "c": joined}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "sound.pt2"

    rows = torch.export.Dim("rows", min=2, max=64)
    example = (torch.randn(4, 4), torch.randn(12, 4))
    with torch.no_grad():
        program = torch.export.export(Model().eval(), example, dynamic_shapes=({0: rows}, {0: 3 * rows}))
    torch.export.save(program, path)
    return path


def changed(sound: Path, out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The program with its JSON changed, as an attacker with a text editor would."""
    with zipfile.ZipFile(sound) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("models/model.json"):
                root = json.loads(content)
                change(root)
                content = json.dumps(root).encode()
            new.writestr(name, content)
    return out


def every(value: Any, key: str) -> list[dict[str, Any]]:
    """Every object of the JSON that has this key."""
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, dict) and key in value else []
    return own + [each for part in below for each in every(part, key)]


def test_program_with_sizes_strings_and_a_dict_of_outputs_is_read(sound: Path) -> None:
    made = exporter.from_program(sound)
    assert list(made.dynamic["x"].values()) != list(made.dynamic["y"].values())
    assert len(made.outputs) == 3


TOUCH = "__import__('pathlib').Path('sprung').touch()"
EXPRESSIONS = [
    TOUCH,
    f"Add(Integer(1), {TOUCH})",
    "Symbol('s0', positive=open('sprung', 'w'))",
    "(lambda: open('sprung', 'w'))()",
    "[open('sprung', 'w') for _ in (1,)][0]",
    "Integer(1).__class__.__init__.__globals__",
    "sympify(\"open('sprung', 'w')\")",
    "Symbol('s0').func",
    "S('open(1)')",
    "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
    "9**9**9",
    "LShift(Integer(1), Integer(99999999))",
    "f'{1}'",
    "s0 if s0 else s1",
    "(s0 := 1)",
    "1" * 4001,
    "(" * 500,
    "exec",
    "Symbol('s0'",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expression_that_is_no_size_is_refused_and_never_run(
    sound: Path, tmp_path: Path, expression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def change(root: dict[str, Any]) -> None:
        every(root, "expr_str")[0]["expr_str"] = expression

    with pytest.raises(TraceError, match=r"found an expression .* which runs when it is read"):
        exporter.from_program(changed(sound, tmp_path / "m.pt2", change))
    assert not (tmp_path / "sprung").exists()


def test_what_torch_itself_would_run_is_run_only_for_who_trusts_the_file(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def change(root: dict[str, Any]) -> None:
        every(root, "expr_str")[0]["expr_str"] = TOUCH

    hostile = changed(sound, tmp_path / "m.pt2", change)
    with pytest.raises(TraceError, match="--trust-source"):
        exporter.from_program(hostile)
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(TraceError):
        exporter.from_program(hostile, trust=True)
    assert (tmp_path / "sprung").exists()  # that the test above tests something


TARGETS = [
    "torch.os.mkdir",
    "torch.serialization.os.system",
    "torch.hub.load",
    "torch.ops.load_library",
    "torch.ops.aten.save.default",
    "torch.ops.aten.from_file.default",
    "torch.ops.attacker.op.default",
    "torch.ops.aten.__class__.__init__",
    "torch.ops.aten.add.__call__",
    "_operator.methodcaller",
    "_operator.attrgetter",
    "_operator.call",
    "_operator.add.__call__",
    "math.__loader__.load_module",
    "#attacker:op",
    "torch.ops.aten.add.Tensor\n",
    "os.mkdir",
]


@pytest.mark.parametrize("target", TARGETS)
def test_target_that_is_no_operator_is_refused_and_never_called(
    sound: Path, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def change(root: dict[str, Any]) -> None:
        node = next(each for each in every(root, "target") if each["target"].startswith("torch.ops.aten"))
        node["target"] = target
        node["inputs"] = [{"name": "path", "arg": {"as_string": "sprung"}, "kind": 1}]

    with pytest.raises(TraceError, match=r"found a call of .* which runs when it is read"):
        exporter.from_program(changed(sound, tmp_path / "m.pt2", change))
    assert not (tmp_path / "sprung").exists()


def guard(root: dict[str, Any]) -> None:
    root["guards_code"] = [TOUCH]


def name_of_an_input(root: dict[str, Any]) -> None:
    text = json.dumps(root).replace('"x"', json.dumps("x):\n    open('sprung', 'w')\n    def f(x"))
    root.clear()
    root.update(json.loads(text))


def tree_with_a_class(root: dict[str, Any]) -> None:
    spec = '[1, {"type": "builtins.dict", "context": "{\\"__enum__\\": 1, \\"fqn\\": \\"antigravity:x\\"}", "children_spec": []}]'
    every(root, "out_spec")[0]["out_spec"] = spec


def tree_with_a_factory(root: dict[str, Any]) -> None:
    spec = '[1, {"type": "collections.defaultdict", "context": "{}", "children_spec": []}]'
    every(root, "in_spec")[0]["in_spec"] = spec


def name_of_a_size(root: dict[str, Any]) -> None:
    root["range_constraints"] = {TOUCH: {"min_val": 1, "max_val": 2}}


def function_it_came_from(root: dict[str, Any]) -> None:
    every(root, "metadata")[-1]["metadata"] = {"source_fn_stack": "x,torch.__loader__.exec_module"}


def deep(root: dict[str, Any]) -> None:
    value: Any = {}
    for _ in range(200):
        value = {"a": value}
    root["graph_module"]["graph"]["nodes"].append(value)


@pytest.mark.parametrize(
    "change",
    [guard, name_of_an_input, tree_with_a_class, tree_with_a_factory, name_of_a_size, function_it_came_from, deep],
)
def test_what_else_of_its_json_runs_is_refused(
    sound: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TraceError, match="which runs when it is read"):
        exporter.from_program(changed(sound, tmp_path / "m.pt2", change))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "text",
    [
        "Mul(Integer(3), Symbol('s77', positive=True, integer=True))",
        "FloorDiv(Symbol('s0', positive=True, integer=True), Integer(2)) + 1",
        "Max(1, s0 - 2) % 7 // 2", "s0**2", "Pow(Symbol('s0', integer=True), Integer(2))", "Ne(s0, -1)", "3*s77",
        "ToFloat(Float('1.5', precision=53))", "And(StrictLessThan(u0, 5), Not(Eq(u0, 2)))", "int_oo",
    ],
)  # fmt: skip
def test_what_torch_writes_for_sizes_is_in_the_grammar(text: str) -> None:
    assert list(programs._expression(text, "an expression")) == []


def test_what_torch_writes_for_guards_is_in_the_grammar() -> None:
    for text in (
        "L['x'].size()[0] == (3*L['y'].size()[0])",
        "not (Mod(L['x'].size()[1], 8) == 0)",
        "2 <= L['a'].size()[0]",
    ):
        assert list(programs._expression(text, "a guard", guards=True)) == []
