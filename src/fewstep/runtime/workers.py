"""Tasks that share the machine: a pool of processes that report to one display and stop together."""

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch

from fewstep.errors import Interrupted, UserError
from fewstep.runtime.tracking import first_metric, progress_display
from fewstep.stopping import end_quietly, stop_request

NUM_PROCESSES = 2
STOPPED = "stopped; continue with --resume"
_messages: Any = None  # in a worker: the queue on which it reports
_stopping: Any = None  # in a worker: the event that tells it to end its task
_orphaned = threading.Event()  # in a worker: set when the process that started it is gone


class Task(NamedTuple):
    """A function of a module that a worker calls with the arguments and a `Report`."""

    title: str
    total: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    threads: int = 1


class TaskRunner:
    """Runs tasks in the pool, with one progress line per title; the first error of a task is raised here."""

    def __init__(self, pool: ProcessPoolExecutor, messages: Any, stopping: Any, stop_requested: Callable[[], int]):
        self.pool, self.messages, self.stopping, self.stop_requested = pool, messages, stopping, stop_requested

    def __call__(self, tasks: Sequence[Task]) -> list[Any]:
        """The results, in the order of the tasks."""
        futures = self._submit(tasks)
        try:
            self._show(tasks, futures)
        finally:
            if not all(future.done() for future in futures):  # stopped, or one has failed
                self.stopping.set()
                for future in futures:
                    future.cancel()
        return [future.result() for future in futures]

    def _submit(self, tasks: Sequence[Task]) -> list[Future[Any]]:
        """Starts processes that inherit a blocked Ctrl-C, which must not meet them before they know what it means."""
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return [self.pool.submit(_run_task, index, task) for index, task in enumerate(tasks)]
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])

    def _show(self, tasks: Sequence[Task], futures: list[Future[Any]]) -> None:
        """Shows what the workers report until every task has ended or one has failed."""
        done = [0] * len(tasks)
        with progress_display() as start:
            advance = {}
            for title in dict.fromkeys(task.title for task in tasks):
                advance[title] = start(title, sum(task.total for task in tasks if task.title == title))
            while not all(future.done() for future in futures):
                if number := self.stop_requested():
                    raise Interrupted(STOPPED, number)
                for future in futures:
                    if future.done():
                        future.result()
                with suppress(queue.Empty):
                    index, done[index], note = self.messages.get(timeout=0.2)
                    title = tasks[index].title
                    count = sum(number for number, task in zip(done, tasks, strict=True) if task.title == title)
                    advance[title](count, note)


@contextmanager
def task_runner() -> Iterator[TaskRunner]:
    """A runner on a pool of `NUM_PROCESSES` fresh processes; Ctrl-C and SIGTERM end it when its tasks have ended."""
    context = multiprocessing.get_context("spawn")
    messages, stopping = context.Queue(), context.Event()
    with stop_request() as stop_requested:  # no start of a process is left half-done
        try:
            with ProcessPoolExecutor(NUM_PROCESSES, context, _start_worker, (messages, stopping)) as pool:
                yield TaskRunner(pool, messages, stopping, stop_requested)
        except BrokenProcessPool as error:
            if number := stop_requested():  # which workers may have met first
                raise Interrupted(STOPPED, number) from None
            raise UserError("a worker process was killed, or ran out of memory; continue with --resume") from error


def _start_worker(messages: Any, stopping: Any) -> None:
    global _messages, _stopping
    _messages, _stopping = messages, stopping
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one stops the others
    signal.signal(signal.SIGTERM, end_quietly)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_watch_parent, daemon=True).start()


def _watch_parent() -> None:
    """Asks this process to end when the one that started it is gone, however it ended."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        _orphaned.set()
        os.kill(os.getpid(), signal.SIGTERM)  # a run writes a checkpoint first, anything else ends at once


def _run_task(index: int, task: Task) -> Any:
    torch.set_num_threads(task.threads)

    def report(done: int, metrics: dict[str, float]) -> None:
        if _stopping.is_set():
            raise Interrupted("stopped")
        _messages.put((index, done, first_metric(metrics)))

    try:
        report(0, {})
        return task.function(*task.arguments, report)
    finally:
        if _orphaned.is_set():  # nobody is there to take a result, or to give another task
            os._exit(1)
