"""The rows that calibration watches: sampled trajectories, and rows that are given."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error, same_bytes, tiny_config, tiny_model

from ptq4dit_jax import sharding
from ptq4dit_jax.calibration import sample_trajectories, spread_labels, stored_rows
from ptq4dit_jax.config import Calibration
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.sampling import run_chain

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def model() -> FloatDiT:
    return tiny_model()


def test_trajectories_are_the_inputs_of_the_samplers_steps(model: FloatDiT) -> None:
    sampling, key = Sampling.of(sampler="ddpm", steps=10, cfg_scale=2.0), jax.random.key(3, impl="threefry2x32")
    data = sample_trajectories(model, Calibration(steps=5, rows=12, sampling=sampling), key=key)
    assert (data.num_steps, data.num_rows) == (5, 12)
    assert (data.x.dtype, data.t.dtype, data.y.dtype) == (np.float32, np.int32, np.int32)

    positions = [0, 2, 4, 7, 9]  # of 10, as evenly as whole numbers allow: 0, 2.25, 4.5, 6.75, 9
    np.testing.assert_array_equal(data.t, np.linspace(999, 0, 10).round()[positions])

    labels = data.y[0, :6]
    assert set(labels) == set(range(CONFIG.num_classes)), "every class is seen"
    np.testing.assert_array_equal(data.y, np.tile([*labels, *[CONFIG.null_label] * 6], (5, 1)))
    np.testing.assert_array_equal(data.x[:, :6], data.x[:, 6:], err_msg="a row and its null twin share x")

    _, every = run_chain(model, labels, key, sampling, keep_steps=np.arange(10))
    np.testing.assert_allclose(data.x[:, :6], every[positions], rtol=1e-5, atol=1e-5)
    for index in range(6):
        of_sample = jax.random.fold_in(jax.random.fold_in(key, index), 0)
        noise = jax.random.normal(of_sample, CONFIG.image_shape, jnp.float32)
        np.testing.assert_allclose(data.x[0, index], noise, rtol=1e-6, err_msg="the chain starts from the sample's own noise")


def test_trajectories_without_guidance_are_all_conditional(model: FloatDiT) -> None:
    """Every step of the chain this time."""
    sampling, key = Sampling.of(sampler="ddim", steps=4, cfg_scale=1.0), jax.random.key(0)
    reported: list[tuple[int, int]] = []
    calibration = Calibration(steps=4, rows=11, sampling=sampling)
    data = sample_trajectories(model, calibration, key=key, progress=lambda *done: reported.append(done))
    np.testing.assert_array_equal(data.t, [750, 500, 250, 0])
    assert data.x.shape == (4, 11, *CONFIG.image_shape)
    np.testing.assert_array_equal(data.y, [[0, 1, 2, 3, 4] * 2 + [0]] * 4)
    assert np.abs(data.x[:, 0] - data.x[:, 1]).max() > 0.1, "every row has noise of its own"
    _, every = run_chain(model, data.y[0], key, sampling, keep_steps=np.arange(4))
    assert relative_error(data.x, every) < 1e-4
    assert reported == [(8, 11), (11, 11)]


@pytest.mark.slow
def test_devices_and_row_batches_change_no_trajectory(model: FloatDiT, mesh8: Any) -> None:
    run = partial(sample_trajectories, model, Calibration(steps=2, rows=22, sampling=Sampling(steps=3)), key=jax.random.key(0))
    alone = run()
    for other in ({"mesh": mesh8}, {"mesh": sharding.data_mesh(mesh8.devices.ravel()[:2])}, {"row_batch": 1}):
        assert same_bytes(run(**cast(Any, other)), alone)


@pytest.mark.parametrize(("count", "classes"), [(1, 10), (4, 10), (10, 10), (25, 10), (32, 1000), (7, 1)])
def test_labels_spread_over_all_classes(count: int, classes: int) -> None:
    labels = spread_labels(count, classes)
    assert labels.shape == (count,)
    assert labels.dtype == np.int32
    assert labels.min() >= 0
    assert labels.max() < classes
    times = np.bincount(labels, minlength=classes)
    assert times.max() - times.min() <= 1
    if 1 < count < classes:
        assert np.ptp(np.diff(np.sort(labels))) <= 1, "as evenly as whole numbers allow"


@pytest.mark.parametrize("steps", [0, -1, 6])
def test_more_calibration_steps_than_sampler_steps(model: FloatDiT, steps: int) -> None:
    with pytest.raises(Ptq4ditError, match=rf"Calibration steps must be 1 to the sampler's 5 steps, not {steps}\."):
        sample_trajectories(model, Calibration(steps=steps, rows=2, sampling=Sampling(steps=5)), key=jax.random.key(0))


@pytest.mark.parametrize(("rows", "cfg_scale"), [(0, 1.0), (-2, 1.0), (0, 1.5), (7, 1.5)])
def test_impossible_numbers_of_rows(model: FloatDiT, rows: int, cfg_scale: float) -> None:
    with pytest.raises(Ptq4ditError, match=rf"rows must be positive, and even under guidance .*, not {rows}\."):
        sample_trajectories(
            model, Calibration(steps=2, rows=rows, sampling=Sampling.of(steps=5, cfg_scale=cfg_scale)), key=jax.random.key(0)
        )


def test_a_model_without_a_null_class_cannot_be_guided() -> None:
    model = tiny_model(null_class=False)
    with pytest.raises(Ptq4ditError, match="without a null class"):
        sample_trajectories(model, Calibration(rows=2, sampling=Sampling.of(steps=5, cfg_scale=1.5)), key=jax.random.key(0))


# --- stored rows


def shuffled_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Four rows at each of three timesteps in a random order; x names its row, and y follows from x."""
    order = np.random.default_rng(4).permutation(12)
    t = np.repeat([7, 999, 500], 4)[order]
    x = np.broadcast_to(np.arange(12, dtype=np.float64)[order, None, None, None], (12, *CONFIG.image_shape))
    return x, t, (np.arange(12) % 6)[order]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_stored_rows_are_grouped_by_timestep(dtype: type) -> None:
    x, t, y = shuffled_rows()
    data = stored_rows(x, t.astype(dtype), y, CONFIG)
    assert (data.x.dtype, data.t.dtype, data.y.dtype) == (np.float32, np.int32, np.int32)
    assert data.x.shape == (3, 4, *CONFIG.image_shape)
    np.testing.assert_array_equal(data.t, [999, 500, 7])
    for step, timestep in enumerate((999, 500, 7)):
        given = [i for i in range(12) if t[i] == timestep]  # in the order given
        np.testing.assert_array_equal(data.x[step], x[given])
        np.testing.assert_array_equal(data.y[step], y[given])


def test_one_timestep_is_enough() -> None:
    data = stored_rows(np.zeros((2, *CONFIG.image_shape)), np.array([3, 3]), np.array([0, CONFIG.null_label]), CONFIG)
    assert (data.num_steps, data.num_rows) == (1, 2)


def test_unequally_many_rows_per_timestep_keep_their_own() -> None:
    """More of this in tests/test_calibration_rows.py."""
    x, t, y = shuffled_rows()
    t = np.where(np.arange(12) == np.argmax(t == 7), 500, t)
    data = stored_rows(x, t, y, CONFIG)
    assert data.t.shape == data.y.shape == (12, 1)
    for row in range(12):
        [source] = np.flatnonzero((x == data.x[row, 0]).all((1, 2, 3)))
        assert (data.t[row, 0], data.y[row, 0]) == (t[source], y[source])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite(value: float) -> None:
    x, t, y = shuffled_rows()
    x = x.copy()
    x[5, 0, 1, 2] = value
    with pytest.raises(Ptq4ditError, match="NaN or infinity"):
        stored_rows(x, t, y, CONFIG)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, t, y: (x[..., :2], t, y),
        lambda x, t, y: (x[:, :4], t, y),
        lambda x, t, y: (x[0], t, y),
        lambda x, t, y: (x[:11], t, y),
        lambda x, t, y: (x, t[:11], y),
        lambda x, t, y: (x, t, y[:11]),
        lambda x, t, y: (x.swapaxes(0, 3), t, y),
    ],
    ids=["channels", "height", "no batch", "fewer x", "fewer t", "fewer y", "CHWN"],
)
def test_rows_of_a_wrong_shape(wrong: Any) -> None:
    x, t, y = wrong(*shuffled_rows())
    with pytest.raises(Ptq4ditError, match=r"Calibration rows must be x \(M, 6, 6, 3\), t \(M,\) and y \(M,\), not"):
        stored_rows(x, t, y, CONFIG)


@pytest.mark.parametrize("label", [-1, CONFIG.num_classes + 1, 1000])
def test_a_label_out_of_range(label: int) -> None:
    x, t, y = shuffled_rows()
    y = np.where(np.arange(12) == 3, label, y)
    with pytest.raises(
        Ptq4ditError, match=rf"Label {label} is out of range; this model has classes 0 to 4 \(5 is the null class\)\."
    ):
        stored_rows(x, t, y, CONFIG)
