"""A run in the ledger: what its learners and its journal have learnt, and what was done about its requests."""

from __future__ import annotations

from typing import Any

from engram.core.running import Running
from engram.core.timeline import Record, Story
from engram.models.io import digest

JOURNAL = "journal"


def register(running: Running, records: list[Record], ledger: Any) -> None:
    """Note every learner of a finished run, its requests in order, and the journal, which holds the learners' state
    before each request. What stands in the ledger already, with the same weights, is not noted again."""
    for story in running.timeline.stories:
        folder = running.directory / "models" / story.name
        held = ledger.holder_of(folder)
        if held is None or held.body["weights"] != digest(story.learner.model):
            _register(running, story, [r for r in records if r["learner"] == story.name], ledger)


def _register(running: Running, story: Story, records: list[Record], ledger: Any) -> None:
    folder, journal = running.directory / "models" / story.name, running.directory / JOURNAL
    parent, action = None, None
    learnt: list[str] = []
    for record, later in zip(records, [*records[1:], None], strict=True):
        if record["kind"] == "learn":
            step = next(step for step in running.timeline.steps if step.index == record["event"])
            learnt += running.timeline.stages[step.task or 0].task.train.ids
        else:
            request = ledger.add_request(record["ids"], what={"event": record["title"]})
            action = ledger.add_action(
                request.number,
                method={"name": record["method"]},
                exact=record["exact"],
                residue=len(record["residue"]),
            ).number
        if later is not None and later["kind"] == "learn" and action is None:
            continue
        what, path = ("learner", folder) if later is None else ("checkpoint", journal)
        weights = digest(story.learner.model) if later is None else None
        entry = ledger.add_holder(what, path, learnt, weights=weights, parent=parent, action=action, learner=story.name)
        parent, action, learnt = entry.number, None, []
