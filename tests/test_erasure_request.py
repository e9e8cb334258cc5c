"""The page about an erasure request does what it says: its blocks are run in order, in an empty folder."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engram.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "erasure-request.md"


FASHION = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
NAMES = ("regressor", "large", "gpt", *(["vit"] if FASHION.exists() else []))


def blocks() -> list[tuple[str, str]]:
    """Language and code, in order; without Fashion-MNIST, those of its section are left out."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    wanted = [text for text in sections if FASHION.exists() or str(FASHION) not in text]
    return re.findall(r"^```(python|bash)\n(.*?)^```$", "".join(wanted), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder after all blocks were run: Python and `engram` in this process, all else in a shell."""
    home = tmp_path_factory.mktemp("desk")
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    said = []
    with contextlib.chdir(home):
        for language, code in blocks():
            with contextlib.redirect_stdout(io.StringIO()) as text:
                python(code) if language == "python" else shell(code)
            said.append(text.getvalue())
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    (home / "said.json").write_text(json.dumps(said))
    yield home


def python(code: str) -> None:
    exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})


def shell(code: str) -> None:
    for line in code.splitlines():
        command, _, expected = line.partition(" || [ $? -eq ")
        if command.startswith("engram "):
            assert main(shlex.split(command)[1:]) == int(expected.removesuffix(" ]") or 0), command
        else:
            subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=True)


def test_every_model_was_forgotten_audited_and_certified(folder: Path) -> None:
    for name in NAMES:
        for file in (f"{name}-forgot/erasure.json", f"audit-{name}/audit.json", f"audit-{name}/report.html"):
            assert (folder / file).exists()
        assert json.loads((folder / f"{name}.json").read_text())["payloadType"] == "application/vnd.in-toto+json"


def test_verdicts_are_those_that_the_page_names(folder: Path) -> None:
    named = {"regressor": "unknown", "large": "pass", "vit": "fail", "gpt": "unknown"}
    audits = {name: json.loads((folder / f"audit-{name}" / "audit.json").read_text()) for name in NAMES}
    assert {name: audit["verdict"] for name, audit in audits.items()} == {name: named[name] for name in NAMES}
    assert {name for name, audit in audits.items() if audit["exact"]} == {"regressor", "large"}


def test_where_knows_who_learnt_what(folder: Path) -> None:
    told = said(folder, "30 records forgotten")
    assert "/regressor\n" in told and "regressor-forgot\n" not in told.split("stands in")[1].partition("\n")[2]


@pytest.mark.skipif("vit" not in NAMES, reason="Debian's package dataset-fashion-mnist is not installed")
def test_statistics_are_known_and_purged(folder: Path) -> None:
    assert "vit-statistics" in said(folder, "forgotten by forget.SSD, approximate")
    assert "vit-statistics (gone)" in said(folder, "deleted or flagged")
    assert not (folder / "vit-statistics").exists()


def said(folder: Path, needle: str) -> str:
    """What the first block printed in which this stands."""
    return next(text for text in json.loads((folder / "said.json").read_text()) if needle in text)
