"""The mutations of a module: its text with one small change each, which some test should notice.

They are made by the operators of Cosmic Ray, and by some more below, after its pattern.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import parso
from cosmic_ray.ast import ast_nodes
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Example, Operator
from cosmic_ray.plugins import get_operator
from parso.python.tree import Keyword, String
from parso.tree import NodeOrLeaf

__all__ = ["Mutation", "mutations_of"]

# Of the replacements of one operator by any other, those to which a test may be blind.
_OF_COSMIC_RAY = [
    "ExceptionReplacer",
    "NumberReplacer",
    "RemoveDecorator",
    "ReplaceAndWithOr",
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    "ReplaceFalseWithTrue",
    "ReplaceOrWithAnd",
    "ReplaceTrueWithFalse",
    "ZeroIterationForLoop",
    *(
        f"ReplaceBinaryOperator_{swap}"
        for swap in [
            "Add_Sub",
            "Sub_Add",
            "Mul_Div",
            "Div_Mul",
            "FloorDiv_Mul",
            "Mod_Div",
            "Pow_Mul",
            "BitOr_BitAnd",
            "BitAnd_BitOr",
        ]
    ),
    *(
        f"ReplaceComparisonOperator_{swap}"
        for swap in [
            "Eq_NotEq",
            "NotEq_Eq",
            "Is_IsNot",
            "IsNot_Is",
            "Lt_LtE",
            "Lt_GtE",
            "LtE_Lt",
            "LtE_Gt",
            "Gt_GtE",
            "Gt_LtE",
            "GtE_Gt",
            "GtE_Lt",
        ]
    ),
    "ReplaceUnaryOperator_Delete_Not",
    "ReplaceUnaryOperator_Delete_USub",
]

_REMOVABLE = {"atom_expr", "power", "expr_stmt", "del_stmt", "raise_stmt", "yield_expr"}


@dataclass(frozen=True)
class Mutation:
    """One change of a module.

    :param where: the function or class that is changed
    :param number: the line that is changed, from 1
    :param line: what that line says, without its indentation
    :param becomes: what it says then; empty if it is taken out
    :param code: the whole module, changed
    """

    where: str
    number: int
    line: str
    becomes: str
    code: str


class _Ours(Operator):
    """What all operators of our own share: which children of a node they would change."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        for child in self.targets(node):
            yield child.start_pos, child.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        return self.change(node, list(self.targets(node))[index])

    def targets(self, node: Any) -> Iterator[Any]:
        raise NotImplementedError

    def change(self, node: Any, target: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return ()


def _replace(node: Any, old: Any, new: Any) -> Any:
    """Put something in the place of a child; both lie on one line after the same blanks."""
    new.get_first_leaf().prefix = old.get_first_leaf().prefix
    node.children[node.children.index(old)] = new
    return node


class RemoveStatement(_Ours):
    """A call, an assignment, a ``raise``, a bare ``return`` in a function is not there."""

    def targets(self, node: Any) -> Iterator[Any]:
        if node.type == "simple_stmt" and parso.python.tree.search_ancestor(node, "funcdef"):
            statement = node.children[0]
            if statement.type in _REMOVABLE or statement == "return":
                yield statement

    def change(self, node: Any, target: Any) -> Any:
        return _replace(node, target, Keyword("pass", target.start_pos))


class ReturnNone(_Ours):
    """What a function returns is lost."""

    def targets(self, node: Any) -> Iterator[Any]:
        if node.type == "return_stmt" and node.children[1].get_code().strip() not in _NOTHING:
            yield node.children[1]

    def change(self, node: Any, target: Any) -> Any:
        return _replace(node, target, Keyword("None", target.start_pos))


_NOTHING = {"None", "False", "()"}


class DropArgument(_Ours):
    """A call is made without one of its keyword, ``*`` or ``**`` arguments."""

    def targets(self, node: Any) -> Iterator[Any]:
        is_call = node.type == "trailer" and node.children[0] == "("
        if is_call or (node.type == "arglist" and node.parent.type == "trailer"):
            for child in node.children:
                value = child.children[-1] if child.type == "argument" else None
                # What is True or False is turned round.
                if value not in {None, "True", "False"} and value.type != "sync_comp_for":
                    yield child

    def change(self, node: Any, target: Any) -> Any:
        at = node.children.index(target)
        if node.type == "arglist":  # with its comma, the one before it if it is the last
            at = min(at, len(node.children) - 2)
            del node.children[at : at + 2]
        else:
            del node.children[at]
        return node


class DropWith(_Ours):
    """The body of a ``with`` runs without it."""

    def targets(self, node: Any) -> Iterator[Any]:
        statement = node.children[1] if node.type == "async_stmt" else node
        if statement.type == "with_stmt" and len(statement.children) == 4:
            context = statement.children[1]
            if context.type != "with_item":
                yield context

    def change(self, node: Any, target: Any) -> Any:
        statement = node.children[1] if node.type == "async_stmt" else node
        statement.children[0].prefix = node.get_first_leaf().prefix
        statement.children[0].value = "if"
        return _replace(statement, target, Keyword("True", target.start_pos))


class NegateCondition(_Ours):
    """A condition is turned round, unless its own ``not`` or comparison is what is turned."""

    def targets(self, node: Any) -> Iterator[Any]:
        conditions: list[Any] = []
        if node.type in {"if_stmt", "while_stmt", "comp_if", "sync_comp_for"}:
            pairs = zip(node.children, node.children[1:], strict=False)
            conditions = [after for before, after in pairs if before in _BEFORE_CONDITIONS]
        elif node.type == "test":
            conditions = [node.children[2]]
        for condition in conditions:
            if condition.type not in {"comparison", "not_test"}:
                yield condition

    def change(self, node: Any, target: Any) -> Any:
        return _replace(node, target, parso.parse(f"not ({target.get_code().strip()})"))


_BEFORE_CONDITIONS = ("if", "elif", "while")


class NegateMembership(_Ours):
    """``in`` is ``not in``, and the other way round."""

    def targets(self, node: Any) -> Iterator[Any]:
        if node.type == "comparison":
            for child in node.children[1::2]:
                if child.get_code().strip() in {"in", "not in"}:
                    yield child

    def change(self, node: Any, target: Any) -> Any:
        other = "in" if target.type == "comp_op" else "not in"
        return _replace(node, target, Keyword(other, target.start_pos))


class ReplaceString(_Ours):
    """A string that something is compared with, or that stands in for something, is another."""

    def targets(self, node: Any) -> Iterator[Any]:
        if node.type in {"comparison", "or_test", "and_test"}:
            for child in node.children:
                if child.type == "string":
                    yield child

    def change(self, node: Any, target: Any) -> Any:
        return _replace(node, target, String('"mutated"', target.start_pos))


_OURS: list[Callable[[], Operator]] = [
    RemoveStatement,
    ReturnNone,
    DropArgument,
    DropWith,
    NegateCondition,
    NegateMembership,
    ReplaceString,
]


def _is_no_behaviour(child: Any, parent: Any) -> bool:
    """Return whether nothing that runs depends on this child of a node; see scripts/mutants."""
    children = parent.children
    first = children[0].get_code().strip()
    match parent.type:
        case "assert_stmt":
            found = True
        case "tfpdef" | "raise_stmt":  # a parameter's annotation, or what an error says
            found = child is not children[0]
        case "annassign":
            found = child is children[1]
        case "funcdef":
            found = child is parent.annotation
        case "parameters":
            found = child.type == "operator"  # the star that is no multiplication
        case "if_stmt":
            found = children[1].get_code().strip() == "TYPE_CHECKING"
        case "decorated":
            found = "@overload" in first
        case "expr_stmt":
            value = children[-1].get_code().strip()
            found = first in {"__all__", "__slots__"} or value.startswith(_TYPE_VARIABLES)
        case "arglist":
            called = parent.get_first_leaf().get_previous_leaf().get_previous_leaf()
            found = child is children[0] and called.get_code().strip() == "cast"
        case _:
            found = False
    return found


_TYPE_VARIABLES = ("TypeVar(", "ParamSpec(")


def _has_behaviour(node: NodeOrLeaf) -> bool:
    child: Any = node
    while child.parent is not None:
        if _is_no_behaviour(child, child.parent):
            return False
        child = child.parent
    return True


def _name_of(node: Any) -> str:
    """Return the qualified name of the function or class that a node is in."""
    names: list[str] = []
    while node is not None:
        if node.type in {"funcdef", "classdef"}:
            names.insert(0, node.name.value)
        node = node.parent
    return ".".join(names)


def _compiles(code: str) -> bool:
    try:
        compile(code, "<mutation>", "exec")
    except SyntaxError:
        return False
    return True


def _first(lines: list[str], start: int, stop: int) -> tuple[int, str]:
    """Return the first line that is not blank, and its number."""
    for number, line in enumerate(lines[start:stop], start + 1):
        if line.strip():
            return number, " ".join(line.split())
    return start + 1, ""


def _change(before: list[str], after: list[str]) -> tuple[int, str, str]:
    """Return where two texts first differ: the line's number, the line, and what it becomes."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    changes = [change for change in matcher.get_opcodes() if change[0] != "equal"]
    _, start, stop, other_start, other_stop = changes[0]
    number, line = _first(before, start, stop)
    return number, line, _first(after, other_start, other_stop)[1]


def mutations_of(source: str) -> list[Mutation]:
    """Return all mutations of a module, from its top to its end.

    What changes no behaviour is left out, what is no Python any more, and what came before.
    """
    found: dict[str, Mutation] = {}
    lines = source.splitlines()
    operators = [*(get_operator(f"core/{name}") for name in _OF_COSMIC_RAY), *_OURS]
    for make in operators:
        tree = parso.parse(source)
        occurrence = -1
        for node in ast_nodes(tree):
            for start, _ in make().mutation_positions(node):
                occurrence += 1
                leaf = tree.get_leaf_for_position(start)
                if not _has_behaviour(leaf):
                    continue
                code = mutate_code(source, make(), occurrence)
                if code is None or code in found or code == source or not _compiles(code):
                    continue
                found[code] = Mutation(_name_of(leaf), *_change(lines, code.splitlines()), code)
    return sorted(found.values(), key=lambda mutation: (mutation.number, mutation.becomes))
