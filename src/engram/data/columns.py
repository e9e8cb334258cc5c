"""pyarrow columns as arrays: numbers, class labels, categories, and what is merely kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as kinds
import torch
from torch import Tensor

from engram.data.table import MISSING, Column
from engram.errors import EngramError, unknown


def is_number(kind: Any) -> bool:
    """Numbers or truth values, one a row."""
    return kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_boolean(kind)


def is_list(kind: Any) -> bool:
    """Lists: several values a row."""
    ragged = kinds.is_list(kind) or kinds.is_large_list(kind)
    return ragged or kinds.is_fixed_size_list(kind) or is_tensor(kind)


def is_tensor(kind: Any) -> bool:
    """A tensor of one shape a row."""
    return isinstance(kind, pa.FixedShapeTensorType)


def is_bytes(kind: Any) -> bool:
    """Bytes, alone or beside a path, which is how the `datasets` library keeps images."""
    if kinds.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind)


def numbers(column: Any, name: str) -> np.ndarray:
    """A column of numbers [n], or of lists of equally many [n, …]; NaN where one is missing.

    EngramError for a column of another kind.
    """
    whole = pa.concat_arrays(column.chunks)
    if is_tensor(column.type):
        return whole.to_numpy_ndarray()
    if is_number(column.type):
        lacking = kinds.is_boolean(column.type) and whole.null_count
        return (whole.cast(pa.int8()) if lacking else whole).to_numpy(zero_copy_only=False)
    try:
        return np.array([np.array(row, np.float64) for row in whole.to_pylist()], np.float64)
    except (ValueError, TypeError) as error:
        raise EngramError(f"the column {name!r} ({column.type}) holds no numbers, or not equally many a row") from error


def class_keys(column: Any, names: Sequence[str] = ()) -> tuple[np.ndarray, list[Any]]:
    """A label column as codes [n] into a list of keys, in which None stands for a missing label (null, "" or
    -1).

    Keys are the values, or the class names if the source states them. -1 is a class where all else is 1.
    """
    whole = pa.concat_arrays(column.chunks)
    encoded = (whole.cast(pa.string()) if kinds.is_null(column.type) else whole).dictionary_encode()
    keys = encoded.dictionary.to_pylist()
    if set(keys) != {MISSING, 1}:
        keys = [None if key in ("", MISSING) else key for key in keys]
    if names:
        keys = [_named(key, names) if isinstance(key, int) else key for key in keys]
    codes = encoded.indices.fill_null(len(keys)).to_numpy(zero_copy_only=False)
    return codes.astype(np.int64), [*keys, None]


def class_names(keys: Sequence[Any]) -> tuple[str, ...]:
    """The names of the classes that occur, in ascending order of the values."""
    return tuple(map(str, sorted(key for key in keys if key is not None)))


def class_ids(codes: np.ndarray, keys: Sequence[Any], classes: Sequence[str]) -> Tensor:
    """Class ids [n], -1 where the label is missing; EngramError for a class that is not among `classes`."""
    position = {name: id for id, name in enumerate(classes)}
    strange = [key for key in keys if key is not None and str(key) not in position]
    if strange:
        raise EngramError(f"{unknown('class', strange[0], classes)} (the classes are those of the training rows)")
    lookup = np.array([MISSING if key is None else position[str(key)] for key in keys], np.int64)
    return torch.from_numpy(lookup[codes])


def one_hot(column: Any, name: str, categories: Sequence[str]) -> np.ndarray:
    """Texts as float64 [n, categories]; NaN where one is missing, EngramError for one that is no category."""
    encoded = pa.concat_arrays(column.chunks).dictionary_encode()
    found = encoded.dictionary.to_pylist()
    strange = sorted(set(found) - set(categories))
    if strange:
        raise EngramError(f"in the column {name!r}: {unknown('category', strange[0], categories)}")
    known = np.eye(len(categories))[[categories.index(text) for text in found]]
    rows = np.vstack([known, np.full(len(categories), np.nan)])
    return rows[encoded.indices.fill_null(len(found)).to_numpy(zero_copy_only=False)]


def kept(column: Any) -> Column:
    """A column that is only kept: numbers as a tensor [n], others as strings (lists and objects as JSON)."""
    if is_number(column.type):
        found = numbers(column, "")
        return torch.tensor(found.astype(np.int64) if found.dtype.kind == "u" else found)
    entries = column.to_pylist()
    if is_list(column.type) or kinds.is_struct(column.type) or kinds.is_map(column.type):
        return [json.dumps(entry, ensure_ascii=False, default=str) for entry in entries]
    return ["" if entry is None else str(entry) for entry in entries]


def _named(key: int, names: Sequence[str]) -> str:
    if not 0 <= key < len(names):
        raise EngramError(f"the label {key} has no name; the source names {len(names)} classes, counted from 0")
    return names[key]
