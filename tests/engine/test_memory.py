"""Freed memory stays for the next tensors."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep what they like")
COUNT = """
from resource import RUSAGE_SELF, getrusage
import torch
from engram.data.table import Batch
from engram.engine import memory
from engram.engine.losses import per_row
from engram.engine.persample import power_sums
from engram.models.build import build

torch.set_num_threads(1)
rows = Batch({"pixel_values": torch.ones(64, 3, 32, 32)}, torch.zeros(64).long(), torch.arange(64))
spec, shapes = {"name": "ResNet", "blocks": 3}, {"pixel_values": (3, 32, 32)}
model = build(spec, inputs=shapes, classes=range(10), generator=torch.Generator()).eval()

def faults():
    power_sums(model, rows, per_row, 2)
    before = getrusage(RUSAGE_SELF).ru_minflt
    for _ in range(3):
        power_sums(model, rows, per_row, 2)
    return getrusage(RUSAGE_SELF).ru_minflt - before

as_it_was = faults()
memory.reuse_freed()
print(as_it_was, faults())
"""


@glibc
def test_pages_are_cleared_once() -> None:
    """Per-row gradients of a ResNet-20, pass after pass: page faults before and after."""
    told = subprocess.run([sys.executable, "-c", COUNT], check=True, capture_output=True, text=True).stdout
    as_it_was, reused = map(int, told.split())
    assert as_it_was > 5 * reused, told
