"""Where rows come from: files, folders, scikit-learn's sets and the hub, all as pyarrow columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pyarrow.types as kinds

from engram.errors import EngramError, unknown

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
SKLEARN = {
    "digits": "digit",
    **{name: name for name in ("wine", "breast_cancer", "iris", "diabetes", "linnerud")},
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Raw:
    """Columns as they were found.

    `names`: class names by column, where the source states them. `label`: the column that serves as the label
    unless another is asked for; several make numbers. `folder`: what paths are relative to.
    """

    source: str
    columns: Any
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    label: str | tuple[str, ...] = "label"
    folder: Path = Path()


def load(source: str | Path, limit: int | None = None) -> Raw:
    """The first `limit` rows of a source; EngramError for one that is missing, damaged or empty."""
    if limit is not None and limit < 1:
        raise EngramError(f"limit={limit} leaves no rows; give 1 or more, or leave it out")
    scheme, _, name = str(source).partition(":")
    raw = SCHEMES[scheme](name) if scheme in SCHEMES else _path(Path(source))
    if not len(raw.columns):
        raise EngramError(f"{source} holds no rows")
    return Raw(raw.source, _plain(raw.columns.slice(0, limit)), raw.names, raw.label, raw.folder)


def _path(path: Path) -> Raw:
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise EngramError(f"there is no file or folder {path}")
    if path.suffix.lower() not in FILES:
        raise EngramError(f"{path} is of no kind that can be read; give {', '.join(FILES)}, or a folder of images")
    if not path.stat().st_size:
        raise EngramError(f"{path} is empty")
    try:
        columns = FILES[path.suffix.lower()](path)
    except EngramError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or ["damaged"])[0]
        raise EngramError(f"{path} cannot be read as {path.suffix[1:].lower()}: {reason}") from error
    _different(path, columns.column_names)
    return Raw(str(path), columns, _class_names(columns), folder=path.parent)


def _parquet(path: Path) -> Any:
    return pa.parquet.ParquetFile(path).read()


def _csv(path: Path) -> Any:
    data = path.read_bytes()
    if data.count(b'"') % 2:
        raise EngramError(f"{path} is damaged or cut off: a quotation mark is never closed")
    data.decode("utf-8")
    # one thread, so that the error names the row; values may hold line breaks
    return pa.csv.read_csv(
        pa.BufferReader(data),
        pa.csv.ReadOptions(use_threads=False),
        pa.csv.ParseOptions(newlines_in_values=True),
    )


def _jsonl(path: Path) -> Any:
    rows = []
    for number, line in enumerate(path.read_bytes().decode("utf-8-sig").split("\n"), 1):
        if line.strip():
            rows.append(_json_row(path, number, line))
    return _from_rows(path, rows)


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise EngramError(f"{path}: line {number} is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise EngramError(f"{path}: line {number} is no object; write one {{column: value, …}} a line")
    return row


def _json(path: Path) -> Any:
    rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise EngramError(f"{path} is no list of objects; write [{{column: value, …}}, …]")
    return _from_rows(path, rows)


def _from_rows(path: Path, rows: list[dict[str, Any]]) -> Any:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _array(path, name, [row.get(name) for row in rows]) for name in names})


def _array(path: Path, name: str, values: list[Any]) -> Any:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise EngramError(f"{path}: column {name!r} mixes kinds of values ({error})") from error


def _folder(path: Path) -> Raw:
    """One subfolder a class. Ids are the paths inside the folder: other files coming or going move none."""
    inside = (file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() in IMAGES)
    files = sorted((file for file in inside if not any(part[0] == "." for part in file.parts)), key=Path.as_posix)
    if not files:
        raise EngramError(f"the folder {path} holds no images; an image folder has one subfolder for each class")
    classes = [file.parts[0] if len(file.parts) > 1 else None for file in files]
    names = [file.as_posix() for file in files]
    columns: dict[str, Any] = {"id": names, "image": [{"bytes": None, "path": name} for name in names]}
    if any(classes):
        columns["label"] = classes
    return Raw(str(path), pa.table(columns), folder=path)


def _sklearn(name: str) -> Raw:
    if name not in SKLEARN:
        raise unknown("scikit-learn data set", name, SKLEARN)
    from sklearn import datasets

    found = getattr(datasets, f"load_{name}")()
    target = np.asarray(found.target)
    labels = ("label",) if target.ndim == 1 else tuple(found.target_names)
    columns: dict[str, Any] = {"id": [f"{SKLEARN[name]}-{row:04d}" for row in range(len(target))]}
    if name == "digits":
        columns["image"] = pa.FixedShapeTensorArray.from_numpy_ndarray((found.images[:, None] / 16).astype(np.float32))
    else:
        columns |= dict(zip(found.feature_names, np.ascontiguousarray(found.data.T), strict=True))
    columns |= dict(zip(labels, np.ascontiguousarray(target.reshape(len(target), -1).T), strict=True))
    if not np.issubdtype(target.dtype, np.integer):
        return Raw(f"sklearn:{name}", pa.table(columns), label="label" if target.ndim == 1 else labels)
    names = DIGITS if name == "digits" else tuple(map(str, found.target_names))
    return Raw(f"sklearn:{name}", pa.table(columns), {"label": names})


def _hub(name: str) -> Raw:
    """A set of the Hugging Face hub, through `datasets`: the one source that may need the network."""
    import datasets

    repository, _, split = name.partition("@")
    if not repository:
        raise EngramError("hub: needs the name of a data set, as in hub:mnist or hub:mnist@test")
    try:
        found = datasets.load_dataset(repository, split=split or "train")
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EngramError(f"the hub's data set {name!r} cannot be loaded: {reason}") from error
    columns = found.with_format("arrow")[:]
    return Raw(f"hub:{name}", columns, _class_names(columns.cast(found.features.arrow_schema)))


def _class_names(columns: Any) -> dict[str, tuple[str, ...]]:
    """The names of ClassLabel columns, which `datasets` writes into the metadata of its files."""
    try:
        features = json.loads((columns.schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {
        name: tuple(feature["names"])
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


def _different(path: Path, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise EngramError(f"{path} has more than one column {twice!r}; is the first line, the column names, missing?")


def _plain(columns: Any) -> Any:
    """The same columns without the types that say the same in another way."""
    pairs = zip(columns.column_names, columns.columns, strict=True)
    return pa.table({name: column.cast(_plain_type(column.type)) for name, column in pairs})


def _plain_type(kind: Any) -> Any:
    if kinds.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if kinds.is_large_string(kind) or kinds.is_string_view(kind):
        return pa.string()
    return pa.float64() if kinds.is_decimal(kind) or kinds.is_float16(kind) else kind


FILES: dict[str, Callable[[Path], Any]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".json": _json,
}
SCHEMES: dict[str, Callable[[str], Raw]] = {"sklearn": _sklearn, "hub": _hub}
