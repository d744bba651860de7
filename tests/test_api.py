"""The public names, and the example of the package's docstring as a user would run it."""

import dataclasses
import inspect
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_float

import ptq4dit_jax as ptq
from ptq4dit_jax import evaluation
from ptq4dit_jax.checkpoints import store

DIGITS = Path(__file__).resolve().parents[1] / "models/digits"
SHORTER = {
    "QuantConfig.of(weight_bits=4)": "QuantConfig.of(weight_bits=4, calib_steps=2, calib_rows=4, steps=4)",
    "jnp.arange(10)": "jnp.arange(4)",
    "steps=50": "steps=4",
}


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The names that the docstring's example leaves behind, run with fewer steps, and the folder that it ran in."""
    code = inspect.cleandoc(ptq.__doc__ or "").partition("\n\n")[2]
    for text, shorter in SHORTER.items():
        assert code.count(text) == 1
        code = code.replace(text, shorter)
    folder = tmp_path_factory.mktemp("example")
    (folder / "models").symlink_to(DIGITS.parent)
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(code, names)
    return names, folder


def test_public_names():
    assert len(set(ptq.__all__)) == len(ptq.__all__)
    for name in ptq.__all__:
        assert getattr(ptq, name) is not None
        assert inspect.getdoc(getattr(ptq, name)), f"{name} has no docstring"
    assert {"load", "save", "quantize", "sample", "QuantConfig", "compare", "stored_rows", "to_uint8"} <= set(ptq.__all__)
    assert {"Reconstruction", "import_checkpoint", "export_meta"} <= set(ptq.__all__)
    assert issubclass(ptq.Ptq4ditError, ValueError)


def test_its_version_is_that_of_the_installed_package():
    assert ptq.__version__ == metadata.version("ptq4dit-jax")


def test_it_is_typed():
    assert (Path(ptq.__file__).parent / "py.typed").is_file()


def test_importing_it_does_not_load_matplotlib():
    """What only reports need is loaded by the first report."""
    program = "import sys, ptq4dit_jax, ptq4dit_jax.cli; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=DIGITS.parents[1]).returncode == 0


def test_figures_are_found_where_they_were():
    assert callable(evaluation.salience_figure)
    assert all(hasattr(evaluation, name) for name in evaluation.__all__)
    with pytest.raises(AttributeError, match="no attribute 'pictures'"):
        _ = evaluation.pictures


def test_the_example_of_the_docstring(example):
    names, folder = example
    assert isinstance(names["dit"], ptq.FloatDiT)
    assert isinstance(names["q"], ptq.QuantizedDiT)
    images = names["images"]
    assert (images.shape, images.dtype) == ((4, 8, 8, 1), np.float32)
    assert np.isfinite(images).all()
    assert images.std() > 0.1
    facts = store.read_config(folder / "out/digits-w4a8")["provenance"]
    assert facts["source_sha256"] == store.read_config(DIGITS)["content_sha256"]
    assert facts["settings"]["weight_bits"] == 4


def test_what_was_saved_gives_the_same_bytes(example):
    names, folder = example
    loaded = ptq.load(folder / "out/digits-w4a8")
    again = ptq.sample(loaded, labels=jnp.arange(4), key=jax.random.key(1), steps=4, cfg_scale=1.5)
    assert again.tobytes() == names["images"].tobytes()
    other = ptq.sample(loaded, labels=jnp.arange(4), key=jax.random.key(2), steps=4, cfg_scale=1.5)
    assert other.tobytes() != again.tobytes()


def test_float_and_quantized_models_have_one_face(example):
    x, t, y = np.zeros((4, 8, 8, 1), np.float32), np.array([999, 500, 20, 0]), np.array([0, 9, 10, 3])
    for name in ("dit", "q"):
        out = jax.eval_shape(lambda model: model.apply(x, t, y), example[0][name])
        assert (out.shape, out.dtype) == ((4, 8, 8, 2), jnp.float32)


def test_describe_says_what_runs(example):
    rows = {row.layer: row for row in ptq.describe(example[0]["q"])}
    assert set(ptq.load(DIGITS).config.linear_shapes) | {"blocks.q @ k", "blocks.probs @ v"} == set(rows)
    for layer in ("blocks.qkv", "blocks.proj", "blocks.fc1", "blocks.fc2", "blocks.adaLN"):
        assert (rows[layer].weight_bits, rows[layer].act_bits, rows[layer].integer) == (4, 8, True)


def test_the_model_is_its_config_and_its_parameters():
    dit = load_float(DIGITS)
    assert dit.num_params == sum(np.prod(a["shape"], dtype=int) for a in store.read_config(DIGITS)["arrays"].values())
    assert ptq.DiTConfig(**dit.config.to_dict()) == dit.config
    assert len(ptq.PRESETS) == 12


#: What a kind of model has alone, with the reason.
ONE_SIDED = {
    ptq.FloatDiT: {
        "init": "an integer model is made of a float one",
        "params": "integers lie in layers",
        "param_dtype": "integers have one type",
        "compute": "the integer model's dtype is a field",
        "precision": "integer products are exact",
        "quantizers": "the integer model's are in layers and sites",
        "observe": "what is calibrated is the float model",
        "layer": "the integer model's layers are linears",
        "fused": "the integer model's attention is its backend's",
    },
    ptq.QuantizedDiT: {
        "linears": "the float model's layers are params",
        "sites": "the float model's are quantizers",
        "label_embed": "the float model's is in params",
        "position_embed": "the float model's is in params",
        "tables": "the float model's are in params",
        "gains": "the float model's are in params",
        "backend": "integer products have several",
        "backend_choice": "integer products have several",
        "provenance": "a float model is not made here",
    },
}


def test_both_models_have_the_same_members_but_for_a_reason():
    members = {
        kind: {name for name in dir(kind) if not name.startswith("_")} | {field.name for field in dataclasses.fields(kind)}
        for kind in ONE_SIDED
    }
    for (kind, reasons), other in zip(ONE_SIDED.items(), reversed(ONE_SIDED), strict=True):
        assert members[kind] - members[other] == set(reasons)
        assert all(reasons.values())


def test_both_models_count_alike(example):
    dit, q = example[0]["dit"], example[0]["q"]
    assert q.num_params == dit.num_params
    for model in (dit, q):
        assert model.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        assert model.dtype == np.float32
        assert model.astype("bfloat16").dtype == jnp.bfloat16
        x, t, y = np.zeros((1, 8, 8, 1), np.float32), np.array([5]), np.array([3])
        np.testing.assert_array_equal(model.jitted()(x, t, y), jax.jit(lambda m, *given: m.apply(*given))(model, x, t, y))
    assert (dit.num_groups, q.num_groups) == (1, 2)
