"""Tasks that share the machine and report to one display: in a pool that stops together, or each in its own process."""

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from fewstep.errors import Interrupted, Lost, UserError, brief, out_of_memory
from fewstep.runtime.launching import GRACE, meeting_place
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
    ranks: int = 1  # processes that do it together, where each has its own


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
    lost: bool = False  # for another rank has failed, which knows why


Ended = Callable[[int, Any], None]
"""Told the number of a task that has ended, and its result or `Failure`."""


def run_apart(tasks: Sequence[Task], jobs: int, ended: Ended = lambda index, result: None) -> list[Any]:
    """The results, in the order of the tasks, at most `jobs` of which run at once, each in processes of its own.

    One that fails, or whose process is killed, leaves the others alone: a `Failure` is in its place. Ctrl-C and SIGTERM
    end all of them, a training behind a checkpoint, and raise Interrupted.
    """
    results: list[Any] = [None] * len(tasks)
    waiting, running = deque(enumerate(tasks)), list[_Apart]()
    totals = Counter[str]()
    for task in tasks:
        totals[task.title] += task.total
    with stop_request() as stop_requested, progress_display() as start, ExitStack() as stack:
        stack.callback(_end_all, running)
        lines = {title: _Line(start(title, total)) for title, total in totals.items()}
        while waiting or running:
            while waiting and len(running) < jobs and not stop_requested():
                running.append(_Apart(*waiting.popleft()))
            ranks = {rank.connection: (each, rank) for each in running for rank in each.ranks}
            for connection in wait([*ranks], timeout=0.2):
                each, rank = ranks[connection]  # type: ignore[index]
                each.read(rank, lines[each.task.title])
            for each in [each for each in running if each.has_ended()]:
                running.remove(each)
                results[each.index] = each.result
                ended(each.index, each.result)
            if number := stop_requested():
                raise Interrupted("stopped", number)
    return results


def _end_all(running: list["_Apart"]) -> None:
    """Ends tasks, a training behind a checkpoint, and waits until they have; nobody reads what they still send."""
    for each in running:
        each.ask_to_end()
    for each in running:
        each.wait_for_end()


class _Line:
    """The progress of the tasks of one title."""

    def __init__(self, advance: Advance):
        self.advance, self.done = advance, Counter[tuple[int, int]]()

    def tell(self, index: int, rank: int, done: int, note: str) -> None:
        self.done[index, rank] = done
        self.advance(self.done.total(), note)


class _Rank(NamedTuple):
    """One of the processes of a task, and where it is heard."""

    number: int
    process: Any
    connection: Connection


class _Apart:
    """A task in its processes, and what they have sent."""

    def __init__(self, index: int, task: Task):
        self.index, self.task = index, task
        if task.ranks > 1:  # they inherit it
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        told = {**meeting_place(), "WORLD_SIZE": str(task.ranks), "LOCAL_WORLD_SIZE": str(task.ranks)}
        self.ranks = [self._start(number, told) for number in range(task.ranks)]
        self.results = dict[int, Any]()
        self.failed: float | None = None  # when the first of them has

    def _start(self, number: int, told: dict[str, str]) -> _Rank:
        context = multiprocessing.get_context("spawn")
        connection, theirs = context.Pipe(duplex=False)
        told = {**told, "RANK": str(number), "LOCAL_RANK": str(number)}
        process = context.Process(target=_run_apart, args=(self.task, theirs, told))
        with _blocked_ctrl_c():
            process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        return _Rank(number, process, connection)

    def read(self, rank: _Rank, line: _Line) -> None:
        """Takes in one message."""
        try:
            kind, *told = rank.connection.recv()
        except (EOFError, OSError):  # it ended without a word
            rank.process.join()
            kind, told = "result", [Failure(_killed(rank.process.exitcode or 0))]
        if kind == "progress":
            line.tell(self.index, rank.number, *told)
            return
        rank.connection.close()
        rank.process.join()
        self.ranks.remove(rank)
        (result,) = told
        self.results[rank.number] = result
        if isinstance(result, Failure) and self.failed is None:
            self.failed = time.monotonic()

    def has_ended(self) -> bool:
        """Whether all have; those that don't find out by themselves that another has failed are made to."""
        if self.failed is not None and time.monotonic() > self.failed + GRACE:
            self.ask_to_end()
            self.wait_for_end()
            self.ranks.clear()
        return not self.ranks

    @property
    def result(self) -> Any:
        """That of the first rank, or the failure that the others' came of."""
        failures = [each for each in self.results.values() if isinstance(each, Failure)]
        return next((each for each in failures if not each.lost), failures[0] if failures else self.results[0])

    def ask_to_end(self) -> None:
        """Behind a checkpoint, if it trains."""
        for rank in self.ranks:
            rank.connection.close()
            rank.process.terminate()

    def wait_for_end(self) -> None:
        """Ranks end together: once one has, the others that still run are stuck."""
        wait([rank.process.sentinel for rank in self.ranks])
        for rank in self.ranks:
            rank.process.join(GRACE)
            rank.process.kill()
            rank.process.join()


def _killed(code: int) -> str:
    """What is told of a process that ended without a word."""
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"its process was killed ({name})" + (", as where memory is short" if code == -signal.SIGKILL else "")


def _run_apart(task: Task, connection: Connection, told: dict[str, str]) -> None:
    os.environ |= told  # as torchrun tells ranks who they are
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
        return Failure(str(error), isinstance(error, Lost))
    except OSError as error:
        return Failure(f"{error.filename or 'a file'}: {error.strerror or brief(error)}")
    except Exception as error:
        return Failure(out_of_memory(error) or brief(error))
