"""Writes files of samples while these are made: an .npz as a stream, a .png as one picture of small integers."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import DTypeLike

from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.evaluation.grids import grid_size, image_grid
from ptq4dit_jax.sampling import to_uint8

#: The most pixels of a picture; Pillow and many viewers treat a larger one as an attack.
MAX_PIXELS = 2**26


def stream_npz(
    file: BinaryIO, name: str, shape: tuple[int, ...], dtype: DTypeLike, parts: Iterable[np.ndarray], **others: np.ndarray
) -> None:
    """Writes an .npz as ``numpy.savez(file, **{name: whole}, **others)`` does, byte for byte, without holding ``whole``.

    Args:
      file: a seekable binary file.
      name: the array that is streamed.
      shape: its shape.
      dtype: its type.
      parts: its consecutive parts along the first axis.
      others: arrays that are complete already; they follow.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for part in parts:
                member.write(np.ascontiguousarray(part, dtype).data.cast("B"))
        for other, array in others.items():
            with archive.open(f"{other}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def write_samples(file: BinaryIO, batches: Iterable[np.ndarray], count: int, labels: np.ndarray | None) -> None:
    """Writes ``count`` samples (B, H, W, C) float32, batch by batch, as an .npz: images as ``arr_0`` (N, H, W, C) uint8, as
    ADM's evaluation takes them, or ``latents`` float32 if C is neither 1 nor 3; then ``labels`` (N,), if there are any."""
    parts = iter(batches)
    first = next(parts)
    shape, others = (count, *first.shape[1:]), {} if labels is None else {"labels": labels}

    def all_parts() -> Iterator[np.ndarray]:
        yield first
        yield from parts

    if first.shape[-1] in (1, 3):
        stream_npz(file, "arr_0", shape, np.uint8, map(to_uint8, all_parts()), **others)
    else:
        stream_npz(file, "latents", shape, np.float32, all_parts(), **others)


def check_picture(count: int, height: int, width: int, columns: int | None) -> None:
    """Raises if a grid of ``count`` images would be too large for one picture."""
    across, down = grid_size(count, height, width, columns)
    if across * down > MAX_PIXELS:
        raise Ptq4ditError(
            f"A grid of {count:,} images would have {across} x {down} pixels, and a .png takes {MAX_PIXELS:,} at most; use "
            "an --out that ends in .npz, or fewer images."
        )


def write_picture(file: BinaryIO, batches: Iterable[np.ndarray], columns: int | None) -> None:
    """Writes images (B, H, W, C) float32, batch by batch, as one .png grid."""
    image_grid(np.concatenate([to_uint8(images) for images in batches]), columns=columns).save(file, "PNG")
