"""Tasks that share the machine and report to one display: in a pool that stops together, or each in its own process."""

import multiprocessing
import os
import queue
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from fewstep.errors import Interrupted, UserError, brief, out_of_memory
from fewstep.runtime.tracking import Advance, Report, first_metric, progress_display
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


@contextmanager
def _blocked_ctrl_c() -> Iterator[None]:
    """For the start of processes: they inherit it, for Ctrl-C must not meet them before they know what it means."""
    resource_tracker.ensure_running()  # else the first start of a process would, and that unblocks it
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


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
        with _blocked_ctrl_c():
            return [self.pool.submit(_run_task, index, task) for index, task in enumerate(tasks)]

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
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    _end_with_parent()


def _end_with_parent() -> None:
    """Has SIGTERM end this process, which a run answers behind a checkpoint, and so does its parent's end."""
    signal.signal(signal.SIGTERM, end_quietly)
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


class Failure(NamedTuple):
    """In the place of a task's result: why there is none."""

    reason: str


Ended = Callable[[int, Any], None]
"""Told the number of a task that has ended, and its result or `Failure`."""


def run_apart(tasks: Sequence[Task], jobs: int, ended: Ended = lambda index, result: None) -> list[Any]:
    """The results, in the order of the tasks, at most `jobs` of which run at once, each in a process of its own.

    One that fails, or whose process is killed, leaves the others alone: a `Failure` is in its place. Ctrl-C and SIGTERM
    end all of them, a training behind a checkpoint, and raise Interrupted.
    """
    results: list[Any] = [None] * len(tasks)
    waiting, running = deque(enumerate(tasks)), dict[Connection, _Apart]()
    totals = Counter[str]()
    for task in tasks:
        totals[task.title] += task.total
    with stop_request() as stop_requested, progress_display() as start, ExitStack() as stack:
        stack.callback(_end_all, running)
        lines = {title: _Line(start(title, total)) for title, total in totals.items()}
        while waiting or running:
            while waiting and len(running) < jobs and not stop_requested():
                each = _Apart(*waiting.popleft())
                running[each.connection] = each
            for connection in wait([*running], timeout=0.2):
                each = running[connection]  # type: ignore[index]
                if each.read(lines[each.task.title]):
                    del running[each.connection]
                    results[each.index] = each.result
                    ended(each.index, each.result)
            if number := stop_requested():
                raise Interrupted("stopped", number)
    return results


def _end_all(running: dict[Connection, "_Apart"]) -> None:
    """Asks the processes to end, and waits until they have; nobody reads what they still send."""
    for each in running.values():
        each.connection.close()
        each.process.terminate()
    for each in running.values():
        each.process.join()


class _Line:
    """The progress of the tasks of one title."""

    def __init__(self, advance: Advance):
        self.advance, self.done = advance, Counter[int]()

    def tell(self, index: int, done: int, note: str) -> None:
        self.done[index] = done
        self.advance(self.done.total(), note)


class _Apart:
    """A task in its process, and what that has sent."""

    def __init__(self, index: int, task: Task):
        self.index, self.task = index, task
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_run_apart, args=(task, theirs))
        with _blocked_ctrl_c():
            self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.result: Any = None

    def read(self, line: _Line) -> bool:
        """Takes in one message; whether it was the last."""
        try:
            kind, *told = self.connection.recv()
        except (EOFError, OSError):  # it ended without a word
            self.process.join()
            kind, told = "result", [Failure(_killed(self.process.exitcode or 0))]
        if kind == "progress":
            line.tell(self.index, *told)
            return False
        self.connection.close()
        self.process.join()
        (self.result,) = told
        return True


def _killed(code: int) -> str:
    """What is told of a process that ended without a word."""
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"its process was killed ({name})" + (", as where memory is short" if code == -signal.SIGKILL else "")


def _run_apart(task: Task, connection: Connection) -> None:
    # Ctrl-C stays blocked here: a run would take it for a first request to stop, and SIGTERM for a second, to be obeyed
    # at once.
    _end_with_parent()
    torch.set_num_threads(task.threads)

    def report(done: int, metrics: dict[str, float]) -> None:
        with suppress(OSError):  # nobody is there to be told, who has asked this process to end, too
            connection.send(("progress", done, first_metric(metrics)))

    report(0, {})
    result = attempt(task, report)
    with suppress(OSError):  # likewise
        connection.send(("result", result))


def attempt(task: Task, report: Report) -> Any:
    """The result of a task, or why it has failed."""
    try:
        return task.function(*task.arguments, report)
    except UserError as error:
        return Failure(str(error))
    except OSError as error:
        return Failure(f"{error.filename or 'a file'}: {error.strerror or brief(error)}")
    except Exception as error:
        return Failure(out_of_memory(error) or brief(error))
