"""What of the machine tests set bounds to, and what they measure."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PEAK = """
import sys
from pathlib import Path
arguments = sys.argv[1:]
def peak():  # of this program; ru_maxrss would be at least that of the process that started it
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
"""


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Every file that grows beyond it gives OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def extra_memory(before: str, work: str, *arguments: object) -> int:
    """Bytes that a program on its own, with these `arguments`, takes for `work` beyond what it took `before`."""
    code = f"{PEAK}{before}\nstart = peak()\n{work}\nprint(peak() - start)"
    command, threads = [sys.executable, "-c", code, *map(str, arguments)], {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **threads})
    return int(done.stdout.splitlines()[-1])
