"""Mean and covariance of a set's features in a .npz file, as EDM and pytorch-fid write and read them."""

import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.errors import UserError, brief
from fewstep.evaluation.extractors import MAX_FEATURES, Extractor
from fewstep.evaluation.gathering import FEATURES, Gathered, Sums
from fewstep.files import written_whole

SUFFIX = ".npz"
MAX_BYTES = 2 * 8 * MAX_FEATURES**2  # of all arrays, unpacked


def is_statistics(source: str | None) -> bool:
    return source is not None and source.lower().endswith(SUFFIX)


def write_statistics(path: Path, images: Gathered, extractor: Extractor, size: int, source: str) -> None:
    """`mu` (D,) and `sigma` (D, D), over n - 1, in float64, and what they are of, which other programs leave aside."""
    sums = images.sums()
    facts = {"count": images.count, "network": extractor.identity, "name": extractor.name, "size": size}
    arrays: dict[str, Any] = {"mu": sums.mean.numpy(), "sigma": sums.covariance.numpy(), **facts, "source": source}
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def read_statistics(path: Path, extractor: Extractor, width: int, size: int) -> Gathered:
    """The sums of the set that a file is of, for features of this network, (D,) of images of `size` pixels.

    Raises UserError if it can't be read (pickles are not), or is of another network, width or size; files of other
    programs say no more than their width.
    """
    arrays = _arrays(path)
    mean, covariance = arrays["mu"], arrays["sigma"]
    for key, what, own in (("network", "network", extractor.identity), ("size", "image size", size)):
        if key in arrays and str(arrays[key]) != str(own):
            told = f"of {arrays.get('name', 'a network')}, size {arrays.get('size', 'unknown')}"
            raise UserError(f"{path}: statistics of another {what} ({told}) than {extractor.name}, size {size}")
    if len(mean) != width:
        told = f"statistics of {len(mean)} features, but {extractor.name} gives {width}"
        raise UserError(f"{path}: {told}; name the network that they are of with --features")
    count = int(arrays["count"]) if "count" in arrays else 0
    mean, covariance = torch.from_numpy(mean), torch.from_numpy(covariance)
    n = count or MAX_FEATURES + 1  # of an unknown number that it is more than the features, as it must be for a FID
    sums = Sums(n, n * mean, (n - 1) * covariance + n * mean.outer(mean))
    return Gathered(count, {FEATURES: [sums]})


def _arrays(path: Path) -> dict[str, Any]:
    """What is in the file, with `mu` (D,) and a symmetric `sigma` (D, D) in float64."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (total := sum(entry.file_size for entry in archive.infolist())) > MAX_BYTES + 2**20:
                raise ValueError(f"{total / 1e9:.1f} GB of arrays")
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = {name: file[name] for name in file.files}
        arrays |= {name: arrays[name].astype(np.float64, casting="same_kind") for name in ("mu", "sigma")}
        mean, covariance = arrays["mu"], arrays["sigma"]
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape or not 0 < len(mean) <= MAX_FEATURES:
            raise ValueError(f"mu {mean.shape}, sigma {covariance.shape}")
        if not np.isfinite(covariance).all() or not np.isfinite(mean).all():
            raise ValueError("not finite")
        if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-8 * math.sqrt(abs(covariance).max() + 1)):
            raise ValueError("sigma is not symmetric")
        if "count" in arrays and not 1 < int(arrays["count"]) < 2**53:
            raise ValueError("count")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        told = "no statistics of features, mu (D,) and sigma (D, D), as EDM and pytorch-fid write them"
        raise UserError(f"{path}: {told} ({brief(error)})") from error
    return arrays
