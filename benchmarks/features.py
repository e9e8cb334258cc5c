"""Frozen features as Parquet files, for `engram compare continual`.

python -m benchmarks.features --data DATA --encoder DIRECTORY --out OUT

Images go through a ResNet trained on CIFAR-10 (its 64 pooled features; ResNet-56, CIFAR-100 through ResNet-20 too),
sentences through a transformers text encoder (mean-pooled, unit length). DATA holds the sets and weights; of each class
the first `--rows` training rows and `--tests` test rows are taken (of Fashion-MNIST ten times as many), in the order
of the files. names.safetensors has the
vector of every class name, by the same text encoder.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from benchmarks.tables.common import as_cifar, backbone
from engram.data.readers import read
from engram.data.table import Table
from engram.engine.predict import features
from engram.models.text import embed

IMAGES = {"fashion_mnist": ("fashion_mnist", 56), "cifar100": ("cifar100", 56), "cifar100_resnet20": ("cifar100", 20)}
TIMES = {"fashion_mnist": 10}  # a set of ten classes has so many times the rows of each
TEXTS = ("clinc150", "banking77")


def main() -> None:
    """Write the files of every set, or of some."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, required=True, help="directory of a text encoder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--tests", type=int, default=30)
    parser.add_argument("--sets", nargs="+", choices=(*IMAGES, *TEXTS), default=(*IMAGES, *TEXTS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.sets:
        for part, count in (("train", given.rows), ("test", given.tests)):
            make = _images if name in IMAGES else _sentences
            write(make(name, part, count, given), given.out / f"{name}-{part}.parquet")
    write_names(given.out, given.encoder)


def _images(name: str, part: str, count: int, given: argparse.Namespace) -> Table:
    folder, depth = IMAGES[name]
    few = first(read(given.data / folder / f"{part}.parquet"), count * TIMES.get(name, 1))
    few = as_cifar(few) if name in TIMES else few
    return replace(few, inputs={"values": features(backbone(given.data, depth), few)})


def _sentences(name: str, part: str, count: int, given: argparse.Namespace) -> Table:
    table = first(sentences(given.data / name / f"{part}.jsonl"), count)
    return replace(table, inputs={"values": embed(list(table.extra["text"]), given.encoder)})


def sentences(file: Path) -> Table:
    """Labelled texts of a JSON-lines file."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    names = sorted({str(row["label"]) for row in rows})
    labels = torch.tensor([names.index(str(row["label"])) for row in rows])
    texts = {"text": tuple(row["text"] for row in rows)}
    return Table({}, labels, tuple(row["id"] for row in rows), texts, dict(enumerate(names)))


def first(table: Table, count: int) -> Table:
    """The first so many rows of every class, in the order of the table."""
    assert table.labels is not None
    seen: dict[int, int] = {}
    chosen = []
    for row, label in enumerate(table.labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= count:
            chosen.append(row)
    return table.take(chosen)


def write(table: Table, file: Path) -> None:
    """Ids, a column for every feature, and the class names."""
    assert table.labels is not None
    values = table.inputs["values"].float().numpy()
    columns = {"id": list(table.ids), **{f"f{k}": values[:, k] for k in range(values.shape[1])}}
    pq.write_table(pa.table({**columns, "label": [table.names.get(c, str(c)) for c in table.labels.tolist()]}), file)
    print(f"{file}: {len(table)} rows, {values.shape[1]} features", flush=True)


def write_names(out: Path, encoder: Path) -> None:
    """The vectors of all class names of the files, by name; an underscore is read as a space."""
    names = sorted({name for file in out.glob("*-train.parquet") for name in read(file).names.values()})
    vectors = embed([name.replace("_", " ") for name in names], encoder)
    file = out / "names.safetensors"
    save_file(dict(zip(names, map(torch.clone, vectors), strict=True)), file)
    print(f"{file}: {len(names)} names", flush=True)


if __name__ == "__main__":
    main()
