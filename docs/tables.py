"""Write the generated parts of the documentation: `python -m docs.tables` (and `--check`, which only compares)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from engram import catalogue

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- methods:", "<!-- end of methods -->"


def methods_table() -> str:
    """Every method with what it does, where it comes from and what it cannot do without."""
    lines = ["| method | what it does | from | needs |", "|---|---|---|---|"]
    for row in catalogue.METHODS:
        paper = (
            "baseline"
            if row.paper is None
            else f"[{row.paper}](https://arxiv.org/abs/{catalogue.paper(row.paper).arxiv})"
        )
        needs = " *or* ".join(", ".join(sorted(n)) or "–" for n in row.needs)
        lines.append(f"| `{row.name}` | {row.summary}{' (exact)' if row.exact else ''} | {paper} | {needs} |")
    return "\n".join(lines)


def written(text: str) -> str:
    """The README with its table as the catalogue has it."""
    pattern = rf"({re.escape(START)}[^\n]*\n).*?({re.escape(END)})"
    return re.sub(pattern, lambda m: m[1] + methods_table() + "\n" + m[2], text, flags=re.DOTALL)


def main() -> int:
    """Write, or with --check say whether something would change."""
    old = README.read_text()
    new = written(old)
    if "--check" in sys.argv:
        return int(old != new)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
