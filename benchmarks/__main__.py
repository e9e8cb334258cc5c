"""Print all ratios, one thread in both arms; exit code 1 if a claimed bound does not hold."""

from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"  # before torch is imported

import sys

import torch

from benchmarks import engine, forgetting


def main() -> int:
    """Run every benchmark, or those whose module is named."""
    torch.set_num_threads(1)
    modules = {"engine": engine, "forgetting": forgetting}
    chosen = [modules[word] for word in sys.argv[1:] if word in modules] or list(modules.values())
    print("CPU seconds of one thread, medians of interleaved repeats; [least, most] over the pairs", flush=True)
    failed = False
    for module in chosen:
        for ratio in module.ratios():
            print(ratio.line(), flush=True)
            failed |= ratio.holds is False
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
