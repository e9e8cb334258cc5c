"""The generated pages of the site: the start page, one page per method, and a list of them."""

from __future__ import annotations

import ast
from pathlib import Path

import mkdocs_gen_files

from docs.tables import README, methods_table
from engram import catalogue


def main() -> None:
    """Write the pages into the site that is being built."""
    start = README.read_text().replace("(docs/", "(")
    _write("index.md", start)
    _write("methods.md", "# Methods\n\n" + _linked(methods_table()))
    for row in catalogue.METHODS:
        paper = "" if row.paper is None else f"\n\n*{catalogue.paper(row.paper).title}*"
        own = f"{row.module}.{row.name.split('.')[1]}"
        _write(f"methods/{row.name}.md", f"# {row.name}\n\n{row.summary}{paper}\n\n{_introduction(row)}\n\n::: {own}\n")


def _introduction(row: catalogue.Method) -> str:
    """The docstring of the method's module, as it is written."""
    source = (Path("src") / Path(*row.module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source)) or ""
    return f"```text\n{text}\n```"


def _linked(table: str) -> str:
    for row in catalogue.METHODS:
        table = table.replace(f"`{row.name}`", f"[`{row.name}`](methods/{row.name}.md)")
    return table


def _write(path: str, text: str) -> None:
    with mkdocs_gen_files.open(Path(path), "w") as page:
        page.write(text)


main()
