"""Stored calibration rows in the layouts of others: every row keeps its image, its timestep and its label."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from helpers import PLAIN, tiny_config, tiny_model

import ptq4dit_jax as ptq
from ptq4dit_jax.calibration import channel_extremes
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.reconstruction.learning import LearningWalk

CONFIG = tiny_config()  # images (6, 6, 3), classes 0 to 4 and 5 for none


def marked(count: int, seed: int = 0) -> np.ndarray:
    """Images (count, 6, 6, 3) without two values alike."""
    values = np.arange(count * 108, dtype=np.float32)
    return np.random.default_rng(seed).permutation(values).reshape(count, 6, 6, 3)


def pairs(data: ptq.CalibrationData) -> set[tuple[bytes, float, int]]:
    """What each row of the result consists of."""
    x, y = np.asarray(data.x), np.asarray(data.y)
    t = np.asarray(data.t)
    t = np.repeat(t[:, None], x.shape[1], 1) if t.ndim == 1 else t
    return {(x[i].tobytes(), float(t[i]), int(y[i])) for i in np.ndindex(*y.shape)}


def given(x: Any, t: Any, y: Any) -> set[tuple[bytes, float, int]]:
    return {(np.ascontiguousarray(x[i], np.float32).tobytes(), float(t[i]), int(y[i])) for i in range(len(x))}


def test_the_layout_of_the_authors_is_read_row_by_row() -> None:
    """xs (S, N, C, H, W), ts (S, N) and y (S, N), cleanest step first here, with null twins."""
    x, t, y = marked(12), np.repeat([10, 500, 990], 4), np.tile([0, 3, 5, 5], 3)
    data = ptq.stored_rows(x.transpose(0, 3, 1, 2).reshape(3, 4, 3, 6, 6), t.reshape(3, 4), y.reshape(3, 4), CONFIG)
    np.testing.assert_array_equal(data.t, [990, 500, 10])
    assert pairs(data) == given(x, t, y)


@pytest.mark.parametrize("t", [np.array([900, 7]), np.array([[900] * 3, [7] * 3])], ids=["(S,)", "(S, N)"])
@pytest.mark.parametrize("y", [np.array([1, 2, 5]), np.array([[1, 2, 5]] * 2)], ids=["(N,)", "(S, N)"])
@pytest.mark.parametrize("first", [False, True], ids=["NHWC", "NCHW"])
def test_steps_and_labels_may_be_shared(t: np.ndarray, y: np.ndarray, first: bool) -> None:
    x = marked(6)
    stored = (np.moveaxis(x, 3, 1) if first else x).reshape(2, 3, *((3, 6, 6) if first else (6, 6, 3)))
    assert pairs(ptq.stored_rows(stored, t, y, CONFIG)) == given(x, np.repeat([900, 7], 3), np.tile([1, 2, 5], 2))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, np.uint16])
def test_whole_timesteps_of_any_type(dtype: Any) -> None:
    data = ptq.stored_rows(marked(4), np.array([999, 20, 20, 999], dtype), np.array([0, 1, 2, 3], dtype), CONFIG)
    np.testing.assert_array_equal(data.t, [999, 20])
    assert (data.t.dtype, data.y.dtype) == (np.int32, np.int32)


@pytest.mark.parametrize(
    ("t", "parts"),
    [([1.5, 2, 3, 4], ("integers", "1.5")), ([1000, 2, 3, 1], ("0 to 999", "1000")), ([np.nan, 2, 3, 1], ("nan",))],
)
def test_timesteps_that_are_none(t: Any, parts: tuple[str, ...], raises_sentence: Any) -> None:
    with raises_sentence("timesteps", *parts):
        ptq.stored_rows(marked(4), t, np.array([0, 1, 2, 3]), CONFIG)


def test_a_label_that_the_table_lacks_is_named(raises_sentence: Any) -> None:
    """1000 is the null class of ImageNet's models; a model of 5 classes has another."""
    t: Any = [9, 9, 4, 4]  # lists are taken too
    labels: Any = [0, 1000, 0, 1000]
    with raises_sentence("Label 1000", "0 to 4"):
        ptq.stored_rows(marked(4), t, labels, CONFIG)
    with raises_sentence("Label 5", "0 to 4"):
        ptq.stored_rows(marked(2), np.array([9, 9]), np.array([0, 5]), tiny_config(null_class=False))


def test_channels_first_or_last_is_asked_where_the_shape_does_not_tell(raises_sentence: Any) -> None:
    cube = tiny_config(input_size=4, in_channels=4)
    x, t, y = np.random.default_rng(1).normal(size=(2, 4, 4, 4)).astype(np.float32), np.array([1, 1]), np.array([0, 1])
    with raises_sentence("(4, 4, 4)", "NHWC or NCHW", "--calibration-layout"):
        ptq.stored_rows(x, t, y, cube)
    np.testing.assert_array_equal(ptq.stored_rows(x, t, y, cube, layout="NHWC").x[0], x)
    np.testing.assert_array_equal(ptq.stored_rows(x, t, y, cube, layout="NCHW").x[0], x.transpose(0, 2, 3, 1))
    with raises_sentence("'CHWN'"):
        ptq.stored_rows(x, t, y, cube, layout="CHWN")  # type: ignore[arg-type]
    with raises_sentence("x (M, 3, 6, 6)", "(2, 6, 6, 3)"):
        ptq.stored_rows(marked(2), t, y, CONFIG, layout="NCHW")


@pytest.mark.parametrize(
    ("x", "t", "y"),
    [
        ((2, 3, 6, 6, 3), (3,), (2, 3)),
        ((2, 3, 6, 6, 3), (2, 3), (2,)),
        ((6, 6, 6, 3), (2, 3), (2, 3)),
        ((0, 6, 6, 3), (0,), (0,)),
        ((2, 2, 2, 6, 6, 3), (8,), (8,)),
    ],
)
def test_shapes_that_do_not_fit_together(x: Any, t: Any, y: Any, raises_sentence: Any) -> None:
    with raises_sentence("Calibration rows must be x (M, 6, 6, 3)", str(x), "steps"):
        ptq.stored_rows(np.zeros(x), np.zeros(t, int), np.zeros(y, int), CONFIG)


def times_of_rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, count)


@pytest.mark.parametrize(("count", "steps"), [(64, 16), (1024, 16), (50, 25), (7, 7), (1, 1)])
def test_random_timesteps_become_steps_of_neighbours_without_a_loss(count: int, steps: int) -> None:
    x, t, y = marked(count), times_of_rows(count, 3), np.arange(count) % 6
    data = ptq.stored_rows(x, t, y, CONFIG)
    assert data.x.shape[:2] == (steps, count // steps)
    if data.t.ndim > 1:
        assert (np.diff(data.t.ravel()) <= 0).all(), "noisiest first, within steps as well"
    assert pairs(data) == given(x, t, y), "no row is lost or shown with another timestep than its own"


@pytest.mark.parametrize("count", [101, 997, 31])
def test_what_does_not_divide_is_left_out_evenly(count: int) -> None:
    x, t, y = marked(count), times_of_rows(count, 4), np.arange(count) % 6
    data = ptq.stored_rows(x, t, y, CONFIG)
    S, R = data.y.shape
    assert 13 <= S <= 25
    assert count - S * R == min(count % S for S in range(13, 26)), "as few as possible"
    assert pairs(data) < given(x, t, y)
    assert data.t.ravel()[0] >= np.sort(t)[-2]
    assert data.t.ravel()[-1] <= np.sort(t)[count - S * R]


def test_unequal_counts_and_times_of_a_flow() -> None:
    x, t, y = marked(8), np.array([999, 999, 999, 500, 7, 7, 7, 7]), np.arange(8) % 6
    data = ptq.stored_rows(x, t, y, CONFIG)
    assert data.y.shape == (8, 1)
    assert pairs(data) == given(x, t, y)
    times = np.random.default_rng(5).uniform(size=120).astype(np.float32)
    flow = ptq.FlowSchedule(data_time=1)
    data = ptq.stored_rows(marked(120), times, np.arange(120) % 6, CONFIG, flow)
    assert data.t.shape == (24, 5)
    np.testing.assert_array_equal(data.t.ravel(), np.sort(times))  # time runs from noise to data
    assert pairs(data) == given(marked(120), times, np.arange(120) % 6)


@pytest.fixture(scope="module")
def mixed() -> ptq.CalibrationData:
    """Two steps of four rows, each with a timestep of its own."""
    x = np.random.default_rng(2).normal(size=(8, 6, 6, 3)).astype(np.float32)
    t = np.array([[990, 900, 700, 650], [400, 300, 20, 3]])
    return ptq.CalibrationData(
        x=x.reshape(2, 4, 6, 6, 3), t=t.astype(np.int32), y=np.arange(8, dtype=np.int32).reshape(2, 4) % 6
    )


@pytest.mark.parametrize("row_batch", [None, 2])
def test_the_network_sees_each_row_with_its_own_timestep(mixed: ptq.CalibrationData, row_batch: int | None) -> None:
    """Per row, what a step of that row alone would have shown."""
    model = tiny_model()
    sites = ("time_in", "blocks.qkv_in", "final_in")
    seen = channel_extremes(model, mixed, sites=sites, row_batch=row_batch)
    for step in range(2):
        alone = [
            channel_extremes(
                model,
                ptq.CalibrationData(x=mixed.x[step : step + 1, [r]], t=mixed.t[step, [r]], y=mixed.y[step : step + 1, [r]]),
                sites=sites,
            )
            for r in range(4)
        ]
        for name in sites:
            np.testing.assert_allclose(seen[name].low[step], np.min([a[name].low[0] for a in alone], 0), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(seen[name].high[step], np.max([a[name].high[0] for a in alone], 0), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_model_is_quantized_on_them(mixed: ptq.CalibrationData) -> None:
    """With groups that part at the cleanest row of a step, and rows of reconstruction in the order of their timesteps."""
    model = jax.tree.map(jax.numpy.asarray, tiny_model())
    config = ptq.QuantConfig.of(**PLAIN, step_groups=2, dynamic_sites=())
    q = ptq.quantize(model, config, key=jax.random.key(0), calibration=mixed)
    np.testing.assert_array_equal(q.group_edges, [650])
    same = ptq.quantize(model, config, key=jax.random.key(0), calibration=mixed, row_batch=2)
    np.testing.assert_array_equal(same.linears["blocks.fc1"].weight.values, q.linears["blocks.fc1"].weight.values)
    walk = LearningWalk(model, q, mixed, Reconstruction(iterations=1, batch_size=4), None)
    order = np.asarray(walk.x).reshape(-1, 108)
    of_row = {row.tobytes(): time for row, time in zip(mixed.x.reshape(8, 108), mixed.t.ravel(), strict=True)}
    np.testing.assert_array_equal(np.asarray(walk.t).ravel(), [of_row[row.tobytes()] for row in order])
    np.testing.assert_array_equal(np.asarray(walk.group), (np.asarray(walk.t) < 650).astype(int))
