"""The collapse of ascent as a drawing: how fast logits run away, and how far from retraining each method passes.

python -m benchmarks.tables.collapse --out docs/images/collapse.svg

Left, the eight points of `engram reproduce npo` at learning rate 1; right, its random features: the divergence of a
retrained model from the unlearned one on both kinds of rows, every hundred epochs. Seed 0 and 1, as in the tests.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.tables.common import write
from engram.core.request import Request
from engram.engine.run import Run
from engram.reproduce.npo import course, divergence, methods, world

HIGH, WIDE, LEFT, TOP = 230, 250, 46, 24
COLOURS = ("#c0392b", "#2471a3", "#1e8449")
Points = Sequence[tuple[float, float]]


def main() -> None:
    """Follow both worlds and write the drawing."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the SVG file")
    panels = [
        panel(0, "rms of logits, over steps (log, log)", drifts(), (10, 8000), (0.1, 1e5)),
        panel(1, "KL from retraining: forget, over retain (log, log)", gaps(), (1e-3, 2), (1e-3, 3)),
    ]
    size = f'viewBox="0 0 {2 * (WIDE + LEFT) + 20} {HIGH + TOP + 34}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="10">'
    white = '<rect width="100%" height="100%" fill="#fff"/>'
    write(parser.parse_args().out, "\n".join([head, white, *panels, "</svg>"]))


def drifts() -> dict[str, Points]:
    """The logits' root mean square along the steps, by method."""
    return {
        name: [(k, size) for k, size in enumerate(course(beta, 0, 8000), 1) if k >= 10 and k % 10 == 0]
        for name, beta in (("GA", None), ("NPO, beta 0.1", 0.1), ("NPO, beta 1", 1.0))
    }


def gaps() -> dict[str, Points]:
    """Divergence on retain and on forget rows along the epochs, by method."""
    there = world(1)
    request = Request.of_records(there.retain.concat(there.forget), there.forget.ids)
    found: dict[str, list[tuple[float, float]]] = {}

    def place(model: nn.Module) -> tuple[float, float]:
        retain, forget = (divergence(there.retrained, model, there.tests[part]) for part in ("retain", "forget"))
        return retain, forget

    for name, method in methods().items():
        found[name] = points = [place(there.model)]

        def watch(path: object, epoch: int, now: nn.Module, points: list[tuple[float, float]] = points) -> None:
            if epoch % 100 == 0:
                points.append(place(now))

        method.forget(there.model, request, Run(seed=1, watch=watch))
    return found


def panel(k: int, title: str, lines: Mapping[str, Points], xs: tuple[float, float], ys: tuple[float, float]) -> str:
    """One drawing: lines from point to point on logarithmic axes, a dot at the end."""
    left = LEFT + k * (WIDE + LEFT)

    def x(value: float) -> float:
        return round(left + WIDE * _part(value, *xs), 1)

    def y(value: float) -> float:
        return round(TOP + HIGH * (1 - _part(value, *ys)), 1)

    parts = [f'<text x="{left}" y="14">{title}</text>']
    parts.append(f'<rect x="{left}" y="{TOP}" width="{WIDE}" height="{HIGH}" fill="none" stroke="#999"/>')
    parts += [f'<text x="{x(t) - 6}" y="{TOP + HIGH + 13}">{t:g}</text>' for t in _decades(*xs)]
    parts += [f'<text x="{left - 32}" y="{y(t) + 4}">{t:g}</text>' for t in _decades(*ys)]
    for (name, points), colour in zip(lines.items(), COLOURS, strict=False):
        path = " ".join(f"{x(a)},{y(b)}" for a, b in points)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{path}"/>')
        parts.append(f'<circle cx="{x(points[-1][0])}" cy="{y(points[-1][1])}" r="3" fill="{colour}"/>')
        place = f'x="{left + 8}" y="{TOP + 16 + 13 * list(lines).index(name)}"'
        parts.append(f'<text {place} fill="{colour}">{name}: ends at {points[-1][1]:.3g}</text>')
    return "\n".join(parts)


def _part(value: float, low: float, high: float) -> float:
    return math.log(min(max(value, low), high) / low) / math.log(high / low)


def _decades(low: float, high: float) -> list[float]:
    return [10.0**k for k in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]


if __name__ == "__main__":
    main()
