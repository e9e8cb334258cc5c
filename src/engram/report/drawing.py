"""Small drawings as inline SVG: they take their colours from the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from engram.core.finding import Finding

WIDTH, HEIGHT = 220, 26
SIDE = 132


def range_bar(finding: Finding) -> Markup:
    """The value with its interval, the oracles' values as ticks, and their mean ± margin as a band."""
    points = [finding.value, *(finding.interval or ()), *finding.reference]
    centre = sum(finding.reference) / len(finding.reference) if finding.reference else None
    if centre is not None and finding.margin is not None:
        points += [centre - finding.margin, centre + finding.margin]
    low, high = min(points), max(points)
    pad = 0.06 * (high - low) or 0.05
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return round(4 + (WIDTH - 8) * (value - low) / (high - low), 1)

    middle = HEIGHT / 2
    parts = [f'<svg class="range" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_label(finding)}">']
    if centre is not None and finding.margin is not None:
        left, right = x(centre - finding.margin), x(centre + finding.margin)
        parts.append(f'<rect class="band" x="{left}" y="2" width="{max(right - left, 1):.1f}" height="{HEIGHT - 4}"/>')
    parts += [f'<line class="oracle" x1="{x(v)}" x2="{x(v)}" y1="5" y2="{HEIGHT - 5}"/>' for v in finding.reference]
    if finding.interval is not None:
        ends = f'x1="{x(finding.interval[0])}" x2="{x(finding.interval[1])}"'
        parts.append(f'<line class="interval" {ends} y1="{middle}" y2="{middle}"/>')
    parts.append(f'<circle class="value" cx="{x(finding.value)}" cy="{middle}" r="4"/></svg>')
    return Markup("".join(parts))


def roc(finding: Finding) -> Markup:
    """A ROC curve with its diagonal, or nothing."""
    if "fpr" not in finding.curve:
        return Markup("")
    pairs = zip(finding.curve["fpr"], finding.curve["tpr"], strict=True)
    points = " ".join(f"{4 + (SIDE - 8) * a:.1f},{SIDE - 4 - (SIDE - 8) * b:.1f}" for a, b in pairs)
    return Markup(
        f'<svg class="roc" viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="ROC curve, AUC {finding.value:.3f}">'
        f'<rect x="4" y="4" width="{SIDE - 8}" height="{SIDE - 8}"/>'
        f'<line x1="4" y1="{SIDE - 4}" x2="{SIDE - 4}" y2="4"/><polyline points="{points}"/></svg>'
    )


def _label(finding: Finding) -> str:
    oracles = (
        f", retrained models {min(finding.reference):.3f} to {max(finding.reference):.3f}" if finding.reference else ""
    )
    return f"{finding.value:.3f}{oracles}"


def courses(entries: Sequence[Mapping[str, Any]], name: str) -> list[Markup]:
    """For each learner its mean accuracy on all tasks so far, over the tasks, before those of all learners in grey.
    `name`: of these together, different from others on the page."""
    lines = []
    for entry in entries:
        means = [sum(row) / len(row) for row in entry["accuracy matrix"]]
        step = 164 / max(1, len(means) - 1)
        lines.append(" ".join(f"{8 + step * k:.1f},{100 - 92 * mean:.1f}" for k, mean in enumerate(means)))
    grey = "".join(f'<polyline points="{points}"/>' for points in lines)
    frame = '<rect x="8" y="8" width="164" height="92"/>'
    drawings = []
    for k, points in enumerate(lines):
        others = f'<g class="others" id="{name}">{frame}{grey}</g>' if not k else f'<use href="#{name}"/>'
        head = '<svg class="course" viewBox="0 0 180 108" role="img" aria-label="accuracy over tasks">'
        drawings.append(Markup(f'{head}{others}<polyline class="mine" points="{points}"/></svg>'))
    return drawings


def line(name: str, values: Sequence[float]) -> Markup:
    """Figures over the tasks, from 0 to the largest, as a small line."""
    top, step = max(values) or 1, 86 / max(1, len(values) - 1)
    points = " ".join(f"{2 + step * k:.1f},{22 - 20 * value / top:.1f}" for k, value in enumerate(values))
    said = f"{name}: {values[0]:.4g} at the first task, {values[-1]:.4g} at the last"
    head = '<svg class="course over" viewBox="0 0 90 24" role="img">'
    return Markup(f'{head}<title>{said}</title><polyline class="mine" points="{points}"/></svg>')


def matrix(values: Sequence[Sequence[float]]) -> Markup:
    """An accuracy matrix, a square a value: row k after the k-th task, a column a task."""
    side = max(1, len(values))
    parts = [f'<svg class="matrix" viewBox="0 0 {side} {side}" role="img" aria-label="accuracy matrix">']
    for k, row in enumerate(values):
        for j, value in enumerate(row):
            parts.append(f'<rect x="{j}" y="{k}" width="1" height="1" fill-opacity="{0.05 + 0.95 * value:.2f}">')
            parts.append(f"<title>task {j + 1} after {k + 1}: {value:.3f}</title></rect>")
    return Markup("".join([*parts, "</svg>"]))


def plane(entries: Sequence[Mapping[str, Any]], share: str) -> Markup:
    """Courses of forgetters on the plane of utility and forget quality (its logarithm, cut at 1e-10): a line from point
    to point, a dot at the end."""
    wide, high, left, low = 560, 326, 46, 292
    floor = -10.0

    def place(point: Mapping[str, Any]) -> tuple[float, float] | None:
        if not point["utility"] or not point["forget quality"]:
            return None
        quality = max(floor, math.log10(max(point["forget quality"][0], 10**floor)))
        return round(left + 400 * point["utility"][0], 1), round(low - 270 * (1 - quality / floor), 1)

    parts = [f'<svg class="plane" viewBox="0 0 {wide} {high}" role="img" aria-label="utility against forget quality">']
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + 400 * tick
        parts.append(
            f'<line class="grid" x1="{x}" x2="{x}" y1="22" y2="{low}"/><text x="{x - 9}" y="306">{tick:g}</text>'
        )
    for tick in (0, -2, -4, -6, -8, -10):
        y = low - 270 * (1 - tick / floor)
        parts.append(f'<line class="grid" x1="{left}" x2="446" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="4" y="{y + 4}">{"1" if not tick else f"1e{tick}"}</text>')
    parts.append(f'<text x="{left + 150}" y="321">model utility</text><text x="4" y="12">forget quality (p)</text>')
    for k, entry in enumerate(entries):
        places = [found for point in entry["shares"][share]["course"] if (found := place(point)) is not None]
        colour = f"hsl({(k * 137) % 360} 60% 45%)"
        text = 30 + 16 * k
        parts.append(f'<circle cx="464" cy="{text - 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="474" y="{text}">{escape(entry["method"])}</text>')
        if places:
            points = " ".join(f"{x},{y}" for x, y in places)
            parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{points}"/>')
            parts.append(f'<circle cx="{places[-1][0]}" cy="{places[-1][1]}" r="4" fill="{colour}"/>')
    return Markup("".join([*parts, "</svg>"]))
