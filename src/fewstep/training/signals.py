"""What a step of a distillation tells of its health, from what it has at hand: no pass of its own, no wait for it.

Every signal is a ratio of sums over samples, which parts of a batch add to, so that the numbers of a batch in parts are
those of one. Samples that are not finite are in no sum. A signal that a batch can't tell, as a deviation of one sample,
is not finite, and so in no line. They are looked at and nothing else: no update is left out for one.
"""

import torch
from torch import Tensor

from fewstep.diffusion.losses import finite_samples, without_samples
from fewstep.runtime.distributed import sums as of_ranks

Sums = dict[str, Tensor]
TINY = 1e-30  # below any product of norms: nothing points nowhere, with a cosine of 0


class Signals:
    """The sums of a step, over its parts, those of other ranks included."""

    def __init__(self) -> None:
        self.sums: Sums = {}

    def add(self, sums: Sums) -> None:
        """Takes in those of a part."""
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def read(self) -> dict[str, Tensor]:
        """The signals of the step, () float32, where there are sums for them; the next step begins with none."""
        sums, self.sums = of_ranks(self.sums), {}
        found = _of_updates(sums) if "updates" in sums else {}
        found |= _of_samples(sums) if "fake_count" in sums else {}
        found |= {"logit_std": _spread(sums)} if "real_logit_count" in sums else {}
        found |= {"critic_lag": sums["critic_error"] / sums["teacher_error"]} if "critic_error" in sums else {}
        return {name: value.float() for name, value in found.items()}


@torch.no_grad()
def sums_of_update(x0: Tensor, teacher_x0: Tensor, critic_x0: Tensor, conditional: Tensor | None = None) -> Sums:
    """Sums behind `gap` and its kin, of a student's samples x and of r and f, teacher's and critic's x0 of them noised.

    With d = r - f, p = x - f, all (B, ...); rms is the root of the mean square over the batch and its numbers:

        gap = rms(d) / rms(r)    magnitude = rms(f) / rms(r)
        cosine = mean over samples of <f, r> / (|f| |r|)
        critic_error_share = mean over samples of <d, p>^2 / (|d|^2 |p|^2): the part of the update along the critic's
            own error at its input, which a critic without error would not have

    `conditional` is the teacher's x0 before guidance, r_cond, where r = r_null + s (r_cond - r_null), so that
    d = (r_cond - f) + (s - 1) (r_cond - r_null) (arXiv 2511.22677), of which the first pulls the samples to the
    teacher's distribution and the second, which has no fixed point, pushes them along the guidance:

        dm_norm = rms(r_cond - f)    cfg_norm = rms((s - 1) (r_cond - r_null)) = rms(r - r_cond)
    """
    x, r, f = (each.flatten(1) for each in (x0, teacher_x0, critic_x0))  # (B, D)
    d, p = r - f, x - f
    found = {"dd": _dot(d, d), "rr": _dot(r, r), "ff": _dot(f, f)}  # each (B,)
    found |= {"cosines": _cosine(f, r), "shares": _cosine(d, p).square()}
    if conditional is not None:
        c = conditional.flatten(1)
        found |= {"dm": _dot(c - f, c - f), "cfg": _dot(r - c, r - c)}
    stacked = torch.stack([*found.values()])  # (signals, B)
    usable = stacked.isfinite().all(0)
    sums = torch.where(usable, stacked, 0).sum(1)
    count = usable.sum()
    return dict(zip(found, sums, strict=True)) | {"updates": count, "numbers": count * x.shape[1]}


def _of_updates(sums: Sums) -> dict[str, Tensor]:
    rr, count = sums["rr"], sums["updates"]
    found = {"gap": (sums["dd"] / rr).sqrt(), "cosine": sums["cosines"] / count, "magnitude": (sums["ff"] / rr).sqrt()}
    found["critic_error_share"] = sums["shares"] / count
    return found | {f"{part}_norm": (sums[part] / sums["numbers"]).sqrt() for part in ("dm", "cfg") if part in sums}


@torch.no_grad()
def sums_of_samples(kind: str, x0: Tensor, on_pixels: bool) -> Sums:
    """Sums behind `x0_std` and its kin, of fakes or reals, x0 (B, C, ...), as `kind` says: "fake" or "real".

        x0_std, real_std = root of the variance over the batch at each place, mean over the places of a channel; mean
            over channels. It falls where samples become alike, and rises with their contrast
        x0_mean_shift = mean over channels of |mean of the fakes - mean of the reals|

    `on_pixels`, of the fakes minus of the reals, in units of pictures in [0, 1], without clipping:

        brightness = mean of grey, the mean over channels    contrast = deviation of grey within an image
        saturation = mean over an image of the largest channel minus the smallest, of pictures in colour
    """
    sums = _moments(kind, x0)
    if not on_pixels:
        return sums
    x = without_samples(x0, finite_samples(x0)) / 2  # [-1, 1] -> [0, 1], but for a shift that differences do not see
    grey = x.mean(1).flatten(1)  # (B, H W)
    colours = [grey.mean(1), grey.std(1, correction=0)]
    if x.shape[1] > 1:
        colours.append((x.amax(1) - x.amin(1)).flatten(1).mean(1))
    return sums | {f"{kind}_colours": torch.stack(colours).sum(1)}  # (2 or 3,)


def _of_samples(sums: Sums) -> dict[str, Tensor]:
    found = {"x0_std": _deviation(sums, "fake")}
    if "real_count" not in sums:
        return found
    means = [sums[f"{kind}_sum"] / sums[f"{kind}_count"] for kind in ("fake", "real")]  # (C, ...)
    shift = _by_channel(means[0] - means[1]).abs().mean()
    found |= {"real_std": _deviation(sums, "real"), "x0_mean_shift": shift}
    if "fake_colours" in sums:
        fake, real = (sums[f"{kind}_colours"] / sums[f"{kind}_count"] for kind in ("fake", "real"))
        names = ("brightness", "contrast", "saturation")
        found |= dict(zip(names, fake - real, strict=False))
    return found


def _deviation(sums: Sums, kind: str) -> Tensor:
    return _by_channel(_over(_squares(sums, kind), sums[f"{kind}_count"] - 1)).sqrt().mean()


def _by_channel(x: Tensor) -> Tensor:
    """(C, ...) -> (C,), the means."""
    return x.reshape(len(x), -1).mean(1)


@torch.no_grad()
def sums_of_logits(kind: str, logits: Tensor) -> Sums:
    """Sums behind `logit_std`, of the discriminator's logits of fakes or reals (B,), as `kind` says.

    It is the deviation of logits from the mean of their own kind: of a head that is blind, or certain, it is 0, and
    `logit_gap` tells which.
    """
    return _moments(f"{kind}_logit", logits.double())  # a mean far from 0 must not cost the deviation its digits


def _spread(sums: Sums) -> Tensor:
    fakes, reals = (_squares(sums, f"{kind}_logit") for kind in ("fake", "real"))
    return _over(fakes + reals, sums["fake_logit_count"] + sums["real_logit_count"] - 2).sqrt()


@torch.no_grad()
def sums_of_errors(critic_error: Tensor, teacher_error: Tensor) -> Sums:
    """Sums behind `critic_lag`, of the critic's denoising losses on fakes (B,) and of the teacher's on reals (B,).

    The latter are a table's (`teacher_errors`), at the same levels; critic_lag = mean of the former / of the latter.
    """
    usable = critic_error.isfinite() & teacher_error.isfinite()
    pairs = {"critic_error": critic_error, "teacher_error": teacher_error}
    return {name: torch.where(usable, each, 0).sum() for name, each in pairs.items()}


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(B, D), (B, D) -> (B,)."""
    return (a * b).sum(1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return _dot(a, b) / norms.clamp_min(TINY)


def _moments(kind: str, x: Tensor) -> Sums:
    """Number, sum and sum of squares of samples (B, ...): (), (...), (...)."""
    usable = finite_samples(x.reshape(len(x), -1))
    x = without_samples(x, usable)
    return {f"{kind}_count": usable.sum(), f"{kind}_sum": x.sum(0), f"{kind}_squares": x.square().sum(0)}


def _squares(sums: Sums, kind: str) -> Tensor:
    """The sum of the squared distances from the mean."""
    return sums[f"{kind}_squares"] - sums[f"{kind}_sum"].square() / sums[f"{kind}_count"]


def _over(squares: Tensor, free: Tensor) -> Tensor:
    """The variance by its degrees of freedom; NaN where there are none."""
    variance: Tensor = squares.clamp_min(0) / free
    return variance.masked_fill(free <= 0, torch.nan)
