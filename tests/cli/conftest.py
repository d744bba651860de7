"""The quantized model that the commands work on, a folder to work in, and what a refusal must look like."""

import dataclasses
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers
import numpy as np
import pytest
from cli_helpers import CALIBRATE, DIGITS, figures, listing, patch, run

from ptq4dit_jax import checkpoints, cli
from ptq4dit_jax.exported import export_sampler
from ptq4dit_jax.exported_file import save_sampler


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """All commands on one device, as compiling for the suite's eight virtual ones takes long; one test undoes it."""
    with pytest.MonkeyPatch.context() as changed:
        patch(changed, "all_devices_mesh", lambda model=1: None)
        yield changed


@pytest.fixture(scope="session")
def w4(tmp_path_factory):
    """The digits model quantized by the program: its folder and the figures."""
    folder = tmp_path_factory.mktemp("w4")
    with pytest.MonkeyPatch.context() as changed:
        patch(changed, "all_devices_mesh", lambda model=1: None)
        run("quantize", DIGITS, "--out", folder / "model", *CALIBRATE, "--json", folder / "figures.json")
    return SimpleNamespace(folder=folder / "model", figures=figures(folder / "figures.json"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Files and folders that commands must refuse, and some that they need; linked into each test's folder."""
    folder = tmp_path_factory.mktemp("inputs")
    model = helpers.tiny_model(in_channels=1)
    bias = np.array(model.params["final"]["bias"])
    bias[1] = np.nan
    checkpoints.save(model, folder / "tiny")
    checkpoints.save(
        dataclasses.replace(model, params={**model.params, "final": {**model.params["final"], "bias": bias}}), folder / "nan"
    )
    checkpoints.save(helpers.tiny_model(in_channels=4), folder / "latent")
    newer = json.loads((folder / "tiny/config.json").read_text()) | {"version": 3}
    (folder / "newer").mkdir()
    (folder / "newer/config.json").write_text(json.dumps(newer))
    (folder / "empty.npz").touch()
    (folder / "text.npz").write_text("text")
    np.save(folder / "plain.npy", np.zeros(3))
    rows: dict[str, Any] = {"x": np.zeros((4, 8, 8, 1)), "t": np.array([5, 5, 900, 900]), "y": np.array([0, 1, 2, 3])}
    changes: dict[str, dict[str, Any]] = {
        "no_t": {"t": None},
        "pickled": {"x": np.array([Unpickled()], object)},
        "words": {"x": np.array(["a"] * 4)},
        "small": {"x": np.zeros((4, 6, 6, 1))},
        "table": {"t": np.array([[5], [5], [900], [900]])},
        "late": {"t": np.array([5, 5, 1000, 1000])},
        "early": {"t": np.array([-1, -1, 900, 900])},
        "halves": {"t": np.array([5.5, 5.5, 900, 900])},
        "uneven": {"t": np.array([5, 5, 5, 900])},
        "label": {"y": np.array([0, 1, 2, 11])},
        "holes": {"x": np.full((4, 8, 8, 1), np.nan)},
    }
    for name, change in changes.items():
        np.savez(folder / f"rows_{name}.npz", **{k: v for k, v in (rows | change).items() if v is not None})
    program = export_sampler(model, 2, steps=3)
    content = save_sampler(program, folder / "program").read_bytes()
    (folder / "damaged").write_bytes(content[:-1])
    np.savez(folder / "noise_shape.npz", noise=np.zeros((2, 8, 8, 1)))
    np.savez(folder / "noise_steps.npz", noise=np.zeros((1, 8, 8, 1)), step_noise=np.zeros((3, 1, 8, 8, 1)))
    np.savez(folder / "noise_words.npz", noise=np.array(["a"]))
    np.savez(folder / "noise_nan.npz", noise=np.full((1, 8, 8, 1), np.nan))
    np.savez(folder / "noise_name.npz", latents=np.zeros((1, 8, 8, 1)))
    np.savez_compressed(folder / "noise_damaged.npz", noise=np.random.default_rng(0).normal(size=(1, 8, 8, 1)))
    damaged = bytearray((folder / "noise_damaged.npz").read_bytes())
    damaged[100:160] = b"\xff" * 60
    (folder / "noise_damaged.npz").write_bytes(damaged)
    return folder


class Unpickled:
    """Tells on whoever unpickles it."""

    def __reduce__(self):
        return warnings.warn, ("unpickled",)


@pytest.fixture
def refused(here, inputs, w4, capsys, monkeypatch):
    """``refused(arguments, *words)``: exit status 1, one sentence with these words on stderr, and the folder as it was.

    ``D`` stands for the digits model, ``Q`` for the quantized one; ``file`` is a file, ``foreign`` somebody's folder. Without
    ``started`` the mistake must be noticed before anything is computed.
    """
    for path in inputs.iterdir():
        Path(path.name).symlink_to(path)
    Path("file").write_text("precious")
    Path("foreign").mkdir()
    Path("foreign/thesis.txt").write_text("precious")
    stands_for = {"D": DIGITS, "Q": str(w4.folder)}

    def check(arguments, *words, started=False):
        before = listing(here)
        with monkeypatch.context() as changed, warnings.catch_warnings():
            warnings.simplefilter("error")
            if not started:
                long = {"quantize": cli.quantize.quantization, "sample_batches": cli.sample.sampling, "compare": cli.evaluate}
                for work, owner in long.items():
                    changed.setattr(owner, work, lambda *_, **__: pytest.fail("long work began"))
            status = cli.main(
                [stands_for.get(a, a) for a in (arguments.split(" ") if isinstance(arguments, str) else arguments)]
            )
        error = capsys.readouterr().err
        assert status == 1
        assert re.fullmatch(r"Error: [^\n]+\.\n", error), error
        assert not re.search(r"\.\s+[A-Z]", error), error
        for word in words:
            assert word in error
        assert listing(here) == before

    return check
