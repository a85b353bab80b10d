"""Every number that a model is judged by: which way is better, what its interval is, and what it needs.

A new one is a row here and a function of its name in `evaluation/metrics.py`.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One column of the table; its value is made in `evaluation/metrics.py`."""

    name: str
    better: Literal["lower", "higher"]
    interval: Literal["jackknife", "wilson"] | None = None  # how its 95 % interval is found
    per_fake: bool = False  # it is the share of all generated images: their number alone gives its interval
    needs: Literal["features", "classes", "prompts", "scenes", "clock"] = "features"
    """Without it the metric is left out; `scenes` are prompts that a program reads back, `clock` is not of images."""
    head: str | None = ""  # of its column in a terminal, if its name is too long; None: not in that narrow table
    digits: int | None = 3  # behind the point; None: three that count, for numbers of any size

    def text(self, value: float) -> str:
        """A value as tables show it."""
        if self.digits is not None:
            return f"{value:.{self.digits}f}"
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("fid", "lower", "jackknife"),
        Metric("kid", "lower", head=None, digits=None),
        Metric("precision", "higher", "wilson", per_fake=True),
        Metric("recall", "higher", "wilson"),
        Metric("accuracy", "higher", "wilson", per_fake=True, needs="classes"),
        Metric("prompt_accuracy", "higher", "wilson", needs="scenes", head="prompt"),
        Metric("two_objects", "higher", "wilson", needs="scenes", head="two"),
        Metric("diversity", "higher", needs="prompts"),
        Metric("images_per_second", "higher", needs="clock", head="images/s", digits=None),
    )
}


def metrics_of(*needs: str) -> list[str]:
    """The names of those that need one of these."""
    return [name for name, metric in METRICS.items() if metric.needs in needs]


def lower_is_better(name: str) -> bool:
    """Of a metric, or of one average's (`ema0.9999_fid`)."""
    known = next((metric for key, metric in METRICS.items() if name == key or name.endswith(f"_{key}")), None)
    return known is not None and known.better == "lower"
