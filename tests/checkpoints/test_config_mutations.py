"""Every number and name in a model's config.json changed at random: the same model, another one of the same arrays, or one
sentence; never another exception."""

import json

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PLAIN
from mutations import mutated, mutated_bytes

import ptq4dit_jax as ptq
from ptq4dit_jax import checkpoints
from ptq4dit_jax.checkpoints import store
from ptq4dit_jax.errors import Ptq4ditError

KINDS = ("float", "quantized")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of each kind, what lies in its folder, and a digest of its arrays."""
    folder = tmp_path_factory.mktemp("models")
    model = jax.tree.map(jnp.asarray, helpers.tiny_model(in_channels=1))
    config = ptq.QuantConfig.of(**PLAIN, weight_bits=4, calib_steps=2, calib_rows=4, steps=4)
    quantized = ptq.quantize(model, config, key=jax.random.key(0))
    found = {}
    for kind, saved in zip(KINDS, (model, quantized), strict=True):
        where = checkpoints.save(saved, folder / kind)
        found[kind] = (where, json.loads((where / "config.json").read_text()), digest(saved))
    return found


def digest(model):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model)]


def ends_well(act, expected):
    """Whether ``act`` loads a model of the expected arrays; it may refuse in one sentence, and do nothing else."""
    try:
        model, said = act(), "."
    except Ptq4ditError as error:
        model, said = None, str(error)
    assert said.isprintable()
    assert said.endswith(".")
    if model is not None:
        assert digest(model) == expected
        assert model.config.num_parameters > 0
    return model is not None


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_settings(kind, folders, monkeypatch):
    """Without the folder's own checks, which notice most of this before settings are read."""
    where, _, expected = folders[kind]
    arrays, meta = store.read(where)
    rng, loaded, total = np.random.default_rng(KINDS.index(kind)), 0, 2000
    for _ in range(total):
        changed = mutated(meta, rng)
        monkeypatch.setattr(store, "read", lambda _, changed=changed: (dict(arrays), changed))
        loaded += ends_well(lambda: checkpoints.load(where), expected)
    assert total / 20 < loaded < total / 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_folders(kind, folders):
    where, config, expected = folders[kind]
    text, rng, loaded = (where / "config.json").read_text(), np.random.default_rng(10 + KINDS.index(kind)), 0
    try:
        for i in range(200):
            if i % 4:
                (where / "config.json").write_text(json.dumps(mutated(config, rng)))
            else:
                (where / "config.json").write_bytes(mutated_bytes(text.encode(), rng))
            loaded += ends_well(lambda: checkpoints.load(where), expected)
    finally:
        (where / "config.json").write_text(text)
    assert loaded < 150
    assert ends_well(lambda: checkpoints.load(where), expected)
