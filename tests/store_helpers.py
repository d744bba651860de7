"""What the tests of model folders share: arrays of every kind, and what becomes of them."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ptq4dit_jax.checkpoints import store
from ptq4dit_jax.errors import Ptq4ditError

META = {"kind": "test", "settings": {"bits": 4, "name": "ä", "list": [1, 2.5, None]}, "title": "x"}


def example_arrays():
    rng = np.random.default_rng(0)
    return {
        "blocks/qkv/weight/values": rng.integers(-128, 128, (3, 20, 30), dtype=np.int8),
        "blocks/qkv": rng.integers(0, 256, (3, 7), dtype=np.uint8),  # a prefix of another name
        "blocks/qkv.scale": rng.normal(size=(3, 1, 30)).astype(np.float32),
        "embed ['ä']": rng.normal(size=(5, 4)).astype(ml_dtypes.bfloat16),
        "steps": np.arange(-3, 4, dtype=np.int32),
        "double": rng.normal(size=4),
        "flags": np.array([True, False]),
        "scalar": np.array(-0.0, np.float32),
        "odd values": np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32),
        "none": np.zeros((0, 3), np.float16),
    }


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert type(actual[name]) is np.ndarray
        assert (actual[name].dtype, actual[name].shape) == (expected[name].dtype, expected[name].shape)
        assert actual[name].tobytes() == np.asarray(expected[name]).tobytes()


def assert_refused(path, *words):
    with pytest.raises(Ptq4ditError) as caught:
        store.read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    for word in (Path(path).name, *words):
        assert word in message


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value is not None}
    seal(folder, config)


def seal(folder, config):
    """Writes config.json with the hash of its fields, as if the program had written them so."""
    (folder / "config.json").write_text(json.dumps(config | {"config_sha256": store.config_hash(config)}))
