"""Main memory while a teacher is loaded in bfloat16 and encodes in it, as for a LoRA, or in float32.

Run as `python benchmarks/loading_memory.py SOURCE CONFIG float32` (CONFIG is - for a folder).
"""

import sys
import threading
import time
from pathlib import Path

import torch

from fewstep.models.loading.pretrained import open_model

STATUS = Path("/proc/self/status")


def gigabytes(name: str) -> float:
    """RssAnon, without what is mapped from files; VmHWM, the most ever, with that."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1e6


def main(source: str, config: str, dtype: str) -> None:
    peaks, before = [gigabytes("RssAnon")], gigabytes("RssAnon")

    def watch() -> None:
        while True:
            peaks.append(gigabytes("RssAnon"))
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    begun = time.perf_counter()
    model = open_model(source, None if config == "-" else config, dtype=getattr(torch, dtype))
    seconds, loaded = time.perf_counter() - begun, max(peaks)
    model.encode_in(torch.bfloat16)
    told = f"to load {loaded - before:.2f}, with encode_in {max(peaks) - before:.2f}, kept {peaks[-1] - before:.2f}"
    print(f"{source} in {dtype}: GB {told}; VmHWM {gigabytes('VmHWM'):.2f}; {seconds:.1f} s")


main(*sys.argv[1:])
