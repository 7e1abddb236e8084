"""A recipe's rules -> the nodes that they are about."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import onnx_ir as ir

from exporter.errors import RecipeError
from exporter.numerics.formats import Scheme
from exporter.recipe import Rule


def matched(rules: Sequence[Rule], nodes: Sequence[ir.Node]) -> dict[ir.Node, Rule]:
    """{node: the first rule that names it or its op_type}.

    Raises:
        RecipeError: a rule that matches no node.
    """
    matched: dict[ir.Node, Rule] = {}
    for number, rule in enumerate(rules):
        pattern = rule.match.replace("[", "[[]")  # names have brackets in them; only * and ? mean something
        found = [n for n in nodes if fnmatchcase(n.name or "", pattern) or fnmatchcase(n.op_type, pattern)]
        if not found:
            raise RecipeError(
                f"rule {rule.match!r} matches no node",
                found=f"{len(nodes)} nodes such as {', '.join(repr(n.name) for n in nodes[:3])}",
                expected="a node name or an op_type",
                do="list the names with `packlight explain`, or delete the rule",
                where=f"rules[{number}]",
            )
        for node in found:
            matched.setdefault(node, rule)
    return matched


def given(model: ir.Model, rules: Sequence[Rule], scheme: Scheme) -> frozenset[str]:
    """Names of the nodes that a rule gives a scheme."""
    nodes = matched(rules, list(model.graph))
    return frozenset(node.name or "" for node, rule in nodes.items() if rule.scheme == scheme)
