"""Every number that a model is judged by: which way is better, what its interval is, and what it needs.

A new one is a row here and a function of its name in `evaluation/metrics.py`.
"""

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["jackknife", "wilson", "bootstrap"]
Interval = tuple[float, float]  # of 95 %
MAX_COMPARED = 10_000  # images of each set that are looked at in pairs, of which there are that many squared


@dataclass(frozen=True)
class Metric:
    """One column of the table; its value is made in `evaluation/metrics.py`."""

    name: str
    better: Literal["lower", "higher", "zero"]
    interval: Kind | None = None  # how its 95 % interval is found
    per_fake: bool = False  # it is the share of all generated images: their number alone gives its interval
    needs: Literal["features", "patches", "clip", "lpips", "colours", "classes", "prompts", "scenes", "clock"] = (
        "features"
    )
    """Without it the metric is left out; `scenes` are prompts that a program reads back, `clock` is not of images."""
    head: str | None = ""  # of its column in a terminal, if its name is too long; None: not in that narrow table
    digits: int | None = 3  # behind the point; None: three that count, for numbers of any size
    about: str = ""  # a line for those who read the table

    def cases(self, num_fakes: int) -> int:
        """How many of the generated images a share is of where it is `per_fake`."""
        return min(num_fakes, MAX_COMPARED) if self.needs == "features" else num_fakes

    def text(self, value: float) -> str:
        """A value as tables show it."""
        if self.better == "zero":
            return f"{value:+.{self.digits}f}"
        if self.digits is not None:
            return f"{value:.{self.digits}f}"
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("fid", "lower", "jackknife", about="distance of the Gaussians that the features of both sets fit"),
        Metric(
            "fid_mean",
            "lower",
            "jackknife",
            head=None,
            about="the part of FID between the means: what all are off alike",
        ),
        Metric(
            "patch_fid",
            "lower",
            "jackknife",
            needs="patches",
            head="patch",
            about="FID of a piece from the middle of each picture, not resized: it sees what resizing hides",
        ),
        Metric("kid", "lower", "jackknife", head=None, digits=None, about="as FID, without its bias of few images"),
        Metric("precision", "higher", "wilson", True, about="of the images, those among the real ones"),
        Metric("recall", "higher", "wilson", about="of the real images, those among the images"),
        Metric("density", "higher", "bootstrap", head=None, about="how many real neighbourhoods an image is in, of 5"),
        Metric("coverage", "higher", "wilson", head=None, about="of the real images, those with an image near them"),
        Metric("clip", "higher", "bootstrap", needs="clip", about="cosine of a picture with its prompt in CLIP"),
        Metric("accuracy", "higher", "wilson", True, "classes", about="of the images, those of the class asked for"),
        Metric(
            "prompt_accuracy",
            "higher",
            "wilson",
            needs="scenes",
            head="prompt",
            about="of the pictures of one object, those in which a program reads back all that the prompt says",
        ),
        Metric("two_objects", "higher", "wilson", needs="scenes", head="two", about="the same of two objects"),
        Metric(
            "diversity", "higher", "bootstrap", needs="prompts", about="feature distance of two pictures of one prompt"
        ),
        Metric(
            "lpips_diversity", "higher", "bootstrap", needs="lpips", head=None, about="their distance as eyes judge it"
        ),
        Metric(
            "memorised",
            "lower",
            "wilson",
            True,
            head=None,
            about="of the images, those less than a third as far from the nearest real one as from the second nearest",
        ),
        Metric("brightness", "zero", "bootstrap", needs="colours", head=None, about="mean of grey, over the real's"),
        Metric("contrast", "zero", "bootstrap", needs="colours", head=None, about="deviation of grey within an image"),
        Metric("saturation", "zero", "bootstrap", needs="colours", head=None, about="largest less smallest channel"),
        Metric("images_per_second", "higher", needs="clock", head="images/s", digits=None),
        Metric("latency", "lower", needs="clock", head=None, digits=None, about="seconds that one image takes"),
    )
}


def metrics_of(*needs: str) -> list[str]:
    """The names of those that need one of these."""
    return [name for name, metric in METRICS.items() if metric.needs in needs]


def base(name: str) -> str:
    """A metric's name without the average in front (`ema0.9999_fid`): no ending, for a plug-in may be called My_FID."""
    return re.sub("^ema[^_]+_", "", name)


def cost(name: str, value: float) -> float:
    """What is less where the value of a metric, or of one average's (`ema0.9999_fid`), is better.

    The value, its size where zero is best, and its negative where more is better, as of all that is not in the table.
    """
    known = METRICS.get(base(name))
    better = known.better if known else "higher"
    return {"lower": value, "zero": abs(value), "higher": -value}[better]


def interval_kind(name: str) -> Kind | None:
    """How the interval of a column is found; one that is not in the table is a mean."""
    return METRICS[name].interval if name in METRICS else "bootstrap"
