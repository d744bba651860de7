"""Schedule, respacing, coefficient tables, single steps and whole chains against golden values in float64."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq4dit_jax.diffusion import Sampling, denoise, sample_keys, sample_noise
from ptq4dit_jax.samplers import SAMPLERS, Sampler, StepTables
from ptq4dit_jax.schedules import NoiseSchedule, respace

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "diffusion.npz"))
SCHEDULE = NoiseSchedule()
SPACINGS = [name.removeprefix("timesteps_") for name in GOLDEN if name.startswith("timesteps_") and "dpmpp" not in name]
#: Relative to the largest magnitude. float32 carries 6e-8 per operation, and the noisiest steps multiply by 157.
TOLERANCE = {np.float32: 1e-6, np.float64: 1e-12}


def assert_close(actual: Any, expected: np.ndarray, tolerance: float) -> None:
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


# Schedule and respacing ------------------------------------------------------------------------------


def test_linear_schedule():
    np.testing.assert_allclose(SCHEDULE.betas, GOLDEN["betas_1000"], rtol=1e-11)
    np.testing.assert_allclose(SCHEDULE.alpha_bars, GOLDEN["abar_1000"], rtol=1e-12)
    assert SCHEDULE.betas.dtype == SCHEDULE.alpha_bars.dtype == np.float64


def test_schedule_of_another_length():
    schedule = NoiseSchedule(num_timesteps=500, beta_start=2e-4, beta_end=0.04)
    expected = np.array([2e-4 + (0.04 - 2e-4) * i / 499 for i in range(500)])
    np.testing.assert_allclose(schedule.betas, expected, rtol=1e-12)
    np.testing.assert_allclose(schedule.alpha_bars[-1], np.exp(np.log1p(-expected).sum()), rtol=1e-12)


@pytest.mark.parametrize("jit", [False, True])
def test_add_noise(jit):
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 4, 3, 3, 2)).astype(np.float32)
    t = np.array([0, 1, 500, 999])
    abar = GOLDEN["abar_1000"][t].reshape(-1, 1, 1, 1)
    function = jax.jit(SCHEDULE.add_noise) if jit else SCHEDULE.add_noise
    assert_close(
        function(jnp.asarray(x0), jnp.asarray(t), jnp.asarray(noise)), np.sqrt(abar) * x0 + np.sqrt(1 - abar) * noise, 1e-6
    )


@pytest.mark.parametrize("spacing", SPACINGS)
def test_respacing_keeps_the_published_timesteps(spacing):
    np.testing.assert_array_equal(respace(1000, spacing), GOLDEN[f"timesteps_{spacing}"])
    if spacing.isdigit():
        np.testing.assert_array_equal(respace(1000, int(spacing)), GOLDEN[f"timesteps_{spacing}"])


@pytest.mark.parametrize("count", [2, 7, 30, 334, 500, 1000])
def test_ddim_spacing_is_the_first_stride_with_that_many_steps(count):
    kept = respace(1000, f"ddim{count}")
    (stride,) = set(np.diff(kept).tolist())
    assert kept[0] == 0
    assert len(kept) == count
    assert len(range(0, 1000, stride)) == count
    assert stride == 1 or len(range(0, 1000, stride - 1)) > count


@pytest.mark.parametrize("num_timesteps", [1, 5, 500])
def test_respacing_a_whole_schedule_keeps_it(num_timesteps):
    np.testing.assert_array_equal(respace(num_timesteps, num_timesteps), np.arange(num_timesteps))


@pytest.mark.parametrize(
    "steps", [0, -1, 1001, "0", "1001", "ddim0", "ddim1001", "", "ddim", "ten", 2.5, "10,10", "\N{SUPERSCRIPT TWO}"]
)
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++2m"])
def test_impossible_step_counts(name, steps, raises_sentence):
    with raises_sentence("1 to 1000", repr(steps)):
        SAMPLERS[name].tables(SCHEDULE, steps)


@pytest.mark.parametrize("steps", ["ddim37", "ddim999"])
def test_a_stride_that_does_not_exist(steps, raises_sentence):
    with raises_sentence("stride", "1000", f"'{steps.removeprefix('ddim')}'"):
        respace(1000, steps)


# Samplers: which timesteps ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10, 20, 25])
def test_dpmpp_timesteps(count):
    for steps in (count, str(count)):
        timesteps = SAMPLERS["dpm++2m"].spacing(SCHEDULE, steps)
        np.testing.assert_array_equal(timesteps, GOLDEN[f"timesteps_dpmpp_{count}"])


@pytest.mark.parametrize(
    ("name", "steps", "spacing"),
    [
        ("ddpm", 50, "50"),
        ("ddpm", "250", "250"),
        ("ddpm", "ddim50", "ddim50"),
        ("ddim", 50, "ddim50"),
        ("ddim", "10", "ddim10"),
        ("ddim", "ddim250", "ddim250"),
        ("dpm++2m", "ddim10", "ddim10"),
    ],
)
def test_which_spacing_a_sampler_takes(name, steps, spacing):
    tables = SAMPLERS[name].tables(SCHEDULE, steps)
    np.testing.assert_array_equal(tables.t, GOLDEN[f"timesteps_{spacing}"][::-1])
    assert tables.t.dtype == np.int32
    assert tables.num_steps == len(tables.t) == len(GOLDEN[f"timesteps_{spacing}"])


def test_ddim_without_a_stride_takes_even_spacing():
    np.testing.assert_array_equal(SAMPLERS["ddim"].spacing(SCHEDULE, 300), respace(1000, 300)[::-1])


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        (name, steps)
        for name in ("ddpm", "ddim", "dpm++2m")
        for steps in (1, 2, 3, 999, 1000)
        if (name, steps) != ("dpm++2m", 1000)
    ],
)
def test_tables_are_finite_and_timesteps_descend_at_any_count(name, steps):
    tables = SAMPLERS[name].tables(SCHEDULE, steps, 0.5 if name == "ddim" else 0.0)
    assert tables.num_steps == steps
    assert all(np.isfinite(column).all() for column in jax.tree.leaves(tables))
    assert (np.diff(tables.t) < 0).all()


def test_dpmpp_refuses_to_visit_a_timestep_twice(raises_sentence):
    with raises_sentence("dpm++2m", "999", "1000"):
        SAMPLERS["dpm++2m"].tables(SCHEDULE, 1000)


@pytest.mark.parametrize(
    ("name", "eta", "stochastic"),
    [
        ("ddpm", 0.0, True),
        ("ddim", 0.0, False),
        ("ddim", 0.1, True),
        ("dpm++2m", 0.5, False),
        ("euler", 0.5, False),
        ("heun", 0.5, False),
    ],
)
def test_which_samplers_add_noise(name, eta, stochastic):
    assert SAMPLERS[name].stochastic(eta) is stochastic


def test_unknown_sampler(raises_sentence):
    with raises_sentence("'plms'", "ddpm", "ddim", "dpm++2m", "euler", "heun"):
        Sampling("plms")


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_out_of_range(eta, raises_sentence):
    with raises_sentence("eta", str(eta)):
        Sampling("ddim", eta=eta)


# Samplers: coefficients ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("spacing", ["50", "1000"])
def test_ddpm_tables(spacing, dtype):
    tables = SAMPLERS["ddpm"].tables(SCHEDULE, spacing, dtype=dtype)
    golden = {field: GOLDEN[f"{field}_{spacing}"][::-1] for field in ("betas", "abar", "mean_x0", "mean_xt", "log_variance")}
    columns = {
        "x0_from_x": golden["abar"] ** -0.5,
        "x0_from_eps": np.sqrt(1 / golden["abar"] - 1),
        "from_x": golden["mean_xt"],
        "from_x0": golden["mean_x0"],
        "from_x0_prev": 0 * golden["abar"],
        "sigma": np.exp(0.5 * golden["log_variance"]),
        "log_var_min": golden["log_variance"],
        "log_var_max": np.log(golden["betas"]),
        "not_last": np.append(np.ones(len(golden["abar"]) - 1), 0.0),
    }
    for name, expected in columns.items():
        column = getattr(tables, name)
        assert column.dtype == dtype
        np.testing.assert_allclose(column, expected, rtol=max(TOLERANCE[dtype], 1e-9), atol=1e-12, err_msg=name)


def test_dpmpp_is_first_order_at_both_ends():
    tables = SAMPLERS["dpm++2m"].tables(SCHEDULE, 10, dtype=np.float64)
    assert tables.from_x0_prev[0] == tables.from_x0_prev[-1] == 0
    assert (tables.from_x0_prev[1:-1] < 0).all()
    np.testing.assert_allclose([tables.from_x[-1], tables.from_x0[-1]], [0, 1], atol=1e-15)


@pytest.mark.parametrize("name", ["ddim", "dpm++2m"])
def test_deterministic_samplers_keep_a_point_on_its_noise_line(name):
    """With the true x0 and noise, a state sqrt(abar) x0 + sqrt(1 - abar) eps must move to the next step's such state."""
    tables = SAMPLERS[name].tables(SCHEDULE, 20, dtype=np.float64)
    abar = np.append(GOLDEN["abar_1000"][tables.t], 1.0)
    x0, eps = 0.7, -1.3
    line = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * eps
    np.testing.assert_allclose(tables.x0_from_x * line[:-1] - tables.x0_from_eps * eps, x0, rtol=1e-9)
    moved = tables.from_x * line[:-1] + (tables.from_x0 + tables.from_x0_prev) * x0
    np.testing.assert_allclose(moved, line[1:], rtol=1e-9)


# Steps and chains through `denoise` ------------------------------------------------------------------


def run_denoise(jit: bool, predict: Any, tables: StepTables, x: np.ndarray, noise: np.ndarray | None, **options: Any) -> Any:
    """``denoise`` on host arrays in the tables' float type; ``noise`` is (S, ...)."""
    dtype = tables.from_x.dtype

    def run(x: jax.Array, noise: jax.Array | None) -> Any:
        return denoise(predict, tables, x, None if noise is None else lambda step: noise[step], **options)

    with jax.enable_x64(dtype == np.float64):
        z = None if noise is None else jnp.asarray(noise, dtype)
        sample, kept = (jax.jit(run) if jit else run)(jnp.asarray(x, dtype), z)
        assert sample.dtype == kept.dtype == dtype
        return np.asarray(sample), np.asarray(kept)


STEPS = {
    "step_ddpm": (SAMPLERS["ddpm"], 0.0, True),
    "step_ddpm_fixed": (SAMPLERS["ddpm"], 0.0, False),
    "step_ddim_eta_0": (SAMPLERS["ddim"], 0.0, False),
    "step_ddim_eta_0.5": (SAMPLERS["ddim"], 0.5, False),
}


def tables_50(sampler: Sampler, eta: float, dtype: Any) -> StepTables:
    """Tables of ``sampler`` over Meta's "50" spacing, which DDIM would not choose by itself."""
    return dataclasses.replace(sampler, spacing=SAMPLERS["ddpm"].spacing).tables(SCHEDULE, "50", eta, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("golden", STEPS)
def test_single_steps(golden, dtype):
    sampler, eta, learned = STEPS[golden]
    tables = tables_50(sampler, eta, dtype)

    @jax.jit
    def step(table: StepTables, out: jax.Array, x: jax.Array, z: jax.Array) -> jax.Array:
        noise = (lambda _: z) if sampler.stochastic(eta) else None
        return denoise(lambda x, t, scale: out, table, x, noise, learned_variance=learned)[0]

    with jax.enable_x64(dtype == np.float64):
        for row, j in enumerate(GOLDEN["step_j"]):
            one = jax.tree.map(lambda column, at=49 - j: column[at : at + 1], tables)
            assert one.t[0] == GOLDEN["timesteps_50"][j]
            eps, v, x, z = (GOLDEN[f"step_{name}"][row].astype(dtype) for name in ("eps", "v", "x", "z"))
            new = step(one, np.concatenate([eps, v], axis=-1), x, z)
            assert new.dtype == dtype
            assert_close(new, GOLDEN[golden][row], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_predicted_clean_image(dtype):
    tables = SAMPLERS["ddpm"].tables(SCHEDULE, "50", dtype=dtype)
    for row, j in enumerate(GOLDEN["step_j"]):
        x0 = tables.x0_from_x[49 - j] * GOLDEN["step_x"][row] - tables.x0_from_eps[49 - j] * GOLDEN["step_eps"][row]
        assert_close(x0, GOLDEN["step_x0"][row], TOLERANCE[dtype])


CHAINS: dict[str, tuple[str, str | int, float]] = {
    "chain_ddpm": ("ddpm", "10", 0.0),
    "chain_ddim_eta_0": ("ddim", "ddim10", 0.0),
    "chain_ddim_eta_0.5": ("ddim", 10, 0.5),
    "chain_dpmpp_10": ("dpm++2m", 10, 0.0),
    "chain_dpmpp_20": ("dpm++2m", 20, 0.0),
}


def toy_predict(x: jax.Array, t: jax.Array, scale: jax.Array) -> jax.Array:
    """The golden chains' model."""
    signal = jnp.asarray(GOLDEN["abar_1000"], x.dtype)[t]
    eps = 0.9 * x * jnp.sqrt(1 - signal) + 0.1 * jnp.sin(x)
    return jnp.concatenate([eps, 0.3 * jnp.cos(x)], axis=-1)


@pytest.mark.parametrize(
    ("golden", "dtype", "jit"), [("chain_ddpm", np.float32, False), *((g, dtype, True) for g in CHAINS for dtype in TOLERANCE)]
)
def test_whole_chains_state_by_state(golden, dtype, jit):
    (name, spacing, eta), states = CHAINS[golden], GOLDEN[golden]
    sampler = SAMPLERS[name]
    tables, steps = sampler.tables(SCHEDULE, spacing, eta, dtype=dtype), len(GOLDEN[golden]) - 1
    assert tables.num_steps == steps
    noise = GOLDEN["chain_z"] if sampler.stochastic(eta) else None
    x, kept = run_denoise(
        jit,
        toy_predict,
        tables,
        GOLDEN["chain_x"],
        noise,
        learned_variance=sampler.learned_variance,
        keep_slots=np.arange(steps, dtype=np.int32),
        num_kept=steps,
    )
    for state, expected in zip([*kept, x], states, strict=True):
        assert_close(state, expected, TOLERANCE[dtype])


def test_denoise_keeps_only_the_steps_asked_for_in_their_slots():
    tables = SAMPLERS["dpm++2m"].tables(SCHEDULE, 10)
    slots = np.full(10, 3, np.int32)
    slots[[8, 0, 5]] = [0, 1, 2]
    x, kept = run_denoise(
        True, toy_predict, tables, GOLDEN["chain_x"], None, learned_variance=False, keep_slots=slots, num_kept=3
    )
    for state, step in zip([*kept, x], [8, 0, 5, 10], strict=True):
        assert_close(state, GOLDEN["chain_dpmpp_10"][step], 1e-6)


def test_denoise_keeps_nothing_by_default():
    tables = SAMPLERS["ddim"].tables(SCHEDULE, 10)
    _, kept = run_denoise(True, toy_predict, tables, GOLDEN["chain_x"], None, learned_variance=False)
    assert kept.shape == (0, *GOLDEN["chain_x"].shape)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_the_last_step_adds_no_noise(name):
    tables = SAMPLERS[name].tables(SCHEDULE, 10, 1.0 if name == "ddim" else 0.0)
    last_only = GOLDEN["chain_z"].copy()
    last_only[-1] = np.nan_to_num(last_only[-1]) + 100.0
    results = [
        run_denoise(True, toy_predict, tables, GOLDEN["chain_x"], noise, learned_variance=name == "ddpm")[0]
        for noise in (GOLDEN["chain_z"], last_only)
    ]
    np.testing.assert_array_equal(*results)


# Noise -----------------------------------------------------------------------------------------------


def test_noise_is_made_of_key_index_and_step():
    key, shape, step = jax.random.key(3, impl="threefry2x32"), (4, 4, 3), np.int32(5)
    indices = np.array([7, 0, 123456], np.int32)
    quick: dict[str, Any] = {"xla_backend_optimization_level": 0}

    def one(key: jax.Array, index: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, index), step), shape, jnp.float32)

    expected = jax.jit(one).lower(key, indices[0], step).compile(compiler_options=quick)
    function = (
        jax.jit(lambda key, indices, step: sample_noise(sample_keys(key, indices), step, shape))
        .lower(key, indices, step)
        .compile(compiler_options=quick)
    )
    noise = np.asarray(function(key, indices, step))
    for row, index in enumerate(indices):
        np.testing.assert_allclose(noise[row], expected(key, index, step), rtol=1e-6, atol=1e-6)
    assert not np.array_equal(noise, function(key, indices, step + np.int32(1)))
    assert not np.array_equal(noise, function(jax.random.key(4, impl="threefry2x32"), indices, step))
