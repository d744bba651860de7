"""The commands on a model without classes, whose table of positions is a parameter."""

from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_helpers import figures, run
from PIL import Image

from ptq4dit_jax import checkpoints, cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = helpers.tiny_model(in_channels=1, num_classes=0, null_class=False, position_table=True)
    return checkpoints.save(jax.tree.map(jnp.asarray, model), tmp_path_factory.mktemp("folder") / "model")


def refused(capsys, *arguments):
    capsys.readouterr()
    assert cli.main([str(a) for a in arguments]) == 1
    message = capsys.readouterr().err
    assert message.startswith("Error: ")
    assert message.count("\n") == 1
    return message


def test_info(folder, here, capsys):
    run("info", folder, "--json", "info.json")
    out = figures("info.json")
    assert (out["classes"], out["positions"]) == (0, "the model's own table")
    assert out["parameters"] == helpers.load_float(folder).num_params
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "classes none" in lines
    assert "positions the model's own table" in lines


def test_sample(folder, here, capsys):
    walk = ["--steps", "2", "--cfg-scale", "1"]
    run("sample", folder, "--out", "x.npz", "--repeat", "3", *walk)
    with np.load("x.npz") as file:
        assert list(file) == ["arr_0"]
        assert file["arr_0"].shape == (3, 6, 6, 1)
        three = file["arr_0"]
    run("sample", folder, "--out", "one.npz", *walk)
    with np.load("one.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], three[:1])
    run("sample", folder, "--out", "x.png", "--repeat", "3", *walk)
    width, height = Image.open("x.png").size
    assert width == height, "two by two, not a column of repetitions"
    message = refused(capsys, "sample", folder, "--out", "y.npz", "--labels", "0", *walk)
    assert "no classes" in message
    assert "--repeat is the number of images" in message
    assert "no classes" in refused(capsys, "sample", folder, "--out", "y.npz", "--steps", "2", "--cfg-scale", "2")


@pytest.mark.slow
def test_quantize_and_evaluate(folder, here, capsys):
    rows: dict[str, Any] = {"x": np.random.default_rng(0).normal(size=(4, 6, 6, 1)), "t": np.array([5, 5, 900, 900])}
    np.savez("rows.npz", **rows)
    np.savez("labelled.npz", **rows, y=np.array([0, 0, 3, 0]))
    small = ["--cfg-scale", "1", "--steps", "2"]
    run("quantize", folder, "--out", "w8", "--calibration", "rows.npz")
    assert "Label 3" in refused(capsys, "quantize", folder, "--out", "y", "--calibration", "labelled.npz")
    run("evaluate", "w8", "--against", folder, "--out", "report", "--repeat", "2", *small, "--json", "figures.json")
    assert figures("figures.json")["labels"] == [0, 0]
    assert "--labels 0-1" in refused(capsys, "evaluate", "w8", "--against", folder, "--out", "r", "--labels", "0-1", *small)
