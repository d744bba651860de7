"""Importing flow models: the network computes what the source's computes, and is sampled as the source samples."""

import dataclasses
import re

import flax
import foreign_files
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training import checkpoints as flax_checkpoints
from foreign_files import save_safetensors as save

import ptq4dit_jax as ptq
from ptq4dit_jax.checkpoints.foreign import export_meta, import_checkpoint, layouts, open_tensors
from ptq4dit_jax.cli import main

KEY = jax.random.key(0)
SIT, SIT_GOLDEN = foreign_files.flow("sit")
SHORTCUT, SHORTCUT_GOLDEN = foreign_files.flow("shortcut")
MEANFLOW, MEANFLOW_GOLDEN = foreign_files.flow("meanflow")


def largest_error(actual, expected):
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


def assert_forward(model, golden, out="out"):
    velocity = model.jitted()(golden["x"], golden["t"].astype(np.float32), golden["y"])
    assert velocity.shape == golden[out].shape
    assert largest_error(velocity, golden[out]) <= 2e-5


def assert_chain(model, golden, **settings):
    image = ptq.sample(model, golden["labels"], key=KEY, noise=golden["x"], **settings)
    assert largest_error(image, golden["chain"]) <= 2e-5


def narrow(params):
    """SiT without its variance half, as it is where learn_sigma is off."""
    half = {}
    for part in ("weight", "bias"):
        name = f"final_layer.linear.{part}"
        half[name] = params[name].reshape(4, 2, 4, -1)[:, 0].reshape(16, *params[name].shape[1:])
    return {**params, **half}


# SiT and what has its weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["weights", "training"])
def test_sit(kind, tmp_path):
    """The published weights are a state dict; its train.py saves Meta's four entries."""
    params = SIT if kind == "weights" else {f"ema.{name}": array for name, array in SIT.items()}
    model, found = import_checkpoint(foreign_files.write_torch(tmp_path / "x.pt", params), num_heads=2)
    assert (found.layout, found.ema) == ("SiT", kind == "training")
    assert (model.config.learn_sigma, found.config, found.parameters) == (False, model.config, model.num_params)
    assert model.schedule == ptq.FlowSchedule(data_time=1)
    assert_forward(model, SIT_GOLDEN)
    assert_chain(model, SIT_GOLDEN, sampler="heun", steps=4, cfg_scale=2.0)


def test_what_tells_a_sit(tmp_path, raises_sentence):
    noisy = {**SIT, "final_layer.linear.bias": np.ones(32, np.float32)}
    path, named, bare = (save(tmp_path / name, a) for name, a in (("a", noisy), ("SiT-XL.pt", noisy), ("b", narrow(SIT))))
    flow, noise = ptq.FlowSchedule(), ptq.NoiseSchedule()
    read = lambda path, **options: import_checkpoint(path, num_heads=2, **options)[0]
    assert (read(path).schedule, read(path).config.learn_sigma) == (noise, True)
    assert (read(named).schedule, read(named).config.learn_sigma) == (flow, False)
    assert read(named, objective="noise").schedule == noise
    assert read(path, objective="velocity").schedule == flow
    assert read(bare).schedule == noise
    model = read(bare, objective="velocity")
    assert model.schedule == flow
    assert_forward(model, SIT_GOLDEN)
    assert read(save(tmp_path / "told", SIT), objective="noise").schedule == noise
    with raises_sentence("must be noise or velocity", "'score'"):
        read(path, objective="score")
    with raises_sentence("Meta DiT", "no step size", "--flow-steps"):
        read(path, flow_steps=4)


def test_repa(tmp_path):
    """SiT's names without a variance half, projectors that sampling does not need, and noise at t = 1."""
    projectors = {f"projectors.0.{i}.weight": np.ones((3, 3), np.float32) for i in (0, 2, 4)}
    model, found = import_checkpoint(save(tmp_path / "x", {**narrow(SIT), **projectors}), num_heads=2)
    assert (found.layout, model.schedule) == ("SiT", ptq.FlowSchedule(data_time=0))
    assert_forward(model, SIT_GOLDEN)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_types(dtype, tmp_path):
    model, found = import_checkpoint(save(tmp_path / "x", {n: a.astype(dtype) for n, a in SIT.items()}), num_heads=2)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {found.dtype} == {np.dtype(dtype).name}
    assert found.layout == "SiT"


def jax_sit_name(name):
    """What convert_torch_to_jax.py of jax-sit makes of SiT's names."""
    name = name.replace("t_embedder.mlp", "t_embedder").replace("embedding_table.weight", "embedding.embedding")
    name = name.replace("final_layer.linear", "final_layer.proj").replace("layer.adaLN_modulation.1", "layer.ada_dense")
    name = re.sub(r"^blocks\.(\d+)", r"blocks_\1", name.replace("adaLN_modulation.1", "Dense_0"))
    return name.replace(".weight", ".kernel")


def flax_array(name, array):
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 and "table" not in name else array


@pytest.mark.parametrize("kind", ["orbax", "pickle"])
def test_jax_sit(kind, tmp_path):
    tree = foreign_files.nested({jax_sit_name(n): flax_array(n, a) for n, a in narrow(SIT).items()}, ".")
    path = tmp_path / "x"
    if kind == "orbax":
        ocp.PyTreeCheckpointer().save(path, {"params": tree})
    else:
        foreign_files.write_pickle(path, tree)
    model, found = import_checkpoint(path, num_heads=2)
    assert (found.layout, model.schedule) == ("demon2036/jax-sit", ptq.FlowSchedule(data_time=0))
    assert_forward(model, SIT_GOLDEN)


def diffuse_nnx_tree(heads):
    """SiT's golden parameters as diffuse_nnx names and shapes them, with the counters that it saves beside them."""
    flat = {"x_embedder.pe": SIT["pos_embed"], "y_embedder.rngs.time.count": np.zeros((), np.uint32)}
    for name, array in narrow(SIT).items():
        head, array = (array.shape[0] // 3, heads, -1), flax_array(name, array)
        name = name.replace("x_embedder.proj", "x_proj").replace("mlp.fc", "mlp.linear")
        name = name.replace("adaLN_modulation", "adaLN_mod.layers").replace("attn.proj", "attn.out")
        name = name.replace("t_embedder.mlp", "t_embedder.mlp.layers")
        name = name.replace(".weight", ".embedding" if "table" in name else ".kernel")
        if "qkv" in name:
            for part, values in zip(("query", "key", "value"), np.split(array, 3, axis=-1), strict=True):
                flat[name.replace("qkv", part)] = values.reshape(head if values.ndim == 2 else head[1:])
        elif name.endswith("attn.out.kernel"):
            flat[name] = array.reshape(heads, -1, array.shape[-1])
        elif name != "pos_embed":
            flat[name] = array
    return foreign_files.nested({f"network.{name}.value": array for name, array in flat.items()}, ".")


def test_diffuse_nnx(tmp_path, raises_sentence):
    tree = diffuse_nnx_tree(2)
    for item, content in (("state", jax.tree.map(np.zeros_like, tree)), ("ema_state", {"ema": tree})):
        ocp.PyTreeCheckpointer().save(tmp_path / "checkpoint_1" / item, content)
    model, found = import_checkpoint(tmp_path / "checkpoint_1")
    assert (found.layout, found.ema, model.config.num_heads) == ("willisma/diffuse_nnx", True, 2)
    assert model.schedule == ptq.FlowSchedule(data_time=0)
    assert_forward(model, SIT_GOLDEN)
    with raises_sentence("willisma/diffuse_nnx", "predicts velocity", "leave the objective out"):
        import_checkpoint(tmp_path / "checkpoint_1", objective="noise")


def test_diffuse_nnx_with_frequencies_of_its_own(tmp_path):
    """Frequencies in turns, sines first: here those that a DiT has fixed, so that it computes the same."""
    tree = diffuse_nnx_tree(2)
    embedder = tree["network"]["t_embedder"]
    kernel = embedder["mlp"]["layers"]["0"]["kernel"]
    half = len(kernel["value"]) // 2
    kernel["value"] = np.concatenate([kernel["value"][half:], kernel["value"][:half]])
    turns = 10000.0 ** (-np.arange(half) / half) / (2 * np.pi)
    embedder["gaussian_basis"] = {"value": turns.astype(np.float32)}
    ocp.PyTreeCheckpointer().save(tmp_path / "checkpoint_1" / "ema_state", {"ema": tree})
    model, found = import_checkpoint(tmp_path / "checkpoint_1")
    assert (found.layout, len(model.config.frequencies)) == ("willisma/diffuse_nnx", half)
    assert_forward(model, SIT_GOLDEN)


# Networks made for a step size -----------------------------------------------------------------------------------------------


def write_shortcut(path, *, average=True):
    tree = jax.tree.map(jnp.asarray, flax.core.freeze(foreign_files.nested(SHORTCUT, "/")))
    other = jax.tree.map(lambda a: a + 1, tree)
    params, params_ema = (other, tree) if average else (tree, other)
    state = {"params": params, "params_ema": params_ema, "opt_state": optax.adam(1e-3).init(params), "step": jnp.zeros(())}
    return foreign_files.write_pickle(path, {"train_state": state, "_timestamp": 1.5})


@pytest.mark.parametrize(("steps", "out"), [(None, "out_128"), (128, "out_128"), (100, "out_100"), (4, "out_4"), (0, "out_0")])
def test_shortcut(steps, out, tmp_path):
    path = write_shortcut(tmp_path / "x", average=steps != 4)
    model, found = import_checkpoint(path, num_heads=2, input_size=8, ema=steps != 4, flow_steps=steps)
    assert (found.layout, found.ema) == ("kvfrans/shortcut-models", steps != 4)
    assert model.schedule == ptq.FlowSchedule(data_time=1, steps=128 if steps is None else steps)
    assert_forward(model, SHORTCUT_GOLDEN, out)
    if steps == 4:
        assert_chain(model, SHORTCUT_GOLDEN, steps=4, cfg_scale=2.0, cfg_channels="all")


def test_shortcut_says_what_it_needs(tmp_path, raises_sentence):
    path = write_shortcut(tmp_path / "x")
    with raises_sentence("does not tell its number of heads", "--num-heads"):
        import_checkpoint(path, input_size=8)
    with raises_sentence("does not tell its input size", "--input-size"):
        import_checkpoint(path, num_heads=2)
    model = import_checkpoint(path, num_heads=2, input_size=8)[0]
    with raises_sentence("imported for 128 steps", "use 128", "--flow-steps) 50"):
        ptq.sample(model, np.array([0]), key=KEY, steps=50)
    with raises_sentence("steps of a flow", "-1"):
        import_checkpoint(path, num_heads=2, input_size=8, flow_steps=-1)


def test_a_damaged_step_embedder(tmp_path, raises_sentence):
    tree = foreign_files.nested(SHORTCUT, "/")
    del tree["TimestepEmbedder_1"]["Dense_1"]["bias"]
    tree["TimestepEmbedder_1"]["Dense_0"]["bias"] = np.zeros(15, np.float32)
    with raises_sentence("missing: TimestepEmbedder_1.Dense_1.bias", "TimestepEmbedder_1.Dense_0.bias (15,) instead of (16,)"):
        import_checkpoint(foreign_files.write_pickle(tmp_path / "x", tree), num_heads=2, input_size=8)


@pytest.mark.parametrize(("steps", "out"), [(None, "out_1"), (2, "out_2"), (0, "out_0")])
def test_meanflow(steps, out, tmp_path):
    tree = foreign_files.nested(MEANFLOW, "/")
    other = jax.tree.map(lambda a: a + 1, tree)
    state = {"step": 7, "params": other, "opt_state": optax.adam(1e-3).init(other), "ema_params": tree}
    folder = flax_checkpoints.save_checkpoint(tmp_path, state, 7)
    model, found = import_checkpoint(folder, num_heads=2, input_size=8, flow_steps=steps)
    assert (found.layout, found.ema) == ("Gsunshine/meanflow", True)
    assert model.schedule == ptq.FlowSchedule(data_time=0, steps=1 if steps is None else steps, guided=True)
    assert_forward(model, MEANFLOW_GOLDEN, out)
    if steps is None:
        assert_chain(model, MEANFLOW_GOLDEN, steps=1, cfg_scale=1.0)


def test_imeanflow_is_refused_by_name(tmp_path, raises_sentence):
    tree = {"params": dict.fromkeys(layouts.flows.IMEANFLOW.markers, np.ones(2))}
    with raises_sentence("Lyy-iiis/imeanflow", "another network than DiT", "rotary", "cannot be imported"):
        import_checkpoint(foreign_files.write_pickle(tmp_path / "x", tree))


# Exports and commands ---------------------------------------------------------------------------------------------------------


def test_a_sit_goes_out_as_it_came(tmp_path, raises_sentence):
    model = import_checkpoint(save(tmp_path / "x", SIT), num_heads=2)[0]
    exported = open_tensors(export_meta(model, tmp_path / "y.safetensors"))
    assert set(exported) == set(SIT)
    for name, array in SIT.items():
        np.testing.assert_array_equal(exported[name].read(), array, err_msg=name)
    for schedule in (ptq.FlowSchedule(data_time=0), ptq.FlowSchedule(steps=8)):
        with raises_sentence("as SiT", schedule.describe(), "model folder"):
            export_meta(dataclasses.replace(model, schedule=schedule), tmp_path / "z.safetensors")


@pytest.mark.slow
def test_from_a_foreign_file_to_a_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("ptq4dit_jax.cli.sample.all_devices_mesh", lambda model=1: None)
    source, folder, small = write_shortcut(tmp_path / "x"), tmp_path / "dit", tmp_path / "w8a8"

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        return status, capsys.readouterr()

    sizes = ["--num-heads", 2, "--input-size", 8]
    status, shown = run("convert", source, folder, *sizes, "--flow-steps", 4)
    assert status == 0, shown.err
    assert "velocity, data at t = 1, 4 steps" in shown.out
    walk = ["--steps", 4, "--cfg-channels", "all"]
    status, shown = run("quantize", folder, "--out", small, "--calib-steps", 4, "--calib-rows", 4, *walk)
    assert status == 0, shown.err
    status, shown = run("evaluate", small, "--against", folder, "--out", tmp_path / "report", "--labels", "0-2", *walk)
    assert status == 0, shown.err
    assert "euler, 4 steps" in shown.out
    assert "SQNR of predicted velocity" in shown.out
    status, shown = run("sample", small, "--out", tmp_path / "a.npz", "--sampler", "ddpm", *walk)
    assert (status, shown.err.count("\n")) == (1, 1)
    assert "'ddpm'" in shown.err
    status, shown = run("convert", tmp_path / "x", tmp_path / "y", *sizes, "--objective", "noise")
    assert (status, "predicts velocity" in shown.err) == (1, True)
