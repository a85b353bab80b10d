"""Tasks of a study without processes, whose imports would take most of a test's time."""

import pickle
from collections.abc import Sequence
from functools import partial
from typing import Any

from fewstep.runtime.workers import Ended, Task, attempt
from steps import quiet


class Here:
    """In place of `run_apart`: one after the other, each of which may be told to do something else first."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.first = dict[str, Any]()  # by title

    def __call__(self, tasks: Sequence[Task], jobs: int, ended: Ended = lambda index, result: None) -> list[Any]:
        results = []
        for index, task in enumerate(pickle.loads(pickle.dumps(tasks))):
            self.ran.append(task.title)
            results.append(attempt(task._replace(function=partial(self.run, task)), quiet))
            ended(index, results[-1])
        return results

    def run(self, task: Task, *arguments: Any) -> Any:
        if first := self.first.pop(task.title, None):
            first()
        return task.function(*arguments)
