"""Files of samples: the bytes of numpy.savez without holding all images, and pictures that are not too large."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ptq4dit_jax as ptq
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


# Files of samples by one call


def batches(whole: np.ndarray, cuts: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    return zip([0, *cuts], np.split(whole, cuts), strict=True)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("labelled", [True, False])
def test_samples_are_saved_while_they_are_made(channels: int, labelled: bool, tmp_path: Path) -> None:
    whole, labels, seen = images(7, channels), np.arange(7)[::-1], []

    def made() -> Iterator[tuple[int, np.ndarray]]:
        for start, part in batches(whole, [3, 6]):
            assert not (tmp_path / "new/a.npz").exists()
            yield start, part

    progress = lambda done, total: seen.append((done, total))
    where = ptq.save_samples(tmp_path / "new/a.npz", made(), labels if labelled else 7, progress=progress)
    assert where == tmp_path / "new/a.npz"
    assert seen == [(3, 7), (6, 7), (7, 7)]
    with np.load(where) as file:
        stored = dict(file)
    name, expected = ("latents", whole) if channels == 4 else ("arr_0", np.clip(127.5 * whole + 128, 0, 255).astype(np.uint8))
    np.testing.assert_array_equal(stored.pop(name), expected)
    if labelled:
        np.testing.assert_array_equal(found := stored.pop("labels"), labels)
        assert found.dtype == np.int32
    assert not stored
    assert [path.name for path in where.parent.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
    ("cuts", "labels", "said"),
    [
        ([2], 4, "is for 4 samples, and 5 came"),
        ([2], np.arange(6), "is for 6 samples, and 5 came"),
        ([], np.ones(5), "must be integers"),
        ([], np.ones((5, 1), int), "must be integers"),
    ],
)
def test_as_many_samples_as_labels(cuts, labels, said, tmp_path, raises_sentence) -> None:
    with raises_sentence(said):
        ptq.save_samples(tmp_path / "a.npz", batches(images(5), cuts), labels)
    assert not list(tmp_path.iterdir())


def test_samples_of_one_file_have_one_shape(tmp_path, raises_sentence) -> None:
    with raises_sentence("(4, 5, 3)", "not (4, 5, 1)"):
        ptq.save_samples(tmp_path / "a.npz", enumerate([images(1), images(1, 1)]), 2)
    with raises_sentence("is for 2 samples, and none came"):
        ptq.save_samples(tmp_path / "a.npz", iter([]), 2)
    assert not list(tmp_path.iterdir())


def test_where_samples_are_not_saved_none_are_made(tmp_path, raises_sentence) -> None:
    def made() -> Iterator[tuple[int, np.ndarray]]:
        pytest.fail("long work began")
        yield 0, images(1)

    (tmp_path / "a.npz").write_text("mine")
    (tmp_path / "b.npz").mkdir()
    for name, overwrite, said in (
        ("gs://bucket/a.npz", False, "gs://bucket/a.npz is an address"),
        (tmp_path / "a.png", False, "ends in .npz"),
        (tmp_path / "a.npz", False, "a.npz exists"),
        (tmp_path / "b.npz", True, "b.npz is a folder, which a file cannot replace"),
    ):
        with raises_sentence(said):
            ptq.save_samples(name, made(), 1, overwrite=overwrite)
    assert (tmp_path / "a.npz").read_text() == "mine"
    ptq.save_samples(tmp_path / "a.npz", enumerate([images(1)]), 1, overwrite=True)
    with np.load(tmp_path / "a.npz") as file:
        assert file["arr_0"].shape == (1, 4, 5, 3)
