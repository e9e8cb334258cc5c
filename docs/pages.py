"""The generated pages of the site: the start page, one page per method, and a list of them."""

from __future__ import annotations

from pathlib import Path

import mkdocs_gen_files

from docs.tables import README, methods_table
from engram import catalogue


def main() -> None:
    """Write the pages into the site that is being built."""
    start = README.read_text().replace("docs/images/", "images/")
    _write("index.md", start)
    _write("methods.md", "# Methods\n\n" + _linked(methods_table()))
    for row in catalogue.METHODS:
        paper = "" if row.paper is None else f"\n\n*{catalogue.paper(row.paper).title}*"
        _write(f"methods/{row.name}.md", f"# {row.name}\n\n{row.summary}{paper}\n\n::: {row.module}\n")


def _linked(table: str) -> str:
    for row in catalogue.METHODS:
        table = table.replace(f"`{row.name}`", f"[`{row.name}`](methods/{row.name}.md)")
    return table


def _write(path: str, text: str) -> None:
    with mkdocs_gen_files.open(Path(path), "w") as page:
        page.write(text)


main()
