"""Quantized models that an earlier version of the program saved: they load, and run as they did."""

import numpy as np
import pytest
from golden import make_quantized_golden as golden
from helpers import same_bytes, structure

import ptq4dit_jax as ptq


@pytest.mark.parametrize("name", golden.MODELS)
def test_it_samples_as_it_did(name):
    """Up to what another CPU rounds differently; ``make_quantized_golden.py --check`` compares bytes."""
    model = ptq.load(golden.FOLDER / name)
    assert isinstance(model, ptq.QuantizedDiT)
    stored = np.load(golden.FOLDER / "samples.npz")[name]
    found = golden.samples(model)
    assert np.linalg.norm(found - stored) < 1e-2 * np.linalg.norm(stored)


@pytest.mark.parametrize("name", golden.MODELS)
def test_saving_it_again_changes_nothing(name, tmp_path):
    model = ptq.load(golden.FOLDER / name)
    ptq.save(model, tmp_path / "again")
    again = ptq.load(tmp_path / "again")
    assert structure(again) == structure(model)
    assert same_bytes(again, model)
