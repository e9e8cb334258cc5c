"""A timeline's config: read, checked and completed before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engram.core.forgetter import Forgetter
from engram.core.learner import Learner
from engram.core.probe import Probe
from engram.core.settings import describe, make, name_of
from engram.errors import EngramError, unknown

KEYS = ("title", "seed", "device", "precision", "data", "stream", "learners", "forgetter", "probes", "events")
DATA_KEYS = ("source", "test", "id", "label", "text", "image", "share", "limit", "image_size", "tokenizer", "more")
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
    probes = tuple(make(spec, wing="audit") for spec in _listed(config.get("probes", [])))
    learners = {name: make(spec) for name, spec in _named(config["learners"]).items()}
    for name, learner in learners.items():
        if not isinstance(learner, Learner):
            raise EngramError(f"learners: {name} is {name_of(learner)}, which is no learner")
    return Plan(
        title=str(config.get("title", "A timeline")),
        seed=_whole("seed", config.get("seed", 0)),
        device=str(config.get("device", "cpu")),
        precision=str(config.get("precision", "float32")),
        data=data,
        stream=dict(config.get("stream") or {"scenario": "single"}),
        learners=learners,
        events=tuple(_event(spec, forgetter, probes) for spec in _listed(config["events"])),
    )


def _event(spec: Any, forgetter: Forgetter | None, probes: tuple[Probe, ...]) -> Event:
    if isinstance(spec, str):
        spec = {spec: "all" if spec == "learn" else {}}
    if not isinstance(spec, Mapping) or len(spec) != 1 or next(iter(spec)) not in ("learn", "forget"):
        raise EngramError(f"an event is written as 'learn: COUNT or all', or 'forget: {{…}}'; not {spec!r}")
    [(kind, value)] = spec.items()
    if kind == "learn":
        return Event("learn", None if value == "all" else _whole("learn", value))
    if not isinstance(value, Mapping):
        raise EngramError(f"forget takes records, classes or where, as in 'forget: {{classes: [3]}}'; not {value!r}")
    _known("key of a forget event", value, FORGET_KEYS)
    what = {key: value[key] for key in ("records", "classes", "where") if key in value}
    if len(what) != 1:
        raise EngramError(
            f"a forget event names one of records, classes or where; this one has {sorted(what) or 'none'}"
        )
    own = tuple(make(probe, wing="audit") for probe in _listed(value["probes"])) if "probes" in value else probes
    return Event("forget", what=what, method=_method(value.get("method")) or forgetter, probes=own)


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


def _source(data: Any) -> dict[str, Any]:
    data = {"source": data} if isinstance(data, str) else dict(data)
    _known("key of data", data, DATA_KEYS)
    if "source" not in data:
        raise EngramError("data needs a 'source', such as sklearn:digits or a file")
    return data


def _named(learners: Any) -> dict[str, Any]:
    """Learners by name; one without a name of its own is called by its class."""
    if isinstance(learners, Mapping) and "name" not in learners:
        return {str(name): spec for name, spec in learners.items()}
    specs = _listed(learners)
    return {str(spec if isinstance(spec, str) else spec["name"]).split(".")[-1]: spec for spec in specs}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise EngramError(f"{name} takes a whole number, not {value!r}")
    return value


def _known(kind: str, given: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    for key in given:
        if key not in allowed:
            raise unknown(kind, key, allowed)
