"""JAX's own switches: the same integers, noise and learned scales whatever a process has set, in one process and in others."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import fast_compilation
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ptq4dit_jax as ptq
from ptq4dit_jax import checkpoints, devices, numerics
from ptq4dit_jax.calibration import Histogram
from ptq4dit_jax.config import QuantConfig
from ptq4dit_jax.diffusion import sample_keys, sample_noise
from ptq4dit_jax.evaluation import metrics
from ptq4dit_jax.guidance import combine_guidance
from ptq4dit_jax.model import FloatDiT, step_group
from ptq4dit_jax.quantization import observations
from ptq4dit_jax.quantizers import ActQuantizer, pack_nibbles, unpack_nibbles
from ptq4dit_jax.ranges import activation_parameters, quantize_weight
from ptq4dit_jax.reconstruction.adam import Adam
from ptq4dit_jax.reconstruction.fake_quant import LearnedQuantizer
from ptq4dit_jax.reconstruction.optimize import chosen_rows
from ptq4dit_jax.reconstruction.sums import order_free_sum
from ptq4dit_jax.salience import average_ranks, spearman
from ptq4dit_jax.vae import VAEConfig, VAEDecoder

ROOT = Path(__file__).resolve().parents[1]
SWITCHES = (ROOT / "tests/switches.txt").read_text().split()
PRODUCTS = ("dot_general", "conv_general_dilated")


def plainly() -> ExitStack:
    """JAX as it is without switches."""
    stack = ExitStack()
    for context in (jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")):
        stack.enter_context(context)
    return stack


def strictly() -> ExitStack:
    """Double precision by default, and no promotion of types or ranks."""
    stack = ExitStack()
    for context in (jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")):
        stack.enter_context(context)
    return stack


def assert_same_bits(make) -> None:
    """``make`` gives the same types, shapes and bytes with and without switches."""
    with plainly():
        expected = jax.device_get(make())
    with strictly():
        actual = jax.device_get(make())
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(4).standard_normal(shape).astype(np.float32)


# Pieces, in this process -----------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["mse", "percentile", "minmax"])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_become_the_same_integers(bits, search):
    w, importance = weights(2, 6, 40), np.square(weights(2, 40))
    assert_same_bits(lambda: quantize_weight(jnp.asarray(w), bits, search, jnp.asarray(importance)))


@pytest.mark.parametrize("search", ["mse", "percentile", "minmax"])
def test_activations_get_the_same_ranges(search):
    x = weights(3000)

    def make():
        ends = jnp.asarray(x.min()), jnp.asarray(x.max())
        seen = Histogram(*ends, jnp.zeros(64, jnp.float32)).observe(jnp.asarray(x))
        return seen, activation_parameters(*ends, seen.counts, 8, search)

    assert_same_bits(make)


@pytest.mark.parametrize("kind", ["static", "groups", "dynamic", "nonnegative"])
def test_activations_become_the_same_codes(kind):
    x, balance = np.abs(weights(3, 5, 8)), np.exp(weights(8))
    scale = np.array([0.02, 0.03, 0.04], np.float32) if kind == "groups" else np.float32(0.02)
    zero_point = np.array([3, -2, 7], np.int32) if kind == "groups" else np.int32(3)
    dynamic = kind in ("dynamic", "nonnegative")

    def make():
        scales, zeros = (None, None) if dynamic else (jnp.asarray(scale), jnp.asarray(zero_point))
        act = ActQuantizer(scales, zeros, jnp.asarray(balance), 8, dynamic, kind == "nonnegative")
        return act.encode(jnp.asarray(x)), act(jnp.asarray(x)), act(jnp.asarray(x, jnp.bfloat16))

    assert_same_bits(make)


def test_noise_and_drawn_rows_are_the_same():
    def make():
        key = numerics.threefry(jax.random.key(5))
        noise = sample_noise(sample_keys(key, jnp.arange(3, dtype=jnp.int32)), 2, (4, 4, 3))
        return noise, chosen_rows(key, jnp.int32(7), 9, 4)

    assert_same_bits(make)


def test_small_sums_and_choices_are_the_same():
    x, edges = weights(4, 6), np.array([700, 300], np.int32)

    def make():
        rows = jnp.asarray(x)
        codes = jnp.arange(48, dtype=jnp.int32).reshape(6, 8) % 16
        learned = LearnedQuantizer(jnp.full(4, 0.1, jnp.float32), jnp.int32([0, 1, 2, 3]), jnp.exp(rows[0]), 8)
        return (
            average_ranks(rows),
            spearman(rows, rows[::-1]),
            order_free_sum(rows, (0,)),
            unpack_nibbles(pack_nibbles(codes), 6),
            step_group(jnp.asarray(edges), jnp.int32([900, 400, 3])),
            step_group(jnp.asarray(edges), jnp.float32([350.5])),
            jax.value_and_grad(lambda r: learned(r).sum())(rows),
        )

    assert_same_bits(make)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_guidance_mixes_types_by_itself(dtype):
    out = weights(2, 4, 4, 8)

    def make():
        first, second = (jnp.asarray(part, dtype) for part in (out, out[::-1]))
        return combine_guidance(first, second, jnp.float32(1.3), 4, "first3")

    assert_same_bits(make)


def test_metrics_are_the_same():
    first, second = weights(2, 12, 12, 3), 0.9 * weights(2, 12, 12, 3)
    assert_same_bits(lambda: [metrics.sqnr_db(first, second), metrics.psnr_db(first, second)])


@pytest.mark.parametrize("decayed_over", [None, 5])
def test_adam_is_optaxs(decayed_over):
    """To float32's rounding, and so are the leaves of its state and their names, which journals hold."""
    variables = {"b": weights(3), "w": weights(4, 3)}
    gradients = [jax.tree.map(lambda a, s=s: s * a, variables) for s in (0.1, -2.0, 0.0, 3.0, 1.0, 0.5)]

    def walk(optimizer):
        state, seen = optimizer.init(jax.tree.map(jnp.asarray, variables)), []
        update = jax.jit(optimizer.update)
        for step in gradients:
            updates, state = update(jax.tree.map(jnp.asarray, step), state)
            seen.append(updates)
        return seen, state

    with plainly():
        rate = 0.02 if decayed_over is None else optax.cosine_decay_schedule(0.02, decayed_over)
        expected = jax.device_get(walk(optax.adam(rate, eps=1e-7)))
    assert_same_bits(lambda: walk(Adam(0.02, decayed_over, eps=1e-7)))
    actual = jax.device_get(walk(Adam(0.02, decayed_over, eps=1e-7)))
    names = lambda tree: [jax.tree_util.keystr(path, simple=True) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert names(actual) == names(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-7, strict=True)


# Keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_of_a_seed_become_one_key(impl):
    expected = jax.random.key_data(jax.random.key(11, impl="threefry2x32"))
    raw = jax.random.key_data(jax.random.key(11, impl=impl))
    for key in (jax.random.key(11, impl=impl), raw, expected, jax.jit(numerics.threefry)(jax.random.key(11, impl=impl))):
        found = numerics.threefry(key)
        assert jax.random.key_impl(found) == "threefry2x32"
        np.testing.assert_array_equal(jax.random.key_data(found), expected)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_every_use_of_a_key_converts_it(impl):
    """Random parameters of both networks; noise and reconstruction are compared between processes below."""
    config = helpers.tiny_config(depth=1)
    vae = VAEConfig(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=3, layers_per_block=1)
    for make in (lambda key: FloatDiT.init(config, key=key).params, lambda key: VAEDecoder.init(vae, key=key).params):
        leaves = [jax.tree.leaves(make(jax.random.key(2, impl=each))) for each in ("threefry2x32", impl)]
        for a, b in zip(*leaves, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("key", [0, np.zeros(3, np.uint32), np.zeros((2, 2), np.uint32), "0", np.zeros(2, np.float32)])
def test_what_is_no_key_is_refused(key, raises_sentence):
    model = helpers.tiny_model(depth=1)
    with raises_sentence("jax.random.key(0)"):
        ptq.sample(model, np.array([0]), key=key, steps=1)
    with raises_sentence("jax.random.key(0)"):
        ptq.quantize(model, key=key)


def test_several_keys_are_no_key(raises_sentence):
    with raises_sentence("(3,)"):
        ptq.sample(helpers.tiny_model(depth=1), np.array([0]), key=jax.random.split(jax.random.key(0), 3), steps=1)


# Precision -------------------------------------------------------------------------------------------


def products(jaxpr) -> list:
    """The precision of every product in a program and all programs in it."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            found.append((equation.invars[0].aval.dtype.name, equation.params["precision"]))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            found += products(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.fixture(scope="module")
def some_models():
    """A float model, and quantized ones that between them hold every kind of product."""
    model = jax.tree.map(jnp.asarray, helpers.tiny_model(depth=1))
    rows = ptq.stored_rows(
        x=weights(2, *model.config.image_shape),
        t=np.array([5, 900], np.int32),
        y=np.array([1, 2], np.int32),
        config=model.config,
    )
    made = [
        ptq.quantize(model, QuantConfig.of(**helpers.PLAIN, policy=policy), key=jax.random.key(0), calibration=rows)
        for policy in ("edges8-float", "uniform")
    ]
    return [model, *made, ptq.reference(made[0])]


@pytest.mark.parametrize("default", ["bfloat16", "tensorfloat32", "BF16_BF16_F32", "highest"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_product_takes_its_precision_from_the_user(some_models, default, dtype):
    for model in some_models:
        config, model = model.config, model.astype(dtype)
        arguments = jnp.zeros((2, *config.image_shape)), jnp.int32([1]), jnp.int32([0, 1])
        apply = lambda *args, model=model: model.apply(*args)
        with jax.default_matmul_precision(default):
            chosen = products(jax.make_jaxpr(apply)(*arguments).jaxpr)
            user = products(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 2)), jnp.ones((2, 2))).jaxpr)
        assert chosen
        exact, rest = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT
        assert all(precision == ((exact,) * 2 if name == "float32" else (rest,) * 2) for name, precision in chosen)
        assert user  # which does follow it
        assert user[0][1] is not None


def test_statistics_take_what_the_hardware_multiplies_fast(monkeypatch):
    """TF32 where there is any: float32 would double the time of calibration on an H200."""
    seen, whole = [], observations.channel_extremes

    def watch(model, *args, **kwargs):
        seen.append(model.precision)
        return whole(model, *args, **kwargs)

    monkeypatch.setattr(observations, "channel_extremes", watch)
    model = helpers.tiny_model(depth=1)
    rows = ptq.stored_rows(x=weights(1, *model.config.image_shape), t=np.array([5]), y=np.array([1]), config=model.config)
    quantized = ptq.quantize(model, QuantConfig.of(**helpers.PLAIN), key=jax.random.key(0), calibration=rows)
    assert seen == [jax.lax.Precision.HIGH]
    assert ptq.reference(quantized).precision == FloatDiT.init(model.config, key=jax.random.key(0)).precision
    assert ptq.reference(quantized).precision == jax.lax.Precision.HIGHEST


# Devices ---------------------------------------------------------------------------------------------


def test_the_default_device_is_used(mesh8, tmp_path):
    """Not merely the first: models are loaded to it, and choices ask it."""
    model = helpers.tiny_model(depth=1)
    folder = checkpoints.save(model, tmp_path / "model")
    other = mesh8.devices[3]
    expected = ptq.sample(model, np.array([0, 1]), key=jax.random.key(0), steps=1)
    with jax.default_device(other):
        assert devices.default() == other
        assert devices.in_use() == [other]
        loaded = helpers.load_float(folder)
        assert {device for leaf in jax.tree.leaves(loaded.params) for device in leaf.devices()} == {other}
        np.testing.assert_array_equal(ptq.sample(loaded, np.array([0, 1]), key=jax.random.key(0), steps=1), expected)
    with jax.default_device("cpu"):
        assert devices.in_use() == jax.devices("cpu")


# Whole programs, in processes of their own ------------------------------------------------------------


def digests(*switches: str) -> dict[str, str]:
    """What ``switches_program.py`` prints under these switches and no others."""
    names = {line.partition("=")[0] for line in SWITCHES}
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= dict(line.split("=") for line in switches) | fast_compilation.environment()
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/switches_program.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{switches}: {done.stderr[-2000:]}"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def without_switches() -> dict[str, str]:
    return digests()


#: Each of them once, several to a process where they do not hide one another.
TOGETHER = [
    ("JAX_ENABLE_X64=1", "JAX_DEFAULT_MATMUL_PRECISION=highest"),
    ("JAX_ENABLE_X64=1", "JAX_NUMPY_RANK_PROMOTION=raise", "JAX_NUMPY_DTYPE_PROMOTION=strict"),
    ("JAX_DEFAULT_PRNG_IMPL=rbg", "JAX_DEBUG_NANS=1", "JAX_DEFAULT_MATMUL_PRECISION=bfloat16", "JAX_DEFAULT_DEVICE=cpu"),
    ("JAX_DEFAULT_PRNG_IMPL=unsafe_rbg", "JAX_CHECK_TRACER_LEAKS=1", "JAX_DEFAULT_MATMUL_PRECISION=tensorfloat32"),
]


def test_every_switch_is_tested():
    assert {line for group in TOGETHER for line in group} == set(SWITCHES)


@pytest.mark.slow
@pytest.mark.parametrize("switches", TOGETHER, ids=" ".join)
def test_the_same_integers_noise_and_samples(switches, without_switches):
    assert digests(*switches) == without_switches
