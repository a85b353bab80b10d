"""Every number that a model is judged by: which way is better, what its interval is, and what it needs."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One column of the table; its value is made in `evaluation/metrics.py`."""

    name: str
    better: Literal["lower", "higher"]
    interval: Literal["jackknife", "wilson"] | None = None
    """How its 95 % interval is found."""


METRICS = {
    metric.name: metric
    for metric in (
        Metric("fid", "lower", "jackknife"),
        Metric("precision", "higher", "wilson"),
        Metric("recall", "higher", "wilson"),
        Metric("accuracy", "higher", "wilson"),
        Metric("prompt_accuracy", "higher", "wilson"),
        Metric("two_objects", "higher", "wilson"),
        Metric("diversity", "higher"),
        Metric("images_per_second", "higher"),
    )
}


def lower_is_better(name: str) -> bool:
    """Of a metric, or of one average's (`ema0.9999_fid`)."""
    known = next((metric for key, metric in METRICS.items() if name == key or name.endswith(f"_{key}")), None)
    return known is not None and known.better == "lower"
