"""The report of a run as one HTML file that opens offline, and a page that compares runs."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from engram.core.examination import AUDIT
from engram.core.finding import Finding
from engram.core.running import CONFIG, ENVIRONMENT, EVENTS, STATUS
from engram.core.verdict import Judgement, judge
from engram.data.table import Table
from engram.errors import EngramError
from engram.files import check_sums, write_atomic
from engram.report import drawing
from engram.stats import continual

REPORT, COMPARISON = "report.html", "comparison.html"
Record = Mapping[str, Any]
OVERALL = {
    "pass": "Every finding that could be decided is the same as in the retrained models, within its margin.",
    "fail": "At least one finding differs from the retrained models by more than its margin, also when it is counted "
    "as one of so many (Holm's correction).",
    "unknown": "Not everything could be decided: the findings say what would be needed. One that fails by itself, if "
    "there is one, may be chance among so many.",
}


def write_report(directory: str | Path, *, show_content: bool = False) -> Path:
    """Render `report.html` of a run directory from what stands in it; the path. EngramError for an unfinished run.

    `show_content`: show the forgotten records (images, texts); they are left out otherwise.
    """
    folder = Path(directory)
    check_sums(folder)
    records = _json(folder / EVENTS)
    config = (folder / CONFIG).read_text()
    learners = list(dict.fromkeys(record["learner"] for record in records))
    page = (
        _environment()
        .get_template("report.html")
        .render(
            title=_title(config),
            learners=[_learner(name, [r for r in records if r["learner"] == name]) for name in learners],
            requests=_requests(records, learners),
            steps=[r for r in records if r["learner"] == learners[0]] if learners else [],
            environment=_json(folder / ENVIRONMENT),
            config=config,
            contents=_contents(config, records) if show_content else [],
            show_content=show_content,
        )
    )
    write_atomic(folder / REPORT, page)
    return folder / REPORT


def write_audit(directory: str | Path) -> Path:
    """Render `report.html` of an audit's directory from its `audit.json`; the path."""
    folder = Path(directory)
    check_sums(folder)
    audit = _json(folder / AUDIT)
    template = _environment().get_template("audit.html")
    items = [_finding(finding) for finding in audit["findings"]]
    page = template.render(title="Audit", audit=audit, items=items, sentence=OVERALL[audit["verdict"]])
    write_atomic(folder / REPORT, page)
    return folder / REPORT


def write_leaderboard(path: str | Path, summary: Mapping[str, Any], *, intro: str) -> Path:
    """The summary of a comparison of forgetters, learners or forgetters of language models as a page; its path."""
    if "forgetters" in summary:
        template = _environment().get_template("language.html")
        page = template.render(
            title="Forgetters of language models side by side",
            intro=intro,
            spread=_spread,
            planes={share: drawing.plane(summary["forgetters"], share) for share in summary["shares"]},
            **summary,
        )
    elif "streams" in summary:
        template = _environment().get_template("learners.html")
        page = template.render(
            title="Learners side by side",
            intro=intro,
            spread=_spread,
            courses={s["stream"]: drawing.courses(s["learners"], s["stream"]) for s in summary["streams"]},
            line=drawing.line,
            matrix=drawing.matrix,
            **summary,
        )
    else:
        kinds = list(dict.fromkeys(kind for entry in summary["methods"] for kind in entry["kinds"]))
        measures = ("forget accuracy", "retain accuracy", "test accuracy", "membership AUC", "gap")
        template = _environment().get_template("leaderboard.html")
        page = template.render(
            title="Forgetters side by side", intro=intro, kinds=kinds, measures=measures, spread=_spread, **summary
        )
    write_atomic(path, page)
    return Path(path)


def _spread(found: Sequence[float] | None) -> str:
    if not found or not any(found):
        return "0" if found else "–"
    digits = 0 if abs(found[0]) >= 100 else 3
    return f"{found[0]:,.{digits}f}" + (f" ± {found[1]:,.{digits}f}" if found[1] == found[1] else "")


def write_comparison(directories: Sequence[str | Path]) -> Path:
    """Runs side by side, into `comparison.html` beside the first one; the path."""
    runs = []
    for directory in directories:
        records = _json(Path(directory) / EVENTS)
        names = list(dict.fromkeys(record["learner"] for record in records))
        runs += [(str(directory), _learner(name, [r for r in records if r["learner"] == name])) for name in names]
    page = _environment().get_template("comparison.html").render(title="Runs side by side", runs=runs)
    path = Path(directories[0]).parent / COMPARISON
    write_atomic(path, page)
    return path


def _environment() -> Environment:
    found = Environment(loader=PackageLoader("engram.report"), autoescape=select_autoescape(), trim_blocks=True)
    found.filters["figure"] = figure
    found.globals.update(range_bar=drawing.range_bar, roc=drawing.roc)
    return found


def figure(value: float | None) -> str:
    """A number with three digits after the point, or a dash."""
    return "–" if value is None or value != value else f"{value:.3f}"


def _learner(name: str, records: Sequence[Record]) -> dict[str, Any]:
    """Accuracy per task after every event, in both readings, and the stream's metrics."""
    tasks = sorted({entry["task"] for record in records for entry in record["accuracy"]})
    rows = [
        {"title": record["title"], "kind": record["kind"], "cells": _cells(record, tasks), "mean": _pooled(record)}
        for record in records
    ]
    learnt = [record for record in records if record["kind"] == "learn"]
    return {
        "name": name,
        "tasks": [t + 1 for t in tasks],
        "rows": rows,
        "metrics": _metrics(learnt),
        "seconds": sum(record["cost"]["seconds"] for record in records),
        "updates": sum(record["cost"]["steps"] for record in records),
    }


def _cells(record: Record, tasks: Sequence[int]) -> list[dict[str, Any] | None]:
    found = {entry["task"]: entry for entry in record["accuracy"]}
    cells: list[dict[str, Any] | None] = []
    for task in tasks:
        entry = found.get(task)
        aware = None if entry is None else entry["hits_task_aware"] / entry["n"]
        cells.append(entry and {"value": entry["hits"] / entry["n"], "aware": aware, "n": entry["n"]})
    return cells


def _pooled(record: Record) -> float | None:
    n = sum(entry["n"] for entry in record["accuracy"])
    return sum(entry["hits"] for entry in record["accuracy"]) / n if n else None


def _metrics(learnt: Sequence[Record]) -> list[tuple[str, float, str]]:
    """The stream's metrics, class-incremental, with what they mean."""
    import numpy as np

    tasks = [record["accuracy"] for record in learnt]
    if len(tasks) < 2 or any(len(row) != k + 1 for k, row in enumerate(tasks)):
        return []
    matrix = np.full((len(tasks), len(tasks)), np.nan)
    for k, row in enumerate(tasks):
        matrix[k, : k + 1] = [entry["hits"] / entry["n"] for entry in row]
    sizes = [entry["n"] for entry in tasks[-1]]
    return [
        ("final accuracy, task mean", continual.average_accuracy(matrix), "mean over tasks after the last one"),
        ("final accuracy, sample mean", continual.sample_accuracy(matrix, sizes), "over all test rows at the end"),
        ("average incremental accuracy", continual.average_incremental(matrix), "task mean, averaged over the stream"),
        ("forgetting", continual.forgetting(matrix), "largest earlier accuracy minus the last, mean over old tasks"),
        (
            "backward transfer",
            continual.backward_transfer(matrix),
            "last accuracy minus the first, mean over old tasks",
        ),
    ]


def _requests(records: Sequence[Record], learners: Sequence[str]) -> list[dict[str, Any]]:
    """Every request with what each learner's audit found."""
    events = list(dict.fromkeys(record["event"] for record in records if record["kind"] == "forget"))
    found = []
    for event in events:
        mine = [record for record in records if record["event"] == event]
        audits = [
            {
                "learner": record["learner"],
                "method": record["method"],
                "exact": record["exact"],
                "weights_hold_it": record.get("weights_hold_it", False),
                "residue": len(record["residue"]),
                "findings": [_finding(finding) for finding in record["findings"]],
                "answers": record.get("answers", []),
            }
            for record in mine
        ]
        for audit in audits:
            verdicts = [finding["verdict"] for finding in audit["findings"]]
            audit["counts"] = {v: verdicts.count(v) for v in ("pass", "fail", "unknown") if v in verdicts}
        first = mine[0]
        found.append(
            {"title": first["title"], "rows": len(first["ids"]), "retain": first["retain_rows"], "audits": audits}
        )
    return found


def _finding(plain: Mapping[str, Any]) -> dict[str, Any]:
    finding = Finding.from_dict(plain)
    judged: Judgement = judge(finding)
    return {
        "name": finding.name,
        "probe": plain.get("probe", ""),
        "finding": finding,
        "verdict": str(judged.verdict),
        "sentence": judged.sentence,
        "comparison": judged.comparison,
        "protocol": ", ".join(f"{key}: {value}" for key, value in finding.protocol.items()),
    }


def _contents(config: str, records: Sequence[Record]) -> list[dict[str, Any]]:
    """The forgotten rows, read again from their source: images as PNG, texts as they are."""
    import yaml

    from engram.core.running import load_data

    train, _, _ = load_data(yaml.safe_load(config)["data"])
    found = []
    for event in dict.fromkeys(record["event"] for record in records if record["kind"] == "forget"):
        record = next(r for r in records if r["event"] == event)
        rows = train.select(record["ids"])
        shown = [_content(rows, k) for k in range(min(len(rows), 100))]
        found.append({"title": record["title"], "rows": shown, "left_out": len(rows) - len(shown)})
    return found


def _content(rows: Table, k: int) -> dict[str, str]:
    shown = {"id": rows.ids[k]}
    columns = [rows.extra[name] for name in ("text", "question", "answer") if name in rows.extra]
    texts = [str(column[k]) for column in columns if not hasattr(column, "dim")]
    if texts:
        shown["text"] = " ".join(texts)
    if "pixel_values" in rows.inputs:
        shown["image"] = _png(rows.batch(rows.rows_of([rows.ids[k]])).inputs["pixel_values"][0])
    return shown


def _png(image: Any) -> str:
    """A tensor [c, h, w] in [0, 1] as a data URL."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    sink = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(sink, "PNG")
    return "data:image/png;base64," + base64.b64encode(sink.getvalue()).decode()


def _title(config: str) -> str:
    import yaml

    return str(yaml.safe_load(config)["title"])


def _json(path: Path) -> Any:
    if not path.exists():
        if path.name == AUDIT:
            raise EngramError(f"{path.parent} holds no audit ({path.name} is missing)")
        status = path.parent / STATUS
        what = "a run that has not finished; use engram run --resume" if status.exists() else "no run"
        raise EngramError(f"{path.parent} holds {what} ({path.name} is missing)")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise EngramError(f"{path} cannot be read: {error}") from error
