"""Files of samples: the bytes of numpy.savez without holding all images, and pictures that are not too large."""

from __future__ import annotations

import io
import tracemalloc
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ptq4dit_jax import outputs
from ptq4dit_jax.evaluation import image_grid


def images(count: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(count).uniform(-1.2, 1.2, (count, 4, 5, channels)).astype(np.float32)


@pytest.mark.parametrize("cuts", [[], [1], [3, 4, 9]])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_stream_has_the_bytes_of_savez(cuts: list[int], channels: int) -> None:
    whole, labels = images(11, channels), np.arange(11, dtype=np.int32)
    expected, streamed = io.BytesIO(), io.BytesIO()
    if channels == 4:
        np.savez(expected, latents=whole, labels=labels)
    else:
        np.savez(expected, arr_0=np.clip(127.5 * whole + 128, 0, 255).astype(np.uint8), labels=labels)
    outputs.write_samples(streamed, iter(np.split(whole, cuts)), len(whole), labels)
    assert streamed.getvalue() == expected.getvalue()


def test_a_stream_holds_one_batch() -> None:
    """64 MB of samples pass through less than a fifth of that."""
    batch = np.zeros((64, 64, 64, 4), np.float32)

    class Sink(io.RawIOBase):
        """Counts and forgets."""

        position = 0

        def writable(self) -> bool:
            return True

        def seekable(self) -> bool:
            return True

        def tell(self) -> int:
            return self.position

        def seek(self, offset: int, whence: int = 0) -> int:
            self.position = offset
            return offset

        def write(self, data: Any) -> int:
            count = memoryview(data).nbytes
            self.position += count
            return count

    tracemalloc.start()
    sink = Sink()
    outputs.write_samples(sink, (batch + i for i in range(16)), 16 * 64, np.zeros(16 * 64, np.int32))  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sink.position > 16 * batch.nbytes
    assert peak < 16 * batch.nbytes / 5


def test_a_picture_of_batches_is_that_of_all() -> None:
    whole, file = images(7), io.BytesIO()
    outputs.write_picture(file, np.split(whole, [2, 4]), columns=3)
    with Image.open(file) as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(image_grid(whole, columns=3)))


@pytest.mark.parametrize(
    ("count", "height", "width", "columns"), [(1, 8, 8, None), (7, 4, 5, 3), (10, 70, 64, None), (6, 3, 100, 2), (5, 8, 8, 9)]
)
def test_the_size_of_a_picture_is_known_before_it_is_made(count, height, width, columns, monkeypatch, raises_sentence) -> None:
    made = image_grid(np.zeros((count, height, width, 1), np.float32), columns=columns)
    monkeypatch.setattr(outputs, "MAX_PIXELS", made.width * made.height)
    outputs.check_picture(count, height, width, columns)
    monkeypatch.setattr(outputs, "MAX_PIXELS", made.width * made.height - 1)
    with raises_sentence(f"{count} images", f"{made.width} x {made.height} pixels", ".npz"):
        outputs.check_picture(count, height, width, columns)


def test_fifty_thousand_digits_are_no_picture(raises_sentence) -> None:
    with raises_sentence("50,000 images", ".npz"):
        outputs.check_picture(50_000, 8, 8, 10)
