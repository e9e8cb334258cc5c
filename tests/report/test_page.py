"""The report: self-contained, honest about contents, and readable in a browser at two widths."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from engram.cli import main
from engram.core.finding import Finding
from engram.report.drawing import courses, range_bar, roc
from engram.report.page import write_leaderboard, write_report

CONFIG = """
title: Reported <run>
data: {source: "sklearn:digits", limit: 300}
stream: {scenario: class, base: 5, increment: 5, order: natural}
learners: {exact: {name: keep.NMC}, other: {name: keep.ACU, size: 60}}
probes: [{name: audit.Accuracy, oracles: 5}, {name: audit.Membership, oracles: 5}]
events: [{learn: all}, {forget: {records: 4}}, {forget: {classes: [3]}}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "config.yaml").write_text(CONFIG)
    assert main(["run", str(folder / "config.yaml"), "--out", str(folder / "run"), "--quiet"]) == 0
    return folder / "run"


def test_one_file_that_asks_the_network_for_nothing(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)[^"']+""", page)
    assert "url(" not in page and "<script" not in page
    assert "Reported &lt;run&gt;" in page and "<run>" not in page


def test_it_says_what_was_measured_and_how_it_was_judged(run: Path) -> None:
    page = (run / "report.html").read_text()
    for text in (
        "forget 4 records",
        "forget class 3",
        "retrained:",
        "95 % interval",
        "margin ±",
        "What this report cannot tell",
    ):
        assert text in page
    assert "would decide it" in page  # four rows cannot tell
    assert "keep.NMC (exact)" in page


def test_contents_are_shown_only_on_request(run: Path) -> None:
    assert "data:image/png" not in (run / "report.html").read_text()
    write_report(run, show_content=True)
    assert (run / "report.html").read_text().count("data:image/png") > 4
    write_report(run)
    assert "data:image/png" not in (run / "report.html").read_text()


def test_drawings_hold_all_values() -> None:
    finding = Finding(
        "AUC", 0.7, 20, (0.6, 0.8), reference=(0.5, 0.52), margin=0.05, curve={"fpr": [0, 1], "tpr": [0, 1]}
    )
    assert range_bar(finding).count('class="oracle"') == 2
    assert "polyline" in roc(finding)
    assert roc(Finding("accuracy", 0.7, 20)) == ""


def test_learners_are_drawn_over_the_tasks(tmp_path: Path) -> None:
    def entry(name: str, matrix: list[list[float]]) -> dict[str, Any]:
        failed = [] if matrix else ["it broke"]
        held = {"bytes": [8.0, 16.0]} if matrix else {}
        plain = {"learner": name, "measures": {}, "failed": failed, "setting": {}}
        return {**plain, "accuracy matrix": matrix, "over tasks": held}

    entries = [entry("keep.A", [[1.0], [0.5, 0.75]]), entry("keep.B", [[0.5], [0.5, 0.5]]), entry("keep.C", [])]
    mine = [re.search('class="mine" points="([^"]*)"', drawing) for drawing in courses(entries, "s")]
    assert [found and found.group(1) for found in mine] == ["8.0,8.0 172.0,42.5", "8.0,54.0 172.0,54.0", ""]
    streams = [{"stream": name, "learners": entries} for name in ("s", "t")]
    summary = {"streams": streams, "accuracies": ["final accuracy"], "costs": ["bytes"]}
    page = write_leaderboard(tmp_path / "page.html", summary, intro="").read_text()
    assert page.count("<title>task 2 after 2: 0.750</title>") == 2
    assert page.count("<figcaption>") == 4 and "it broke" in page
    assert page.count("<title>bytes: 8 at the first task, 16 at the last</title>") == 4
    assert 'points="2.0,12.0 88.0,2.0"' in page and page.count('id="s"') == page.count('href="#s"') == 1


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_no_sideways_scroll(run: Path, width: int, tmp_path: Path) -> None:
    browser = next(name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name))
    page = (run / "report.html").read_text()
    probe = "<script>document.title = 'W' + document.documentElement.scrollWidth</script></body>"
    frame = tmp_path / "page.html"
    frame.write_text(page.replace("</body>", probe))
    outer = tmp_path / "outer.html"  # headless windows have a least width; a frame has not
    outer.write_text(
        f'<iframe id="f" src="page.html" style="width:{width}px;height:800px;border:0"></iframe>'
        "<script>f.onload = () => { document.title = 'W' + f.contentDocument.documentElement.scrollWidth }</script>"
    )
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-sync", "--allow-file-access-from-files", "--virtual-time-budget=5000",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", outer.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r"<title>W(\d+)</title>", shown)
    assert found is not None, shown[:400]
    assert int(found.group(1)) <= width
