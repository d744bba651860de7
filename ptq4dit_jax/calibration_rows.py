"""Calibration rows as others store them: layouts of images, steps and labels, told apart by their shapes. NumPy only."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jax.typing import ArrayLike

from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.networks.dit import DiTConfig

ImageLayout = Literal["auto", "NHWC", "NCHW"]
#: The most steps that rows are grouped into, and the rows that each timestep needs to be a step where there are more of them.
_STEPS, _FEW_ROWS = 25, 4


def flat_rows(
    x: ArrayLike, t: ArrayLike, y: ArrayLike | None, config: DiTConfig, layout: ImageLayout = "auto"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the rows one after another: ``x`` (M, H, W, C) float32, ``t`` (M,) and ``y`` (M,) of their own dtypes.

    Args:
      x: images (M, ...) or, step by step, (S, N, ...); each (H, W, C) or (C, H, W), determined by the model's image shape.
      t: (M,), or with steps (S, N) or (S,).
      y: (M,), or with steps (S, N) or (N,), labels that all steps share; None for a model without classes.
      config: that of the model.
      layout: of an image, where H == C and the shape does not tell.

    Raises:
      Ptq4ditError: shapes that do not fit together, or fit the model in both layouts.
    """
    if layout not in ("auto", "NHWC", "NCHW"):
        raise Ptq4ditError(f"The layout of calibration images must be auto, NHWC or NCHW, not {layout!r}.")
    if y is None and config.num_labels:
        raise Ptq4ditError("Calibration rows of a model with classes need labels y (M,), not None.")
    x, t = np.asarray(x), np.atleast_1d(t)
    y = np.zeros(x.shape[: x.ndim - 3], np.int32) if y is None else np.atleast_1d(y)
    shapes = f"{x.shape}, {t.shape} and {y.shape}"
    last, first = config.image_shape, (config.image_shape[2], *config.image_shape[:2])
    fits = {"NHWC": x.shape[-3:] == last, "NCHW": x.shape[-3:] == first}
    fitting = [name for name, fit in fits.items() if fit and layout in ("auto", name)]
    if x.ndim not in (4, 5) or not fitting:
        wanted = ", ".join(map(str, first if layout == "NCHW" else last))
        raise Ptq4ditError(
            f"Calibration rows must be x (M, {wanted}), t (M,) and y (M,), not {shapes}; channels may come first, and steps "
            "before rows."
        )
    if len(fitting) > 1:
        raise Ptq4ditError(
            f"Calibration images of shape {last} may have their channels first or last, which their shape does not tell; pass "
            "the layout NHWC or NCHW (--calibration-layout)."
        )
    if x.ndim == 5:
        S, N = x.shape[:2]
        t = np.repeat(t, N).reshape(S, N) if t.shape == (S,) else t
        y = np.broadcast_to(y, (S, N)) if y.shape == (N,) else y
        if t.shape == y.shape == (S, N):
            x, t, y = x.reshape(S * N, *x.shape[2:]), t.reshape(S * N), y.reshape(S * N)
    if x.ndim != 4 or not t.shape == y.shape == x.shape[:1] or not t.size:
        raise Ptq4ditError(
            f"Calibration rows must be x (M, {', '.join(map(str, last))}), t (M,) and y (M,), not {shapes}; with steps x is "
            "(S, N, ...), t (S, N) or (S,), and y (S, N) or (N,)."
        )
    x = np.moveaxis(x, 1, 3) if fitting == ["NCHW"] else x
    return np.asarray(x, np.float32), t, y


def whole_numbers(values: np.ndarray) -> np.ndarray:
    """Returns integers stored as floats as integers, other floats as float64, and anything else as it is."""
    if values.dtype.kind != "f" and values.dtype.name != "bfloat16":
        return values
    wide = values.astype(np.float64)
    return wide.astype(np.int64) if np.isfinite(wide).all() and (wide == np.round(wide)).all() else wide


def order_by_steps(t_M: np.ndarray, noise_level_M: np.ndarray) -> tuple[np.ndarray, bool]:
    """Returns (S, R) indices into the rows, noisiest step first, and whether each step has one timestep.

    Where all timesteps have equally many rows, each is a step. Otherwise, or where there are many timesteps of few rows each,
    neighbours in time make steps of equally many rows. A remainder of up to 24 rows, evenly spread, is left out.
    """
    order = np.argsort(-noise_level_M, kind="stable")
    counts = np.unique(t_M, return_counts=True)[1]
    rows = int(counts[0])
    if (counts == rows).all() and (len(counts) <= _STEPS or rows >= _FEW_ROWS):
        return order.reshape(len(counts), rows), True
    M = len(order)
    most = min(_STEPS, M)
    steps = min(range(most // 2 + 1, most + 1), key=lambda S: (M % S, -S))  # few rows left out, then many steps
    kept = M - M % steps
    return order[np.arange(kept) * M // kept].reshape(steps, -1), False
