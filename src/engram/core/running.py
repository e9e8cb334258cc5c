"""`engram run`: a config in, a run directory out."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engram.core.environment import environment
from engram.core.learner import Learner, fresh
from engram.core.persist import load_learner, save_learner
from engram.core.plan import Plan, read_plan
from engram.core.timeline import Record, Story, Timeline
from engram.data.preprocessing import Preprocessing
from engram.data.qa import pairs, read_pairs, tokenizer_for
from engram.data.readers import read, read_with, train_test
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.progress import Progress
from engram.engine.run import Run
from engram.errors import EngramError, nearest, unknown
from engram.files import LEFT, SUMS, check_sums, refuse_existing, sum_files, sweep, write_atomic

FORMAT = 1
CONFIG, STATUS, EVENTS, ENVIRONMENT, METRICS = (
    "config.yaml",
    "run.json",
    "events.json",
    "environment.json",
    "metrics.parquet",
)


def read_config(path: str | Path) -> dict[str, Any]:
    """A config from a YAML file, or by the name of one that engram brings ("quickstart")."""
    found = Path(path)
    shipped = Path(__file__).parents[1] / "configs" / f"{path}.yaml"
    if not found.is_file():
        if not shipped.is_file():
            names = sorted(p.stem for p in shipped.parent.glob("*.yaml"))
            near = nearest(found.stem, names)
            hint = f"did you mean {near!r}?" if near else f"give a YAML file, or one of: {', '.join(names)}"
            raise EngramError(
                f"{path} is a directory; {hint}" if found.is_dir() else f"there is no config file {path}; {hint}"
            )
        found = shipped
    try:
        config = yaml.safe_load(found.read_text())
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise EngramError(f"the config {found} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise EngramError(f"the config {found} is no mapping of keys to values")
    return config


def override(config: dict[str, Any], dotted: Mapping[str, Any]) -> dict[str, Any]:
    """The config with values put in at dotted keys, as in {"learners.exact.gamma": 1.0}; lists count from 0."""
    changed = json.loads(json.dumps(config))
    for key, value in dotted.items():
        *path, last = key.split(".")
        _known_learner(changed, path, dotted)
        place: Any = changed
        for name in path:
            place = _inner(place, name, key)
        if isinstance(place, list):
            place[_position(place, last, key)] = value
        else:
            place[last] = value
    return changed


def load_data(data: Mapping[str, Any]) -> tuple[Table, Table, Preprocessing | Written]:
    """Train and test rows as a plan's `data` says (a test source of its own, or a share of the rows), and how they were
    read, so that new rows can be read alike. With a `tokenizer` the rows are questions and answers (see `data.qa`), and
    where there is no other source, the test rows are the training rows: what is tested is what is remembered."""
    if "tokenizer" in data:
        return _load_pairs(data)
    columns = {key: data[key] for key in ("id", "label", "text", "image", "limit", "image_size") if key in data}
    table, preprocessing = read_with(data["source"], **columns)
    if "test" in data:
        return table, read(data["test"], preprocessing=preprocessing, **columns), preprocessing
    train, test = train_test(table, float(data.get("share", 0.3)), seed=0)
    return train, test, preprocessing


@dataclass(frozen=True)
class Written:
    """How questions and answers were written as tokens."""

    tokenizer: Any

    def save(self, directory: str | Path) -> None:
        """Put the tokenizer beside a model."""
        self.tokenizer.save_pretrained(directory)


def _load_pairs(data: Mapping[str, Any]) -> tuple[Table, Table, Written]:
    """`source`: JSON lines of questions and answers; `more`: further files with their other columns."""
    rows = read_pairs(data["source"], *data.get("more", ()))
    tokenizer = tokenizer_for(data["tokenizer"], rows)
    table = pairs(rows[: data.get("limit")], tokenizer)
    if "test" in data:
        return table, pairs(read_pairs(data["test"], *data.get("more", ())), tokenizer), Written(tokenizer)
    train, test = train_test(table, float(data["share"]), seed=0) if "share" in data else (table, table)
    return train, test, Written(tokenizer)


class Running:
    """One run of a plan in a directory."""

    def __init__(
        self,
        config: Mapping[str, Any],
        directory: str | Path,
        *,
        resume: bool = False,
        progress: Progress | None = None,
        show_content: bool = False,
    ) -> None:
        """`show_content`: keep what a language model said of forgotten rows, before and after, for the report."""
        self.plan: Plan = read_plan(config)
        self.directory = Path(directory)
        self._claim(resume)
        self.run = Run(
            self.directory,
            seed=self.plan.seed,
            device=self.plan.device,
            precision=self.plan.precision,
            progress=progress,
        )
        train, test, self.preprocessing = load_data(self.plan.data)
        words = self.preprocessing.tokenizer if isinstance(self.preprocessing, Written) else None
        self.timeline = Timeline(self.plan, train, test, self.run, words if show_content else None)

    def outline(self) -> list[str]:
        """What will be done, and what it will take: said before work starts."""
        steps = [step.title for step in self.timeline.steps]
        learners = ", ".join(self.plan.learners)
        return [
            f"{self.plan.title}: {len(self.timeline.everything)} training rows, {len(self.timeline.stages)} tasks",
            f"learners: {learners}",
            *(f"  {index + 1}. {title}" for index, title in enumerate(steps)),
            f"models to train besides, as controls for the audits: {self._controls()}",
            f"expected: about {self.forecast():.0f} s on this machine (measured on a few rows of the first task)",
        ]

    def forecast(self) -> float:
        """Seconds that learning and the controls will take, from the time that each learner takes for a few rows."""
        rows, first = len(self.timeline.everything), self.timeline.stages[0].task
        total = 0.0
        for learner in self.plan.learners.values():
            _, few, many = (_seconds(learner, first, size) for size in (16, 16, 128))  # the first pays for imports
            per_row = max(many - few, 0.0) / max(min(len(first.train), 128) - 16, 1)
            trainings = 1 + self._controls_per_learner()
            total += trainings * (few * len(self.timeline.stages) + per_row * rows)
        return total

    def execute(self) -> list[Record]:
        """Do the work and write the directory; `run.json` says "finished" only after everything else is written. A run
        that cannot do its first event leaves nothing that stands in the way of a better config."""
        try:
            return self._execute()
        except EngramError:
            self._withdraw()
            raise

    def _execute(self) -> list[Record]:
        self._write_status("running")
        (self.directory / SUMS).unlink(missing_ok=True)
        write_atomic(self.directory / CONFIG, yaml.safe_dump(self.plan.resolved(), sort_keys=False, allow_unicode=True))
        write_atomic(self.directory / ENVIRONMENT, json.dumps(environment(self.plan.device), indent=1))
        records = self.timeline.execute()
        write_atomic(self.directory / EVENTS, json.dumps(records, indent=1))
        write_metrics(records, self.directory / METRICS)
        for story in self.timeline.stories:
            folder = self.directory / "models" / story.name
            save_learner(story.learner, folder, tasks=story.taken, beside=self.preprocessing.save)
        sum_files(self.directory, (CONFIG, ENVIRONMENT, EVENTS, METRICS))
        sweep(sorted(self.directory.rglob(".*")))
        return records

    def finish(self) -> None:
        """Mark the run as finished."""
        self._write_status("finished")

    @property
    def finished(self) -> bool:
        """Was it finished before?"""
        return _state(self.directory / STATUS) == "finished"

    def reread(self) -> list[Record]:
        """What a finished run wrote, as `execute` gave it; its learners stand in `timeline.stories` again."""
        check_sums(self.directory)
        loaded = {name: load_learner(self.directory / "models" / name) for name in self.plan.learners}
        self.timeline.stories = [Story(name, learner, tasks) for name, (learner, tasks) in loaded.items()]
        records: list[Record] = json.loads((self.directory / EVENTS).read_text())
        return records

    def _withdraw(self) -> None:
        """Take away a run that has journaled nothing and written no result."""
        if (self.directory / "journal").exists() or (self.directory / EVENTS).exists():
            return
        for name in (CONFIG, ENVIRONMENT, STATUS):
            (self.directory / name).unlink(missing_ok=True)
        if self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()

    def _claim(self, resume: bool) -> None:
        status = self.directory / STATUS
        if not self.directory.is_dir():
            refuse_existing(self.directory)
        held = self.directory.exists() and any(not LEFT.fullmatch(path.name) for path in self.directory.iterdir())
        if held and not resume:
            state = _state(status)
            hint = "use --resume to go on" if state == "running" else "choose another --out"
            raise EngramError(f"{self.directory} exists already and holds {_article(state)}; {hint}")
        if resume and not status.exists() and (held or not self.directory.exists()):
            raise EngramError(
                f"{self.directory} holds no run to resume ({STATUS} is missing); begin it without --resume"
            )
        if resume:
            self._same_config()

    def _same_config(self) -> None:
        written = self.directory / CONFIG
        try:
            found = yaml.safe_load(written.read_text()) if written.exists() else None
        except (OSError, yaml.YAMLError, ValueError) as error:
            raise EngramError(f"{written} cannot be read, delete it: {str(error).splitlines()[0]}") from error
        if written.exists() and found != json.loads(json.dumps(self.plan.resolved())):
            raise EngramError(
                f"{written} differs from the config given; resume with the same one, or choose another --out"
            )

    def _write_status(self, status: str) -> None:
        write_atomic(self.directory / STATUS, json.dumps({"format": FORMAT, "status": status}) + "\n")

    def _controls_per_learner(self) -> int:
        counts = [
            max([0, *(getattr(probe, "oracles", 0) for probe in step.event.probes)]) for step in self.timeline.steps
        ]
        return sum(counts)

    def _controls(self) -> int:
        return self._controls_per_learner() * len(self.plan.learners)


def _seconds(learner: Learner, task: Task, size: int) -> float:
    """The time that a fresh learner takes for the first rows of a task."""
    sample = task.train.take(range(min(len(task.train), size)))
    start = time.perf_counter()
    fresh(learner).learn(Task(sample, None, 0, sample.classes, task.names), Run(seed=1))
    return time.perf_counter() - start


def write_metrics(records: list[Record], path: Path) -> None:
    """One row per measured number: event, learner, metric, task, value, n, and an interval where there is one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row for record in records for row in _metrics(record)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA(pa)), sink)
    write_atomic(path, sink.getvalue().to_pybytes())


def _metrics(record: Record) -> list[dict[str, Any]]:
    at = {"event": record["event"], "learner": record["learner"]}
    rows = []
    for entry in record["accuracy"]:
        for metric, hit in (("accuracy", "hits"), ("accuracy, task-aware", "hits_task_aware")):
            value = entry[hit] / entry["n"]
            rows.append({**at, "metric": metric, "task": entry["task"], "value": value, "n": entry["n"]})
    for finding in record.get("findings", []):
        low, high = finding["interval"] or (None, None)
        name = f"{finding['probe']}: {finding['name']}"
        rows.append({**at, "metric": name, "value": finding["value"], "n": finding["n"], "low": low, "high": high})
    rows.append({**at, "metric": "seconds", "value": record["cost"]["seconds"]})
    return rows


def _SCHEMA(pa: Any) -> Any:  # noqa: N802
    whole, number, text = pa.int64(), pa.float64(), pa.string()
    names = {"event": whole, "learner": text, "metric": text, "task": whole, "value": number, "n": whole}
    return pa.schema({**names, "low": number, "high": number})


def _known_learner(config: Mapping[str, Any], path: list[str], dotted: Mapping[str, Any]) -> None:
    """A setting of a learner that the config does not have is a slip, unless its name is given too."""
    learners = config.get("learners")
    if len(path) < 2 or path[0] != "learners" or not isinstance(learners, dict):
        return
    if path[1] not in learners and f"learners.{path[1]}.name" not in dotted:
        raise unknown("learner", path[1], learners)


def _inner(place: Any, name: str, key: str) -> Any:
    if isinstance(place, list):
        return place[_position(place, name, key)]
    if not isinstance(place, dict):
        raise EngramError(f"--{key}: {name!r} stands below a plain value; there is nothing to set there")
    return place.setdefault(name, {})


def _position(place: list[Any], name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(place):
        raise EngramError(f"--{key}: {name!r} is no position in a list of {len(place)}; positions count from 0")
    return int(name)


def _state(status: Path) -> str:
    """What a directory says that it holds."""
    try:
        return str(json.loads(status.read_text())["status"])
    except (OSError, ValueError, LookupError, TypeError):
        return "something else"


def _article(state: str) -> str:
    return f"a {state} run" if state in ("running", "finished") else state
