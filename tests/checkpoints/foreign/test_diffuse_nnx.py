"""diffuse_nnx's LightningDiT: its checkpoints compute what its own mathematics say, and what is another network is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import foreign_files
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import PLAIN, random_inputs, relative_error
from test_flows import diffuse_nnx_tree
from test_lightning_dit import rms, rotated, silu

import ptq4dit_jax as ptq
from ptq4dit_jax.calibration import CalibrationData
from ptq4dit_jax.checkpoints import load, save
from ptq4dit_jax.checkpoints.foreign import export_meta, import_checkpoint
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.lightning_dit import LightningDiTConfig
from ptq4dit_jax.schedules import FlowSchedule

SIDE, PATCH, CHANNELS, WIDTH, DEPTH, HEADS, CLASSES, FREQUENCIES = 3, 2, 5, 32, 2, 4, 5, 16
HEAD, MLP = WIDTH // HEADS, int(2 / 3 * 4 * WIDTH)
T = np.array([0.1, 0.6, 0.95], np.float32)
#: The settings of its constructor that are not what its configuration of a LightningDiT says.
KINDS: dict[str, dict[str, bool]] = {
    "as configured": {},
    "no-shifts": {"adaln_shift": False},
    "fixed frequencies": {"continuous_time_embed": False},
    "qk-norm": {"qk_norm": True},
}
Tensors = dict[str, np.ndarray]


def make_tensors(*, adaln_shift: bool = True, continuous_time_embed: bool = True, qk_norm: bool = False) -> Tensors:
    """Random tensors by their paths below ``network``; kernels are (in, out)."""
    rng = np.random.default_rng(7)
    found: Tensors = {}

    def linear(name: str, *shape: int) -> None:
        found[f"{name}.kernel"] = (rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)
        found[f"{name}.bias"] = (0.1 * rng.standard_normal(shape[-1])).astype(np.float32)

    def gain(name: str, width: int) -> None:
        found[f"{name}.rms_weight"] = rng.uniform(0.5, 1.5, width).astype(np.float32)

    linear("x_proj", PATCH, PATCH, CHANNELS, WIDTH)
    linear("t_embedder.mlp.layers.0", FREQUENCIES, WIDTH)
    linear("t_embedder.mlp.layers.2", WIDTH, WIDTH)
    if continuous_time_embed:
        found["t_embedder.gaussian_basis"] = rng.standard_normal(FREQUENCIES // 2).astype(np.float32)
    found["y_embedder.embedding_table.embedding"] = rng.standard_normal((CLASSES + 1, WIDTH)).astype(np.float32)
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        linear(f"{block}.adaLN_mod.layers.1", WIDTH, (6 if adaln_shift else 4) * WIDTH)
        linear(f"{block}.attn.to_qkv", WIDTH, 3 * WIDTH)
        linear(f"{block}.attn.out", WIDTH, WIDTH)
        linear(f"{block}.mlp.linear12", WIDTH, 2 * MLP)
        linear(f"{block}.mlp.linear3", MLP, WIDTH)
        gain(f"{block}.norm1", WIDTH)
        gain(f"{block}.norm2", WIDTH)
        if qk_norm:  # one module has the names q_norm and k_norm, and is stored once
            gain(f"{block}.attn.k_norm", HEAD)
    linear("final_layer.adaLN_mod.layers.1", WIDTH, 2 * WIDTH)
    linear("final_layer.linear", WIDTH, PATCH * PATCH * CHANNELS)
    gain("final_layer.norm", WIDTH)
    row, column = np.divmod(np.arange(SIDE * SIDE), SIDE)
    turns = np.repeat(10000.0 ** (-np.arange(0, HEAD // 2, 2) / (HEAD // 2)), 2)
    angles = np.concatenate([np.outer(row, turns), np.outer(column, turns)], 1)
    found |= {"feat_rope.freqs_cos": np.cos(angles, dtype=np.float32), "feat_rope.freqs_sin": np.sin(angles, dtype=np.float32)}
    found["x_embedder.pe"] = positions()[None].astype(np.float32)
    counters = {f"blocks.0.attn.out_drop.rngs.{stream}.count": np.zeros((), np.uint32) for stream in ("params", "time")}
    return found | counters


def positions() -> np.ndarray:
    """Sines, then cosines, of the column, then of the row."""
    row, column = np.divmod(np.arange(SIDE * SIDE), SIDE)
    omega = 10000.0 ** (-np.arange(WIDTH // 4) / (WIDTH // 4))
    return np.concatenate([wave(np.outer(place, omega)) for place in (column, row) for wave in (np.sin, np.cos)], 1)


def write(folder: Path, tensors: Tensors) -> Path:
    """A checkpoint as its trainer leaves it: what an optimizer holds, and the averages, each leaf below ``value``."""
    tree = lambda arrays: foreign_files.nested({f"network.{name}.value": array for name, array in arrays.items()}, ".")
    trained, averages = tree(tensors | {"t_embedder.mlp.layers.0.bias": np.full(WIDTH, 2.0, np.float32)}), tree(tensors)
    optimizer = {"count": {"value": np.zeros((), np.int32)}, "mu": averages, "nu": averages}
    for item, content in (("state", {"model": trained, "opt_state": {"0": optimizer}}), ("ema_state", {"ema": averages})):
        ocp.PyTreeCheckpointer().save(folder / "checkpoint_50000" / item, content)
    return folder / "checkpoint_50000"


# An independent forward, one image at a time -----------------------------------------------------------


def attention(p: Tensors, block: str, x: np.ndarray) -> np.ndarray:
    """Queries, keys and values lie side by side, in each the heads; the norm comes before the rotation."""
    qkv = (x @ p[f"{block}.attn.to_qkv.kernel"] + p[f"{block}.attn.to_qkv.bias"]).reshape(len(x), 3, HEADS, HEAD)
    gain, out = p.get(f"{block}.attn.k_norm.rms_weight"), np.empty((len(x), HEADS, HEAD))
    turned = lambda rows: np.stack([rotated(head, *divmod(token, SIDE)) for token, head in enumerate(rows)])
    for a in range(HEADS):
        q, k, v = qkv[:, 0, a], qkv[:, 1, a], qkv[:, 2, a]
        if gain is not None:
            q, k = (np.stack([rms(row) * gain for row in rows]) for rows in (q, k))
        weights = np.exp(turned(q) @ turned(k).T / np.sqrt(HEAD))
        out[:, a] = weights / weights.sum(1, keepdims=True) @ v
    return out.reshape(len(x), WIDTH) @ p[f"{block}.attn.out.kernel"] + p[f"{block}.attn.out.bias"]


def forward(tensors: Tensors, image: np.ndarray, t: float, label: int) -> np.ndarray:
    p = {name: array.astype(np.float64) for name, array in tensors.items()}
    linear = lambda name, x: x @ p[f"{name}.kernel"] + p[f"{name}.bias"]
    normed = lambda name, x: np.stack([rms(token) for token in x]) * p[f"{name}.rms_weight"]
    if (basis := p.get("t_embedder.gaussian_basis")) is not None:
        features = np.concatenate([np.sin(2 * np.pi * t * basis), np.cos(2 * np.pi * t * basis)])
    else:
        angles = t * 10000.0 ** (-np.arange(FREQUENCIES // 2) / (FREQUENCIES // 2))
        features = np.concatenate([np.cos(angles), np.sin(angles)])
    time = linear("t_embedder.mlp.layers.2", silu(linear("t_embedder.mlp.layers.0", features)))
    c = silu(time + p["y_embedder.embedding_table.embedding"][label])
    patches = image.reshape(SIDE, PATCH, SIDE, PATCH, CHANNELS).transpose(0, 2, 1, 3, 4).reshape(SIDE**2, -1)
    x = patches @ p["x_proj.kernel"].reshape(-1, WIDTH) + p["x_proj.bias"] + positions()
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        chunks = linear(f"{block}.adaLN_mod.layers.1", c).reshape(-1, WIDTH)
        if len(chunks) == 4:
            scale1, gate1, scale2, gate2 = chunks
            shift1 = shift2 = np.zeros(WIDTH)
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = chunks
        x = x + gate1 * attention(p, block, normed(f"{block}.norm1", x) * (1 + scale1) + shift1)
        gate, value = np.split(linear(f"{block}.mlp.linear12", normed(f"{block}.norm2", x) * (1 + scale2) + shift2), 2, axis=1)
        x = x + gate2 * linear(f"{block}.mlp.linear3", silu(gate) * value)
    shift, scale = np.split(linear("final_layer.adaLN_mod.layers.1", c), 2)
    out = linear("final_layer.linear", normed("final_layer.norm", x) * (1 + scale) + shift)
    out = out.reshape(SIDE, SIDE, PATCH, PATCH, CHANNELS).transpose(0, 2, 1, 3, 4)
    return out.reshape(SIDE * PATCH, SIDE * PATCH, CHANNELS)


# What is read ------------------------------------------------------------------------------------------


def config_of(kind: str) -> LightningDiTConfig:
    """What an import must find, but for frequencies, which are values."""
    return LightningDiTConfig(
        input_size=SIDE * PATCH,
        patch_size=PATCH,
        in_channels=CHANNELS,
        hidden_size=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=CLASSES,
        frequency_size=FREQUENCIES,
        shifts=KINDS[kind].get("adaln_shift", True),
        qk_norm=KINDS[kind].get("qk_norm", False),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_source_says(kind, tmp_path):
    tensors = make_tensors(**KINDS[kind])
    path = write(tmp_path, tensors)
    model, found = import_checkpoint(path, classes=CLASSES)
    assert (found.layout, found.ema, found.notes) == ("willisma/diffuse_nnx LightningDiT", True, ())
    assert model.schedule == FlowSchedule(data_time=0)
    assert isinstance(model.config, LightningDiTConfig)
    assert dataclasses.replace(model.config, frequencies=()) == config_of(kind)
    assert len(model.config.frequencies) == (0 if kind == "fixed frequencies" else FREQUENCIES // 2)
    x, y = random_inputs(model.config, 3, seed=1)
    expected = np.stack([forward(tensors, *each) for each in zip(x, T, y, strict=True)])
    assert relative_error(model.apply(x, T, y), expected) < 2e-5
    trained, found = import_checkpoint(path, classes=CLASSES, ema=False)
    assert (found.words, found.ema) == ("as saved, state.model", False)
    np.testing.assert_array_equal(trained.params["time_fc1"]["bias"], 2)
    with pytest.raises(ptq.Ptq4ditError, match="willisma/diffuse_nnx LightningDiT, which predicts velocity"):
        import_checkpoint(path, classes=CLASSES, objective="noise")


def test_its_dit_is_told_apart(tmp_path):
    ocp.PyTreeCheckpointer().save(tmp_path / "checkpoint_1" / "ema_state", {"ema": diffuse_nnx_tree(2)})
    model, found = import_checkpoint(tmp_path / "checkpoint_1")
    assert (found.layout, type(model.config)) == ("willisma/diffuse_nnx", DiTConfig)


def test_frequencies_of_its_own_stay_with_the_model(tmp_path, raises_sentence):
    model, _ = import_checkpoint(write(tmp_path, make_tensors()), classes=CLASSES)
    x, y = random_inputs(model.config, 3)
    again = load(save(model, tmp_path / "model"))
    assert again.config == model.config
    np.testing.assert_array_equal(again.apply(x, T, y), model.apply(x, T, y))
    with raises_sentence("frequencies of time", "model folder"):
        export_meta(model, tmp_path / "x.safetensors")


@pytest.mark.slow
def test_it_is_quantized_with_frequencies_of_its_own(tmp_path):
    model, _ = import_checkpoint(write(tmp_path, make_tensors()), classes=CLASSES)
    x, y = random_inputs(model.config, 24)
    rows = CalibrationData(x=x.reshape(3, 8, *x.shape[1:]), t=T, y=y.reshape(3, 8))
    made = ptq.quantize(model, ptq.QuantConfig.of(**PLAIN), key=jax.random.key(0), calibration=rows)
    again = load(save(made, tmp_path / "q"))
    assert again.config == model.config
    assert relative_error(again.apply(x[:3], T, y[:3]), model.apply(x[:3], T, y[:3])) < 0.05


# What is refused ---------------------------------------------------------------------------------------

_LAYER_NORM = {f"blocks.{i}.attn.k_norm.{leaf}": np.ones(HEAD, np.float32) for i in range(DEPTH) for leaf in ("scale", "bias")}
_SECOND_TIME = {"dt_embedder.mlp.layers.0.kernel": np.ones((FREQUENCIES, WIDTH), np.float32)}
_NAN = np.full(FREQUENCIES // 2, np.nan, np.float32)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            {"blocks.1.mlp.linear3.kernel": None},
            ("no complete", "LightningDiT", "missing: network.blocks.1.mlp.linear3.kernel"),
        ),
        ({"final_layer.norm.rms_weight": None}, ("no complete", "missing: network.final_layer.norm.rms_weight")),
        (_LAYER_NORM, ("another network", "norms of queries and keys", "network.blocks.0.attn.k_norm.bias")),
        (_SECOND_TIME, ("another network", "a second embedder of time", "network.dt_embedder.mlp.layers.0.kernel")),
        ({"feat_rope.freqs_sin": np.zeros((9, 8), np.float32)}, ("network.feat_rope.freqs_sin", "published rotation")),
        ({"t_embedder.gaussian_basis": np.zeros(3, np.float32)}, ("gaussian_basis", "(3,)", "has 8 of them")),
        ({"t_embedder.gaussian_basis": _NAN}, ("NaN or infinity in network.t_embedder.gaussian_basis",)),
        ({"t_embedder.gaussian_basis": np.full(8, 1e30, np.float32)}, ("frequencies", "at most 1,048,576")),
        ({"blocks.0.norm1.rms_weight": None}, ("LightningDiT", "without SwiGLU, its RMS norms or its rotation")),
        ({"enc_blocks.0.attn.to_qkv.kernel": np.ones((2, 6), np.float32), "blocks": None}, ("LightningDDT", "an encoder")),
    ],
)
def test_another_network_is_refused(change, parts, tmp_path, raises_sentence):
    dropped = tuple(name for name, array in change.items() if array is None)
    tensors = {name: array for name, array in (make_tensors() | change).items() if not name.startswith(dropped)}
    with raises_sentence(*parts):
        import_checkpoint(write(tmp_path, tensors), classes=CLASSES)


@pytest.mark.parametrize(
    ("said", "parts"),
    [
        ({}, ()),
        ({"adaln_shift": False}, ("adaln_shift (False)", "norms with a shift True")),
        ({"continuous_time_embed": False}, ("continuous_time_embed (False)", "frequencies of its own True")),
        ({"qk_norm": True}, ("qk_norm (True)", "norms of queries and keys False")),
        ({"swiglu": False}, ("swiglu", "--ignore swiglu")),
        ({"freq_embed_size": 256}, ("freq_embed_size (256)", "time frequencies 16")),
    ],
)
def test_a_configuration_must_agree(said, parts, tmp_path, raises_sentence):
    """The part ``network`` of its configuration, which a user may lay beside the checkpoint."""
    network: dict[str, Any] = {
        "num_heads": HEADS,
        "mlp_ratio": 4.0,
        "continuous_time_embed": True,
        "freq_embed_size": FREQUENCIES,
        "num_classes": CLASSES,
        "class_dropout_prob": 0.1,
        "qk_norm": False,
        "swiglu": True,
        "use_rope": True,
        "rms_norm": True,
        "adaln_shift": True,
    }
    path = write(tmp_path, make_tensors())
    (path / "config.json").write_text(json.dumps({"network": network | said}))
    if not parts:
        assert import_checkpoint(path)[1].notes == ()
        return
    with raises_sentence(*parts):
        import_checkpoint(path)
