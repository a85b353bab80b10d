"""Functions run by several ranks, each a process of its own, which talk by gloo."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fewstep.runtime.distributed import joined


def in_ranks(num: int, folder: Path, function: Callable[..., Any], *given: Any) -> list[Any]:
    """What the function of a module gives in each rank: nested tensors and numbers."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        port = door.getsockname()[1]
    # Of one process that has imported what they need: that takes most of a short test.
    multiprocessing.set_forkserver_preload([function.__module__])
    start = multiprocessing.get_context("forkserver").Process
    sent = pickle.dumps(given)  # by value: of shared tensors each would take a file of the server's few
    ranks = [start(target=_run, args=(number, num, port, folder, function, sent)) for number in range(num)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        process.kill()
    errors = [(folder / f"{number}.txt").read_text() for number in range(num) if (folder / f"{number}.txt").exists()]
    assert not errors, "\n".join(errors)
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(num)]


def _run(number: int, num: int, port: int, folder: Path, function: Callable[..., Any], sent: bytes) -> None:
    told = {"RANK": number, "WORLD_SIZE": num, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in told.items()}
    torch.set_num_threads(1)
    try:
        with joined(torch.device("cpu"), stall_minutes=2):
            torch.save(function(*pickle.loads(sent)), folder / f"{number}.pt")
    except BaseException:
        (folder / f"{number}.txt").write_text(f"rank {number}: {traceback.format_exc()}")
