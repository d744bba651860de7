"""LightningDiT's published names: imported with gains folded, refused where it is not what the names say, and exported."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from foreign_files import write_torch
from helpers import random_inputs, relative_error
from test_lightning_dit import CONFIG, forward

import ptq4dit_jax as ptq
from ptq4dit_jax.checkpoints.foreign import open_tensors
from ptq4dit_jax.networks.lightning_dit import LightningDiTConfig
from ptq4dit_jax.schedules import FlowSchedule

T = np.array([0.2, 0.7], np.float32)


@pytest.fixture(scope="module", params=[(6, False), (4, False), (6, True)], ids=["published", "no-shifts", "qk-norm"])
def tensors(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    """Random weights under the names of hustvl/LightningDiT, torch's order (out, in), gains between 0.5 and 1.5; adaLN has six
    chunks, or four without shifts."""
    chunks, qk_norm = request.param
    rng, D, side = np.random.default_rng(5), CONFIG.hidden_size, CONFIG.input_size
    found: dict[str, np.ndarray] = {}

    def linear(name: str, out: int, inner: int) -> None:
        found[f"{name}.weight"] = (rng.standard_normal((out, inner)) / np.sqrt(inner)).astype(np.float32)
        found[f"{name}.bias"] = (0.1 * rng.standard_normal(out)).astype(np.float32)

    linear("x_embedder.proj", D, CONFIG.in_channels)
    found["x_embedder.proj.weight"] = found["x_embedder.proj.weight"][:, :, None, None]
    linear("t_embedder.mlp.0", D, CONFIG.frequency_size)
    linear("t_embedder.mlp.2", D, D)
    found["y_embedder.embedding_table.weight"] = rng.standard_normal((CONFIG.num_labels, D)).astype(np.float32)
    for i in range(CONFIG.depth):
        linear(f"blocks.{i}.adaLN_modulation.1", chunks * D, D)
        linear(f"blocks.{i}.attn.qkv", 3 * D, D)
        linear(f"blocks.{i}.attn.proj", D, D)
        linear(f"blocks.{i}.mlp.w12", 2 * CONFIG.mlp_size, D)
        linear(f"blocks.{i}.mlp.w3", D, CONFIG.mlp_size)
    linear("final_layer.adaLN_modulation.1", 2 * D, D)
    linear("final_layer.linear", CONFIG.in_channels, D)
    norms = [f"blocks.{i}.norm{n}" for i in range(CONFIG.depth) for n in (1, 2)]
    for name in (*norms, "final_layer.norm_final"):
        found[f"{name}.weight"] = rng.uniform(0.5, 1.5, D).astype(np.float32)
    for name in (f"blocks.{i}.attn.{side}_norm" for i in range(CONFIG.depth) for side in "qk" if qk_norm):
        found[f"{name}.weight"] = rng.uniform(0.5, 1.5, CONFIG.head_width).astype(np.float32)
    row, column = np.divmod(np.arange(side * side), side)
    half = CONFIG.head_width // 2
    frequencies = np.repeat(10000.0 ** (-np.arange(0, half, 2) / half), 2)
    angles = np.concatenate([np.outer(row, frequencies), np.outer(column, frequencies)], 1)
    found |= {
        "feat_rope.freqs_cos": np.cos(angles).astype(np.float32),
        "feat_rope.freqs_sin": np.sin(angles).astype(np.float32),
    }
    omega = 10000.0 ** (-np.arange(D // 4) / (D // 4))
    waves = [wave(np.outer(place, omega)) for place in (column, row) for wave in (np.sin, np.cos)]
    found["pos_embed"] = np.concatenate(waves, 1)[None].astype(np.float32)
    return found


def as_ours(tensors: dict[str, np.ndarray]) -> dict:
    """Parameters for :func:`forward`, gains left out."""
    stack = lambda name: np.stack([tensors[name.replace("*", str(i))] for i in range(CONFIG.depth)])
    layer = lambda name, get: {"kernel": np.swapaxes(get(f"{name}.weight"), -1, -2), "bias": get(f"{name}.bias")}
    inner = {"adaLN": "adaLN_modulation.1", "qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.w12", "fc2": "mlp.w3"}
    edges = {"time_fc1": "t_embedder.mlp.0", "time_fc2": "t_embedder.mlp.2", "final": "final_layer.linear"}
    edges["final_adaLN"] = "final_layer.adaLN_modulation.1"
    params = {ours: layer(theirs, tensors.__getitem__) for ours, theirs in edges.items()}
    params["patch_embed"] = {"kernel": tensors["x_embedder.proj.weight"][:, :, 0, 0].T, "bias": tensors["x_embedder.proj.bias"]}
    params["label_embed"] = {"embedding": tensors["y_embedder.embedding_table.weight"]}
    blocks: dict[str, Any] = {ours: layer(f"blocks.*.{theirs}", stack) for ours, theirs in inner.items()}
    if norms_heads(tensors):
        blocks |= {f"{side}_norm": stack(f"blocks.*.attn.{side}_norm.weight") for side in "qk"}
    return params | {"blocks": blocks}


def norms_heads(tensors: dict[str, np.ndarray]) -> bool:
    return "blocks.0.attn.q_norm.weight" in tensors


def has_shifts(tensors: dict[str, np.ndarray]) -> bool:
    return len(tensors["blocks.0.adaLN_modulation.1.bias"]) == 6 * CONFIG.hidden_size


def with_gains(params: dict, tensors: dict[str, np.ndarray]) -> dict:
    """A norm's gain as a factor on the rows of the layer behind it, and a shift that undoes it there: another way than ours."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    D, blocks = CONFIG.hidden_size, params["blocks"]
    gains = {
        n: np.stack([tensors[f"blocks.{i}.norm{n}.weight"] for i in range(CONFIG.depth)]).astype(np.float64) for n in (1, 2)
    }
    for n, layer, shift in ((1, "qkv", 0), (2, "fc1", 3)):
        blocks[layer]["kernel"] *= gains[n][:, :, None]
        if not has_shifts(tensors):
            continue
        cut = slice(shift * D, (shift + 1) * D)
        blocks["adaLN"]["kernel"][:, :, cut] /= gains[n][:, None]
        blocks["adaLN"]["bias"][:, cut] /= gains[n]
    last = tensors["final_layer.norm_final.weight"].astype(np.float64)
    params["final"]["kernel"] *= last[:, None]
    params["final_adaLN"]["kernel"][:, :D] /= last
    params["final_adaLN"]["bias"][:D] /= last
    return params


@pytest.fixture(scope="module")
def imported(tensors, tmp_path_factory):
    path = write_torch(tmp_path_factory.mktemp("lightning") / "lightningdit.pt", tensors)
    return ptq.import_checkpoint(path, classes=5)


def test_it_computes_what_the_file_says(imported, tensors):
    model, found = imported
    assert (found.layout, type(model.config), model.schedule) == ("LightningDiT", LightningDiTConfig, FlowSchedule())
    assert model.config == dataclasses.replace(CONFIG, shifts=has_shifts(tensors), qk_norm=norms_heads(tensors))
    x, y = random_inputs(CONFIG, 2)
    params = with_gains(as_ours(tensors), tensors)
    expected = np.stack([forward(params, *each) for each in zip(x, T, y, strict=True)])
    assert relative_error(model.apply(x, T, y), expected) < 2e-5


def test_what_is_exported_comes_back(imported, tmp_path):
    model, _ = imported
    path = ptq.export_meta(model, tmp_path / "out.safetensors")
    file = open_tensors(path)
    assert (file["blocks.1.norm2.weight"].read() == 1).all()
    again, found = ptq.import_checkpoint(path, classes=5)
    assert found.layout == "LightningDiT"
    x, y = random_inputs(CONFIG, 2)
    assert relative_error(again.apply(x, T, y), model.apply(x, T, y)) < 1e-6


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            {"blocks.0.attn.q_norm.weight": np.ones(8, np.float32), "blocks.0.attn.k_norm.weight": None},
            ("no complete LightningDiT", "blocks.0.attn.k_norm.weight"),
        ),
        (
            {"blocks.0.attn.q_norm.weight": np.ones(8, np.float32), "blocks.0.attn.q_norm.bias": np.ones(8, np.float32)},
            ("another network than a LightningDiT", "norms of queries"),
        ),
        (
            {"feat_rope.freqs_sin": np.zeros((9, 8), np.float32)},
            ("feat_rope.freqs_sin", "heads of width 8", "published rotation"),
        ),
        ({"blocks.1.mlp.w3.weight": None}, ("no complete LightningDiT", "blocks.1.mlp.w3.weight")),
    ],
)
def test_another_network_is_refused(change, parts, tensors, tmp_path, raises_sentence):
    changed = {name: array for name, array in (tensors | change).items() if array is not None}
    path = write_torch(tmp_path / "model.pt", changed)
    with raises_sentence(*parts):
        ptq.import_checkpoint(path, classes=5)


@pytest.mark.parametrize(("value", "refused"), [(True, False), (False, True)])
def test_a_configuration_must_agree(value, refused, tensors, tmp_path, raises_sentence):
    path = write_torch(tmp_path / "model.pt", tensors)
    settings = {"model": {"model_type": "LightningDiT-XS/1", "use_rope": value, "use_swiglu": True, "use_rmsnorm": True}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    if not refused:
        model, _ = ptq.import_checkpoint(path, classes=5)
        assert type(model.config) is LightningDiTConfig
        return
    with raises_sentence("use_rope", "--ignore use_rope"):
        ptq.import_checkpoint(path, classes=5)


@pytest.mark.parametrize("wo_shift", [True, False])
def test_shifts_that_a_configuration_denies_or_claims(wo_shift, tensors, tmp_path, raises_sentence):
    path = write_torch(tmp_path / "model.pt", tensors)
    (tmp_path / "config.json").write_text(json.dumps({"model": {"wo_shift": wo_shift, "use_rope": True}}))
    if wo_shift is not has_shifts(tensors):
        model, _ = ptq.import_checkpoint(path, classes=5)
        assert isinstance(model.config, LightningDiTConfig)
        assert model.config.shifts is has_shifts(tensors)
        return
    with raises_sentence(f"wo_shift ({wo_shift})", f"norms without a shift {not wo_shift}", "--ignore wo_shift"):
        ptq.import_checkpoint(path, classes=5)


def test_adaln_of_another_number_of_chunks_is_refused(tensors, tmp_path, raises_sentence):
    name = "blocks.0.adaLN_modulation.1.weight"
    path = write_torch(
        tmp_path / "model.pt", tensors | {name: np.zeros((5 * CONFIG.hidden_size, CONFIG.hidden_size), np.float32)}
    )
    with raises_sentence(name, "another network"):
        ptq.import_checkpoint(path, classes=5)


def test_norms_of_queries_and_keys_that_a_configuration_denies_or_claims(tensors, tmp_path, raises_sentence):
    path, there = write_torch(tmp_path / "model.pt", tensors), norms_heads(tensors)
    for said in (True, False):
        (tmp_path / "config.json").write_text(json.dumps({"model": {"use_qknorm": said, "use_rope": True}}))
        if said is there:
            model, _ = ptq.import_checkpoint(path, classes=5)
            assert isinstance(model.config, LightningDiTConfig)
            assert model.config.qk_norm is there
        else:
            with raises_sentence(f"use_qknorm ({said})", f"norms of queries and keys {there}", "--ignore use_qknorm"):
                ptq.import_checkpoint(path, classes=5)
