"""Quantized models through a folder: every kind of layer comes back leaf by leaf, and a spec that does not fit is refused."""

import json
import shutil
import sys
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from store_helpers import seal

from ptq4dit_jax import chain, checkpoints, sampling
from ptq4dit_jax.checkpoints import quantized_dit, store
from ptq4dit_jax.engine import Provenance, QLinear, QuantizedDiT
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.quantizers import ActQuantizer, QTensor
from ptq4dit_jax.schedules import NoiseSchedule

FACTS = {"source_sha256": "ab" * 32, "settings": {"weight_bits": 4, "dynamic_sites": ["blocks.qkv_in"]}}
VARIANTS: dict[str, dict[str, Any]] = {
    "W8A8, balance none": {"weight_bits": 8},
    "W4A8, balanced": {"weight_bits": 4, "balanced": ("blocks.proj", "blocks.fc2")},
    "W3A6, edges fed by floats": {"weight_bits": 3, "act_bits": 6, "float_inputs": ("patch_embed", "time_fc1", "final")},
    "groups of steps": {"weight_bits": 4, "groups": 3},
    "dynamic sites": {"weight_bits": 5, "groups": 2, "dynamic": ("blocks.qkv", "blocks.fc1"), "balanced": ("blocks.fc1",)},
    "dynamic probabilities": {"weight_bits": 8, "dynamic": ("probs",)},
}


def build(weight_bits, act_bits=8, groups=1, dynamic=(), balanced=(), float_inputs=(), **overrides) -> QuantizedDiT:
    """A model of random integers with the scales of a working one. Nothing is compiled to make it."""
    config = helpers.tiny_config(**overrides)
    rng = np.random.default_rng(weight_bits)

    def uniform(low, high, *shape):
        return jnp.asarray(rng.uniform(low, high, shape), jnp.float32)

    def act(lead, K=None, is_dynamic=False):
        factors = None if K is None else uniform(0.5, 2, *lead, K)
        if is_dynamic:
            return ActQuantizer(None, None, factors, bits=act_bits, dynamic=True, nonnegative="probs" in dynamic)
        scale, zero_point = (
            uniform(2, 4, *lead, groups) / 2**act_bits,
            jnp.asarray(rng.integers(-3, 4, (*lead, groups)), jnp.int32),
        )
        return ActQuantizer(scale, zero_point, factors, bits=act_bits)

    def linear(name):
        lead = (config.depth,) if name.startswith("blocks.") else ()
        K, N = config.linear_shapes[name]
        half = 2 ** (weight_bits - 1)
        if weight_bits > 4:
            values, zero_point = rng.integers(1 - half, half, (*lead, N, K), np.int8), None
        else:  # the same mask for both codes of a byte
            values = rng.integers(0, 256, (*lead, -(-N // 2), K), np.uint8) & np.uint8(17 * (2 * half - 1))
            zero_point = jnp.full((*lead, N), half, jnp.int8)
        scale = uniform(1, 2, *lead, N) * np.float32(K**-0.5 / half)
        quantizer = None if name in float_inputs else act(lead, K if name in balanced else None, name in dynamic)
        bias = uniform(-0.2, 0.2, *lead, 1 if quantizer is None or quantizer.dynamic else groups, N)
        return QLinear(weight=QTensor(jnp.asarray(values), scale, zero_point, weight_bits), bias=bias, act=quantizer)

    model = QuantizedDiT(
        linears={name: linear(name) for name in config.linear_shapes},
        sites={f"blocks.{name}": act((config.depth,), None, name in dynamic) for name in ("q", "k", "v", "probs")},
        label_embed=uniform(-1, 1, config.num_classes + 1, config.hidden_size),
        group_edges=jnp.asarray(np.linspace(800, 100, groups)[:-1].astype(np.int32)),
        config=config,
        schedule=NoiseSchedule(num_timesteps=900, beta_end=0.03),
        provenance=Provenance(FACTS),
    )
    return jax.tree.map(jnp.asarray, model)


def edit_config(folder, path, value):
    """Sets the entry at ``path`` in config.json, or deletes it where ``value`` is None."""
    config = json.loads((folder / "config.json").read_text())
    inner = config
    for name in path[:-1]:
        inner = inner[name]
    inner.pop(path[-1]) if value is None else inner.update({path[-1]: value})
    seal(folder, config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """W4 with groups of steps, a dynamic and a balanced layer: its folder, not to be written to, and the model."""
    model = build(4, groups=2, dynamic=("blocks.qkv",), balanced=("blocks.fc2",), float_inputs=("final",))
    return checkpoints.save(model, tmp_path_factory.mktemp("quantized") / "model"), model


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant, tmp_path):
    model = build(**VARIANTS[variant])
    loaded = checkpoints.load(checkpoints.save(model, tmp_path / "model"))
    assert type(loaded) is QuantizedDiT
    assert helpers.structure(loaded) == helpers.structure(model)
    assert (loaded.config, loaded.schedule) == (model.config, model.schedule)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(model), strict=True):
        assert isinstance(ours, jax.Array)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.parametrize("shape", [{}, {"patch_size": 1, "in_channels": 3}], ids=["even", "odd"])
def test_a_model_whose_codes_share_bytes_along_k_is_packed_anew(shape, tmp_path):
    """As they did before ``packed`` was written: byte j of a row held its codes j and j + ceil(K / 2)."""
    model = build(4, **shape)
    arrays, meta = store.read(checkpoints.save(model, tmp_path / "now"))
    assert meta.pop("packed") == "rows"
    for name, layer in model.linears.items():
        codes = np.asarray(layer.stored.codes() + np.asarray(layer.stored.zero_point)[..., None]).astype(np.uint8)
        half = (codes.shape[-1] + 1) // 2
        old = codes[..., :half].copy()
        old[..., : codes.shape[-1] - half] |= codes[..., half:] << 4
        arrays[f"linears/{name}/weight/values"] = old
    loaded = checkpoints.load(store.write(tmp_path / "before", arrays, meta))
    assert all(map(np.array_equal, jax.tree.leaves(loaded), jax.tree.leaves(model)))


def test_the_same_samples(saved):
    """Of a model with layers of every kind; the program that was compiled for one model serves the other."""
    folder, model = saved
    samples, programs = [], []
    for either in (model, checkpoints.load(folder)):
        samples.append(sampling.sample(either, np.arange(3), key=jax.random.key(5), steps=2))
        programs.append(helpers.num_programs(chain.sample_batch))
    assert programs[0] == programs[1]
    assert np.isfinite(samples[0]).all()
    assert samples[0].std() > 0
    assert samples[1].tobytes() == samples[0].tobytes()


def test_a_model_that_computes_in_bfloat16_comes_back_so(tmp_path):
    model = build(4).astype("bfloat16")
    assert checkpoints.load(checkpoints.save(model, tmp_path / "model")).dtype == "bfloat16"


@pytest.mark.parametrize("weight_bits", [8, 4])
def test_the_folder_is_hardly_larger_than_its_arrays(weight_bits, tmp_path):
    model = build(weight_bits, groups=5, hidden_size=384, depth=3, frequency_size=256)
    config, groups = model.config, 5
    assert model.label_embed is not None
    expected = 4 * model.label_embed.size + 4 * (groups - 1) + 4 * config.depth * groups * (4 + 4)  # ranges of q, k, v, probs
    for name, (K, N) in config.linear_shapes.items():
        layers = config.depth if name.startswith("blocks.") else 1
        weights = N * K if weight_bits == 8 else N * -(-K // 2) + N  # two to a byte, and a byte for the zero point
        expected += layers * (weights + 4 * N + groups * (4 * N + 4 + 4))  # scales; per group biases and the input's range
    folder = checkpoints.save(model, tmp_path / "model")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert model.nbytes == expected
    assert expected < size < 1.05 * expected


def test_four_bits_take_half_the_room(tmp_path):
    sizes = {}
    for bits in (8, 4, 2):
        arrays, _ = store.read(checkpoints.save(build(bits), tmp_path / str(bits)))
        sizes[bits] = sum(a.nbytes for name, a in arrays.items() if name.endswith("weight/values"))
    assert sizes[4] == sizes[2] == sizes[8] / 2


def test_provenance(tmp_path):
    folder = checkpoints.save(build(4), tmp_path / "model", provenance={"seed": 3, "source": "models/digits"})
    facts = json.loads((folder / "config.json").read_text())["provenance"]
    assert set(facts.pop("versions")) == {"ptq4dit_jax", "jax", "flax", "orbax"}
    assert facts == {**FACTS, "seed": 3, "source": "models/digits"}
    loaded = helpers.load_quantized(folder)
    assert {key: loaded.provenance.facts[key] for key in facts} == facts
    again = checkpoints.save(loaded, tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["provenance"].keys() == {*facts, "versions"}
    assert store.read_config(again)["content_sha256"] == store.read_config(folder)["content_sha256"]


def test_the_folder_stands_alone(saved, tmp_path, monkeypatch):
    """Moved elsewhere, with nothing else around it, and with no float model to be had."""
    shutil.copytree(saved[0], tmp_path / "moved/model")
    monkeypatch.chdir(tmp_path)
    for name in ("load_float", "save_float"):
        monkeypatch.setattr(checkpoints.float_dit, name, lambda *_: sys.exit("asked for a float model"))
    loaded, original = checkpoints.load("moved/model"), saved[1]
    assert helpers.structure(loaded) == helpers.structure(original)
    assert all(map(np.array_equal, jax.tree.leaves(loaded), jax.tree.leaves(original)))


# What does not fit

QKV, FC2, FINAL = (("linears", name) for name in ("blocks.qkv", "blocks.fc2", "final"))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("linears",), None, "'linears'"),
        (("linears",), [], "config.json"),
        (("linears",), {}, "patch_embed"),
        (QKV, None, "blocks.qkv"),
        (QKV, 4, "config.json"),
        ((*QKV, "weight_bits"), None, "weight_bits"),
        ((*QKV, "weight_bits"), "4", "not '4'"),
        ((*QKV, "weight_bits"), 1, "not 1"),
        ((*QKV, "weight_bits"), 9, "not 9"),
        ((*QKV, "weight_bits"), True, "not True"),
        ((*QKV, "weight_bits"), 8, "linears/blocks.qkv/weight/values is uint8 (2, 48, 32), not int8 (2, 96, 32)"),
        ((*QKV, "act"), "int8", "config.json"),
        ((*QKV, "act", "bits"), None, "bits"),
        ((*QKV, "act", "bits"), 8.0, "not 8.0"),
        ((*QKV, "act", "dynamic"), None, "dynamic"),
        ((*QKV, "act", "dynamic"), False, "missing: linears/blocks.qkv/act/scale, linears/blocks.qkv/act/zero_point"),
        ((*QKV, "act", "balanced"), True, "missing: linears/blocks.qkv/act/balance"),
        ((*FC2, "act", "balanced"), False, "unexpected: linears/blocks.fc2/act/balance"),
        ((*FC2, "act"), {}, "config.json"),
        ((*FINAL, "act"), {"bits": 8, "dynamic": False, "balanced": False}, "missing: linears/final/act/scale"),
        (("sites",), None, "'sites'"),
        (("sites",), [1], "config.json"),
        (("sites", "blocks.q"), None, "'blocks.q'"),
        (("sites", "blocks.q", "bits"), 0, "not 0"),
        (("num_groups",), None, "num_groups"),
        (("num_groups",), "2", "num_groups"),
        (("num_groups",), 2.0, "num_groups"),
        (("num_groups",), 0, "num_groups"),
        (("num_groups",), -1, "num_groups"),
        (("num_groups",), 3, "group_edges is int32 (1,), not int32 (2,)"),
        (("config",), None, "DiTConfig"),
        (("config", "depth"), 3, "(3,"),
        (("config", "num_classes"), 6, "label_embed"),
        (("schedule",), [], "NoiseSchedule"),
        (("provenance",), [1], "provenance"),
        (("provenance",), "none", "provenance"),
        (("dtype",), "int8", "dtype"),
        (("packed",), "spirals", "'spirals'"),
    ],
)
def test_a_damaged_spec_is_refused_in_one_sentence(path, value, words, saved, tmp_path, raises_sentence):
    folder = shutil.copytree(saved[0], tmp_path / "model")
    edit_config(folder, path, value)
    with raises_sentence(words):
        checkpoints.load(folder)


def test_all_arrays_that_do_not_fit_are_named_at_once(saved):
    arrays, meta = store.read(saved[0])
    del arrays["label_embed"], arrays["linears/blocks.fc1/bias"]
    arrays["linears/final/act/scale"] = np.ones(1, np.float32)
    arrays["linears/time_fc1/bias"] = arrays["linears/time_fc1/bias"][:, :3]
    arrays["linears/blocks.proj/weight/values"] = arrays["linears/blocks.proj/weight/values"].view(np.int8)
    with pytest.raises(Ptq4ditError) as caught:
        quantized_dit.load_quantized(arrays, meta)
    message = str(caught.value)
    assert "\n" not in message
    for words in (
        "missing: label_embed, linears/blocks.fc1/bias;",
        "unexpected: linears/final/act/scale;",
        "linears/blocks.proj/weight/values is int8 (2, 16, 32), not uint8 (2, 16, 32)",
        "linears/time_fc1/bias is float32 (2, 3), not float32 (2, 32).",
    ):
        assert words in message


def with_leaf(model, name, change):
    """The model with one leaf replaced by ``change`` of it; names are those of the folder's arrays."""
    return jax.tree_util.tree_map_with_path(
        lambda path, a: change(np.asarray(a)) if jax.tree_util.keystr(path, simple=True, separator="/") == name else a, model
    )


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("linears/blocks.qkv/weight/scale", lambda a: a.astype(np.float64), "is float64 (2, 96), not float32 (2, 96)"),
        ("sites/blocks.v/zero_point", lambda a: a.astype(np.int64), "is int64 (2, 2), not int32 (2, 2)"),
        ("linears/time_fc1/bias", lambda a: a[:, :3], "is float32 (2, 3), not float32 (2, 32)"),
        ("label_embed", lambda a: a[:-1], "is float32 (5, 32), not float32 (6, 32)"),
        ("linears/blocks.fc1/weight/values", lambda a: a.view(np.int8), "is int8 (2, 64, 32), not uint8 (2, 64, 32)"),
        ("group_edges", lambda a: a.astype(np.float32), "is float32 (1,), not int32 (1,)"),
        ("group_edges", lambda a: a[0], "not ()"),
    ],
)
def test_what_cannot_be_loaded_is_not_saved(name, change, words, saved, tmp_path, raises_sentence):
    with raises_sentence("This quantized model cannot be saved", name, words):
        checkpoints.save(with_leaf(saved[1], name, change), tmp_path / "a/model")
    assert list(tmp_path.iterdir()) == []


def test_parts_and_settings_that_cannot_be_loaded_are_not_saved(saved, tmp_path, raises_sentence):
    model = saved[1]
    without = lambda parts, *names: {name: part for name, part in parts.items() if name not in names}
    wrong_bits = model.linears["final"].replace(weight=model.linears["final"].weight.replace(bits=9))
    for odd, words in (
        (model.replace(sites=without(model.sites, "blocks.q", "blocks.probs")), "lacks the site blocks.q, blocks.probs"),
        (model.replace(linears=without(model.linears, "time_fc2")), "lacks the layer time_fc2"),
        (model.replace(linears={**model.linears, "final": wrong_bits}), "not 9"),
        (model.astype("float64"), "'float64'"),
        (model.replace(linears={**model.linears, "extra": model.linears["final"]}), "unexpected: linears/extra/bias"),
    ):
        with raises_sentence(words):
            checkpoints.save(odd, tmp_path / "a/model")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(build(4), tmp_path / "a/model")
    assert list(tmp_path.iterdir()) == []
