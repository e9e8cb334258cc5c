"""The documentation says what the code is."""

from __future__ import annotations

import re
from pathlib import Path

from docs.tables import README, written

ROOT = Path(__file__).parents[1]


def test_the_table_of_methods_is_that_of_the_catalogue() -> None:
    assert README.read_text() == written(README.read_text()), "run python -m docs.tables"


def test_the_ten_lines_of_the_readme_run() -> None:
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    code = code.replace("epochs=20", "epochs=3")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["finding"].name  # type: ignore[attr-defined]


def test_no_file_links_to_what_is_not_there() -> None:
    for page in [README, *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
