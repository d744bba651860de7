"""Files of calibration rows: that of PTQ4DiT's authors, npz, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import patch, run
from foreign_files import write_torch
from helpers import tiny_model

import ptq4dit_jax as ptq
from ptq4dit_jax.checkpoints import store
from ptq4dit_jax.terminal import calibration_line, read_calibration

S, N = 3, 4


def authors() -> dict[str, np.ndarray]:
    """xs (S, N, C, H, W) float32, ts and y (S, N) int64, of a model of 5 classes: half of the rows are null twins."""
    rng = np.random.default_rng(0)
    return {
        "xs": rng.normal(size=(S, N, 3, 6, 6)).astype(np.float32),
        "ts": np.repeat(np.array([[999], [500], [1]]), N, axis=1),
        "y": np.tile(np.array([0, 3, 5, 5]), (S, 1)),
    }


def npz(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    np.savez(path.with_suffix(".npz"), allow_pickle=True, **arrays)
    return path.with_suffix(".npz")


@pytest.mark.parametrize("write", [write_torch, npz], ids=["torch.save", "npz"])
@pytest.mark.parametrize("names", [("xs", "ts", "y"), ("x", "t", "y"), ("xs", "ts", "ys")])
def test_arrays_are_read_under_either_name(write: Any, names: tuple[str, str, str], tmp_path: Path) -> None:
    arrays = authors()
    read = read_calibration(write(tmp_path / "rows.pt", dict(zip(names, arrays.values(), strict=True))))
    assert list(read) == ["x", "t", "y"]
    for ours, theirs in zip(("x", "t", "y"), arrays.values(), strict=True):
        np.testing.assert_array_equal(read[ours], theirs)


def test_an_npz_is_told_by_its_content(tmp_path: Path) -> None:
    where = npz(tmp_path / "rows", authors())
    assert set(read_calibration(where.rename(tmp_path / "rows.pt"))) == {"x", "t", "y"}


def test_half_precision_images_and_float_timesteps(tmp_path: Path) -> None:
    arrays = authors()
    halves: dict[str, np.ndarray] = {
        "xs": arrays["xs"].astype(np.float16),
        "ts": arrays["ts"].astype(np.float32),
        "y": arrays["y"].astype(np.int32),
    }
    rows = read_calibration(write_torch(tmp_path / "r.pt", halves))
    assert set(rows) == {"x", "t", "y"}
    data = ptq.stored_rows(rows["x"], rows["t"], rows["y"], tiny_model().config)
    assert (data.x.dtype, data.t.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(data.t, [999, 500, 1])
    np.testing.assert_array_equal(data.x, halves["xs"].transpose(0, 1, 3, 4, 2).astype(np.float32))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"ts": None}, ("must hold the array t", "xs, y")),
        ({"xs": None, "images": np.zeros(2, np.float32)}, ("must hold the array x", "images")),
        ({"x": np.zeros(3, np.float32)}, ("x and xs", "two names", "keep one")),
    ],
)
@pytest.mark.parametrize("write", [write_torch, npz], ids=["torch.save", "npz"])
def test_missing_and_double_names(write: Any, change: dict[str, Any], parts: Any, tmp_path: Path, raises_sentence: Any) -> None:
    arrays = {name: array for name, array in (authors() | change).items() if array is not None}
    with raises_sentence(*parts):
        read_calibration(write(tmp_path / "rows.pt", arrays))


def test_what_cannot_be_read(tmp_path: Path, raises_sentence: Any) -> None:
    (tmp_path / "text.pt").write_text("rows")
    with raises_sentence("text.pt", "npz", "torch.save"):
        read_calibration(tmp_path / "text.pt")
    with raises_sentence("absent.pt", "does not exist"):
        read_calibration(tmp_path / "absent.pt")
    evil = b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00idtR."
    write_torch(tmp_path / "evil.pt", authors(), table=evil)
    with raises_sentence("evil.pt", "os.system"):
        read_calibration(tmp_path / "evil.pt")


def test_the_line_says_what_was_made_of_the_rows() -> None:
    config = tiny_model().config
    rows = lambda count: (np.zeros((count, *config.image_shape), np.float32), np.arange(count) * 5, np.arange(count) % 6)
    shared = ptq.stored_rows(np.zeros((4, *config.image_shape)), np.array([5, 5, 7, 7]), np.array([0, 1, 2, 3]), config)
    assert calibration_line(shared, 4) == "Calibrating on 2 steps of 2 rows"
    assert "each at its own timestep" in calibration_line(ptq.stored_rows(*rows(30), config), 30)
    line = calibration_line(ptq.stored_rows(*rows(101), config), 101)
    assert "1 of 101 rows left out" in line


@pytest.mark.slow
def test_the_command_calibrates_on_the_authors_file_as_on_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch(monkeypatch, "all_devices_mesh", lambda model=1: None)
    monkeypatch.chdir(tmp_path)
    ptq.save(tiny_model(), "m")
    arrays = authors()
    write_torch(Path("rows.pt"), arrays)
    flat = arrays["xs"].transpose(0, 1, 3, 4, 2).reshape(-1, 6, 6, 3)
    np.savez("rows.npz", x=flat, t=arrays["ts"].ravel(), y=arrays["y"].ravel())
    for kind in ("pt", "npz"):
        run(
            "quantize",
            "m",
            "--out",
            f"q-{kind}",
            "--calibration",
            f"rows.{kind}",
            "--policy",
            "weights-only",
            "--weight-bits",
            "4",
        )
    assert store.read_config("q-pt")["content_sha256"] == store.read_config("q-npz")["content_sha256"]
    q = ptq.load("q-pt")
    assert isinstance(q, ptq.QuantizedDiT)
    assert not q.sites
