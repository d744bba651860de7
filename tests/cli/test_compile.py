"""``compile`` and ``sample --program``: what they write and say."""

import numpy as np
from cli_helpers import figures, run

import ptq4dit_jax as ptq
from ptq4dit_jax import cli


def test_a_program_for_a_device_that_is_not_here(inputs, here, capsys, monkeypatch):
    monkeypatch.setattr(cli.compile.sampling, "compile_exported", lambda *_, **__: 1 / 0)
    how = ["--steps", "5", "--sampler", "ddim", "--cfg-scale", "2"]
    run(
        "compile",
        inputs / "tiny",
        *how,
        "--batch-size",
        "4",
        "--platform",
        "v6e",
        "--devices",
        "2",
        "--out",
        "p",
        "--json",
        "j",
    )
    program = ptq.load_sampler("p")
    assert (program.batch_size, program.devices, str(program.kind)) == (4, 2, "a TPU v6 lite")
    assert program.sampling == ptq.Sampling("ddim", "5", guidance=ptq.Guidance(2.0))
    found = figures("j")
    assert found["bytes"] == len(program.module)
    assert {name: found[name] for name in ("batch_size", "devices", "platform", "sampler", "cfg_scale", "out")} == {
        "batch_size": 4,
        "devices": 2,
        "platform": "v6e",
        "sampler": "ddim",
        "cfg_scale": 2.0,
        "out": "p",
    }
    out = capsys.readouterr().out
    assert "for 4 images on 2 devices, each a TPU v6 lite, in float32: ddim, 5 steps, guidance 2" in out
    assert f"{here / 'p'}" in out


def test_it_is_compiled_for_this_device_and_used(inputs, here, capsys):
    """Compiling is for JAX's folder of programs, which the tests have. Options change numbers of the exported sampling."""
    run("compile", inputs / "tiny", "--steps", "3", "--batch-size", "2", "--out", "p")
    assert "Compiled for this device" in capsys.readouterr().out
    how = ["--labels", "0-2", "--cfg-scale", "3", "--out"]
    run("sample", inputs / "tiny", "--program", "p", *how, "a.npz")
    assert "ddpm, 3 steps, guidance 3" in capsys.readouterr().out
    run("sample", inputs / "tiny", "--steps", "3", "--batch-size", "2", *how, "b.npz")
    first, second = (np.load(name)["arr_0"] for name in ("a.npz", "b.npz"))
    assert first.std() > 0
    assert first.tobytes() == second.tobytes()
