"""An interruption at every point at which a run or a request writes something down; each ends as if there were none."""

from __future__ import annotations

import json
import os
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from engram.core.ledger import Ledger
from engram.engine.journal import Journal

JOURNAL = ((Journal, "store"),)
FILES = ((os, "replace"), (os, "rename"))
LEDGER = ((Ledger, "add_holder"), (Ledger, "add_request"), (Ledger, "add_action"))


def resume_run(lab: Any, out: Path) -> None:
    lab.run(out, resume=(out / "run.json").exists())
    assert lab.run_outcome(out) == lab.expected["run"]


def test_a_run_interrupted_at_every_journal_point(lab: Any, faulty: Any, tmp_path: Path) -> None:
    for k in count():
        fault = faulty(k, KeyboardInterrupt)
        with fault.at(*JOURNAL):
            try:
                lab.run(tmp_path / str(k))
            except KeyboardInterrupt:
                assert json.loads((tmp_path / str(k) / "run.json").read_text())["status"] == "running"
        if not fault.hit:
            break
        resume_run(lab, tmp_path / str(k))
    assert k >= 6 + 2 * 2 + 2  # every event of both learners, every epoch of the network's learning, some of forgetting


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_request_interrupted_at_every_point(after: bool, lab: Any, faulty: Any, tmp_path: Path) -> None:
    """Before and after each entry of the journal, each rename, and each transaction of the ledger."""
    for k in count():
        out, fault = tmp_path / f"new{k}", faulty(k, KeyboardInterrupt, after)
        with fault.at(*JOURNAL, *FILES, *LEDGER):
            assert lab.forget(out) == (130 if fault.hit else 0)
        if not fault.hit:
            break
        lab.resume(out)
        assert lab.forget_outcome(out) == lab.expected["forget"], k
    assert k >= 3 * 3 + 1 + 3 + 3  # epochs and account, each a store and two renames; the model; claim; entries


def test_a_request_interrupted_at_every_point_of_its_resumption(lab: Any, faulty: Any, tmp_path: Path) -> None:
    """One request, interrupted again and again: it gets one step further each time."""
    out = tmp_path / "new"
    for step in count():
        fault = faulty(step, KeyboardInterrupt)
        with fault.at(*LEDGER, *FILES):
            code = lab.forget(out, *(("--resume",) if Path(f"{out}.work").exists() else ()))
        if code == 0:
            break
        assert code == 130
    assert step > 3 and lab.forget_outcome(out) == lab.expected["forget"]
