"""What `sample`, `quantize` and `evaluate` decide by themselves, and what they refuse to write."""

import dataclasses
from pathlib import Path

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_helpers import figures, listing, patch, run

import ptq4dit_jax as ptq
from ptq4dit_jax import checkpoints, cli, terminal
from ptq4dit_jax.checkpoints import store

ONE_STEP = ptq.FlowSchedule(data_time=0, steps=1, guided=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders: a mean flow for one step, a model that overflows in float16, one whose samples are NaN."""
    folder = tmp_path_factory.mktemp("models")
    tiny = helpers.tiny_model(in_channels=1, learn_sigma=False)
    checkpoints.save(dataclasses.replace(tiny, schedule=ONE_STEP), folder / "one")
    blocks = jax.tree.map(np.array, tiny.params["blocks"])
    blocks["fc1"]["kernel"] *= 5e4
    blocks["fc2"]["kernel"] *= 2e-5
    half = jax.tree.map(lambda a: a.astype(np.float16), dataclasses.replace(tiny, params={**tiny.params, "blocks": blocks}))
    checkpoints.save(half, folder / "half")
    checkpoints.save(
        dataclasses.replace(tiny, params=jax.tree.map(lambda a: a * np.float32(1e12), tiny.params)), folder / "wild"
    )
    return folder


@pytest.mark.slow
def test_a_model_of_one_step_needs_no_options(models, here, capsys):
    run("sample", models / "one", "--out", "a.npz", "--labels", "0-2", "--json", "a.json")
    assert "euler, 1 step, no guidance" in capsys.readouterr().out
    facts = figures("a.json")
    assert (facts["steps"], facts["cfg_scale"], facts["sampler"]) == (1, 1.0, "euler")
    model = ptq.load(models / "one")
    assert model.schedule == ONE_STEP
    expected = ptq.sample(model, np.array([0, 1, 2]), key=jax.random.key(0), steps=1, cfg_scale=1.0)
    np.testing.assert_array_equal(np.load("a.npz")["arr_0"], ptq.to_uint8(expected))
    run("quantize", models / "one", "--out", "q", "--calib-rows", "4")
    settings = store.read_config("q")["provenance"]["settings"]
    assert (settings["steps"], settings["calib_steps"], settings["cfg_scale"]) == (1, 1, 1.0)
    assert ptq.load("q").schedule == ONE_STEP
    run("sample", "q", "--out", "q.npz")


def test_the_guidance_interval_is_used_and_told(models, here, capsys):
    run("sample", models / "one", "--out", "a.npz", "--cfg-scale", "3", "--guidance-interval", "0,1", "--json", "a.json")
    assert "euler, 1 step, guidance 3 from time 1 to 0" in capsys.readouterr().out
    assert figures("a.json")["guidance_interval"] == [0, 1]
    run("sample", models / "one", "--out", "b.npz", "--cfg-scale", "3", "--guidance-interval", "0,0.5")
    run("sample", models / "one", "--out", "c.npz", "--cfg-scale", "1")
    guided, outside, alone = (np.load(name)["arr_0"].astype(int) for name in ("a.npz", "b.npz", "c.npz"))
    assert np.abs(outside - alone).max() <= 1
    assert np.abs(guided - alone).max() > 5


@pytest.mark.makes_nan
def test_float16_is_computed_in_float32_unless_asked_for(models, here, capsys):
    arguments = ["sample", models / "half", "--labels", "0-1", "--steps", "2"]
    run(*arguments, "--out", "a.npz")
    assert "in float32 (stored in float16)" in capsys.readouterr().out
    run(*arguments, "--out", "b.npz", "--dtype", "float32")
    np.testing.assert_array_equal(np.load("a.npz")["arr_0"], np.load("b.npz")["arr_0"])
    before = listing(here)
    assert cli.main([str(a) for a in (*arguments, "--out", "new/c.npz", "--dtype", "float16")]) == 1
    error = capsys.readouterr().err
    for word in ("Image 0 (label 0)", "step 1 of 2 on (t = 999)", "computed in float16", "--dtype float32"):
        assert word in error
    assert listing(here) == before


@pytest.mark.makes_nan
@pytest.mark.parametrize("command", ["sample W --out new/a.npz", "sample W --out a.png", "quantize W --out new/q"])
def test_nothing_is_written_of_what_is_not_finite(command, models, here, capsys):
    command = command.replace("W", str(models / "wild")).split()
    assert cli.main([*command, "--steps", "3"]) == 1
    error = capsys.readouterr().err
    assert "NaN or infinity from step 1 of 3 on" in error
    assert error.count("\n") == 1
    assert listing(here) == {}


@pytest.mark.makes_nan
def test_a_fault_in_a_later_batch_drops_what_was_streamed(models, here, capsys, monkeypatch):
    def stream(*_, **__):
        yield 0, np.zeros((2, 6, 6, 1), np.float32)
        there = sorted(path.suffix for path in here.rglob("*") if path.is_file())
        assert there == [".lock", ".tmp"], "the first batch is on its way, and the place is claimed"
        raise ptq.Ptq4ditError("Image 2 holds NaN.")

    monkeypatch.setattr(cli.sample.sampling, "sample_batches", stream)
    assert cli.main(["sample", str(models / "one"), "--out", "new/a.npz", "--labels", "0-3"]) == 1
    assert "Image 2 holds NaN." in capsys.readouterr().err
    assert listing(here) == {}


def test_too_large_a_picture_is_refused_before_sampling(models, here, capsys, monkeypatch):
    monkeypatch.setattr(cli.sample.sampling, "sample_batches", lambda *_, **__: pytest.fail("long work began"))
    assert cli.main(["sample", str(models / "one"), "--out", "a.png", "--labels", "0-4", "--repeat", "10000"]) == 1
    assert "50,000 images" in (error := capsys.readouterr().err)
    assert ".npz" in error
    assert not Path("a.png").exists()


def test_a_guided_flow_is_kept_and_told(models, capsys):
    run("info", models / "one")
    assert "velocity, data at t = 0, 1 step, guided by training" in capsys.readouterr().out
    assert ptq.FlowSchedule() != ptq.FlowSchedule(guided=True)
    assert jnp.float16 == helpers.load_float(models / "half").param_dtype


@pytest.mark.slow
def test_a_model_that_devices_hold_between_them(models, here, mesh8, capsys, monkeypatch):
    """As in Python, and refused where there are not as many devices."""
    patch(monkeypatch, "all_devices_mesh", terminal.all_devices_mesh)
    run("quantize", models / "one", "--out", "q", "--calib-rows", "4", "--model-devices", "2", "--rounding", "nearest")
    run("sample", "q", "--labels", "0-2", "--out", "a.npz", "--model-devices", "2")
    expected = ptq.sample(ptq.load("q"), np.array([0, 1, 2]), key=jax.random.key(0), mesh=ptq.data_mesh(model=2))
    np.testing.assert_array_equal(np.load("a.npz")["arr_0"], ptq.to_uint8(expected))
    capsys.readouterr()
    assert cli.main(["sample", "q", "--out", "b.npz", "--model-devices", "3"]) == 1
    assert "A model on 3 devices needs a multiple of them, not 8" in " ".join(capsys.readouterr().err.split())
    assert not (here / "b.npz").exists()
