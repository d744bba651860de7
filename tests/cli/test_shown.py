"""What files have chosen is printed without control characters, so that it cannot act on a terminal or start a line."""

import json
import warnings
from functools import partial
from pathlib import Path

import helpers
import numpy as np
import pytest
from cli_helpers import ROOT, run

import ptq4dit_jax as ptq
from ptq4dit_jax import checkpoints, cli
from ptq4dit_jax.checkpoints import store
from ptq4dit_jax.checkpoints.foreign import open_tensors
from ptq4dit_jax.checkpoints.foreign.safetensors_file import write_safetensors
from ptq4dit_jax.terminal import console, print_table

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\nModel: /all/good \u202e"


def write(path, arrays):
    shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    with Path(path).open("wb") as file:
        write_safetensors(file.write, {name: partial(np.asarray, array) for name, array in arrays.items()}, shapes)


def assert_harmless(text):
    assert "\\x1b[2J" in text
    assert all(line.isprintable() for line in text.splitlines())
    assert not any(line.startswith("Model: /all/good") for line in text.splitlines())


@pytest.mark.parametrize(
    "facts", [{"source": EVIL}, {EVIL: 1}, {"notes": [EVIL]}, {"evidence": {EVIL: EVIL}}, {"evidence": EVIL}]
)
def test_provenance(facts, here, capsys):
    checkpoints.save(helpers.tiny_model(in_channels=1), "model")
    config = json.loads((here / "model/config.json").read_text())
    config["provenance"] = facts
    config["config_sha256"] = store.config_hash(config)
    (here / "model/config.json").write_text(json.dumps(config))
    run("info", "model")
    assert_harmless(capsys.readouterr().out)


def test_names_of_tensors(here, capsys):
    write("a.safetensors", {EVIL: np.ones(1, np.float32)})
    assert cli.main(["info", "a.safetensors"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert_harmless(error)


def test_tables_and_lines(capsys):
    print_table(EVIL, [{EVIL: EVIL, "b": 1.0}])
    console.print(EVIL)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert_harmless(out)


def test_notes_of_the_library(here):
    tensors = open_tensors(ROOT / "tests/golden/foreign/meta_train.pt")
    write("a.safetensors", {name.removeprefix("ema."): t.read() for name, t in tensors.items() if name.startswith("ema.")})
    (here / "config.json").write_text(json.dumps({"num_heads": 3, "window_size": EVIL}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ptq.load("a.safetensors")
    [message] = [str(w.message) for w in caught if "Not understood" in str(w.message)]
    assert message.isprintable()
