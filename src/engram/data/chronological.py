"""Chronological streams: tasks in the order of the years in which their data were published.

After Bornschein et al.: NEVIS'22: A Stream of 100 Tasks Sampled from 30 Years of Computer Vision Research. 2022, arXiv
2211.11747. A stream is one small YAML file over data that are at hand:

    stop_year: 2020              # entries of this year and later are left out, unless another year is asked for
    shape: [3, 16, 16]           # what all images are brought to: channels, height, width
    features: 256                # the numbers that a text, or a row of columns, is brought to
    variants: {short: [digits, wine]}
    entries:
      - {name: digits, year: 1998, source: "sklearn:digits"}
      - {name: digits again, year: 2012, of: digits}                      # the same rows and classes come back
      - {name: pairs, year: 2011, of: digits, derive: pairs, kind: multi-label}

An entry's `source` is a file below a folder of data, or whatever `data.readers` reads; `dev`, `dev_test` and `test`
name further ones. Parts that no source gives are drawn from the rows: each row falls into one by a categorical draw of
its own, a function of the seed and its id, so that neither order nor other rows matter, and what is derived from a row
falls where the row does. The fractions are those of published code, which draws row after row from seed 0:

    nothing but rows        train 0.56, dev 0.12, dev_test 0.12, test 0.20
    rows and test rows      train 0.70, dev 0.15, dev_test 0.15
    all but one of the two  train 0.80, and 0.20 for dev or dev_test
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from engram.data.preprocessing import Preprocessing
from engram.data.readers import read_with
from engram.data.sources import SCHEMES
from engram.data.streams import Stage
from engram.data.table import MISSING, Table, Target
from engram.data.task import Task
from engram.errors import EngramError, unknown
from engram.stats.seeds import derive, generator

KINDS = ("classes", "multi-label", "numbers")
PARTS = ("train", "dev", "dev_test", "test")
FRACTIONS: dict[frozenset[str], dict[str, float]] = {
    frozenset({"dev", "dev_test", "test"}): {"train": 0.56, "dev": 0.12, "dev_test": 0.12, "test": 0.20},
    frozenset({"dev", "dev_test"}): {"train": 0.70, "dev": 0.15, "dev_test": 0.15},
    frozenset({"dev"}): {"train": 0.8, "dev": 0.2},
    frozenset({"dev_test"}): {"train": 0.8, "dev_test": 0.2},
    frozenset(): {"train": 1.0},
}  # by the parts that no source gives
LUMA = (0.299, 0.587, 0.114)

Parts = dict[str, Table]


@dataclass(frozen=True)
class Dated(Stage):
    """A task of a chronological stream. Learners see `task` alone: its training rows, and `valid`, the dev rows.

    `kind`: "classes", "multi-label" (labels are 0 or 1, [n, k], one column for each of `task.classes`) or "numbers".
    `dev_test`: what a learner is judged by while it is developed; `test`: once, at the end.
    """

    name: str = ""
    year: int = 0
    kind: str = "classes"
    dev_test: Table = field(default_factory=lambda: Table({}))

    @property
    def dev(self) -> Table:
        """The rows that settings are chosen by."""
        assert self.task.valid is not None
        return self.task.valid


@dataclass(frozen=True)
class Entry:
    """One line of a stream's file. `source`, `dev`, `dev_test`, `test`: sources; `of`: another entry, whose rows come
    back, or with `derive` (rotated, inverted, pairs) come changed. `label`, `text`, `image`, `values`, `limit`: as for
    `read`, the last for each source. `classes`: ids or names, if not all. `vectoriser` of texts: hashing or tfidf."""

    name: str
    year: int
    kind: str = "classes"
    source: str | None = None
    dev: str | None = None
    dev_test: str | None = None
    test: str | None = None
    of: str | None = None
    derive: str | None = None
    label: Any = None
    text: str | None = None
    image: str | None = None
    values: Sequence[str] | None = None
    limit: int | None = None
    classes: Sequence[int | str] | None = None
    vectoriser: str = "hashing"
    fractions: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.year, int):
            raise EngramError(f"the year of {self.name!r} is {self.year!r}; write a whole number")
        if self.kind not in KINDS:
            raise unknown(f"kind of {self.name!r}", self.kind, KINDS)
        if self.derive is not None and self.derive not in DERIVED:
            raise unknown(f"derivation of {self.name!r}", self.derive, DERIVED)
        if self.vectoriser not in VECTORISERS:
            raise unknown(f"vectoriser of {self.name!r}", self.vectoriser, VECTORISERS)
        if (self.source is None) == (self.of is None) or (self.derive is not None and self.of is None):
            raise EngramError(f"{self.name!r} needs either a source, or with `of` the entry whose rows it takes")

    @property
    def key(self) -> str:
        """What its classes belong to: a task that comes back has those that it had."""
        return self.of if self.of is not None and self.derive is None else self.name


@dataclass(frozen=True)
class StreamFile:
    """A stream's file, read. `shape` and `features`: what images and other rows are brought to."""

    entries: tuple[Entry, ...]
    stop_year: int | None = None
    shape: tuple[int, int, int] = (3, 16, 16)
    features: int = 256
    variants: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def chosen(self, variant: str | None, stop_year: int | None, kinds: Iterable[str]) -> list[Entry]:
        """The entries that will come, by year; those of one year in the order of the file."""
        if variant is not None and variant not in self.variants:
            raise unknown("variant of the stream", variant, self.variants)
        names = {entry.name for entry in self.entries} if variant is None else set(self.variants[variant])
        stop = self.stop_year if stop_year is None else stop_year
        wanted = (e for e in self.entries if e.name in names and e.kind in set(kinds))
        return sorted((e for e in wanted if stop is None or e.year < stop), key=lambda e: e.year)

    def entry(self, name: str) -> Entry:
        """An entry by its name."""
        found = {entry.name: entry for entry in self.entries}
        if name not in found:
            raise unknown("entry of the stream", name, found)
        return found[name]


def build(
    path: str | Path,
    *,
    data: str | Path | None = None,
    variant: str | None = None,
    stop_year: int | None = None,
    kinds: Sequence[str] = ("classes", "multi-label"),
    seed: int = 0,
) -> list[Dated]:
    """The tasks of a stream's file, in order of their years; "small" and "sklearn" are files that engram brings.

    `data`: the folder that the file's sources stand in. `variant`: one of the file's, instead of all entries.
    `stop_year`: nothing of this year or later. `kinds`: others are left out. Class ids run on from task to task, so no
    two tasks share one unless the task comes back; ids of rows are "ENTRY/ID". EngramError for a file, an entry or a
    source that cannot be used, naming it. Cost: every source is read whole.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("kind of task", kind, KINDS)
    plan = read_file(path)
    reader = _Reader(plan, None if data is None else Path(data), seed)
    stages, ids, start = [], dict[str, tuple[int, ...]](), 0
    for index, entry in enumerate(plan.chosen(variant, stop_year, kinds)):
        parts = reader.parts(entry)
        if entry.key not in ids:
            count = _width(parts) if entry.kind != "numbers" else 0
            ids[entry.key] = tuple(range(start, start + count))
            start += count
        stages.append(_dated(entry, parts, ids[entry.key], index))
    return stages


def read_file(path: str | Path) -> StreamFile:
    """A stream's file, checked; EngramError says what is wrong with it."""
    file = Path(path)
    shipped = Path(__file__).parents[1] / "configs" / "streams" / f"{path}.yaml"
    if not file.is_file():
        if not shipped.is_file():
            raise unknown("stream (or YAML file)", str(path), [found.stem for found in shipped.parent.glob("*.yaml")])
        file = shipped
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise EngramError(f"the stream {file} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or not content.get("entries") or not isinstance(content["entries"], list):
        raise EngramError(f"the stream {file} has no entries; write a list of them under `entries`")
    try:
        entries = tuple(_record(Entry, entry, "entry") for entry in content["entries"])
        plan = _record(StreamFile, {**content, "entries": entries}, "stream")
        _checked(plan)
    except EngramError as error:
        raise EngramError(f"{file.name}: {error}") from error
    return plan


def _record(cls: type, given: Any, what: str) -> Any:
    """A dataclass from the file's mapping."""
    if not isinstance(given, Mapping):
        raise EngramError(f"an {what} is a mapping of keys to values, not {given!r}")
    known = [f.name for f in fields(cls)]
    for key in given:
        if key not in known:
            raise unknown(f"key of an {what}", str(key), known)
    lacking = [key for key in ("name", "year") if cls is Entry and key not in given]
    if lacking:
        raise EngramError(f"the entry {dict(given)} has no {lacking[0]}")
    return cls(**given)


def _checked(plan: StreamFile) -> None:
    names = [entry.name for entry in plan.entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise EngramError(f"two entries have the name {twice!r}; for a task that comes back, use `of`")
    for entry in plan.entries:
        if entry.of is not None and plan.entry(entry.of).of is not None:
            raise EngramError(
                f"{entry.name!r} is of {entry.of!r}, which has no rows of its own; name the entry that has"
            )
    if not (isinstance(plan.shape, Sequence) and len(plan.shape) == 3 and all(map(_positive, plan.shape))):
        raise EngramError(f"shape is {plan.shape!r}; write channels, height and width, as in [3, 16, 16]")
    if not isinstance(plan.stop_year, int | None):
        raise EngramError(f"stop_year is {plan.stop_year!r}; write a whole number")
    if not _positive(plan.features):
        raise EngramError(f"features is {plan.features!r}; write a number from 1")
    for name in [name for names in plan.variants.values() for name in names]:
        plan.entry(name)


def _positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0


# --- reading


class _Reader:
    """Parts of entries; what several entries take is read once."""

    def __init__(self, plan: StreamFile, data: Path | None, seed: int) -> None:
        self.plan, self.data, self.seed = plan, data, seed
        self.read: dict[str, Parts] = {}

    def parts(self, entry: Entry) -> Parts:
        """The four tables of an entry, with labels from 0."""
        base = entry if entry.of is None else self.plan.entry(entry.of)
        if base.name not in self.read:
            self.read[base.name] = self._own(base)
        found = self.read[base.name]
        if entry.derive is None:
            return found
        return {part: _named(self._derived(entry, part, table), entry.name) for part, table in found.items()}

    def _derived(self, entry: Entry, part: str, table: Table) -> Table:
        if "pixel_values" not in table.inputs or table.target != Target.CLASSES:
            raise EngramError(f"{entry.name!r} is derived from {entry.of!r}, which holds no images with classes")
        return DERIVED[str(entry.derive)](table, generator("pairs", self.seed, entry.name, part))

    def _own(self, entry: Entry) -> Parts:
        given: Parts = {}
        preprocessing: Preprocessing | None = None
        for part, source in zip(PARTS, (entry.source, entry.dev, entry.dev_test, entry.test), strict=True):
            if source is not None:
                given[part], preprocessing = self._rows(entry, source, preprocessing)
        parts = self._split(entry, given)
        empty = [part for part, table in parts.items() if not len(table)]
        if empty:
            raise EngramError(f"no row of {entry.name!r} is left for {empty[0]}; give more rows, or other fractions")
        return {part: _named(table, entry.name) for part, table in self._brought(entry, parts).items()}

    def _rows(self, entry: Entry, source: str, plan: Preprocessing | None) -> tuple[Table, Preprocessing]:
        place = source
        if source.partition(":")[0] not in SCHEMES:
            if self.data is None and not Path(source).is_absolute():
                raise EngramError(f"{entry.name!r} is read from {source}; say with data= in which folder that stands")
            place = str((self.data or Path()) / source)
        table, found = read_with(
            place,
            label=entry.label,
            text=entry.text,
            image=entry.image,
            values=entry.values,
            limit=entry.limit,
            image_size=self.plan.shape[1:],
            standardise=False,
            preprocessing=plan,
        )
        return _checked_kind(entry, table), found

    def _split(self, entry: Entry, given: Parts) -> Parts:
        missing = frozenset(part for part in PARTS if part not in given)
        if missing not in FRACTIONS and entry.fractions is None:
            raise EngramError(f"{entry.name!r} has no {' and '.join(sorted(missing))}; state its fractions")
        shares = dict(entry.fractions or FRACTIONS[missing])
        if shares.keys() != missing | {"train"} or abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) <= 0:
            wanted = ", ".join(part for part in PARTS if part in missing | {"train"})
            raise EngramError(f"the fractions of {entry.name!r} are {shares}; they are of {wanted}, and add up to 1")
        return {**given, **split(given["train"], shares, self.seed)}

    def _brought(self, entry: Entry, parts: Parts) -> Parts:
        """The same rows in the stream's shapes."""
        if "pixel_values" in parts["train"].inputs:
            shape = self.plan.shape
            return {
                part: _with(table, "pixel_values", fitted(table.inputs["pixel_values"], shape))
                for part, table in parts.items()
            }
        wide = self._features(entry, parts)
        return {part: _with(table, "values", values) for (part, table), values in zip(parts.items(), wide, strict=True)}

    def _features(self, entry: Entry, parts: Parts) -> list[Tensor]:
        width = self.plan.features
        if "text" in parts["train"].extra and not parts["train"].inputs:
            texts = [list(map(str, table.extra["text"])) for table in parts.values()]
            place = list(parts).index("train")
            return VECTORISERS[entry.vectoriser](texts, texts[place], width)
        columns = [table.inputs["values"].double() for table in parts.values()]
        if columns[0].shape[1] > width:
            raise EngramError(f"{entry.name!r} has {columns[0].shape[1]} columns, and the stream {width} features")
        spread, middle = torch.std_mean(parts["train"].inputs["values"].double(), 0, correction=0)
        spread = torch.where(spread > 1e-9, spread, 1.0)
        return [F.pad((x - middle) / spread, (0, width - x.shape[1])).float() for x in columns]


def split(table: Table, fractions: Mapping[str, float], seed: int) -> Parts:
    """The rows cut into parts, each by a draw of its own, a function of (seed, id): disjoint, and together all rows."""
    draws = np.array([derive("part", seed, id) / 2**63 for id in table.ids])
    edges = np.cumsum(list(fractions.values()))
    part = np.searchsorted(edges / edges[-1], draws, side="right")
    return {name: table.take(torch.from_numpy(np.flatnonzero(part == k))) for k, name in enumerate(fractions)}


def fitted(pixels: Tensor, shape: Sequence[int]) -> Tensor:
    """Images [n, c, h, w], of levels 0 to 255 or floats from 0 to 1, as uint8 of another shape.

    Sizes by bilinear interpolation with a filter against aliasing; grey is repeated, RGB weighed to grey (ITU-R 601).
    EngramError for any other change of channels.
    """
    x = pixels.float() if pixels.dtype == torch.uint8 else 255 * pixels.float()
    if x.shape[1] != shape[0]:
        if {x.shape[1], shape[0]} != {1, 3}:
            raise EngramError(f"images of {x.shape[1]} channels cannot be brought to {shape[0]}")
        weights = torch.tensor(LUMA).view(1, 3, 1, 1)
        x = x.repeat(1, 3, 1, 1) if shape[0] == 3 else (weights * x).sum(1, keepdim=True)
    if tuple(x.shape[2:]) != tuple(shape[1:]):
        x = F.interpolate(x, size=tuple(shape[1:]), mode="bilinear", antialias=True)
    return x.round().clamp(0, 255).to(torch.uint8)


def _checked_kind(entry: Entry, table: Table) -> Table:
    """The table, if its labels are of the kind that the entry states; rows of the classes that it asks for."""
    wanted = Target.CLASSES if entry.kind == "classes" else Target.NUMBERS
    if table.target != wanted:
        raise EngramError(f"{entry.name!r} is of the kind {entry.kind}, and its labels are {table.target}")
    if entry.kind == "multi-label" and not is_several(table):
        raise EngramError(f"the labels of {entry.name!r} are not all 0 or 1, as those of a multi-label task are")
    if entry.classes is None:
        return table
    known = {name: id for id, name in table.names.items()}
    for name in entry.classes:
        if name not in known and name not in table.names:
            raise unknown(f"class of {entry.name!r}", str(name), known)
    return table.of_classes([known[name] if name in known else int(name) for name in entry.classes])


def is_several(table: Table) -> bool:
    """Has each row any number of labels: is every number 0 or 1, or missing?"""
    labels = table.labels
    if labels is None or table.target != Target.NUMBERS:
        return False
    return bool(((labels == 0) | (labels == 1) | labels.isnan()).all())


# --- texts


def _hashed(texts: Sequence[Sequence[str]], train: Sequence[str], width: int) -> list[Tensor]:
    """Words and pairs of words, hashed to so many numbers; rows of length 1. Nothing is learnt from any row."""
    from sklearn.feature_extraction.text import HashingVectorizer

    made = HashingVectorizer(n_features=width, ngram_range=(1, 2), alternate_sign=True, norm="l2")
    return [torch.from_numpy(made.transform(part).toarray()).float() for part in texts]


def _tfidf(texts: Sequence[Sequence[str]], train: Sequence[str], width: int) -> list[Tensor]:
    """The words that are most frequent in the training rows, weighed by inverse document frequency there."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    made = TfidfVectorizer(max_features=width, sublinear_tf=True).fit(train)
    found = [torch.from_numpy(made.transform(part).toarray()).float() for part in texts]
    return [F.pad(x, (0, width - x.shape[1])) for x in found]


Vectoriser = Callable[[Sequence[Sequence[str]], Sequence[str], int], list[Tensor]]
VECTORISERS: dict[str, Vectoriser] = {"hashing": _hashed, "tfidf": _tfidf}


# --- derived tasks


def _rotated(table: Table, draws: torch.Generator) -> Table:
    """A quarter turn."""
    pixels = table.inputs["pixel_values"]
    if pixels.shape[2] != pixels.shape[3]:
        raise EngramError("images are turned by a quarter, so the stream's shape has to be square")
    return _with(table, "pixel_values", torch.rot90(pixels, 1, (2, 3)).contiguous())


def _inverted(table: Table, draws: torch.Generator) -> Table:
    """Black for white."""
    return _with(table, "pixel_values", 255 - table.inputs["pixel_values"])


def _pairs(table: Table, draws: torch.Generator) -> Table:
    """Each image beside another one of the same part, squeezed to the old width; labelled with the classes of both."""
    pixels, labels = table.inputs["pixel_values"], table.labels
    assert labels is not None
    partner = torch.randperm(len(pixels), generator=draws)
    both = fitted(torch.cat([pixels, pixels[partner]], 3), pixels.shape[1:])
    told = torch.zeros(len(labels), max(table.names, default=int(labels.max())) + 1)
    for own in (labels, labels[partner]):
        known = own != MISSING
        told[known.nonzero()[:, 0], own[known]] = 1.0
    return replace(_with(table, "pixel_values", both), labels=told)


DERIVED: dict[str, Callable[[Table, torch.Generator], Table]] = {
    "rotated": _rotated,
    "inverted": _inverted,
    "pairs": _pairs,
}


# --- tables and stages


def _with(table: Table, name: str, values: Tensor) -> Table:
    return Table({name: values}, table.labels, table.ids, names=table.names)


def _named(table: Table, entry: str) -> Table:
    """Ids under the name of the entry: those of the rows that it was derived from give way."""
    return replace(table, ids=tuple(f"{entry}/{id.partition('/')[2] or id}" for id in table.ids))


def _classes(parts: Parts) -> list[int]:
    """The classes that occur in any part."""
    return sorted({c for table in parts.values() for c in table.classes})


def _width(parts: Parts) -> int:
    """How many classes, or columns of labels, there are."""
    labels = parts["train"].labels
    assert labels is not None
    return labels.shape[1] if parts["train"].target == Target.NUMBERS else len(_classes(parts))


def _dated(entry: Entry, parts: Parts, ids: tuple[int, ...], index: int) -> Dated:
    local = list(range(len(ids))) if parts["train"].target == Target.NUMBERS else _classes(parts)
    train, dev, dev_test, test = (_renumbered(parts[part], local, ids) for part in PARTS)
    task = Task(train, dev, index, ids, train.names)
    return Dated(task, test, entry.name, entry.year, entry.kind, dev_test)


def _renumbered(table: Table, local: list[int], ids: tuple[int, ...]) -> Table:
    """Class ids of the stream in place of those of the source."""
    names = {id: table.names.get(c, str(c)) for c, id in zip(local, ids, strict=True)}
    if table.target != Target.CLASSES or table.labels is None:
        return replace(table, names=names)
    lookup = torch.full((max(local, default=0) + 2,), MISSING)
    lookup[local] = torch.tensor(ids)
    return replace(table, labels=lookup[table.labels], names=names)
