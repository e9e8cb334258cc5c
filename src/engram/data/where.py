"""Conditions on columns, as in `label == 3` or `alphabet != "Greek"`: read, never evaluated."""

from __future__ import annotations

import ast
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram.errors import EngramError, unknown

if TYPE_CHECKING:
    from engram.data.table import Table

OPERATORS: dict[type, Any] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def matches(table: Table, expression: str) -> Tensor:
    """Mask [n] of the rows for which the comparison holds; EngramError for anything but one comparison."""
    name, compare, value = _parse(expression)
    column = _column(table, name)
    if not isinstance(column, Tensor):
        return torch.tensor([bool(compare(entry, str(value))) for entry in column], dtype=torch.bool)
    if isinstance(value, str):
        value = _class_id(table, name, value)
    if column.numel() != len(column):
        raise EngramError(f"the column {name!r} holds {column[0].numel()} values a row; a condition needs one")
    return compare(column.reshape(-1), value)


def column_of(expression: str) -> str:
    """The column that a condition is about."""
    return _parse(expression)[0]


def _parse(expression: str) -> tuple[str, Any, Any]:
    wanted = f"{expression!r} is no condition; write one comparison, as in 'label == 3'"
    try:
        node = ast.parse(expression.strip(), mode="eval").body
        if not (isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and len(node.ops) == 1):
            raise EngramError(wanted)
        right = node.comparators[0]
        value = right.id if isinstance(right, ast.Name) else ast.literal_eval(right)  # a bare word is text
        if not isinstance(value, str | int | float):
            raise EngramError(wanted)
        return node.left.id, OPERATORS[type(node.ops[0])], value
    except (SyntaxError, KeyError, ValueError) as error:
        raise EngramError(wanted) from error


def _column(table: Table, name: str) -> Any:
    columns: dict[str, Any] = {**table.extra, "id": table.ids}
    if table.labels is not None:
        columns["label"] = table.labels
    if name not in columns:
        raise unknown("column", name, columns)
    return columns[name]


def _class_id(table: Table, name: str, value: str) -> int:
    if name != "label" or not table.names:
        raise EngramError(f"the column {name!r} holds numbers; compare it with a number, not with {value!r}")
    by_name = {label: id for id, label in table.names.items()}
    if value not in by_name:
        raise unknown("class", value, by_name)
    return by_name[value]
