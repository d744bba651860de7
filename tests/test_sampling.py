"""Sampling: batches, devices, noise, guidance, compilation and errors."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ptq4dit_jax import chain, sharding
from ptq4dit_jax.chain import Batch, Program, Shared, sample_batch
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.sampling import check_labels, run_chain, sample, sample_batches, to_uint8
from ptq4dit_jax.schedules import FlowSchedule, NoiseSchedule, Schedule

STEPS = 5
LABELS = np.array([3, 0, 9, 3, 10])


@pytest.fixture(autouse=True)
def _quick_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """XLA takes seconds to optimize random bits on CPU; programs around the toy network need not be fast."""
    jax.config.update("jax_disable_most_optimizations", "tiny_model" not in request.fixturenames)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def key() -> jax.Array:
    return jax.random.key(1, impl="threefry2x32")


@pytest.fixture(scope="module")
def other_key() -> jax.Array:
    return jax.random.key(99, impl="threefry2x32")


@struct.dataclass
class ToyNetwork:
    """A network that compiles in no time: ``eps = 0.5 x + label_bias[y]`` and constant variance channels ``v``."""

    label_bias: Any  # (num_classes + 1, in_channels)
    v: Any
    config: DiTConfig = struct.field(pytree_node=False)
    schedule: Schedule = struct.field(pytree_node=False, default=NoiseSchedule())
    on_trace: Callable[..., None] = struct.field(pytree_node=False, default=lambda *shapes: None)

    def apply(self, x_BHWC: jax.Array, t_B: jax.Array, y_B: jax.Array) -> jax.Array:
        self.on_trace(x_BHWC.shape, t_B.shape, y_B.shape)
        eps = 0.5 * x_BHWC + self.label_bias[y_B][:, None, None]
        return jnp.concatenate([eps, jnp.broadcast_to(self.v, x_BHWC.shape)], -1) if self.config.learn_sigma else eps


@pytest.fixture(scope="module")
def toy() -> ToyNetwork:
    config = DiTConfig(input_size=4, patch_size=2, in_channels=4, hidden_size=8, depth=1, num_heads=2, num_classes=10)
    bias = np.random.default_rng(0).standard_normal((11, 4)).astype(np.float32)
    return ToyNetwork(label_bias=jnp.asarray(bias), v=jnp.float32(0.3), config=config)


def changed(toy: ToyNetwork, **config: Any) -> ToyNetwork:
    return dataclasses.replace(toy, config=DiTConfig(**{**toy.config.to_dict(), **config}))


@pytest.fixture(scope="module")
def drawn(key: jax.Array, toy: ToyNetwork) -> dict[str, np.ndarray]:
    """What the key draws for eleven samples, one normal at a time: ``noise`` (N, H, W, C), ``step_noise`` (S, N, H, W, C)."""
    shape = toy.config.image_shape
    of_sample = lambda index, step: jax.random.fold_in(jax.random.fold_in(key, index), step)
    drawing = jax.jit(lambda index, step: jax.random.normal(of_sample(index, step), shape, jnp.float32))
    quickly: dict[str, Any] = {"xla_backend_optimization_level": 0}
    draw = drawing.lower(0, 0).compile(compiler_options=quickly)
    rows = [[np.asarray(draw(index, step)) for index in range(11)] for step in range(STEPS + 1)]
    return {"noise": np.array(rows[0]), "step_noise": np.array(rows[1:])}


@pytest.fixture(scope="module")
def explicit(drawn: dict[str, np.ndarray]) -> dict[str, Any]:
    """Options that sample ``LABELS`` in a program without random draws, which would take most of the time to compile."""
    return {"steps": STEPS, "noise": drawn["noise"][:5], "step_noise": drawn["step_noise"][:, :5]}


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert np.isfinite(expected).all()
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


# Noise: the key and the sample's index, nothing else -------------------------------------------------


@pytest.fixture(scope="module")
def all_at_once(tiny_model, key) -> np.ndarray:
    images = sample(tiny_model, LABELS, key=key, steps=STEPS)
    assert images.shape == (5, *tiny_model.config.image_shape)
    assert images.dtype == np.float32
    assert isinstance(images, np.ndarray)
    return images


def test_batch_size_does_not_matter(tiny_model, key, all_at_once):
    """Two batches, the second one padded."""
    assert_close(sample(tiny_model, LABELS, key=key, steps=STEPS, batch_size=3), all_at_once)


def test_devices_do_not_matter(tiny_model, key, all_at_once, mesh8):
    """Five images over eight devices."""
    assert_close(sample(tiny_model, LABELS, key=key, steps=STEPS, mesh=mesh8), all_at_once)


def test_each_image_depends_on_its_own_label_and_place_alone(toy, key, other_key):
    same = np.array([3, 3, 3, 3, 3])
    images = sample(toy, same, key=key, steps=STEPS)
    assert len({image.tobytes() for image in images}) == 5
    other_label = sample(toy, np.array([3, 7, 3, 3, 3]), key=key, steps=STEPS)
    assert_close(other_label[[0, 2, 3, 4]], images[[0, 2, 3, 4]], 1e-6)
    assert np.abs(other_label[1] - images[1]).max() > 1e-2
    assert_close(sample(toy, same, key=key, steps=STEPS, batch_size=1), images)
    assert np.abs(sample(toy, same, key=other_key, steps=STEPS) - images).max() > 1e-2


def test_explicit_noise_equal_to_the_keys_gives_the_keys_images(toy, key, other_key, explicit):
    expected = sample(toy, LABELS, key=key, steps=STEPS)
    assert_close(sample(toy, LABELS, key=other_key, **explicit), expected, 1e-6)
    for part in ("noise", "step_noise"):
        images = [sample(toy, LABELS, key=k, steps=STEPS, **{part: explicit[part]}) for k in (key, other_key)]
        assert_close(images[0], expected, 1e-6)
        assert np.abs(images[1] - expected).max() > 1e-2, f"{part} is only half of the noise"


@pytest.mark.parametrize(("batch_size", "devices"), [(1, 1), (4, 1), (100, 1), (3, 8), (None, 8), (9, 8)])
def test_any_number_of_samples_in_any_batches(toy, key, drawn, request, batch_size, devices):
    labels, calls = np.arange(11), []
    mesh = request.getfixturevalue("mesh8") if devices == 8 else None
    images = sample(
        toy, labels, key=key, steps=STEPS, batch_size=batch_size, mesh=mesh, progress=lambda *call: calls.append(call), **drawn
    )
    assert_close(images, sample(toy, labels, key=key, steps=STEPS, **drawn))
    per_call = -(-min(batch_size or 11, 11) // devices) * devices
    assert calls == [(min(start + per_call, 11), 11) for start in range(0, 11, per_call)]


def test_deterministic_samplers_use_the_key_for_the_initial_noise_only(toy, key, other_key, explicit):
    noise = explicit["noise"]
    for sampler in ("ddim", "dpm++2m"):
        images = sample(toy, LABELS, key=key, steps=STEPS, sampler=sampler)
        assert_close(sample(toy, LABELS, key=other_key, steps=STEPS, sampler=sampler, noise=noise), images, 1e-6)
    noisy = [sample(toy, LABELS, key=k, steps=STEPS, sampler="ddim", eta=1.0, noise=noise) for k in (key, other_key)]
    assert np.abs(noisy[0] - noisy[1]).max() > 1e-2


# Guidance and variance -------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "guided"), [("all", 4), ("first3", 3)])
def test_guidance_moves_the_label_away_from_the_null_class(toy, key, explicit, channels, guided):
    """For a network that is its input plus a bias by label, guidance is another table of biases."""
    bias = np.asarray(toy.label_bias)
    moved = bias.copy()
    moved[:, :guided] = bias[10, :guided] + 4.0 * (bias[:, :guided] - bias[10, :guided])
    expected = sample(toy.replace(label_bias=jnp.asarray(moved)), LABELS, key=key, cfg_scale=1.0, **explicit)
    assert_close(sample(toy, LABELS, key=key, cfg_scale=4.0, cfg_channels=channels, **explicit), expected)


def test_only_guidance_doubles_the_batch(toy, key, explicit):
    seen: set[Any] = set()
    model = toy.replace(on_trace=lambda *shapes: seen.add(shapes))
    for scale, rows in ((1.0, 5), (1.5, 10)):
        seen.clear()
        sample(model, LABELS, key=key, cfg_scale=scale, **explicit)
        assert seen == {((rows, 4, 4, 4), (1,), (rows,))}


def test_a_network_without_null_class_samples_unguided(toy, key, explicit, raises_sentence):
    model, labels = changed(toy, null_class=False), np.array([0, 9, 0, 9, 0])
    assert sample(model, labels, key=key, cfg_scale=1.0, **explicit).shape == (5, 4, 4, 4)
    with raises_sentence("null class", "cfg_scale 1"):
        sample(model, labels, key=key, cfg_scale=1.5, **explicit)


def test_which_samplers_use_the_learned_variance(toy, key, explicit):
    """-1 in every variance channel is the posterior's variance, which a model without learned sigma uses."""
    fixed = changed(toy, learn_sigma=False)
    for sampler, eta, follows in (("ddpm", 0.0, True), ("ddim", 1.0, False), ("dpm++2m", 0.0, False)):
        options = {"sampler": sampler, "eta": eta, **explicit}
        low, high = (sample(toy.replace(v=jnp.float32(v)), LABELS, key=key, **options) for v in (-1, 1))
        assert_close(low, sample(fixed, LABELS, key=key, **options), 1e-6)
        assert (np.abs(low - high).max() > 1e-2) == follows


# Kept inputs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "mesh"), [(None, False), (2, False), (None, True)])
def test_kept_steps_are_the_networks_inputs(toy, key, explicit, request, batch_size, mesh):
    """Replayed by hand: DDPM with the posterior's variance, unguided, in NumPy."""
    model, sampling = changed(toy, learn_sigma=False), Sampling.of(sampler="ddpm", steps=STEPS, cfg_scale=1.0)
    keep, x, z = np.array([4, 0, 2]), explicit["noise"], explicit["step_noise"]
    images, kept = run_chain(
        model,
        LABELS,
        key,
        sampling,
        noise=x,
        step_noise=z,
        batch_size=batch_size,
        mesh=request.getfixturevalue("mesh8") if mesh else None,
        keep_steps=keep,
    )
    assert kept.shape == (3, 5, 4, 4, 4)

    tables, states = sampling.resolve(model.schedule, model.config).tables(dtype=np.float64), []
    for i in range(STEPS):
        states.append(x)
        eps = 0.5 * x + np.asarray(toy.label_bias)[LABELS][:, None, None]
        x0 = tables.x0_from_x[i] * x - tables.x0_from_eps[i] * eps
        x = tables.from_x[i] * x + tables.from_x0[i] * x0 + (i < STEPS - 1) * tables.sigma[i] * z[i]
    for slot, step in enumerate(keep):
        assert_close(kept[slot], states[step])
    assert_close(images, x)


def test_nothing_is_kept_unless_asked_for(toy, key, explicit):
    noise = {name: explicit[name] for name in ("noise", "step_noise")}
    images, kept = run_chain(toy, LABELS, key, Sampling.of(steps=STEPS, cfg_scale=1.5), **noise)
    assert kept.shape == (0, *images.shape)
    np.testing.assert_array_equal(images, sample(toy, LABELS, key=key, cfg_scale=1.5, **explicit))


# What is compiled ------------------------------------------------------------------------------------


def test_twice_gives_the_same_bytes_and_compiles_nothing(tiny_model, toy, key, other_key, all_at_once, explicit, caplog):
    def compilations() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.getMessage().startswith("Compiling")]

    with jax.log_compiles():
        again = sample(tiny_model, LABELS, key=key, steps=STEPS)
        sample(tiny_model, LABELS[::-1], key=other_key, steps=STEPS, cfg_scale=2.0)  # other values, same shapes
        assert compilations() == []
        sample(toy.replace(on_trace=lambda *shapes: None), LABELS, key=key, **explicit)
        assert any("sample_batch" in message for message in compilations()), "a new model does compile, and is noticed"
    assert again.tobytes() == all_at_once.tobytes()


def batch_arguments(model: Any, key: jax.Array) -> tuple[tuple[Shared, Batch], dict[str, Program]]:
    sampling = Sampling(steps=STEPS).resolve(model.schedule, model.config)
    shared, batch = Shared(model, sampling.tables(), key), Batch(np.arange(5, dtype=np.int32), LABELS.astype(np.int32))
    return jax.device_put((shared, batch)), {"program": Program.of(sampling, model.config)}


def loops(jaxpr: Any, inside: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Trip counts of every loop, each with those it is inside of; -1 for a loop without a known count."""
    found = []
    for equation in jaxpr.eqns:
        here = inside
        if equation.primitive.name in ("scan", "while"):
            here = (*inside, equation.params.get("length", -1))
            found.append(here)
        for inner in jaxprs_in_params(equation.params):
            found += loops(inner, here)
    return found


def test_one_loop_over_the_steps_and_one_over_the_blocks(tiny_model, key):
    arguments, options = batch_arguments(tiny_model, key)
    jaxpr = jax.make_jaxpr(partial(sample_batch, **options))(*arguments)
    assert tiny_model.config.depth != STEPS
    assert loops(jaxpr.jaxpr) == [(STEPS,), (STEPS, tiny_model.config.depth)]


def test_a_batch_moves_nothing_between_host_and_device(tiny_model, key, all_at_once):
    arguments, options = batch_arguments(tiny_model, key)
    with jax.transfer_guard("disallow"):
        images, _ = jax.block_until_ready(sample_batch(*arguments, **options))
    assert_close(np.asarray(images), all_at_once)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_run_makes_intended_transfers_only(toy, key, explicit, request, devices):
    mesh = request.getfixturevalue("mesh8") if devices == 8 else None
    with jax.transfer_guard("disallow"):
        images = sample(toy, LABELS, key=key, batch_size=2, mesh=mesh, **explicit)
    assert_close(images, sample(toy, LABELS, key=key, **explicit))


def compilations(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [m for m in (record.getMessage() for record in caplog.records) if m.startswith("Compiling jit(sample_batch)")]


@pytest.mark.parametrize("devices", [1, 8])
def test_measuring_the_memory_compiles_nothing_more(toy, key, request, caplog, devices):
    """The program that is measured is the one that runs; a second request measures nothing anew."""
    mesh = request.getfixturevalue("mesh8") if devices == 8 else None
    model, labels = changed(toy, num_classes=10 + devices), np.arange(20) % 7
    noise, step_noise = np.ones((20, 4, 4, 4)), np.ones((2, 20, 4, 4, 4))
    options: dict[str, Any] = {"steps": 2, "mesh": mesh, "noise": noise, "step_noise": step_noise}
    with jax.log_compiles():
        sample(model, labels, key=key, **options)
        assert len(compilations(caplog)) == 1
        sample(model, labels, key=key, **options)
        sample(model, labels[::-1], key=key, cfg_scale=3.0, **options)
        assert len(compilations(caplog)) == 1


@pytest.mark.parametrize("devices", [1, 8])
def test_scarce_memory_makes_batches_smaller_and_changes_no_image(toy, key, request, monkeypatch, devices):
    mesh = request.getfixturevalue("mesh8") if devices == 8 else None
    labels, asked, calls = np.arange(40) % 11, [], []
    rng = np.random.default_rng(0)
    noise = {"noise": rng.normal(size=(40, 4, 4, 4)), "step_noise": rng.normal(size=(STEPS, 40, 4, 4, 4))}
    options: dict[str, Any] = {"steps": STEPS, "mesh": mesh, **noise}
    whole = sample(toy, labels, key=key, **options)

    def noted(found):
        asked.append(len(found))
        return 12_000

    monkeypatch.setattr(chain.memory, "free_bytes", noted)
    images = sample(toy, labels, key=key, progress=lambda *call: calls.append(call), **options)
    assert asked == [devices]
    assert_close(images, whole)
    batch = calls[0][0]
    assert devices <= batch < 40
    assert calls == [(min(stop, 40), 40) for stop in range(batch, 40 + batch, batch)]


def test_a_single_image_waits_for_no_measurement(toy, key, monkeypatch):
    monkeypatch.setattr(chain.memory, "free_bytes", lambda devices: pytest.fail("measured"))
    one: Any = [3]  # a list is taken too
    assert sample(toy, one, key=key, steps=2).shape == (1, 4, 4, 4)
    assert sample(toy, np.array([3, 4]), key=key, steps=2, batch_size=2).shape == (2, 4, 4, 4)


def test_more_than_is_useful_at_once_is_cut(toy, key, monkeypatch):
    monkeypatch.setattr(chain, "_USEFUL_ROWS", 8)
    labels, noise = np.arange(21) % 11, np.random.default_rng(0).normal(size=(21, 4, 4, 4))
    options: dict[str, Any] = {"steps": 2, "sampler": "ddim", "noise": noise}
    parts = list(sample_batches(toy, labels, key=key, sampling=Sampling("ddim", 2), noise=noise))
    assert [(start, len(images)) for start, images in parts] == [(0, 8), (8, 8), (16, 5)]
    joined = np.concatenate([images for _, images in parts])
    np.testing.assert_array_equal(joined, sample(toy, labels, key=key, **options))
    assert_close(joined, sample(toy, labels, key=key, batch_size=21, **options))


def test_a_stream_checks_its_arguments_before_its_first_batch(toy, key, raises_sentence):
    with raises_sentence("Label 11"):
        sample_batches(toy, np.array([0, 11]), key=key)
    with raises_sentence("batch_size", "0"):
        sample_batches(toy, np.array([0, 1]), key=key, batch_size=0)


# Defaults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "null_class", "steps", "guidance"),
    [
        (NoiseSchedule(), True, 50, 1.5),
        (NoiseSchedule(), False, 50, 1.0),
        (FlowSchedule(steps=1), True, 1, 1.5),
        (FlowSchedule(steps=3, guided=True), True, 3, 1.0),
        (FlowSchedule(guided=True), True, 50, 1.0),
    ],
)
def test_steps_and_guidance_follow_the_model(toy, key, schedule, null_class, steps, guidance):
    """What is sampled without options is what is sampled with those that the model asks for, and with no others."""
    model = dataclasses.replace(changed(toy, null_class=null_class, learn_sigma=False), schedule=schedule)
    sampler = "ddim" if isinstance(schedule, NoiseSchedule) else "euler"
    options: dict[str, Any] = {"sampler": sampler, "noise": np.random.default_rng(0).normal(size=(2, 4, 4, 4))}
    images = sample(model, np.array([1, 2]), key=key, **options)
    np.testing.assert_array_equal(images, sample(model, np.array([1, 2]), key=key, steps=steps, cfg_scale=guidance, **options))
    if null_class:
        other = sample(model, np.array([1, 2]), key=key, steps=steps, cfg_scale=2.5 - guidance, **options)
        assert np.abs(other - images).max() > 1e-3


# Errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        ([0, 11], ("Label 11", "0 to 9", "10 is the null class")),
        ([-1], ("Label -1", "0 to 9")),
        ([2**40], (f"Label {2**40}", "0 to 9")),
        ([0.5, 1.0], ("integers", "0.5")),
        (np.array([1.0]), ("integers", "1.")),
        ([True], ("integers", "True")),
        ([[0, 1]], ("integers", "[[0, 1]]")),
        ([], ("non-empty", "[]")),
        (["3"], ("integers", "'3'")),
    ],
)
def test_labels_that_are_none(toy, key, labels, parts, raises_sentence):
    with raises_sentence(*parts):
        sample(toy, labels, key=key, steps=2)


def test_the_null_class_is_a_label_only_where_there_is_one(toy, raises_sentence):
    labels: Any = [0, 10]  # a list is taken too
    np.testing.assert_array_equal(check_labels(labels, toy.config), np.array([0, 10], np.int32))
    with raises_sentence("Label 10", "0 to 9"):
        check_labels(labels, changed(toy, null_class=False).config)
    assert check_labels(7, toy.config).shape == (1,)
    assert check_labels(jnp.arange(3), toy.config).dtype == np.int32


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"noise": np.zeros((2, 4, 4, 3))}, ("noise", "(2, 4, 4, 4)", "(2, 4, 4, 3)")),
        ({"noise": np.zeros((4, 4, 4))}, ("noise", "(2, 4, 4, 4)", "(4, 4, 4)")),
        ({"step_noise": np.zeros((2, 2, 4, 4, 4))}, ("step_noise", "(3, 2, 4, 4, 4)", "(2, 2, 4, 4, 4)")),
        ({"step_noise": np.zeros((3, 1, 4, 4, 4))}, ("step_noise", "(3, 2, 4, 4, 4)", "(3, 1, 4, 4, 4)")),
        ({"batch_size": 0}, ("batch_size", "0")),
        ({"batch_size": -2}, ("batch_size", "-2")),
        ({"sampler": "plms"}, ("'plms'", "ddpm, ddim, dpm++2m")),
        ({"steps": 0}, ("1 to 1000", "0")),
        ({"steps": 1001}, ("1 to 1000", "1001")),
        ({"steps": "ddim37"}, ("stride", "37")),
        ({"steps": "many"}, ("1 to 1000", "'many'")),
        ({"sampler": "ddim", "eta": 2.0}, ("eta", "2.0")),
    ],
)
def test_options_that_make_no_sense(toy, key, options, parts, raises_sentence):
    with raises_sentence(*parts):
        sample(toy, np.array([0, 1]), key=key, **{"steps": 3, **options})


def test_a_mesh_without_a_data_axis(toy, key, raises_sentence):
    with raises_sentence("'data'", "model"):
        sample(toy, np.array([0]), key=key, steps=2, mesh=Mesh(np.array(jax.devices()[:1]), ("model",)))


# Placement and output --------------------------------------------------------------------------------


def test_sharding_rules(mesh8, tiny_model):
    assert (sharding.data_size(None), sharding.data_size(mesh8)) == (1, 8)
    assert sharding.data_mesh().shape == {"data": jax.device_count()}
    cut = sharding.shard(mesh8, np.arange(16))
    assert cut.sharding == NamedSharding(mesh8, PartitionSpec("data"))
    assert {shard.data.shape for shard in cut.addressable_shards} == {(2,)}
    along_1 = sharding.shard(mesh8, {"z": jnp.zeros((3, 8, 2))}, axis=1)["z"]
    assert {shard.data.shape for shard in along_1.addressable_shards} == {(3, 1, 2)}
    whole = sharding.replicate(mesh8, tiny_model)
    assert all(leaf.sharding.is_fully_replicated and len(leaf.devices()) == 8 for leaf in jax.tree.leaves(whole))
    assert isinstance(whole, FloatDiT)
    there = sharding.replicate(None, tiny_model)
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(there))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(tiny_model), strict=True))


@pytest.mark.parametrize("on_device", [False, True])
def test_to_uint8_is_metas_rule(on_device):
    values = np.array([-np.inf, -2, -1, -1 + 1e-3, -0.5, -1 / 255, 0, 0.5, 0.99, 1, 3, np.inf], np.float32)
    # 127.5 x + 128 = 0.5, 0.63, 64.25, 127.5, 128, 191.75, 254.2 where it is not clipped; truncated, not rounded.
    expected = np.array([0, 0, 0, 0, 64, 127, 128, 191, 254, 255, 255, 255], np.uint8)
    out = to_uint8(jnp.asarray(values) if on_device else values)
    assert isinstance(out, np.ndarray)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, expected)
