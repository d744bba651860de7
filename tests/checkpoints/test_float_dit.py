"""Float models through a folder: the same function comes back, and what does not fit its settings is named."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import load_float, structure
from store_helpers import seal

from ptq4dit_jax import checkpoints
from ptq4dit_jax.checkpoints import float_dit, store
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.hashing import flatten, source_hash
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.dit import DiTConfig, init_params
from ptq4dit_jax.schedules import NoiseSchedule

CONFIG = DiTConfig(
    input_size=4,
    patch_size=2,
    in_channels=3,
    hidden_size=16,
    depth=2,
    num_heads=2,
    mlp_ratio=2.5,
    num_classes=5,
    null_class=False,
    learn_sigma=False,
    frequency_size=32,
    freq_shift=1.0,
    mlp_norm_eps=1e-5,
)
SCHEDULE = NoiseSchedule(num_timesteps=400, beta_start=2e-4, beta_end=0.03)


def random_model(config, schedule):
    """Like ``FloatDiT.init``, without compiling the initializers."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape, scale=0.2), leaf.dtype), shapes)
    return FloatDiT(params=params, config=config, schedule=schedule)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, SCHEDULE)


@pytest.fixture
def saved(model, tmp_path):
    return checkpoints.save(model, tmp_path / "model")


def edit_config(folder, key, value):
    """Sets ``key`` (with dots for nesting) in config.json, or deletes it where ``value`` is None."""
    config = json.loads((folder / "config.json").read_text())
    *outer, last = key.split(".")
    inner = config
    for name in outer:
        inner = inner[name]
    inner.pop(last, None) if value is None else inner.update({last: value})
    seal(folder, config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip(dtype, model, tmp_path):
    model = model.astype(dtype)
    path = checkpoints.save(model, tmp_path / "model", provenance={"recipe": "train.py"})
    loaded = checkpoints.load(str(path))
    assert type(loaded) is FloatDiT
    assert (loaded.config, loaded.schedule, loaded.param_dtype, loaded.quantizers) == (CONFIG, SCHEDULE, jnp.dtype(dtype), {})
    assert structure(loaded) == structure(model.replace(compute=None)), "float16 is asked for anew"
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(model), strict=True):
        assert isinstance(ours, jax.Array)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_same_function(model, saved):
    batch = (np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32), np.array([3, 399]), np.array([0, 4]))
    np.testing.assert_array_equal(load_float(saved).jitted()(*batch), model.jitted()(*batch))


def test_a_preset(tmp_path):
    model = random_model(DiTConfig.preset("DiT-S/8", depth=1, num_classes=3), NoiseSchedule())
    loaded = load_float(checkpoints.save(model, tmp_path / "model"))
    assert loaded.config == model.config
    assert loaded.num_params == model.num_params


def test_what_the_folder_says(model, saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["kind"] == "float_dit"
    assert config["dtype"] == "float32"
    assert config["config"]["mlp_ratio"] == 2.5
    assert config["schedule"] == {"num_timesteps": 400, "beta_start": 2e-4, "beta_end": 0.03}
    assert config["arrays"]["blocks/qkv/kernel"] == {"shape": [2, 16, 48], "dtype": "float32"}
    assert config["arrays"]["label_embed/embedding"] == {"shape": [5, 16], "dtype": "float32"}


def test_source_hash_is_the_content_hash_of_the_folder(model, saved):
    expected = json.loads((saved / "config.json").read_text())["content_sha256"]
    assert source_hash(model.params) == expected
    assert source_hash(flatten(model.params)) == expected
    assert source_hash(store.read(saved)[0]) == expected
    assert source_hash(load_float(saved).params) == expected
    assert source_hash(model.astype("bfloat16").params) != expected


def test_provenance(model, tmp_path):
    path = checkpoints.save(model, tmp_path / "model", provenance={"seed": 3, "figures": {"accuracy": 0.5}})
    provenance = store.read_config(path)["provenance"]
    assert set(provenance.pop("versions")) == {"ptq4dit_jax", "jax", "flax", "orbax"}
    assert provenance == {"seed": 3, "figures": {"accuracy": 0.5}}


def test_overwrite(model, saved):
    with pytest.raises(Ptq4ditError, match="exists already"):
        checkpoints.save(model, saved)
    checkpoints.save(model.astype("bfloat16"), saved, overwrite=True)
    assert checkpoints.load(saved).dtype == jnp.bfloat16


@pytest.mark.makes_nan
def test_not_finite_weights_are_stored_as_they_are(model, tmp_path):
    params = model.params | {"final": model.params["final"] | {"bias": jnp.full_like(model.params["final"]["bias"], jnp.nan)}}
    loaded = load_float(checkpoints.save(model.replace(params=params), tmp_path / "model"))
    assert np.isnan(loaded.params["final"]["bias"]).all()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("config.window", 8, "DiTConfig has the unknown setting window"),
        ("config.depth", None, "DiTConfig lacks depth"),
        ("config.depth", "2", "DiTConfig has depth = '2', which is no int"),
        ("config.depth", True, "depth = True, which is no int"),
        ("config.depth", 2.0, "depth = 2.0, which is no int"),
        ("config.learn_sigma", 0, "learn_sigma = 0, which is no bool"),
        ("config.mlp_ratio", "4", "mlp_ratio = '4', which is no float"),
        ("config.frequencies", 1.0, "frequencies = 1.0, which is no tuple"),
        ("config.frequencies", ["1"], "frequencies = '1', which is no float"),
        ("config.frequencies", [1.0], "frequencies must be 16 numbers"),
        ("config.depth", 0, "depth must be a positive integer"),
        ("config.depth", 3, "blocks/qkv/kernel is float32 (2, 16, 48), not float32 (3, 16, 48)"),
        ("config", None, "DiTConfig is missing"),
        ("config", [1], "DiTConfig is missing or is no JSON object"),
        ("schedule", None, "NoiseSchedule is missing"),
        ("schedule.kind", "cosine", "NoiseSchedule has the unknown setting kind"),
        ("dtype", None, "dtype is None"),
        ("dtype", "int8", "dtype is 'int8'"),
        ("dtype", ["float32"], "dtype is ['float32']"),
        ("dtype", "bfloat16", "final/bias is float32 (12,), not bfloat16 (12,)"),
        ("kind", "video", "kind 'video'"),
    ],
)
def test_settings_that_do_not_fit(key, value, words, saved):
    edit_config(saved, key, value)
    with pytest.raises(Ptq4ditError) as caught:
        checkpoints.load(saved)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_with_a_default_may_be_left_out_and_whole_floats_may_be_integers(model, saved):
    edit_config(saved, "schedule.beta_end", None)
    edit_config(saved, "config.freq_shift", 1)
    loaded = checkpoints.load(saved)
    assert isinstance(loaded.schedule, NoiseSchedule)
    assert loaded.schedule.beta_end == 0.02
    assert loaded.config == CONFIG
    assert type(loaded.config.freq_shift) is float


def test_all_arrays_that_do_not_fit_are_named_at_once(saved):
    arrays, meta = store.read(saved)
    del arrays["final/bias"], arrays["blocks/fc1/kernel"]
    arrays["lora/a"] = arrays["lora/b"] = np.zeros(3)
    arrays["time_fc1/bias"] = arrays["time_fc1/bias"][:3]
    arrays["time_fc2/bias"] = arrays["time_fc2/bias"].astype(np.float64)
    with pytest.raises(Ptq4ditError) as caught:
        float_dit.load_float(arrays, meta)
    for words in (
        "missing: blocks/fc1/kernel, final/bias;",
        "unexpected: lora/a, lora/b;",
        "time_fc1/bias is float32 (3,), not float32 (16,)",
        "time_fc2/bias is float64 (16,), not float32 (16,).",
    ):
        assert words in str(caught.value)


def test_what_cannot_be_loaded_is_not_saved(model, tmp_path):
    mixed = model.params | {"final": jax.tree.map(lambda a: a.astype("bfloat16"), model.params["final"])}
    without = {name: value for name, value in model.params.items() if name != "final"}
    for params in (mixed, without, {}):
        with pytest.raises(Ptq4ditError, match="cannot be saved"):
            checkpoints.save(model.replace(params=params), tmp_path / "model")
    double = jax.tree.map(lambda a: np.asarray(a, np.float64), model.params)
    with pytest.raises(Ptq4ditError, match="dtype is 'float64'"):
        checkpoints.save(model.replace(params=double), tmp_path / "model")
    odd = model.replace(config=dataclasses.replace(model.config, null_class=1))  # as wide a table, but 1 is no bool in JSON
    with pytest.raises(Ptq4ditError, match="null_class = 1"):
        checkpoints.save(odd, tmp_path / "model")
    quantizers = {"patch_in": jnp.ones(3)}
    with pytest.raises(Ptq4ditError, match="fake quantizers"):
        checkpoints.save(model.replace(quantizers=quantizers), tmp_path / "model")
    with pytest.raises(Ptq4ditError, match="type Dense is no model"):
        checkpoints.save(nn.Dense(3), tmp_path / "model")  # type: ignore[arg-type]  # refused on purpose
    assert list(tmp_path.iterdir()) == []


def test_loading_what_is_no_model(tmp_path):
    with pytest.raises(Ptq4ditError, match="does not exist"):
        checkpoints.load(tmp_path / "missing")
