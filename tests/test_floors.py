"""The floors of the house: imports go down, no wing imports another, what should be quick loads little."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import engram

SOURCE = Path(engram.__file__).parent
ORDER = (
    ("errors",),
    ("catalogue", "environment", "files"),
    ("stats",),
    ("data",),
    ("models",),
    ("engine",),
    ("core",),
    ("learn", "keep", "forget", "protect", "recall", "audit"),
    ("reproduce", "report"),
    ("compare",),
    ("commands",),
    ("comparing",),
    ("cli",),
    ("__main__", "testing"),
)
FLOOR = {name: floor for floor, names in enumerate(ORDER) for name in names}
STATS_MAY = {"engram", "torch", "numpy", "scipy", "sklearn", *sys.stdlib_module_names}
HEAVY = ("torch", "numpy", "transformers", "datasets", "diffusers", "sklearn", "matplotlib")


def imported(module: str, source: str, package: bool = False) -> Iterator[str]:
    """The full names that a module imports anywhere: also inside functions and for type checking alone."""
    home = module.split(".") if package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{target}.{alias.name}" for alias in node.names)


def faults(module: str, source: str, package: bool = False) -> list[str]:
    """The imports of a module of engram that break the order of the floors."""
    part = module.partition(".")[2].partition(".")[0]
    found = []
    for name in imported(module, source, package):
        root, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if root == "engram" and target in FLOOR and target != part and FLOOR[target] >= FLOOR.get(part, -1):
            found.append(f"{module} imports {name}")
        if part == "stats" and root not in STATS_MAY:
            found.append(f"{module} imports {name}")
    return found


def modules() -> list[tuple[str, Path]]:
    """Every module of engram: its full name and its file."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def test_every_part_of_the_package_has_a_floor() -> None:
    parts = {name.split(".")[1] for name, _ in modules() if "." in name}
    assert parts - FLOOR.keys() == set()
    assert len(parts) > 8  # it looked at the package


@pytest.mark.parametrize(("module", "path"), [pytest.param(*row, id=row[0]) for row in modules()])
def test_imports_go_down_only(module: str, path: Path) -> None:
    assert faults(module, path.read_text(encoding="utf-8"), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engram.stats.ridge", "from engram.data.table import Table"),
        ("engram.stats.ridge", "import pandas"),
        ("engram.keep.nmc", "from engram.forget.ssd import SSD"),
        ("engram.keep.nmc", "from engram import forget"),
        ("engram.keep.nmc", "def f():\n    import engram.forget.ssd"),
        ("engram.keep.nmc", "from ..forget import ssd"),
        ("engram.keep.nmc", "from .. import forget"),
        ("engram.core.verbs", "from engram.cli import main"),
        ("engram.report.html", "from engram.reproduce import ssd"),
        ("engram.catalogue", "from engram.stats import ridge"),
        ("engram", "from engram.errors import EngramError"),
    ],
)
def test_the_rule_notices(module: str, source: str) -> None:
    assert len(faults(module, source, package=module == "engram")) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engram.keep.nmc", "from engram.models.heads import NearestMeanHead"),
        ("engram.keep.nmc", "from .finetune import Finetune"),
        ("engram.keep.nmc", "from ..stats import moments"),
        ("engram.cli", "from engram.report import html"),
        ("engram.stats.ridge", "import math, torch\nfrom engram.errors import EngramError"),
    ],
)
def test_the_rule_lets_pass(module: str, source: str) -> None:
    assert faults(module, source) == []


@pytest.mark.parametrize("module", ["engram", "engram.catalogue", "engram.environment", "engram.errors"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_listing_papers_and_methods_loads_nothing_heavy() -> None:
    code = (
        "import sys; from engram.catalogue import find, methods, papers, possible\n"
        "papers(); methods(); find('ssd'); possible(['model'])\n"
        f"print(*(name for name in {HEAVY} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_name_that_engram_does_not_have() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        engram.nothing  # noqa: B018
    assert set(engram.__all__) <= set(dir(engram))
