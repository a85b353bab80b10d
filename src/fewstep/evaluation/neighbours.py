"""Who is near whom: precision, recall, density, coverage and memorisation, of one pass over all pairs of images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.evaluation.gathering import FEATURES, Gathered, Share
from fewstep.evaluation.intervals import Mean
from fewstep.metric_table import MAX_COMPARED

NARROW = 3  # neighbours that the balls of precision and recall reach to (arXiv 1904.06991)
WIDE = 5  # those of density and coverage (arXiv 2002.09797)
BLOCK = 500  # images; of distances there are this many rows at a time, of float64 copies twice as many
SAME = 1e-11  # of a squared norm: what rounding leaves of a squared distance between equal points is below it


@dataclass(frozen=True)
class Balls:
    """Points (N, D), each in the middle of two balls, which reach to its third and its fifth neighbour."""

    points: Tensor
    origin: Tensor  # (D,), near the points, so that little is lost where squares are subtracted
    narrow: Tensor  # (N,) squared radii
    wide: Tensor

    @classmethod
    def around(cls, points: Tensor, origin: Tensor) -> "Balls":
        """With fewer neighbours than that to the farthest there is; a point is none of its own, a copy of it is one."""
        most = min(WIDE, len(points) - 1)
        found = [_squares(part, points, origin).topk(most + 1, largest=False).values for part in points.split(BLOCK)]
        reach = torch.cat(found)  # (N, 1 + most), the first of each is itself
        norms = torch.cat([(part.double() - origin).square().sum(1) for part in points.split(BLOCK)])
        radii = ((1 + SAME) * reach[:, min(k, most)] + SAME * norms for k in (NARROW, WIDE))
        return cls(points, origin, *radii)  # a hair longer, so that the same distance found in another order is inside


@dataclass(frozen=True)
class Compared:
    """What M fakes are among N reals; a manifold is the union of the narrow balls around its points.

    Memorised is a fake less than a third as far from the nearest real as from the second nearest (Yoon et al. 2023,
    "Diffusion probabilistic models generalize when they fail to memorize"); of a real that is there twice no copy is.
    """

    precision: Share  # of the fakes, inside the real manifold (arXiv 1904.06991, equations 1 and 2)
    recall: Share  # of the reals, inside the fake manifold
    density: Mean  # over fakes, of the wide real balls one is in, over 5 (arXiv 2002.09797); about 1 of perfect fakes
    coverage: Share  # of the reals, with a fake in their wide ball (ibid.); 1 - 2^-5 of as many perfect fakes
    memorised: Share  # of the fakes


def compared(real: Gathered, fake: Gathered) -> Compared | None:
    """The first `MAX_COMPARED` of each; found once, as are the balls of reals. None where only sums were kept."""
    if FEATURES not in real.numbers or FEATURES not in fake.numbers:
        return None
    known = fake.memo.get("compared")
    if known is None or known[0] is not real:
        if "balls" not in real.memo:
            points = real.features[:MAX_COMPARED]
            real.memo["balls"] = Balls.around(points, points.mean(0).double())
        balls: Balls = real.memo["balls"]
        known = real, compare(balls, Balls.around(fake.features[:MAX_COMPARED], balls.origin))
        fake.memo["compared"] = known
    found: Compared = known[1]
    return found


def compare(real: Balls, fake: Balls) -> Compared:
    """All pairs of M fakes and N reals once, `BLOCK` fakes at a time."""
    num = len(real.points)
    met, covered = torch.zeros(2, num, dtype=torch.bool)  # reals in a fake's ball, reals with a fake in theirs
    among, depth, copies = 0, list[Tensor](), 0
    for points, radii in zip(fake.points.split(BLOCK), fake.narrow.split(BLOCK), strict=True):
        squares = _squares(points, real.points, real.origin)  # (B, N)
        among += int((squares <= real.narrow).any(1).sum())
        met |= (squares <= radii[:, None]).any(0)
        inside = squares <= real.wide
        depth.append(inside.sum(1, dtype=torch.float64) / min(WIDE, num - 1))
        covered |= inside.any(0)
        first, *second = squares.topk(min(2, num), largest=False).values.unbind(1)
        copies += sum(int((first < other / 9).sum()) for other in second)
    return Compared(
        precision=Share(among, len(fake.points)),
        recall=Share(int(met.sum()), num),
        density=Mean(torch.cat(depth)),
        coverage=Share(int(covered.sum()), num),
        memorised=Share(copies, len(fake.points)),
    )


def _squares(rows: Tensor, columns: Tensor, origin: Tensor) -> Tensor:
    """Squared distances (B, N) in float64 of points (B, D) and (N, D): |x|^2 + |y|^2 - 2 x y, and 0 of equal ones."""
    x = rows.double() - origin
    norms = x.square().sum(1, keepdim=True)  # (B, 1)
    found = x.new_empty(len(rows), len(columns))
    for part, into in zip(columns.split(BLOCK), found.split(BLOCK, dim=1), strict=True):
        y = part.double() - origin
        into.copy_(torch.addmm(y.square().sum(1), x, y.T, alpha=-2))
    found += norms
    return found.masked_fill_(found < SAME * norms, 0)
