"""Frozen features as Parquet files, for `engram compare continual`.

python -m benchmarks.features --data DATA --encoder DIRECTORY --out OUT

Images go through the ResNet-56 trained on CIFAR-10 (its 64 pooled features), sentences through a transformers text
encoder (mean-pooled, unit length). DATA holds fashion_mnist, cifar100, clinc150 and weights; of each class the first
`--rows` training rows and `--tests` test rows are taken, in the order of the files. names.safetensors has the vector of
every class name, by the same text encoder.
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

from benchmarks.tables.common import as_cifar, backbone, images
from engram.data.readers import read
from engram.data.table import Table
from engram.engine.predict import features
from engram.models.text import embed


def main() -> None:
    """Write the files of every set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, required=True, help="directory of a text encoder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--tests", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    model = backbone(given.data, 56)
    for name in ("fashion_mnist", "cifar100"):
        for part, table, count in zip(
            ("train", "test"), images(given.data / name), (given.rows, given.tests), strict=True
        ):
            few = first(table, count * (10 if name == "fashion_mnist" else 1))
            few = as_cifar(few) if name == "fashion_mnist" else few
            write(replace(few, inputs={"values": features(model, few)}), given.out / f"{name}-{part}.parquet")
    for part, count in (("train", given.rows), ("test", given.tests)):
        table = first(sentences(given.data / "clinc150" / f"{part}.jsonl"), count)
        found = embed(list(table.extra["text"]), given.encoder)
        write(replace(table, inputs={"values": found}), given.out / f"clinc150-{part}.parquet")
    write_names(given.out, given.encoder)


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
