"""Libraries that are missing or broken are named, and the suite's own guard of random states works."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engram.environment import require
from engram.errors import EngramError

BROKEN = "raise RuntimeError('operator torchvision::nms does not exist')"
LIBRARY = "value = 7\n"


def ask_for(library: str, folder: Path) -> str:
    """What `require(library)` says in a fresh process that finds only engram and the packages of `folder`."""
    source = Path(sys.modules["engram"].__file__ or "").parents[1]
    code = (
        "from engram.environment import require\n"
        "from engram.errors import EngramError\n"
        f"try: print(require({library!r}).value)\n"
        "except EngramError as error: print(error)\n"
    )
    path = os.pathsep.join((str(folder), str(source)))
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert not done.stderr
    return done.stdout.strip()


def packages(folder: Path, **sources: str) -> Path:
    for name, source in sources.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(source)
    return folder


@pytest.mark.parametrize("library", ["transformers", "peft", "diffusers"])
def test_a_broken_torchvision_is_named(tmp_path: Path, library: str) -> None:
    said = ask_for(library, packages(tmp_path, torchvision=BROKEN, **{library: LIBRARY}))
    assert said.startswith("torchvision") and "\n" not in said
    assert "operator torchvision::nms does not exist" in said
    assert "pip uninstall torchvision" in said


def test_a_broken_torchvision_is_nothing_to_a_library_that_does_not_use_it(tmp_path: Path) -> None:
    assert ask_for("pyarrow", packages(tmp_path, torchvision=BROKEN, pyarrow=LIBRARY)) == "7"


def test_a_sound_torchvision_and_none_at_all_are_both_fine(tmp_path: Path) -> None:
    packages(tmp_path, transformers=LIBRARY)
    assert ask_for("transformers", tmp_path) == "7"
    packages(tmp_path, torchvision=LIBRARY)
    assert ask_for("transformers", tmp_path) == "7"


def test_a_missing_library_is_named_with_the_extra_that_brings_it(tmp_path: Path) -> None:
    with pytest.raises(EngramError, match=r"engramnothing is not installed.*pip install 'engram\[language\]'"):
        require("engramnothing", extra="language")
    with pytest.raises(EngramError, match=r"pip install engramnothing"):
        require("engramnothing")


def test_what_a_library_itself_lacks_is_not_taken_for_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(packages(tmp_path, engramhollow="import engramabsent")))
    with pytest.raises(ModuleNotFoundError, match="engramabsent"):
        require("engramhollow", extra="language")


@pytest.mark.parametrize(
    ("library", "draw"),
    [
        ("torch", lambda: torch.rand(1)),
        ("torch", lambda: torch.manual_seed(0)),
        ("numpy", lambda: np.random.rand()),
        ("random", lambda: random.random()),
    ],
)
def test_a_draw_from_a_global_generator_is_noticed(
    moved_by: Callable[[Callable[[], object]], list[str]], library: str, draw: Callable[[], object]
) -> None:
    assert moved_by(draw) == [library]


def test_a_draw_from_an_own_generator_is_no_fault(
    moved_by: Callable[[Callable[[], object]], list[str]],
) -> None:
    own = torch.Generator().manual_seed(0)
    assert moved_by(lambda: (torch.rand(3, generator=own), np.random.default_rng(0).random())) == []


def test_one_thread_per_process() -> None:
    assert torch.get_num_threads() == 1
    assert os.environ["OMP_NUM_THREADS"] == "1"
