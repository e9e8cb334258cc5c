"""A timeline: learn and forget events in order, with probes between them. It is what `engram run` runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from engram.core.erasure import forget
from engram.core.history import History, rows_of
from engram.core.learner import Forgetful, Learner, fresh
from engram.core.needs import Need
from engram.core.plan import Event, Plan
from engram.core.probe import Subject
from engram.core.request import Classes, Records, Request
from engram.core.settings import name_of
from engram.data.streams import Stage, stream
from engram.data.table import Ids, Table, Target
from engram.engine.answers import told, truths
from engram.engine.predict import hits
from engram.engine.run import Run
from engram.errors import EngramError, unknown
from engram.models.guards import is_guard
from engram.stats.seeds import generator
from engram.stats.text import rouge_l

Record = dict[str, Any]


@dataclass
class Story:
    """What happened to one learner so far."""

    name: str
    learner: Learner
    taken: int = 0  # tasks learnt
    gone: set[str] = field(default_factory=set)  # ids forgotten
    retired: set[int] = field(default_factory=set)  # classes forgotten


@dataclass(frozen=True)
class Step:
    """One entry of the timeline: a single task, or a request."""

    index: int
    title: str
    event: Event
    task: int | None = None


class Timeline:
    """Runs a plan's events for each of its learners, on the same stream, with the same requests.

    Each event of each learner is a phase of the run: it is journaled with the learner's whole state, and a resumed run
    goes on after the last finished one.
    """

    def __init__(self, plan: Plan, train: Table, test: Table, run: Run, shown: Any = None) -> None:
        """`shown`: a tokenizer; what a language model says of forgotten rows, before and after, is kept as text."""
        self.plan, self.run, self.shown = plan, run, shown
        self.stages: list[Stage] = stream(train, test, **plan.stream)
        self.everything = rows_of([stage.task for stage in self.stages])
        self.steps = list(self._steps())
        self._check()

    def execute(self) -> list[Record]:
        """Do everything; one record per event and learner, in order. The learners end in `self.stories`."""
        self.stories = [Story(name, fresh(learner)) for name, learner in self.plan.learners.items()]
        records: list[Record] = []
        with self.run.progress("timeline", len(self.steps) * len(self.stories)) as advance:
            for step in self.steps:
                for story in self.stories:
                    records.append(self._do(step, story))
                    advance(1)
        return records

    def request(self, step: Step, story: Story) -> Request:
        """The request of a forget event, with everything that is at hand for it."""
        rows = self._learnt(story)
        what = step.event.what
        if any(value in ([], 0, "", None) for value in what.values()):
            raise EngramError(f"{step.title}: the forget set is empty; name at least one record or class")
        history = self._history(story)
        if "classes" in what:
            request = Request.of_classes(rows, tuple(self._class(rows, label) for label in what["classes"]))
        else:
            request = Request.of_records(rows, self._ids(what, rows))
        return request.but(at_hand={Need.RECIPE: history})

    def _do(self, step: Step, story: Story) -> Record:
        worked = False

        def make() -> dict[str, Any]:
            nonlocal worked
            worked = True
            record = self._learn(step, story) if step.event.kind == "learn" else self._forget(step, story)
            return {"record": record, "state": story.learner.state_dict()}

        before = self.run.cost.copy()
        entry = self.run.phase(f"{story.name}/{step.index}", make)
        record: Record = entry["record"]
        if not worked:
            story.learner.load_state_dict(entry["state"])
            self._note(step, story, record)
        return {**record, "cost": asdict(self.run.cost.since(before))}

    def _learn(self, step: Step, story: Story) -> Record:
        task = self.stages[step.task or 0].task
        left = task.without(story.gone)
        if len(left.train):
            story.learner.learn(left, self.run)
            story.learner.refresh(self.run)
        record = {**self._entry(step, story), "rows": len(task.train), "classes": list(task.classes)}
        self._note(step, story, record)
        return {**record, "accuracy": self._accuracies(story)}

    def _forget(self, step: Step, story: Story) -> Record:
        request = self.request(step, story)
        own = isinstance(story.learner, Forgetful)
        method = None if own else step.event.method
        before = copy.deepcopy(story.learner.model)
        history = self._history(story)
        with self.run.scope("request"):
            done = forget(story.learner, request, method, self.run)
        classes = list(request.what.labels) if isinstance(request.what, Classes) else []
        record = {
            **self._entry(step, story),
            "method": done.method,
            "exact": done.exact,
            "weights_hold_it": is_guard(story.learner.model),
            "residue": list(done.residue),
            "ids": list(request.ids),
            "classes": classes,
            "retain_rows": 0 if request.retain is None else len(request.retain),
        }
        self._note(step, story, record)
        subject = Subject(
            story.learner.model,
            before=before,
            request=request,
            rows=self._tables(story, request),
            recipe=history,
            forgetter=method,
            learner=story.learner,
        )
        findings = self._findings(step, subject)
        assert request.forget is not None
        if request.forget.target == Target.TOKENS:
            record["answers"] = answers(before, story.learner.model, request.forget, self.shown, self.run)
        return {**record, "findings": findings, "accuracy": self._accuracies(story)}

    def _findings(self, step: Step, subject: Subject) -> list[dict[str, Any]]:
        found = []
        for probe in step.event.probes:
            probe.check(subject)
            with self.run.scope("audit"):
                for finding in probe.examine(subject, self.run):
                    found.append({"probe": name_of(probe), **finding.as_dict()})
        return found

    def _note(self, step: Step, story: Story, record: Mapping[str, Any]) -> None:
        """Keep the story in step with what the record says."""
        if step.event.kind == "learn":
            story.taken = (step.task or 0) + 1
        else:
            story.gone |= set(record["ids"])
            story.retired |= set(record["classes"])

    def _entry(self, step: Step, story: Story) -> Record:
        return {"event": step.index, "kind": step.event.kind, "learner": story.name, "title": step.title}

    def _accuracies(self, story: Story) -> list[dict[str, Any]]:
        """Hits on the test rows of each task learnt so far, among all classes and among the task's own. Classes that
        were forgotten are left out of both."""
        found = []
        for stage in self.stages[: story.taken]:
            left = [c for c in stage.test.classes if c not in story.retired]
            rows = stage.test.of_classes(left) if stage.test.classes else stage.test.without(story.gone)
            if stage.test.target == Target.NUMBERS:
                continue
            if stage.test.labels is None or not len(rows):
                continue
            found.append(
                {
                    "task": stage.task.index,
                    "n": len(rows),
                    "hits": int(hits(story.learner.model, rows).sum()),
                    "hits_task_aware": int(hits(story.learner.model, rows, classes=tuple(left) or None).sum()),
                }
            )
        return found

    def _tables(self, story: Story, request: Request) -> dict[str, Table]:
        """Rows for the probes: what went, what stays, and test rows of classes that stay and that went."""
        tests = [stage.test for stage in self.stages[: story.taken]]
        test = tests[0].concat(*tests[1:])
        assert request.forget is not None and request.retain is not None
        tables = {"forget": request.forget, "retain": request.retain}
        if isinstance(request.what, Classes):
            tables["test-forget"] = test.of_classes(request.what.labels)
        left = [c for c in test.classes if c not in story.retired]
        tables["test"] = test.of_classes(left) if test.classes else test
        return tables

    def _history(self, story: Story) -> History:
        return History(fresh(story.learner), tuple(stage.task for stage in self.stages[: story.taken]))

    def _learnt(self, story: Story) -> Table:
        """The rows that the learner was given and that nobody has asked to forget yet."""
        return rows_of([stage.task for stage in self.stages[: story.taken]]).without(story.gone)

    def _ids(self, what: Mapping[str, Any], rows: Table) -> Ids:
        if "where" in what:
            return rows.where(str(what["where"])).ids
        records = what["records"]
        if isinstance(records, int):
            if not 0 < records <= len(rows):
                raise EngramError(f"records: {records} is not between 1 and the {len(rows)} rows that were learnt")
            order = torch.randperm(len(rows), generator=generator("records to forget", self.plan.seed))
            return rows.take(order[:records].sort().values).ids
        return tuple(map(str, records))

    def _class(self, rows: Table, label: Any) -> int:
        by_name = {name: id for id, name in rows.names.items()}
        label = by_name.get(str(label), label)
        if label in self.everything.classes and label not in rows.classes:
            raise EngramError(
                f"the class {label!r} is not there when it must be forgotten; learn it in an earlier event"
            )
        if label not in rows.classes:
            raise unknown("class", label, [*rows.classes, *by_name])
        return int(label)

    def _steps(self) -> Iterator[Step]:
        """One step per task and per request."""
        taken = 0
        for event in self.plan.events:
            if event.kind == "forget":
                if not taken:
                    raise EngramError("a forget event comes before anything was learnt; put a learn event first")
                yield Step(self._next(), _title(event.what), event)
                continue
            last = len(self.stages) if event.count is None else taken + event.count
            if last > len(self.stages):
                raise EngramError(f"the events learn {last} tasks, but the stream has {len(self.stages)}")
            for index in range(taken, last):
                yield Step(self._next(), _task_title(self.stages[index]), event, index)
            taken = last

    def _next(self) -> int:
        self._count = getattr(self, "_count", -1) + 1
        return self._count

    def _check(self) -> None:
        """Find out before any work that every request can be carried out, as things will then stand. Requests are the
        same for all learners; those that cannot forget by themselves need a method."""
        unable = [name for name, learner in self.plan.learners.items() if not isinstance(learner, Forgetful)]
        story = Story("", next(iter(self.plan.learners.values())))
        for step in self.steps:
            if step.event.kind == "learn":
                story.taken = (step.task or 0) + 1
                continue
            method = step.event.method
            if unable and method is None:
                raise EngramError(f"{unable[0]} cannot forget by itself; give the config a 'forgetter', such as SSD")
            request = self.request(step, story)
            if unable and method is not None:
                method.check(request)
            story.gone |= set(request.ids)


ANSWERS = 20  # forgotten rows whose answers are compared


def answers(before: nn.Module, after: nn.Module, rows: Table, words: Any, run: Run) -> list[dict[str, Any]]:
    """What a language model said to the first questions, before and after: lengths in tokens and ROUGE-L recall of the
    true answer; with a tokenizer (`words`) the texts too."""
    some = rows.take(range(min(len(rows), ANSWERS)))
    said = [told(model, some, run) for model in (before, after)]
    found = []
    for id, right, *pair in zip(some.ids, truths(after, some), *said, strict=True):
        entry: dict[str, Any] = {"id": id, "length": len(right)}
        for name, answer in zip(("before", "after"), pair, strict=True):
            entry[name] = {"length": len(answer), "recall": rouge_l(answer, right)}
            if words is not None:
                entry[name]["text"] = words.decode(answer)
        found.append(entry)
    return found


def _title(what: Mapping[str, Any]) -> str:
    [(kind, value)] = what.items()
    if kind == "classes":
        return f"forget class {', '.join(map(str, value))}"
    count = value if isinstance(value, int) else len(value)
    return f"forget the rows where {value}" if kind == "where" else f"forget {count} records"


def _task_title(stage: Stage) -> str:
    names = [stage.task.names.get(c, str(c)) for c in stage.task.classes]
    return f"learn {', '.join(names)}" if names else f"learn task {stage.task.index}"


def requested(what: Records | Classes | Any) -> str:
    """A request in a few words."""
    if isinstance(what, Records):
        return f"{len(what.ids)} records"
    return f"class {', '.join(map(str, what.labels))}" if isinstance(what, Classes) else str(what.text)


def learners_of(stories: Sequence[Story]) -> dict[str, Learner]:
    """The learners by name."""
    return {story.name: story.learner for story in stories}
