"""Importances of weights against a loop over single rows; FeTrIL's classifier on rows that never stand together."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.svm import LinearSVC
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ratio import Act, Ratio, speedup
from engram.data.readers import read
from engram.data.table import Table
from engram.engine.importance import importance
from engram.engine.run import Run
from engram.models.build import build
from engram.stats.linear import Linear, ridge_of_blocks, svc_of_blocks


def ratios(rows: int = 1000) -> Iterator[Ratio]:
    """Those of EWC (Fisher of the true labels) and of MAS (norm of the outputs), on the MLP of the digits."""
    digits = read("sklearn:digits").take(range(rows))
    draws = torch.Generator().manual_seed(0)
    model = build(
        {"name": "MLP", "hidden": [256, 256]}, inputs=digits.shapes, classes=digits.classes, generator=draws
    ).eval()
    for name, loss, power in (("EWC", "ce", 2), ("MAS", "norm", 1)):
        yield speedup(
            f"importances of {name}, {rows} rows, MLP 64-256-256-10, against a loop over rows",
            lambda loss=loss, power=power: importance(model, digits, loss=loss, power=power, run=Run()),  # type: ignore[misc]
            lambda loss=loss, power=power: by_rows(model, digits, loss, power),  # type: ignore[misc]
            repeats=3,
        )

    yield from classifiers()


def classifiers(classes: int = 50, rows: int = 1000, width: int = 64) -> Iterator[Ratio]:
    """The last task of FeTrIL with so many classes, one fifth of them new: LinearSVC and scikit-learn's ridge on
    materialised pseudo-features against the same objectives class by class. Memory: the most that either arm held
    beside the task's own features."""
    for seed in range(3):
        draws = torch.Generator().manual_seed(seed)
        means = torch.randn(classes, width, generator=draws).abs()
        new = classes // 5
        own = means[-new:].repeat_interleave(rows, 0) + torch.randn(new * rows, width, generator=draws)
        own, shifts = own.double(), (means - means[-new:].repeat(5, 1)).double()

        def blocks(own: Tensor = own, shifts: Tensor = shifts, new: int = new) -> Iterator[tuple[int, Tensor]]:
            for k, shift in enumerate(shifts):
                start = k % new * rows
                yield k, F.normalize(own[start : start + rows] + shift, dim=1)

        def whole(blocks: Any = blocks) -> tuple[np.ndarray, np.ndarray]:
            x = torch.cat([part for _, part in blocks()]).numpy()
            return x, np.repeat(np.arange(classes), rows)

        def ours(blocks: Any = blocks) -> Linear:
            return svc_of_blocks(torch.arange(classes), blocks)

        def theirs(whole: Any = whole) -> LinearSVC:
            return LinearSVC(dual=False, random_state=0).fit(*whole())

        what = f"FeTrIL's classifier, {classes} classes x {rows} rows of {width}, stream {seed}"
        x, y = whole()
        found, known = ours(), theirs()
        score = float(((torch.from_numpy(x) @ found.weight + found.bias).argmax(1).numpy() == y).mean())
        gap = 100 * (score - known.score(x, y))
        yield speedup(f"{what}, SVM (accuracy {gap:+.2f} points)", ours, theirs, least=2, repeats=1)
        yield held(f"{what}, SVM: bytes", ours, theirs)
        yield speedup(
            f"{what}, ridge form against LinearSVC",
            lambda blocks=blocks: ridge_of_blocks(torch.arange(classes), blocks),  # type: ignore[misc]
            theirs,
            least=5,
            repeats=1,
        )


def held(name: str, ours: Act, theirs: Act, most: float = 0.2) -> Ratio:
    """Peak memory of a process of its own for each arm, beyond what it held before; libraries have their buffers from
    the calls before."""
    sizes = [peak(act) for act in (ours, theirs)]
    share = sizes[0] / max(sizes[1], 1)
    return Ratio(name, share, share, share, f"<= {most:g}", share <= most)


def peak(act: Act) -> int:
    """The growth of a forked process's resident memory while it works, in bytes; it has done the work once before, so
    that pages of libraries, which a fork has to find again, do not count."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        act()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _high_water()
        act()
        os.write(writer, str(_high_water() - before).encode())
        os._exit(0)
    os.wait()
    return int(os.read(reader, 32))


def _high_water() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def by_rows(model: nn.Module, table: Table, loss: str, power: int) -> dict[str, Tensor]:
    """The loop that one would write: a backward pass for each row."""
    params = dict(model.named_parameters())
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in params.items()}
    for row in range(len(table)):
        batch = table.batch(torch.tensor([row]))
        logits = model(**batch.inputs).logits
        assert batch.labels is not None
        value = F.cross_entropy(logits, batch.labels) if loss == "ce" else logits.square().sum()
        for name, gradient in zip(params, torch.autograd.grad(value, list(params.values())), strict=True):
            total[name] += gradient.double().abs() ** power
    return {name: value / len(table) for name, value in total.items()}
