"""Tasks that share the machine: a pool of processes that report to one display and stop together."""

import multiprocessing
import queue
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch

from fewstep.errors import Interrupted
from fewstep.runtime.tracking import first_metric, progress_columns

NUM_PROCESSES = 2
_messages: Any = None  # in a worker: the queue on which it reports
_stopping: Any = None  # in a worker: the event that tells it to end its task


class Task(NamedTuple):
    """A function of a module that a worker calls with the arguments and a `Report`."""

    title: str
    total: int
    function: Callable[..., Any]
    arguments: tuple
    threads: int = 1


class TaskRunner:
    """Runs tasks in the pool, with one progress line per title; the first error of a task is raised here."""

    def __init__(self, pool: ProcessPoolExecutor, messages: Any, stopping: Any):
        self.pool, self.messages, self.stopping = pool, messages, stopping

    def __call__(self, tasks: Sequence[Task]) -> list[Any]:
        """The results, in the order of the tasks."""
        futures = [self.pool.submit(_run_task, index, task) for index, task in enumerate(tasks)]
        try:
            self._show(tasks, futures)
        except KeyboardInterrupt:
            raise Interrupted("stopped; continue with --resume") from None
        finally:
            if not all(future.done() for future in futures):  # stopped, or one has failed
                self.stopping.set()
                for future in futures:
                    future.cancel()
        return [future.result() for future in futures]

    def _show(self, tasks: Sequence[Task], futures: list[Future]) -> None:
        """Shows what the workers report until every task has ended or one has failed."""
        done = [0] * len(tasks)
        with progress_columns() as progress:
            totals: Counter[str] = Counter()
            for task in tasks:
                totals[task.title] += task.total
            lines = {title: progress.add_task(title, total=total, note="") for title, total in totals.items()}
            while not all(future.done() for future in futures):
                for future in futures:
                    if future.done():
                        future.result()
                with suppress(queue.Empty):
                    index, done[index], note = self.messages.get(timeout=0.2)
                    title = tasks[index].title
                    count = sum(number for number, task in zip(done, tasks, strict=True) if task.title == title)
                    progress.update(lines[title], completed=count, **({"note": note} if note else {}))


@contextmanager
def task_runner() -> Iterator[TaskRunner]:
    """A runner on a pool of `NUM_PROCESSES` fresh processes."""
    context = multiprocessing.get_context("spawn")
    messages, stopping = context.Queue(), context.Event()
    with ProcessPoolExecutor(NUM_PROCESSES, context, _start_worker, (messages, stopping)) as pool:
        yield TaskRunner(pool, messages, stopping)


def _start_worker(messages: Any, stopping: Any) -> None:
    global _messages, _stopping
    _messages, _stopping = messages, stopping
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one stops the others


def _run_task(index: int, task: Task) -> Any:
    torch.set_num_threads(task.threads)

    def report(done: int, metrics: dict[str, float]) -> None:
        if _stopping.is_set():
            raise Interrupted("stopped")
        _messages.put((index, done, first_metric(metrics)))

    return task.function(*task.arguments, report)
