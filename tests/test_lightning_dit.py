"""LightningDiT: its forward against NumPy in float64, and the whole pipeline on it."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PLAIN, act_of, random_inputs, relative_error, same_bytes

import ptq4dit_jax as ptq
from ptq4dit_jax.calibration import CalibrationData
from ptq4dit_jax.folding import fold
from ptq4dit_jax.networks.lightning_dit import LightningDiTConfig
from ptq4dit_jax.schedules import FlowSchedule
from ptq4dit_jax.summary import summary_of

CONFIG = LightningDiTConfig(input_size=3, in_channels=5, hidden_size=32, depth=2, num_heads=4, num_classes=5, frequency_size=16)

#: As published, and with what its code offers besides.
KINDS = {
    "published": CONFIG,
    "no-shifts": dataclasses.replace(CONFIG, shifts=False),
    "qk-norm": dataclasses.replace(CONFIG, qk_norm=True),
}


@pytest.fixture(scope="module", params=list(KINDS))
def model(request: pytest.FixtureRequest) -> ptq.FloatDiT:
    made = ptq.FloatDiT.init(KINDS[request.param], key=jax.random.key(0))
    rng = np.random.default_rng(0)
    biased = jax.tree.map(lambda a: np.asarray(a) + 0.1 * rng.standard_normal(a.shape).astype(np.float32), made.params)
    return dataclasses.replace(made, params=biased, schedule=FlowSchedule())


@pytest.fixture(scope="module")
def rows(model: ptq.FloatDiT) -> CalibrationData:
    x, y = random_inputs(CONFIG, 24)
    t = np.array([0.1, 0.5, 0.9], np.float32)
    return CalibrationData(x=x.reshape(3, 8, *x.shape[1:]), t=t, y=y.reshape(3, 8))


# An independent forward, one image and one token at a time --------------------------------------------


def silu(x):
    return x / (1 + np.exp(-x))


def rms(x):
    return x / np.sqrt(np.mean(x * x) + 1e-6)


def rotated(head: np.ndarray, row: int, column: int) -> np.ndarray:
    """Each pair of channels as a complex number, turned by its angle."""
    out, half = np.empty_like(head), len(head) // 2
    for pair in range(len(head) // 2):
        position, within = (row, 2 * pair) if 2 * pair < half else (column, 2 * pair - half)
        turn = np.exp(1j * position * 10000.0 ** (-within / half))
        turned = (head[2 * pair] + 1j * head[2 * pair + 1]) * turn
        out[2 * pair], out[2 * pair + 1] = turned.real, turned.imag
    return out


def forward(params, image: np.ndarray, t: float, label: int) -> np.ndarray:
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    linear = lambda layer, x: x @ layer["kernel"] + layer["bias"]
    D, A, side = CONFIG.hidden_size, CONFIG.num_heads, CONFIG.input_size
    angles = t * 10000.0 ** (-np.arange(8) / 8)
    hidden = silu(linear(params["time_fc1"], np.concatenate([np.cos(angles), np.sin(angles)])))
    c = silu(linear(params["time_fc2"], hidden) + params["label_embed"]["embedding"][label])
    places = [(row, column) for row in range(side) for column in range(side)]
    omega = 10000.0 ** (-np.arange(D // 4) / (D // 4))
    wave = lambda p: np.concatenate([np.sin(p * omega), np.cos(p * omega)])
    x = [linear(params["patch_embed"], image[r, k]) + np.concatenate([wave(k), wave(r)]) for r, k in places]
    for i in range(CONFIG.depth):
        block = jax.tree.map(lambda a, i=i: a[i], params["blocks"])
        modulation = linear(block["adaLN"], c)
        if len(modulation) == 4 * D:  # without shifts
            scale1, gate1, scale2, gate2 = np.split(modulation, 4)
            shift1 = shift2 = np.zeros(D)
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = np.split(modulation, 6)
        qkv = [np.split(linear(block["qkv"], rms(token) * (1 + scale1) + shift1), 3) for token in x]
        attended = np.empty((len(x), D))
        for head in range(A):
            cut = slice(head * D // A, (head + 1) * D // A)
            heads = [[parts[j][cut] for parts in qkv] for j in (0, 1)]
            if "q_norm" in block:
                heads = [[rms(x) * block[name] for x in side] for name, side in zip(("q_norm", "k_norm"), heads, strict=True)]
            q, k = ([rotated(x, *place) for x, place in zip(side, places, strict=True)] for side in heads)
            for token, query in enumerate(q):
                weights = np.exp([query @ key / np.sqrt(D // A) for key in k])
                attended[token, cut] = sum(w * parts[2][cut] for w, parts in zip(weights / weights.sum(), qkv, strict=True))
        x = [token + gate1 * linear(block["proj"], out) for token, out in zip(x, attended, strict=True)]
        for index, token in enumerate(x):
            gate, value = np.split(linear(block["fc1"], rms(token) * (1 + scale2) + shift2), 2)
            x[index] = token + gate2 * linear(block["fc2"], silu(gate) * value)
    shift, scale = np.split(linear(params["final_adaLN"], c), 2)
    return np.stack([linear(params["final"], rms(token) * (1 + scale) + shift) for token in x]).reshape(side, side, -1)


@pytest.mark.parametrize("jit", [False, True])
def test_the_forward_is_an_independent_one(model, jit):
    x, y = random_inputs(CONFIG, 3)
    t = np.array([0.0, 0.3, 1.0], np.float32)
    apply = (lambda *args: model.apply(*args)) if not jit else jax.jit(lambda *args: model.apply(*args))
    expected = np.stack([forward(model.params, *each) for each in zip(x, t, y, strict=True)])
    assert relative_error(apply(x, t, y), expected) < 2e-5


def test_published_sizes():
    """675 M parameters, as the paper says; SwiGLU is 3,072 wide."""
    assert LightningDiTConfig().mlp_size == 3072
    assert round(LightningDiTConfig().num_parameters / 1e6) == 675


def test_without_shifts_modulation_is_a_third_smaller():
    with_shifts, without = (LightningDiTConfig(shifts=shifts) for shifts in (True, False))
    shapes = (config.linear_shapes["blocks.adaLN"] for config in (with_shifts, without))
    assert list(shapes) == [(1152, 6912), (1152, 4608)]
    assert with_shifts.num_parameters - without.num_parameters == 28 * 2 * 1152 * 1153
    assert LightningDiTConfig(**without.to_dict()) == without


def test_shifts_are_there_or_not(raises_sentence):
    with raises_sentence("shifts", "true or false", "'no'"):
        dataclasses.replace(CONFIG, shifts=cast(Any, "no"))


def test_a_head_must_have_whole_pairs_of_both_axes(raises_sentence):
    with raises_sentence("heads of width 6", "multiple of 4"):
        LightningDiTConfig(input_size=2, in_channels=1, hidden_size=12, depth=1, num_heads=2)


def test_folding_leaves_the_function_and_nothing_behind_fc2(model):
    rng, sites = np.random.default_rng(1), model.config.spec.sites
    homes = [name for name, site in sites.items() if site.home is not None]
    width = lambda site: (site.place.lead[0], int(np.prod(site.features)))
    factors = {name: jnp.asarray(np.exp(rng.normal(size=width(sites[name]))), jnp.float32) for name in homes}
    params, residual = fold(model.config, model.params, factors)
    assert set(residual) == {"blocks.proj_in"}
    x, y = random_inputs(CONFIG, 4)
    folded = model.replace(
        params=params, quantizers={"blocks": {"proj_in": ptq.quantizers.ChannelScale(residual["blocks.proj_in"])}}
    )
    t = np.array([0.5], np.float32)
    assert relative_error(folded.apply(x, t, y), model.apply(x, t, y)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "bits", "least"),
    [("published", 8, 30.0), ("published", 4, 15.0), ("no-shifts", 4, 15.0), ("qk-norm", 4, 15.0)],
    indirect=["model"],
)
def test_it_is_quantized_saved_loaded_and_sampled(bits, least, model, rows, tmp_path):
    config = ptq.QuantConfig.of(weight_bits=bits)
    quantized = ptq.quantize(model, config, key=jax.random.key(0), calibration=rows)
    assert quantized.provenance.facts["quality"]["sqnr_mean_db"] > least
    assert act_of(quantized, "blocks.fc2").balance is None
    described = {row.layer: row for row in ptq.describe(quantized)}
    blocks = [name for name in CONFIG.spec.linears if "." in name]
    assert {described[name].runs for name in blocks} == {"int8 x int8 -> int32"}
    twin = ptq.reference(quantized)
    x, y = random_inputs(CONFIG, 4, seed=3)
    arguments = x, np.array([0.5], np.float32), y
    assert relative_error(quantized.apply(*arguments), twin.apply(*arguments)) < 1e-4
    ptq.save(quantized, tmp_path / "q")
    ptq.save(model, tmp_path / "m")
    loaded = ptq.load(tmp_path / "q")
    assert type(loaded.config) is type(ptq.load(tmp_path / "m").config) is LightningDiTConfig
    assert summary_of(loaded)["network"] == "LightningDiT"
    assert same_bytes(loaded, quantized)
    images = ptq.sample(loaded, np.array([0, 1]), key=jax.random.key(1), steps=2)
    assert np.isfinite(images).all()
    assert relative_error(images, ptq.sample(model, np.array([0, 1]), key=jax.random.key(1), steps=2)) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("model", ["published", "qk-norm"], indirect=True)
def test_it_is_reconstructed(model, rows):
    learned = ptq.Reconstruction(iterations=20, batch_size=8)
    config = ptq.QuantConfig.of(**{**PLAIN, "rounding": None}, weight_bits=4, reconstruction=learned)
    made = ptq.quantize(model, config, key=jax.random.key(0), calibration=rows)
    facts = made.provenance.facts["reconstruction"]
    assert list(facts) == ["embed image", "embed condition", "block 0", "block 1", "head"]
    assert all(row["after"] <= row["before"] for row in facts.values())
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(made) if jnp.issubdtype(leaf.dtype, jnp.floating))
