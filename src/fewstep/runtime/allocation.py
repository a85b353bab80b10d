"""How memory of a CPU is taken and given back."""

import ctypes
import sys
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as malloc.h has them
NEVER = 2**30  # bytes


def keep_freed_memory() -> None:
    """Has the C library keep what is freed for the next tensors, as a step's are those of the last; glibc's alone.

    Else it gives large pieces back to the system, which hands them out anew page by page. The peak stays as it is.
    """
    library: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        for option in (TRIM_THRESHOLD, MMAP_THRESHOLD):
            library.mallopt(option, NEVER)
