"""The embedded digits: the smallest real image set."""

import torch

from fewstep.data.images import ImageSet


def digits() -> ImageSet:
    """The 1,797 scanned 8x8 grey digits that scikit-learn carries, 16 levels spread over 0..255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (torch.from_numpy(bunch.images).float() * 255 / 16).round().to(torch.uint8)[:, None]
    return ImageSet(images.__getitem__, torch.from_numpy(bunch.target).long(), len(images))
