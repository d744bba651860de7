"""Writes files of samples while these are made: an .npz as a stream, a .png as one picture of small integers."""

from __future__ import annotations

import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float32
from numpy.typing import DTypeLike

from ptq4dit_jax import processes
from ptq4dit_jax.checkpoints.addresses import refuse_address
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.evaluation.grids import grid_size, image_grid
from ptq4dit_jax.sampling import Labels, Progress, to_uint8
from ptq4dit_jax.staging import check_replaceable, place, write_whole

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

    Raises:
      Ptq4ditError: the parts together do not have that shape.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            written = 0
            for part in parts:
                if part.shape[1:] != shape[1:]:
                    raise Ptq4ditError(f"All samples of a file must have the shape {shape[1:]}, not {part.shape[1:]}.")
                written += len(part)
                member.write(np.ascontiguousarray(part, dtype).data.cast("B"))
            if written != shape[0]:
                raise Ptq4ditError(
                    f"The file is for {shape[0]:,} samples, and {written:,} came; pass as many labels as samples."
                )
        for other, array in others.items():
            with archive.open(f"{other}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def write_samples(file: BinaryIO, batches: Iterable[np.ndarray], count: int, labels: np.ndarray | None) -> None:
    """Writes ``count`` samples (B, H, W, C) float32, batch by batch, as an .npz: images as ``arr_0`` (N, H, W, C) uint8, as
    ADM's evaluation takes them, or ``latents`` float32 if C is neither 1 nor 3; then ``labels`` (N,), if there are any."""
    parts = iter(batches)
    if (first := next(parts, None)) is None:
        raise Ptq4ditError(f"The file is for {count:,} samples, and none came; sample them anew.")
    shape, others = (count, *first.shape[1:]), {} if labels is None else {"labels": labels}

    def all_parts() -> Iterator[np.ndarray]:
        yield first
        yield from parts

    if first.shape[-1] in (1, 3):
        stream_npz(file, "arr_0", shape, np.uint8, map(to_uint8, all_parts()), **others)
    else:
        stream_npz(file, "latents", shape, np.float32, all_parts(), **others)


def save_samples(
    path: str | os.PathLike[str],
    batches: Iterable[tuple[int, Float32[np.ndarray, "B H W C"]]],
    labels: Labels,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes samples to an .npz while they are made, whole or not at all, in the memory of one batch.

    In a run of several processes, all of them call this. Process 0 writes; the others make their share of the samples.

    Args:
      path: a file, whose name ends in .npz.
      batches: of :func:`ptq4dit_jax.sample_batches`: the index of a batch's first sample, and the batch (B, H, W, C) float32.
      labels: as they were passed there: (N,) integers, or the number N of samples of a model without classes.
      overwrite: replace a file that exists.
      progress: called with (samples done, samples in all) after each batch.

    Returns:
      The absolute path of the file. It holds images as ``arr_0`` (N, H, W, C) uint8, as ADM's evaluation takes them, or
      ``latents`` float32 if C is neither 1 nor 3, and the ``labels`` (N,) int32, if there are any.

    Raises:
      Ptq4ditError: the file exists and must not be replaced, or cannot be written; there are not N samples; or a batch cannot
        be made.
    """
    named = np.asarray(labels)
    if named.ndim > 1 or named.dtype.kind not in "iu":
        raise Ptq4ditError(f"Labels must be integers, or the number of samples, not {labels!r}.")
    total = int(named) if named.ndim == 0 else len(named)
    refuse_address(path)
    if Path(path).suffix != ".npz":
        raise Ptq4ditError(f"Samples are written to a file whose name ends in .npz, not to {os.fspath(path)!r}.")
    processes.on_first(lambda: check_replaceable(place(path), overwrite))

    def images() -> Iterator[np.ndarray]:
        done = 0
        for _, batch in batches:
            done += len(batch)
            if progress is not None:
                progress(done, total)
            yield batch

    def write(made: Iterable[np.ndarray]) -> Path:
        target = place(path)
        content = lambda file: write_samples(file, made, total, None if named.ndim == 0 else named.astype(np.int32))
        return write_whole(target, content, lambda: check_replaceable(target, overwrite))

    return written_by_first(write, images())


def written_by_first(write: Callable[[Iterable[np.ndarray]], Path], batches: Iterable[np.ndarray]) -> Path:
    """Has process 0 write batches, of which the other processes make their share. Returns the path in all of them."""
    if processes.is_first():
        where = write(batches)  # if it fails, this process ends, and the others with it, since they wait for its share
    else:
        deque(batches, maxlen=0)
    return Path(processes.on_first(lambda: str(where)))


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
