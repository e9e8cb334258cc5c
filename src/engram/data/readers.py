"""Readers: any source of rows as a table, and a table cut into rows to learn from and rows to test with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.types as kinds
import torch
from torch import Tensor

from engram.data.columns import (
    class_ids,
    class_keys,
    class_names,
    is_bytes,
    is_list,
    is_number,
    is_tensor,
    kept,
    numbers,
)
from engram.data.images import decode
from engram.data.preprocessing import Preprocessing, fit_values
from engram.data.preprocessing import values as values_of
from engram.data.sources import Raw, load
from engram.data.table import Column, Ids, Table, Target
from engram.errors import EngramError, unknown
from engram.stats.seeds import derive

Label = str | Sequence[str] | Literal[False] | None
Size = int | Sequence[int] | None


def read(source: str | Path, **settings: Any) -> Table:
    """The rows of a source; `read_with` says more and takes the same arguments."""
    return read_with(source, **settings)[0]


def read_with(
    source: str | Path,
    *,
    id: str | None = None,
    label: Label = None,
    text: str | None = None,
    image: str | None = None,
    values: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    limit: int | None = None,
    image_size: Size = None,
    standardise: bool = True,
    keep: Sequence[str] = (),
) -> tuple[Table, Preprocessing]:
    """The rows of a source, and what was derived from them: pass that on as `preprocessing` to read test or
    new rows.

    `source`: a .parquet, .csv, .jsonl or .json file; a folder of images with a subfolder for each class;
    "sklearn:NAME" (digits, wine, breast_cancer, iris, diabetes, linnerud); "hub:NAME" or "hub:NAME@SPLIT",
    which alone may need the network. `limit`: the first so many rows.

    `id`: the column of ids; left out, "id" or else row numbers ("row-000000"), whatever the file is called.
    `label`: the column of labels; left out, "label"; False reads rows without labels. Texts, whole numbers
    and truth values are classes, numbered in ascending order (so 0..C-1 stay what they are; null, "" and -1
    are a missing label). Decimal numbers, and all columns when a list of them is given, are numbers [n, k].
    `text`: becomes the extra column "text"; left out, "text". `image`: becomes uint8 `pixel_values` [n, c, h,
    w], resized to `image_size` (one number, or height and width). `values`: the columns that become float32
    `values` [n, d]. Left out, they are all with numbers or text where rows have neither text nor image. Texts
    are one-hot encoded; numbers get mean 0 and standard deviation 1 (`standardise`). Other columns, and those
    named in `keep`, go to `extra` as they are: numbers as tensors, all else as strings.

    Raises EngramError for a source that is missing, empty or damaged, columns and classes that do not exist,
    ids that are not unique, missing values, and images of several sizes.
    """
    raw = load(source, limit)
    try:
        roles = _roles(raw, id, label, text, image, values, preprocessing)
        ids = _ids(raw, roles.id)
        plan = preprocessing or _fit(raw, roles, ids, standardise)
        pixels = _images(raw, roles, ids, plan, _size(image_size))
        if pixels is not None and preprocessing is None:
            plan = replace(plan, image_shape=tuple(pixels.shape[1:]), resized=image_size is not None)
        return _table(raw, roles, ids, plan, pixels, keep).checked(), plan
    except EngramError as error:
        raise EngramError(f"{raw.source}: {error}") from error


@dataclass(frozen=True)
class Roles:
    """Which column of a source serves as what; `numbers`: labels are numbers even where they are whole."""

    id: str | None
    label: tuple[str, ...]
    numbers: bool
    text: str | None
    image: str | None
    values: tuple[str, ...]

    @property
    def used(self) -> set[str | None]:
        """The columns that are not merely kept."""
        return {self.id, *self.label, self.text, self.image, *self.values}


def _roles(
    raw: Raw,
    id: str | None,
    label: Label,
    text: str | None,
    image: str | None,
    values: Sequence[str] | None,
    plan: Preprocessing | None,
) -> Roles:
    """What was asked for, else what the training rows had, else what the columns' names and types suggest."""
    present = raw.columns.column_names
    asked = _label_columns(raw, label, plan)
    if id is None and "id" in present:
        id = "id"
    if text is None:
        text = plan.text if plan else _text_column(raw, asked)
    if image is None:
        image = plan.image if plan else _image_column(raw, asked)
    roles = Roles(id, asked, len(asked) > 1 or not isinstance(label, str | None), text, image, ())
    chosen = plan.columns if plan else _value_columns(raw, roles, values)
    for name in (id, text, image, *([] if plan else chosen)):
        _present(raw, name)
    return replace(roles, values=tuple(chosen))


def _label_columns(raw: Raw, asked: Label, plan: Preprocessing | None) -> tuple[str, ...]:
    if asked is False:
        return ()
    wanted = asked if asked is not None else plan.label if plan else raw.label
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    missing = [name for name in names if name not in raw.columns.column_names]
    if missing:
        raise EngramError(
            f"there is no label column {missing[0]!r}; say with label= (--label) which it is of "
            f"{', '.join(raw.columns.column_names)}, or read rows without labels with label=False"
        )
    return names


def _text_column(raw: Raw, labels: Sequence[str]) -> str | None:
    there = "text" in raw.columns.column_names and "text" not in labels
    return "text" if there and kinds.is_string(raw.columns["text"].type) else None


def _image_column(raw: Raw, labels: Sequence[str]) -> str | None:
    found = [name for name, kind in _types(raw) if (is_bytes(kind) or is_tensor(kind)) and name not in labels]
    if len(found) > 1 and "image" not in found:
        raise EngramError(f"the columns {', '.join(found)} hold images; say which one with image= (--image)")
    return "image" if "image" in found else next(iter(found), None)


def _value_columns(raw: Raw, roles: Roles, asked: Sequence[str] | None) -> Sequence[str]:
    if asked is not None or roles.text is not None or roles.image is not None:
        return asked or ()
    found = [name for name, kind in _types(raw) if is_number(kind) or kinds.is_string(kind)]
    usual = {raw.label} if isinstance(raw.label, str) else set(raw.label)  # nothing to learn from, asked for or not
    found = [name for name in found if name not in roles.used | usual]
    if not found:
        raise EngramError("no column is left to learn from; name some with values=, text= (--text) or image= (--image)")
    return found


def _types(raw: Raw) -> list[tuple[str, Any]]:
    return [(entry.name, entry.type) for entry in raw.columns.schema]


def _present(raw: Raw, name: str | None) -> None:
    if name is not None and name not in raw.columns.column_names:
        raise unknown("column", name, raw.columns.column_names)


def _ids(raw: Raw, name: str | None) -> Ids:
    if name is None:
        return tuple(f"row-{row:06d}" for row in range(len(raw.columns)))
    found = raw.columns[name].to_pylist()
    if None in found:
        raise EngramError(f"row {found.index(None)} (counted from 0) has no id in the column {name!r}")
    return tuple(map(str, found))


def _fit(raw: Raw, roles: Roles, ids: Ids, standardise: bool) -> Preprocessing:
    """What these rows, as training rows, determine; the shape of images is not known yet."""
    target = _target(raw, roles)
    names: tuple[str, ...] = ()
    if target == Target.CLASSES:
        stated = raw.names.get(roles.label[0], ())
        names = stated or class_names(class_keys(raw.columns[roles.label[0]])[1])
        if not names:
            raise EngramError(f"no row has a label in the column {roles.label[0]!r}; read them with label=False")
    fitted = fit_values(raw.columns, roles.values, ids, standardise) if roles.values else {}
    return Preprocessing(target.value, roles.label, names, text=roles.text, image=roles.image, **fitted)


def _target(raw: Raw, roles: Roles) -> Target:
    if not roles.label:
        return Target.NONE
    kind = raw.columns[roles.label[0]].type
    return Target.NUMBERS if roles.numbers or kinds.is_floating(kind) or is_list(kind) else Target.CLASSES


def _labels(raw: Raw, roles: Roles, plan: Preprocessing) -> Tensor | None:
    """Class ids [n] or numbers [n, k], as the training rows had them."""
    if not roles.label:
        return None
    if plan.target == Target.NUMBERS:
        parts = [numbers(raw.columns[name], name) for name in roles.label]
        return torch.tensor(np.concatenate([part.reshape(len(part), -1) for part in parts], 1), dtype=torch.float32)
    name = roles.label[0]
    if _target(raw, roles) == Target.NUMBERS:
        raise EngramError(f"the column {name!r} holds {raw.columns[name].type}; the training rows had classes")
    return class_ids(*class_keys(raw.columns[name], raw.names.get(name, ())), plan.classes)


def _images(raw: Raw, roles: Roles, ids: Ids, plan: Preprocessing, size: tuple[int, int] | None) -> Tensor | None:
    """uint8 [n, c, h, w] from files; tensors as they are."""
    if roles.image is None:
        return None
    column, shape = raw.columns[roles.image], plan.image_shape
    if is_tensor(column.type):
        found = torch.tensor(numbers(column, roles.image))
    else:
        wanted = (shape[1], shape[2]) if shape and plan.resized else size
        channels = shape[0] if shape else None
        found = decode(_files(raw, roles.image, ids), ids, channels=channels, size=wanted)
    if shape and found.shape[1:] != shape:
        raise EngramError(f"these images have the shape {tuple(found.shape[1:])}, those of the training rows {shape}")
    return found


def _files(raw: Raw, name: str, ids: Ids) -> list[bytes | Path]:
    """The contents of images, or where only a path is given, the path."""
    column = raw.columns[name]
    if not (is_bytes(column.type) or kinds.is_string(column.type)):
        raise EngramError(f"the column {name!r} holds {column.type}, no images")
    cells = [cell if isinstance(cell, dict) else {"bytes": cell} for cell in column.to_pylist()]
    found = [cell["bytes"] or cell.get("path") for cell in cells]
    if None in found:
        raise EngramError(f"the row {ids[found.index(None)]!r} has no image")
    return [cell if isinstance(cell, bytes) else raw.folder / str(cell) for cell in found]


def _size(size: Size) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or min(sides) < 1:
        raise EngramError(f"image_size={size} is no size; give one number, or height and width")
    return sides[0], sides[1]


def _table(raw: Raw, roles: Roles, ids: Ids, plan: Preprocessing, pixels: Tensor | None, keep: Sequence[str]) -> Table:
    labels = _labels(raw, roles, plan)
    inputs = {} if pixels is None else {"pixel_values": pixels}
    if plan.columns:
        inputs["values"] = values_of(raw.columns, ids, plan)
    for name in keep:
        _present(raw, name)
    left = [name for name, kind in _types(raw) if name not in roles.used and not is_bytes(kind)]
    others = [*left, *(name for name in keep if name not in left)]
    extra: dict[str, Column] = {name: kept(raw.columns[name]) for name in others}
    if roles.text is not None:
        extra["text"] = kept(raw.columns[roles.text])
    return Table(inputs, labels, ids, extra, {} if labels is None else dict(enumerate(plan.classes)))


def train_test(
    table: Table, share: float, seed: int = 0, how: Literal["ids", "sklearn"] = "ids"
) -> tuple[Table, Table]:
    """Rows to learn from, and the `share` of rows to test with; stratified where labels are classes.

    "ids": a class's rows are ordered by a hash of (seed, id), and the first round(share · rows) are for
    testing, but at least one, and never the last one. So the order of rows does not matter, and a row that
    comes or goes moves at most one other row of its class. "sklearn": the rows, in the order, of
    scikit-learn's `train_test_split` with `test_size=share, stratify=labels, random_state=seed`, which
    published figures were made with. EngramError where one side would be empty.
    """
    if how not in SPLITS:
        raise unknown("way to split", how, SPLITS)
    if not 0 < share < 1:
        raise EngramError(f"a share of {share} for testing leaves one side empty; give a number between 0 and 1")
    train, test = SPLITS[how](table, share, seed)
    if not (len(train) and len(test)):
        raise EngramError(f"{len(table)} rows cannot be split so that a share of {share} is for testing")
    return table.take(torch.from_numpy(train)), table.take(torch.from_numpy(test))


def _split_by_ids(table: Table, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    keys = np.array([derive("split", seed, id) for id in table.ids])
    groups = _classes(table)
    test = np.zeros(len(table), bool)
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        count = min(max(int(share * len(rows) + 0.5), 1), len(rows) - 1)
        test[rows[keys[rows].argsort(kind="stable")[:count]]] = True
    return np.flatnonzero(~test), np.flatnonzero(test)


def _split_as_sklearn(table: Table, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split

    classes = _classes(table) if table.target == Target.CLASSES else None
    try:
        train, test = train_test_split(np.arange(len(table)), test_size=share, stratify=classes, random_state=seed)
    except ValueError as error:
        raise EngramError(f"scikit-learn cannot split these {len(table)} rows: {error}") from error
    return train, test


def _classes(table: Table) -> np.ndarray:
    classes = table.target == Target.CLASSES and table.labels is not None
    return table.labels.numpy() if classes else np.zeros(len(table), int)  # type: ignore[union-attr]


SPLITS: dict[str, Callable[[Table, float, int], tuple[np.ndarray, np.ndarray]]] = {
    "ids": _split_by_ids,
    "sklearn": _split_as_sklearn,
}
