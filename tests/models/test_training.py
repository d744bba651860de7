"""What the recipes share: losses against densities from SciPy, the cooldown, and training on a data set of two images."""

from __future__ import annotations

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from scipy import stats

from models import training
from models.training import Recipe, cooldown_window, losses, progress_printer, train, variational_bound
from ptq4dit_jax.networks.dit import DiTConfig, init_params

CONFIG = DiTConfig(
    input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=2, frequency_size=16
)


#: One recipe, one chunk length and always a deadline: each combination is a program to compile.
RECIPE = Recipe(steps=100, batch_size=16, warmup=5, learning_rate=3e-3, ema_decay=0.9)


@struct.dataclass
class TwoImages:
    """Class 0 is white, class 1 is black; ``white`` is 1 where nothing is wrong."""

    white: float = 1.0
    max_level: int = struct.field(pytree_node=False, default=255)

    def draw(self, keys_3: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        labels = jax.random.randint(keys_3[0], (count,), 0, 2, jnp.int32)
        sign = (1 - 2 * labels).astype(jnp.float32).reshape(-1, 1, 1, 1)
        return jnp.broadcast_to(self.white * sign, (count, 4, 4, 1)), labels


@functools.cache
def initial(key_data: tuple[int, ...]) -> Any:
    return init_params(CONFIG, jax.random.wrap_key_data(jnp.asarray(np.array(key_data, np.uint32))))


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short chunks, and initial parameters compiled once for each seed."""
    monkeypatch.setattr(training, "CHUNK", 20)
    # A copy, because training donates its parameters.
    copy = lambda key: jax.tree.map(jnp.copy, initial(tuple(jax.random.key_data(key).tolist())))
    monkeypatch.setattr(training, "init_params", lambda _, key: copy(key))


def bound_at(t: int, x0: float, mean: float, log_var: float, true_mean: float, true_log_var: float, max_level: int) -> float:
    pixel = lambda value: jnp.full((1, 1, 1, 1), value, jnp.float32)
    t_B = jnp.array([t])
    bound = variational_bound(pixel(x0), pixel(mean), pixel(log_var), pixel(true_mean), pixel(true_log_var), t_B, max_level)
    return float(bound[0])


def test_bound_is_the_divergence_of_two_gaussians_in_bits() -> None:
    # Numerically, from the densities: KL(p | q) = integral of p log2(p / q).
    true, model = stats.norm(0.2, 0.3), stats.norm(0.5, 0.7)
    expected = true.expect(lambda x: (true.logpdf(x) - model.logpdf(x)) / math.log(2))
    got = bound_at(7, 0.1, 0.5, 2 * math.log(0.7), 0.2, 2 * math.log(0.3), 16)
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("max_level", [16, 255])
def test_bound_at_the_last_step_is_a_likelihood_over_all_levels(max_level: int) -> None:
    # Probabilities of all levels of a pixel add up to one, whatever the Gaussian.
    levels = np.arange(max_level + 1) * (2 / max_level) - 1
    bits = [bound_at(0, level, 0.3, 2 * math.log(0.4), 0.0, 0.0, max_level) for level in levels]
    assert np.sum(0.5 ** np.array(bits)) == pytest.approx(1, abs=1e-4)


def test_the_bound_teaches_the_variance_only() -> None:
    model = helpers.tiny_model(**CONFIG.to_dict())
    x0, t, y = jnp.zeros((3, 4, 4, 1), jnp.float32), jnp.int32([0, 10, 900]), jnp.int32([0, 1, 2])
    noise = jax.random.normal(jax.random.key(1), x0.shape, jnp.float32)
    mse, bound = jax.jit(losses, static_argnums=6)(model, training.loss_tables(), x0, t, y, noise, 255)
    assert mse.shape == bound.shape == (3,)
    assert np.isfinite(mse).all()
    assert np.isfinite(bound).all()
    # The final layer's columns are (row, column, channel): even ones are noise, odd ones variance.
    changed = lambda params: dataclasses.replace(model, params=params)
    of_params = lambda params: losses(changed(params), training.loss_tables(), x0, t, y, noise, 255)[1].sum()
    bias = np.asarray(jax.jit(jax.grad(of_params))(model.params)["final"]["bias"])
    assert not bias[0::2].any()
    assert bias[1::2].all()


@pytest.mark.slow
def test_training_learns_and_a_seed_decides_it() -> None:
    seen: list[tuple[int, float]] = []
    show = lambda done, means: seen.append((done, means["mse"]))
    first, steps = train(RECIPE, 0, TwoImages(), CONFIG, progress=show, max_seconds=1000)
    assert steps == 100
    assert [done for done, _ in seen] == [20, 40, 60, 80, 100]
    assert seen[-1][1] < 0.7 * seen[0][1]
    again, other = (train(RECIPE, seed, TwoImages(), CONFIG, max_seconds=1000)[0] for seed in (0, 1))
    kernels = [np.asarray(model.params["blocks"]["qkv"]["kernel"]) for model in (first, again, other)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])


@pytest.mark.makes_nan
def test_training_stops_where_the_loss_is_not_finite(raises_sentence) -> None:  # type: ignore[no-untyped-def]
    seen: list[int] = []
    with raises_sentence("step 20", "nan", "learning rate"):
        train(RECIPE, 0, TwoImages(white=math.nan), CONFIG, progress=lambda done, _: seen.append(done), max_seconds=1000)
    assert not seen


def test_training_ends_in_time_with_a_cooldown(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 s per chunk of 20 steps: of the 20 s, the last four (two chunks) are the cooldown. Ends at step 200 of 10,000.
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    windows: list[tuple[int, int]] = []

    def watched(state: Any, key: Any, tables: Any, data: Any, first: Any, cooldown: Any, **settings: Any) -> Any:
        first_edge, last_edge = cooldown
        windows.append((int(first_edge), int(last_edge)))
        return state, {"mse": jnp.zeros(())}

    monkeypatch.setattr(training, "train_steps", watched)
    _, done = train(Recipe(steps=10_000, batch_size=2), 0, TwoImages(), CONFIG, max_seconds=20)
    assert done == 200
    assert windows == [(10_000, 10_001)] * 8 + [(160, 200)] * 2


def test_no_update_is_left_at_the_end_of_a_cooldown() -> None:
    data, tables = jax.tree.map(jnp.asarray, TwoImages()), training.loss_tables()
    start = training.init_params(CONFIG, jax.random.split(jax.random.key(0))[0])

    def change(window: tuple[int, int], first: int) -> float:
        params = jax.tree.map(jnp.copy, start)
        state = {"params": params, "optimizer": RECIPE.optimizer().init(params), "ema": jax.tree.map(jnp.copy, params)}
        state, _ = training.train_steps(
            state,
            jax.random.key(1),
            tables,
            data,
            jnp.int32(first),
            tuple(map(jnp.int32, window)),
            config=CONFIG,
            recipe=RECIPE,
            count=20,
        )
        return float(abs(state["params"]["blocks"]["qkv"]["kernel"] - start["blocks"]["qkv"]["kernel"]).max())

    whole, nothing = change((100, 101), 40), change((20, 40), 40)
    assert whole > 1e-4
    assert nothing == 0


def test_cooldown_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHUNK", 100)
    assert cooldown_window(100, 10_000, 10, 0.1, 100) is None  # far from the end
    assert cooldown_window(9_900, 10_000, 85, 0.1, 100) is None  # the rest fits
    assert cooldown_window(500, 10_000, 80, 0.05, 100) == (500, 900)  # 20 s are 4 chunks of 5 s
    assert cooldown_window(500, 10_000, 99, 0.05, 100) == (500, 600)  # at least one
    assert cooldown_window(9_950, 10_000, 99, 0.05, 100) == (9_950, 10_000)  # never beyond the recipe


def test_progress_is_printed_every_so_often(capsys: pytest.CaptureFixture[str]) -> None:
    show = progress_printer(Recipe(steps=500, batch_size=8), every=200)
    for done in (100, 200, 300, 400, 500):
        show(done, {"mse": 0.25})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["200/500", "400/500", "500/500"]
    assert all("mse 0.2500" in line and "img/s" in line for line in lines)


def test_mistakes(raises_sentence) -> None:  # type: ignore[no-untyped-def]
    with raises_sentence("steps", "0"):
        Recipe(steps=0, batch_size=4)
    with raises_sentence("batch_size", "-1"):
        Recipe(steps=1, batch_size=-1)
    with raises_sentence("float16"):
        Recipe(steps=1, batch_size=1, compute_dtype="float16")
    with raises_sentence("max_seconds", "0"):
        train(Recipe(steps=1, batch_size=1), 0, TwoImages(), CONFIG, max_seconds=0)
