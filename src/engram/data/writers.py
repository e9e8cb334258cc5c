"""Tables as files that `engram.data.readers` reads back."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from engram.data.table import Table
from engram.errors import EngramError


def parquet(table: Table, *, id: str = "id", label: str = "label", image: str = "image") -> bytes:
    """The bytes of a Parquet file of labelled images: labels as numbers with the class names beside them, images as
    tensors, and all other columns. `id`, `label`, `image`: what the columns are called.

    EngramError for rows without `pixel_values` or labels.
    """
    if "pixel_values" not in table.inputs or table.labels is None:
        raise EngramError("only labelled images can be written as Parquet")
    pixels = pa.FixedShapeTensorArray.from_numpy_ndarray(table.inputs["pixel_values"].contiguous().numpy())
    columns = {id: list(table.ids), image: pixels, label: table.labels.numpy()}
    others = {key: value.numpy() if isinstance(value, Tensor) else list(value) for key, value in table.extra.items()}
    classes = {"_type": "ClassLabel", "names": [table.names[c] for c in sorted(table.names)]}
    about = json.dumps({"info": {"features": {label: classes}}})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({**others, **columns}, metadata={"huggingface": about}), sink)
    return sink.getvalue().to_pybytes()
