import resource
import sys

import pytest
import torch

from fewstep.runtime.allocation import keep_freed_memory


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_not_taken_from_the_system_again() -> None:
    keep_freed_memory()
    torch.ones(10 * 2**20)  # 40 MiB, above all that glibc keeps by itself
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(10 * 2**20)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 2 * 10_240  # pages of two of them; of all five where they are given back
