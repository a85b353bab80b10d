"""What makes judging quick."""

from collections.abc import Iterator
from functools import partial

import pytest

from fewstep.evaluation.extractors import train_classifier


@pytest.fixture(scope="session")
def quick() -> Iterator[None]:
    """A worse classifier will do, and speed is not measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.evaluation.extractors.train_classifier", partial(train_classifier, num_steps=10))
        patch.setattr("fewstep.commands.evaluate.images_per_second", lambda *args: 1.0)
        yield
