"""Judges generated digits: a classifier that has only ever seen real ones.

Whether a class-conditional sample shows its class is the one property of this small model that can be measured without a human
and without downloads. The same judge serves the float model and everything quantized from it, so it lives beside the model.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from ptq4dit_jax.errors import Ptq4ditError

#: Grey levels of the data set are 0..MAX_LEVEL; images map them to [-1, 1].
MAX_LEVEL = 16


def load_images() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's bundled handwritten digits: images (1797, 8, 8, 1) float32 in [-1, 1], labels (1797,) int32."""
    digits = load_digits()
    images = digits.images[..., None] * (2 / MAX_LEVEL) - 1
    return images.astype(np.float32), digits.target.astype(np.int32)


def to_levels(images: ArrayLike) -> np.ndarray:
    """Images in [-1, 1], of any shape, rounded to the data set's grey levels: integers 0..MAX_LEVEL, clipped."""
    return np.clip(np.rint((np.asarray(images, np.float64) + 1) * (MAX_LEVEL / 2)), 0, MAX_LEVEL).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class DigitClassifier:
    """A fitted classifier, and its accuracy on real digits that it was not fitted to (a fraction)."""

    model: SVC
    held_out_accuracy: float

    def predict(self, images: ArrayLike) -> np.ndarray:
        """Classes (N,) of images (N, 8, 8, 1) in [-1, 1]; images are rounded to the data set's levels first."""
        levels = to_levels(images)
        if levels.ndim != 4 or levels.shape[1:] != (8, 8, 1) or not len(levels):
            raise Ptq4ditError(f"The digit classifier takes images (N, 8, 8, 1), not an array of shape {levels.shape}.")
        return self.model.predict(levels.reshape(len(levels), -1) / MAX_LEVEL)


def train_classifier(seed: int = 0) -> DigitClassifier:
    """Fits a support vector machine (RBF kernel) to 80 % of the real digits and tests it on the other 20 %.

    Takes a fraction of a second; ``seed`` chooses the split, stratified by class. C and gamma are the best of a small grid
    under repeated 5-fold cross-validation, where a polynomial kernel and nearest neighbours did slightly worse.
    """
    images, labels = load_images()
    features = to_levels(images).reshape(len(images), -1) / MAX_LEVEL
    fit_x, test_x, fit_y, test_y = train_test_split(features, labels, test_size=0.2, stratify=labels, random_state=seed)
    model = SVC(C=10.0, gamma=0.08).fit(fit_x, fit_y)
    return DigitClassifier(model, float(model.score(test_x, test_y)))


def recognition_rate(images: ArrayLike, labels: ArrayLike, classifier: DigitClassifier | None = None) -> float:
    """Fraction of images (N, 8, 8, 1) in [-1, 1] that the classifier assigns to their label (N,).

    NaN pixels count as level 0, so a broken model scores low instead of failing. Without ``classifier``, ``train_classifier()``
    is fitted for the call.
    """
    predicted = (classifier or train_classifier()).predict(np.nan_to_num(np.asarray(images), nan=-1.0))
    wanted = np.asarray(labels)
    if wanted.shape != predicted.shape:
        raise Ptq4ditError(f"There must be one label per image; {len(predicted)} images came with labels {wanted.shape}.")
    return float(np.mean(predicted == wanted))
