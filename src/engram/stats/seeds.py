"""Seeds and draws as pure functions of names: no draw depends on which other draws were made before it."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def derive(*parts: object) -> int:
    """A seed in [0, 2**63) from any printable parts; equal parts give equal seeds on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `derive(*parts)`."""
    return torch.Generator().manual_seed(derive(*parts))


def uniform(rows: Tensor, *key: object, size: int = 1) -> Tensor:
    """Uniform draws that belong to a row: [B] row numbers -> [B, size] float64 in [0, 1).

    The draw of a row is a function of (key, row) alone, so it is the same in whichever batch or process the row
    arrives (SplitMix64 over a counter).
    """
    counters = rows.cpu().numpy().astype(np.uint64)[:, None] * np.uint64(size) + np.arange(size, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x: np.ndarray = np.uint64(derive(*key)) + (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)
