"""What was derived from the training rows, so that new rows are treated as they were."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.types as kinds
import torch
from torch import Tensor

from engram.data.columns import numbers, one_hot
from engram.data.table import Target
from engram.errors import EngramError, unknown
from engram.files import SUMS, check_sums, sum_files, write_atomic

FILE = "preprocessing.json"
MOST_CATEGORIES = 256


@dataclass(frozen=True)
class Preprocessing:
    """Which columns serve as what, and what the training rows said about them.

    `label`: the label's column, or the several columns of numbers. `classes`: class names in the order of
    their ids. `columns`: the columns that make `values` [n, d], in order; `categories`: for each of them that
    holds text, the texts it is one-hot encoded by; `mean`, `sd` [d]: what is subtracted and divided by (0 and
    1 where nothing is). `image_shape`: (channels, height, width); `resized`: images of other sizes are
    brought to it.
    """

    target: str = Target.NONE.value
    label: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    mean: tuple[float, ...] = ()
    sd: tuple[float, ...] = ()
    text: str | None = None
    image: str | None = None
    image_shape: tuple[int, ...] | None = None
    resized: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON has them."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Preprocessing:
        """What `to_dict` described. EngramError for a key that does not exist."""
        known = {entry.name for entry in fields(cls)}
        for name in state:
            if name not in known:
                raise unknown("key of a preprocessing", name, known)
        return cls(**{name: _frozen(value) for name, value in state.items()})

    def save(self, directory: str | Path) -> None:
        """Write `preprocessing.json` into a directory, beside a model; whole or not at all."""
        write_atomic(Path(directory) / FILE, json.dumps(self.to_dict(), indent=1, ensure_ascii=False))
        if (Path(directory) / SUMS).exists():
            sum_files(directory, [FILE])

    @classmethod
    def load(cls, directory: str | Path) -> Preprocessing:
        """What `save` wrote. EngramError names a file that is missing or damaged."""
        path = Path(directory) / FILE
        try:
            found = cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise EngramError(f"{path} cannot be read: {error}") from error
        check_sums(directory, FILE)
        return found


def fit_values(columns: Any, names: Sequence[str], ids: Sequence[str], standardise: bool) -> dict[str, Any]:
    """Those fields of a `Preprocessing` that the columns for `values` determine.

    sd is the population's (ddof 0), and 1 for a constant column; one-hot columns keep 0 and 1.
    """
    categories = {name: _categories(columns[name], name) for name in names if kinds.is_string(columns[name].type)}
    blocks = _blocks(columns, names, categories, ids)
    mean, sd = [0.0] * sum(block.shape[1] for block in blocks.values()), []
    if standardise:
        mean = [m for name, x in blocks.items() for m in (x.mean(0) * (name not in categories)).tolist()]
        sd = [s or 1.0 for name, x in blocks.items() for s in (x.std(0) * (name not in categories)).tolist()]
    return {
        "columns": tuple(names),
        "categories": categories,
        "mean": tuple(mean),
        "sd": tuple(sd or [1.0] * len(mean)),
    }


def values(columns: Any, ids: Sequence[str], plan: Preprocessing) -> Tensor:
    """The columns of a plan as float32 [n, d].

    EngramError for a column that is missing or of another kind, a category that the training rows did not
    have, and a missing or infinite value.
    """
    missing = [name for name in plan.columns if name not in columns.column_names]
    if missing:
        raise EngramError(f"the column {missing[0]!r}, which the training rows had, is missing")
    together = np.concatenate(list(_blocks(columns, plan.columns, plan.categories, ids).values()), 1)
    if together.shape[1] != len(plan.mean):
        raise EngramError(
            f"these columns hold {together.shape[1]} numbers a row; the training rows had {len(plan.mean)}"
        )
    return torch.from_numpy(((together - np.array(plan.mean)) / np.array(plan.sd)).astype(np.float32))


def _categories(column: Any, name: str) -> tuple[str, ...]:
    found = sorted(text for text in column.unique().to_pylist() if text is not None)
    if len(found) > MOST_CATEGORIES:
        raise EngramError(
            f"the column {name!r} holds {len(found)} different texts, too many for categories; "
            "say with text= that it is text, or with values= which columns to learn from"
        )
    return tuple(found)


def _blocks(
    columns: Any, names: Sequence[str], categories: Mapping[str, Sequence[str]], ids: Sequence[str]
) -> dict[str, np.ndarray]:
    """Every column as finite float64 [n, k]."""
    blocks = {}
    for name in names:
        _same_kind(columns[name], name, name in categories)
        column = columns[name]
        found = one_hot(column, name, categories[name]) if name in categories else numbers(column, name)
        blocks[name] = found.astype(np.float64).reshape(len(found), -1)
        _finite(blocks[name], name, ids)
    return blocks


def _same_kind(column: Any, name: str, text: bool) -> None:
    if kinds.is_string(column.type) != text:
        held = "text" if text else "numbers"
        raise EngramError(f"the column {name!r} held {held} in the training rows and holds {column.type} here")


def _finite(block: np.ndarray, name: str, ids: Sequence[str]) -> None:
    bad = ~np.isfinite(block).all(1)
    if bad.any():
        row = ids[int(np.argmax(bad))]
        raise EngramError(f"the column {name!r} has a missing or infinite value in row {row!r}; fill or drop such rows")


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _frozen(entry) for name, entry in value.items()}
    return tuple(value) if isinstance(value, list) else value
