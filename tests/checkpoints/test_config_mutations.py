"""Every number and name in a model's config.json changed at random: the same model, another one of the same arrays, or one
sentence; never another exception."""

import copy
import json

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ptq4dit_jax as ptq
from ptq4dit_jax import checkpoints
from ptq4dit_jax.checkpoints import store
from ptq4dit_jax.errors import Ptq4ditError

#: What a value becomes. Numbers at and beyond the ends of what computers and people use, and every other type of JSON.
VALUES = (
    0, 1, 2, 3, 5, 7, 8, -1, -8, 16, 255, 1000, 32768, 65536, 2**20, 2**31 - 1, 2**31, 2**40, 2**53 + 1, 2**63, 2**70, 10**99,
    0.0, -0.0, 0.5, 1.0, -1.0, 1e-300, 1e300, 1e38, 3.7, True, False, None, "", "8", "float32", "object", "O", "V8", "x" * 5000,
    "\x1b[2J\x07\n", [], [0], [2**70], [-1, 0], [0] * 70, {}, {"a": {}}, {"shape": [0, 2**70], "dtype": "float32"},
)  # fmt: skip
KINDS = ("float", "quantized")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of each kind, what lies in its folder, and a digest of its arrays."""
    folder = tmp_path_factory.mktemp("models")
    model = jax.tree.map(jnp.asarray, helpers.tiny_model(in_channels=1))
    config = ptq.QuantConfig(weight_bits=4, calib_steps=2, calib_rows=4, steps=4)
    quantized = ptq.quantize(model, config, key=jax.random.key(0))
    found = {}
    for kind, saved in zip(KINDS, (model, quantized), strict=True):
        where = checkpoints.save(saved, folder / kind)
        found[kind] = (where, json.loads((where / "config.json").read_text()), digest(saved))
    return found


def digest(model):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model)]


def places(value, path=()):
    """The path of every entry of nested containers."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from places(inner, (*path, key))


def mutated(config, rng):
    """A copy with one or two entries replaced, removed, renamed or scaled."""
    new = copy.deepcopy(config)
    for _ in range(rng.integers(1, 3)):
        every = list(places(new))
        *above, key = every[rng.integers(len(every))]
        parent = new
        for part in above:
            parent = parent[part]
        match rng.integers(8):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[str(VALUES[rng.integers(len(VALUES))])[:50]] = parent.pop(key)
            case 2 if type(parent[key]) in (int, float):
                parent[key] = parent[key] * [2, 3, 10, 1000, 0.5, -1][rng.integers(6)]
            case _:
                parent[key] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    return new


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
                content = bytearray(text.encode())
                for _ in range(rng.integers(1, 4)):
                    content[rng.integers(len(content))] = rng.integers(256)
                (where / "config.json").write_bytes(content)
            loaded += ends_well(lambda: checkpoints.load(where), expected)
    finally:
        (where / "config.json").write_text(text)
    assert loaded < 150
    assert ends_well(lambda: checkpoints.load(where), expected)
