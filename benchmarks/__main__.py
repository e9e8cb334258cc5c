"""Print all ratios, one thread in both arms. A bound that does not hold is said so in its line."""

from __future__ import annotations

import os
import sys
from importlib import import_module

MODULES = ("engine", "many", "forgetting", "evidence", "keeping", "preference", "language")


def main() -> None:
    """Run every benchmark, or those whose module is named."""
    os.environ.update({name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")})
    import torch  # after the number of threads is set

    torch.set_num_threads(1)
    print("Seconds of CPU on one thread (fit_many: of the clock, two processes of one thread each);", flush=True)
    print("medians of interleaved repeats, [least, most] over the pairs", flush=True)
    for name in sys.argv[1:] or MODULES:
        for ratio in import_module(f"benchmarks.{name}").ratios():
            print(ratio.line(), flush=True)


if __name__ == "__main__":
    main()
