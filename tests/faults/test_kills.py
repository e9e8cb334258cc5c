"""Real processes, killed at random moments, and a system that refuses to write; each goes on to the same bits."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from engram import files
from engram.cli import main
from engram.errors import EngramError
from engram.models import io

pytestmark = [pytest.mark.faults, pytest.mark.slow]

KILLS = 20
# The command line, with a line said before work starts and every epoch journaled.
DRIVER = """
import resource, sys
import engram.core.desk, engram.core.ledger, engram.core.running, engram.report.page
from engram.cli import main
from engram.engine import fit
fit.CHECKPOINT_EVERY = fit.WORTH_KEEPING = 0.0
if limit := int(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print("ready", flush=True)
sys.exit(main(sys.argv[2:]))
"""
WRITES = (
    (os, "replace"),
    (os, "rename"),
    (os, "fsync"),
    (os, "mkdir"),
    (files, "open"),
    (Path, "write_text"),
    (Path, "write_bytes"),
    (io, "save_file"),
)


def started(words: Sequence[str], limit: int = 0) -> subprocess.Popen[str]:
    """A process that has imported everything and begins its work."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(limit), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def kill(words: Sequence[str], seconds: float) -> bool:
    """Kill it after so many seconds of work; whether it was still at work."""
    process = started(words)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def goes_on(lab: Any, out: Path) -> None:
    assert main([*lab.run_words(out), *(["--resume"] if (out / "run.json").exists() else [])]) == 0
    assert lab.run_outcome(out) == lab.expected["run"]


def one_sentence(said: str) -> None:
    assert said.startswith("engram: ") and said.count("\n") == 1 and "Traceback" not in said, said


@pytest.fixture(scope="module")
def draws() -> random.Random:
    return random.Random(20)


def test_runs_that_are_killed(lab: Any, draws: random.Random, tmp_path: Path) -> None:
    process = started(lab.run_words(tmp_path / "whole"))
    began = time.monotonic()
    assert process.communicate() and process.returncode == 0
    assert lab.run_outcome(tmp_path / "whole") == lab.expected["run"]
    length, killed = time.monotonic() - began, 0
    for k in range(KILLS):
        killed += kill(lab.run_words(tmp_path / str(k)), length * k / KILLS + draws.uniform(0, length / KILLS))
        goes_on(lab, tmp_path / str(k))
    assert killed > KILLS / 2, f"{killed} of {KILLS} were still at work; the whole takes {length:.1f} s"


def test_requests_that_are_killed(lab: Any, draws: random.Random, tmp_path: Path) -> None:
    process = started(lab.forget_words(tmp_path / "whole"))
    began = time.monotonic()
    assert process.communicate() and process.returncode == 0
    length, killed = time.monotonic() - began, 0
    for k in range(KILLS):
        out = tmp_path / f"new{k}"
        killed += kill(lab.forget_words(out), length * k / KILLS + draws.uniform(0, length / KILLS))
        lab.resume(out)
        assert lab.forget_outcome(out) == lab.expected["forget"]
    assert killed > KILLS / 2


def refused() -> OSError:
    return OSError(28, "No space left on device")


def test_a_run_whose_kth_write_is_refused(lab: Any, faulty: Any, tmp_path: Path) -> None:
    for k in count():
        out, fault = tmp_path / str(k), faulty(k, refused)
        with fault.at(*WRITES):
            try:
                lab.run(out)
                stopped = False  # a directory that was to be made is there already
            except (EngramError, OSError) as error:  # both end in a sentence
                stopped = True
                assert "No space left" in str(error), k
        if not fault.hit:
            break
        if stopped:
            lab.run(out, resume=(out / "run.json").exists())
        assert lab.run_outcome(out) == lab.expected["run"], k
        shutil.rmtree(out)
    assert k > 100


def test_a_request_whose_kth_write_is_refused(
    lab: Any, faulty: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k in count():
        out, fault = tmp_path / f"new{k}", faulty(k, refused)
        with fault.at(*WRITES):
            code = lab.forget(out)
        said = capsys.readouterr().err
        if not fault.hit:
            break
        if code:
            assert code == 2 and "No space left" in said, k
            one_sentence(said)
            assert lab.forget(out, *(("--resume",) if Path(f"{out}.work").exists() else ())) == 0
        assert lab.forget_outcome(out) == lab.expected["forget"]
        capsys.readouterr()
    assert code == 0 and k > 40


@pytest.mark.parametrize("limit", [100, 1_000, 4_000, 10_000])
def test_files_that_may_not_grow(limit: int, lab: Any, tmp_path: Path) -> None:
    """The system itself refuses, in the middle of files, the ledger's among them."""
    for words in (lab.run_words(tmp_path / "run"), lab.forget_words(tmp_path / "new")):
        process = started(words, limit)
        _, said = process.communicate()
        assert process.returncode == 2, said
        one_sentence(said)
    goes_on(lab, tmp_path / "run")
    lab.resume(tmp_path / "new")
    assert lab.forget_outcome(tmp_path / "new") == lab.expected["forget"]
