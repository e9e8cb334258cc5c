"""The ledger with a million records and fifty models: how long `where` takes, and how large the file is.

python -m benchmarks.ledger (some minutes: almost all of them build the ledger)
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from engram.core.ledger import Ledger

RECORDS, MODELS, QUESTIONS = 1_000_000, 50, 100


def main() -> None:
    """Print the median CPU time of a question on a new connection, and the size of the file."""
    draws = random.Random(0)
    ids = [f"record-{k}" for k in range(RECORDS)]
    with TemporaryDirectory() as folder:
        place = Path(folder) / "ledger.sqlite"
        ledger = Ledger(place)
        for k in range(MODELS):
            ledger.add_holder("model", Path(folder) / f"model-{k}", ids if k == 0 else draws.sample(ids, RECORDS // 2))
        seconds, found = [], []
        for _ in range(QUESTIONS):
            start = time.process_time()
            found.append(len(Ledger(place).where(draws.choice(ids))))
            seconds.append(time.process_time() - start)
        size = place.stat().st_size / 2**20
    assert "torch" not in sys.modules
    print(f"{RECORDS:,} records, {MODELS} models, each after the first on a random half of them")
    print(f"where: {1e3 * median(seconds):.1f} ms of CPU, median of {QUESTIONS} ({median(found)} models); bound 50 ms")
    print(f"file: {size:.1f} MiB; bound 64 MiB")


if __name__ == "__main__":
    main()
