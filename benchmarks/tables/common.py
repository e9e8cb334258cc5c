"""What the tables share: the data, streams of learners, and Markdown."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from engram.compare.course import Course, follow
from engram.core.learner import Learner
from engram.core.settings import describe
from engram.data.readers import read
from engram.data.streams import Stage
from engram.data.table import Table
from engram.engine.cache import FeatureCache
from engram.engine.run import Run
from engram.files import write_atomic
from engram.models.resnet import load_cifar_resnet
from engram.report.page import write_leaderboard
from engram.stats import continual
from engram.stats.intervals import mean

Summary = dict[str, float]


def arguments(text: str | None) -> argparse.ArgumentParser:
    """The command line that the tables share."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with fashion_mnist, cifar10, cifar100, weights"
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/features"), help="where features are kept")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file")
    return parser


def images(folder: Path) -> tuple[Table, Table]:
    """Train and test rows of a folder with train.parquet and test.parquet."""
    train, test = (read(folder / f"{part}.parquet") for part in ("train", "test"))
    return train, test


def as_cifar(table: Table) -> Table:
    """Grey images padded by 2 to 32 x 32 and repeated in three channels."""
    padded = F.pad(table.inputs["pixel_values"], (2, 2, 2, 2)).repeat(1, 3, 1, 1)
    return replace(table, inputs={"pixel_values": padded})


def backbone(data: Path, depth: int) -> nn.Module:
    """The ResNet trained on CIFAR-10."""
    return load_cifar_resnet(data / "weights" / f"resnet{depth}-cifar10.safetensors")


def with_features(table: Table, model: nn.Module, cache: Path) -> Table:
    """The same rows with `values` [n, 64] in place of pixels."""
    return replace(table, inputs={"values": FeatureCache(cache).features(model, table)})


def summary(course: Course) -> Summary:
    """The figures of a table's row."""
    return {
        "final, task mean": continual.average_accuracy(course.matrix),
        "final, sample mean": continual.sample_accuracy(course.matrix, course.sizes),
        "incremental, task mean": continual.average_incremental(course.matrix),
        "incremental, sample mean": continual.average_incremental(course.matrix, course.sizes),
        "forgetting": continual.forgetting(course.matrix),
    }


def course(learner: Learner, stages: Sequence[Stage], seed: int) -> Summary:
    """What a learner shows along a stream."""
    return summary(follow(learner, stages, Run(seed=seed)))


def row(name: str, summaries: Sequence[Summary]) -> str:
    """A line of Markdown: mean ± half of the 95 % t interval over the runs, in percent."""
    cells = []
    for key in summaries[0]:
        values = [summary[key] for summary in summaries]
        found = mean(values) if len(values) > 1 else None
        around = "" if found is None else f" ± {100 * (found.high - found.low) / 2:.1f}"
        cells.append(f"{100 * sum(values) / len(values):.1f}{around}")
    return f"| {name} | {' | '.join(cells)} |"


def head(first: str, summary: Summary) -> str:
    """The two lines over such rows."""
    return f"| {first} | {' | '.join(summary)} |\n|---|{'---:|' * len(summary)}"


def settings(learners: dict[str, Learner]) -> str:
    """The settings of all learners, as a list."""
    return "\n".join(f"- {name}: `{describe(learner)}`" for name, learner in learners.items())


def page(title: str, body: str, command: str) -> str:
    """A page of results with the command that makes it and the machine in words."""
    return f"# {title}\n\nMade by\n\n```\n{command}\n```\n\non {machine()}.\n\n{body}\n"


def machine() -> str:
    """The machine in words; the GPU, if one was used."""
    used = torch.cuda.is_initialized()
    gpu = f"one {torch.cuda.get_device_name()}, " if used else ""
    cores = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} thread" + (" a process" if used else "")
    return f"{gpu}{cores}, torch {torch.__version__.split('+')[0]}"


def said() -> str:
    """The command as it was given, with the places of data and cache left open."""
    module = (sys.modules["__main__"].__spec__ or argparse.Namespace(name="")).name
    left_open = {"--data": "DATA", "--cache": "CACHE"}
    words = [left_open.get(before, word) for before, word in zip(["", *sys.argv[1:]], sys.argv[1:], strict=False)]
    return f"python -m {module} {' '.join(words)}"


def by_hand(file: Path, made: Collection[str]) -> dict[str, str]:
    """The sections of a page that is there which no table makes, by title."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    sections = {part.partition("\n")[0]: f"## {part.strip()}" for part in text.split("\n## ")[1:]}
    return {title: section for title, section in sections.items() if title not in made}


def leaderboard(out: Path, name: str, summary: Mapping[str, Any], intro: str) -> str:
    """The leaderboard of a comparison beside the page `out`; a line that points to it."""
    place = out.parent / "leaderboards" / f"{name}.html"
    place.parent.mkdir(parents=True, exist_ok=True)
    write_leaderboard(place, summary, intro=intro)
    return f"All measures, with drawings: [leaderboard](leaderboards/{name}.html)."


def write(path: Path, text: str) -> None:
    """Put the page down and say so."""
    write_atomic(path, text)
    print(f"wrote {path}", flush=True)
