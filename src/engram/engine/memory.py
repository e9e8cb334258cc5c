"""Memory of tensors on the CPU: what was freed is used again."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

TRIM, MAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>
LARGEST = 32 << 20  # bytes; glibc takes no larger one
KEPT = 64 << 20


@cache
def reuse_freed() -> None:
    """Let glibc keep up to `KEPT` bytes of freed memory for the next tensors, of up to `LARGEST` each; once a process.

    As it is, it hands much of it back after every step, and the kernel clears the same pages again for the next one,
    which shows most with per-row gradients; it comes to these limits by itself once a block of 32 MiB was freed. Other
    C libraries go by rules of their own. See mallopt(3).
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MAP, LARGEST)
        mallopt(TRIM, KEPT)
