"""Grids of samples, made with Pillow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jax.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.evaluation.compare import NOISE_FLOOR
from ptq4dit_jax.sampling import to_uint8


def caption(name: str) -> str:
    """Returns the name of a model for figures and grids."""
    return f"{name} (noise floor)" if name == NOISE_FLOOR else name


def grid_size(
    count: int, height: int, width: int, columns: int | None = None, *, cell: int = 64, gap: int = 2
) -> tuple[int, int]:
    """Returns the width and height in pixels of :func:`image_grid`'s grid of ``count`` images of ``height`` x ``width``."""
    factor = _enlargement(height, width, cell)
    across, down = _layout(count, height, width, columns)
    return across * (factor * width + gap) - gap, down * (factor * height + gap) - gap


def _enlargement(height: int, width: int, cell: int) -> int:
    return max(1, -(-cell // min(height, width)))


def _layout(count: int, height: int, width: int, columns: int | None) -> tuple[int, int]:
    """Returns the numbers of columns and rows."""
    if columns is not None and columns < 1:
        raise Ptq4ditError(f"A grid needs at least one column, not {columns}.")
    across = min(count, columns or int(np.ceil(np.sqrt(count * height / width))))
    return across, -(-count // across)


def image_grid(images: ArrayLike, *, columns: int | None = None, cell: int = 64, gap: int = 2) -> Image.Image:
    """Draws images side by side on white, in reading order.

    Args:
      images: (N, H, W, C) in [-1, 1] or uint8, C 1 or 3.
      columns: images per row; by default the grid is nearly square.
      cell: images with a shorter side are enlarged by a whole factor to at least this number of pixels, without smoothing.
      gap: pixels between images.
    """
    pixels = _pixels(images)
    count, height, width, _ = pixels.shape
    across, _ = _layout(count, height, width, columns)
    factor = _enlargement(height, width, cell)
    size = grid_size(count, height, width, columns, cell=cell, gap=gap)
    canvas = np.full((*size[::-1], 3), 255, np.uint8)
    height, width = factor * height, factor * width
    for index, image in enumerate(pixels):
        top, left = index // across * (height + gap), index % across * (width + gap)
        canvas[top : top + height, left : left + width] = image.repeat(factor, 0).repeat(factor, 1)
    return Image.fromarray(canvas)


def sample_grid(
    images: Mapping[str, ArrayLike], labels: Sequence[int] | ArrayLike, *, columns: int = 10, cell: int = 64
) -> Image.Image:
    """Draws samples of several models on the same noise: a row per model with its name, a column per sample with its class.

    Args:
      images: (N, H, W, C) of each model, in [-1, 1], C 1 or 3.
      labels: (N,) the classes.
      columns: the number of samples shown, from the first.
      cell: as for :func:`image_grid`.
    """
    classes = np.asarray(labels)[:columns]
    rows = [image_grid(np.asarray(array)[:columns], columns=columns, cell=cell, gap=4) for array in images.values()]
    if not rows or any(row.size != rows[0].size for row in rows):
        raise Ptq4ditError("Samples side by side need at least one model and the same number and size of images from each.")
    font = ImageFont.load_default(size=16)
    captions = [caption(name) for name in images]
    margin, header = int(max(font.getlength(text) for text in captions)) + 24, 28
    width, height = rows[0].size
    canvas = Image.new("RGB", (margin + width + 4, header + len(rows) * (height + 4)), "white")
    draw = ImageDraw.Draw(canvas)
    for index, label in enumerate(classes):
        center = margin + (index + 0.5) * (width + 4) / len(classes) - 2
        draw.text((center, header / 2), str(label), fill="#333333", font=font, anchor="mm")
    for index, (row, text) in enumerate(zip(rows, captions, strict=True)):
        top = header + index * (height + 4)
        canvas.paste(row, (margin, top))
        draw.text((margin - 12, top + height / 2), text, fill="#333333", font=font, anchor="rm")
    return canvas


def _pixels(images: ArrayLike) -> np.ndarray:
    """Returns images to show, (N, H, W, 1 or 3) uint8."""
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[0] == 0:
        raise Ptq4ditError(f"A grid needs images of shape (N, H, W, C) with N at least 1, not {array.shape}.")
    channels = array.shape[-1]
    if channels not in (1, 3):
        raise Ptq4ditError(
            f"Samples with {channels} channels are latents, not images; write them to a .npz file and decode them with the "
            "autoencoder of the model."
        )
    return array if array.dtype == np.uint8 else to_uint8(array)
