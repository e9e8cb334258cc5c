"""A timeline's config: read, checked and completed before any work starts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engram.core.forgetter import Forgetter
from engram.core.learner import Learner, batched
from engram.core.learning import GradientLearner
from engram.core.probe import Probe
from engram.core.settings import describe, make, name_of, settings
from engram.errors import EngramError, at_least, unknown

KEYS = (
    "title",
    "seed",
    "device",
    "precision",
    "batch_size",
    "data",
    "stream",
    "learners",
    "forgetter",
    "probes",
    "events",
)
TEXT, WHOLE = (str, "text"), (int, "a whole number")
DATA: dict[str, tuple[Any, str]] = {  # the keys of data: what their values are, in types and in words
    "source": (str | Path, "text"),
    "test": (str | Path, "text"),
    "id": TEXT,
    "label": (str | list | tuple | bool, "text, a list of texts, or false"),
    "text": TEXT,
    "image": TEXT,
    "share": (int | float, "a number"),
    "limit": WHOLE,
    "image_size": (int | list | tuple, "a whole number, or [height, width]"),
    "tokenizer": (str | Path | Mapping, "text, or {vocabulary: …, longest: …}"),
    "more": (list | tuple, "a list of files"),
}
FORGET_KEYS = ("records", "classes", "where", "method", "probes")


@dataclass(frozen=True)
class Event:
    """`kind`: learn (`count` tasks, None for all that are left), or forget (`what`: {records|classes|where: …})."""

    kind: str
    count: int | None = None
    what: Mapping[str, Any] = field(default_factory=dict)
    method: Forgetter | None = None
    probes: tuple[Probe, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A checked config: methods are made, defaults are filled in."""

    title: str
    seed: int
    device: str
    precision: str
    data: Mapping[str, Any]
    stream: Mapping[str, Any]
    learners: Mapping[str, Learner]
    events: tuple[Event, ...]

    def resolved(self) -> dict[str, Any]:
        """The complete config, every setting of every method included; reading it gives the same plan."""
        return {
            "title": self.title,
            "seed": self.seed,
            "device": self.device,
            "precision": self.precision,
            "data": dict(self.data),
            "stream": dict(self.stream),
            "learners": {name: describe(learner) for name, learner in self.learners.items()},
            "events": [_written(event) for event in self.events],
        }


def read_plan(config: Mapping[str, Any]) -> Plan:
    """Check a config. EngramError names a wrong key or method and the nearest right one, or what is missing."""
    _known("key", config, KEYS)
    for key in ("data", "learners", "events"):
        if not config.get(key):
            raise EngramError(f"the config has no {key!r}; it needs data, learners and events")
    data = _source(config["data"])
    forgetter = _method(config.get("forgetter"))
    probes = _probes(config.get("probes"))
    learners = {name: _learner(name, spec) for name, spec in _named(config["learners"]).items()}
    if config.get("batch_size") is not None:
        learners = _batched(learners, _whole("batch_size", config["batch_size"], 1))
    return Plan(
        title=str(config.get("title") or "A timeline"),
        seed=_whole("seed", config.get("seed", 0)),
        device=str(config.get("device") or "cpu"),
        precision=str(config.get("precision") or "float32"),
        data=data,
        stream=_stream(config.get("stream") or {"scenario": "single"}),
        learners=learners,
        events=tuple(_event(spec, forgetter, probes) for spec in _listed(config["events"])),
    )


def _learner(name: str, spec: Any) -> Learner:
    learner = make(spec)
    if not isinstance(learner, Learner):
        raise EngramError(f"learners: {name} is {name_of(learner)}, which is no learner")
    if isinstance(learner, GradientLearner) and learner.epochs == 0:
        raise EngramError(f"learners: {name} learns nothing in epochs: 0; give 1 or more")
    return learner


def _batched(learners: Mapping[str, Learner], size: int) -> dict[str, Learner]:
    """The learners, with this batch size wherever they have one."""
    able = {name: batched(learner, size) for name, learner in learners.items() if "batch_size" in settings(learner)}
    if not able:
        kinds = ", ".join(f"{name} ({name_of(learner)})" for name, learner in learners.items())
        raise EngramError(f"no learner of this run has a batch_size: {kinds}; leave it out")
    return {**learners, **able}


def _event(spec: Any, forgetter: Forgetter | None, probes: tuple[Probe, ...]) -> Event:
    if isinstance(spec, str):
        spec = {spec: "all" if spec == "learn" else {}}
    if not isinstance(spec, Mapping) or len(spec) != 1 or next(iter(spec)) not in ("learn", "forget"):
        raise EngramError(f"an event is written as 'learn: COUNT or all', or 'forget: {{…}}'; not {spec!r}")
    [(kind, value)] = spec.items()
    if kind == "learn":
        return Event("learn", None if value == "all" else _whole("learn", value, 1))
    if not isinstance(value, Mapping):
        raise EngramError(f"forget takes records, classes or where, as in 'forget: {{classes: [3]}}'; not {value!r}")
    _known("key of a forget event", value, FORGET_KEYS)
    what = {key: _asked(key, value[key]) for key in ("records", "classes", "where") if key in value}
    if len(what) != 1:
        raise EngramError(
            f"a forget event names one of records, classes or where; this one has {sorted(what) or 'none'}"
        )
    own = _probes(value["probes"]) if "probes" in value else probes
    return Event("forget", what=what, method=_method(value.get("method")) or forgetter, probes=own)


def _asked(key: str, value: Any) -> Any:
    """Classes and ids as a list, also where there is one; a number of records, and a condition, as they are."""
    plain = value is None or key == "where" or (key == "records" and isinstance(value, int))
    return value if plain else _listed(value)


def _written(event: Event) -> dict[str, Any]:
    if event.kind == "learn":
        return {"learn": "all" if event.count is None else event.count}
    method = {} if event.method is None else {"method": describe(event.method)}
    return {"forget": {**event.what, **method, "probes": [describe(probe) for probe in event.probes]}}


def _method(spec: Any) -> Forgetter | None:
    method = None if spec is None else make(spec, wing="forget")
    if method is not None and not isinstance(method, Forgetter):
        raise EngramError(f"{name_of(method)} is no forgetter")
    return method


def _probes(specs: Any) -> tuple[Probe, ...]:
    probes = tuple(make(spec, wing="audit") for spec in _listed(specs or []))
    for probe in probes:
        if not isinstance(probe, Probe):
            raise EngramError(f"{name_of(probe)} is no probe; engram methods --wing audit lists them")
    return probes


def _source(data: Any) -> dict[str, Any]:
    data = {"source": data} if isinstance(data, str) else data
    if not isinstance(data, Mapping) or not data.get("source"):
        raise EngramError("data needs a 'source', such as sklearn:digits or a file")
    _known("key of data", data, tuple(DATA))
    found = {key: value for key, value in data.items() if value is not None}
    for key, value in found.items():
        kind, words = DATA[key]
        if not isinstance(value, kind):
            raise EngramError(f"{key} of data takes {words}, not {value!r}")
    return found


def _stream(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise EngramError(f"stream is written as {{scenario: …, …}}, not {given!r}")
    for key in ("base", "increment", "tasks", "shots", "seed"):
        if given.get(key) is not None:
            _whole(f"{key} of the stream", given[key])
    return dict(given)


def _named(learners: Any) -> dict[str, Any]:
    """Learners by name; one without a name of its own is called by its class. Names are those of directories too."""
    if isinstance(learners, Mapping) and "name" not in learners:
        pairs = [(str(name), spec) for name, spec in learners.items()]
    else:
        pairs = [(_own_name(spec), spec) for spec in _listed(learners)]
    names = [name for name, _ in pairs]
    for name in names:
        if not re.fullmatch(r"\w[\w .+-]*", name):
            raise EngramError(f"learners: {name!r} cannot be the name of a directory; use letters, digits, . - + and _")
        if names.count(name) > 1:
            raise EngramError(f"two learners are called {name}; give them names, as in {{first: …, second: …}}")
    return dict(pairs)


def _own_name(spec: Any) -> str:
    name = spec.get("name", "") if isinstance(spec, Mapping) else spec
    return str(name).split(".")[-1]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _whole(name: str, value: Any, least: float = -math.inf) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise EngramError(f"{name} takes a whole number, not {value!r}")
    at_least(name, value, least)
    return value


def _known(kind: str, given: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    for key in given:
        if key not in allowed:
            raise unknown(kind, key, allowed)
