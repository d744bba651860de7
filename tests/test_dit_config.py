"""The presets' sizes, custom shapes, and shapes that are refused."""

import jax
import jax.numpy as jnp
import pytest

from ptq4dit_jax.dit import PRESETS, DiTConfig
from ptq4dit_jax.model import FloatDiT

# Presets and custom shapes ---------------------------------------------------------------------------

#: Depth, width, heads, and the paper's count in millions at patch size 2 (Peebles & Xie, 2023).
_PUBLISHED = {"S": (12, 384, 6, 33), "B": (12, 768, 12, 130), "L": (24, 1024, 16, 458), "XL": (28, 1152, 16, 675)}


def _metas_count(config: DiTConfig) -> int:
    """Values in Meta's checkpoint, its fixed position table included."""
    D, patch = config.hidden_size, config.patch_size**2
    block = (6 * D * D + 6 * D) + (3 * D * D + 3 * D) + (D * D + D) + (4 * D * D + 4 * D) + (4 * D * D + D)
    embedders = (patch * 4 * D + D) + (256 * D + D) + (D * D + D) + 1001 * D
    final = (2 * D * D + 2 * D) + (patch * 8 * D + patch * 8)
    return embedders + config.depth * block + final + (32 * 32 // patch) * D


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name):
    config = DiTConfig.preset(name)
    size, patch = name.removeprefix("DiT-").split("/")
    depth, width, heads, millions = _PUBLISHED[size]
    assert (config.depth, config.hidden_size, config.num_heads, config.patch_size) == (depth, width, heads, int(patch))
    assert (config.num_classes, config.out_channels, config.null_label) == (1000, 8, 1000)
    shapes = jax.eval_shape(lambda: FloatDiT.init(config, jax.random.key(0)))
    position_table = (32 // int(patch)) ** 2 * width
    assert shapes.num_params + position_table == _metas_count(config)
    assert abs(_metas_count(config) / 1e6 - millions) < 1.0
    if name == "DiT-XL/2":
        assert shapes.num_params == 675_129_632 - 256 * 1152
    for layer, shape in config.linear_shapes.items():
        node = shapes.params["blocks"] if layer.startswith("blocks.") else shapes.params
        lead = (depth,) if layer.startswith("blocks.") else ()
        assert node[layer.removeprefix("blocks.")]["kernel"].shape == lead + shape, layer


def test_there_are_twelve_presets():
    assert len(set(PRESETS)) == 12
    assert {name.split("/")[1] for name in PRESETS} == {"2", "4", "8"}


@pytest.mark.parametrize(
    "shape",
    [
        {"input_size": 64},
        {"patch_size": 4, "in_channels": 1, "learn_sigma": False},
        {"null_class": False, "num_classes": 3},
        {"mlp_ratio": 2.0, "frequency_size": 64, "patch_size": 1, "input_size": 4},
    ],
)
def test_custom_shapes(shape):
    base = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "depth": 2, "num_heads": 3}
    config = DiTConfig(**{**base, **shape})
    model = jax.eval_shape(lambda: FloatDiT.init(config, jax.random.key(0)))
    out = jax.eval_shape(
        FloatDiT.apply, model, jnp.zeros((5, *config.image_shape)), jnp.zeros(5, jnp.int32), jnp.zeros(5, jnp.int32)
    )
    assert out.shape == (5, config.input_size, config.input_size, config.in_channels * (1 + config.learn_sigma))
    assert model.params["label_embed"]["embedding"].shape[0] == config.num_classes + config.null_class
    assert model.params["blocks"]["fc1"]["kernel"].shape == (2, 24, int(24 * config.mlp_ratio))
    assert DiTConfig(**config.to_dict()) == config


def test_preset_overrides_and_input_size():
    config = DiTConfig.preset("DiT-S/4", input_size=64, learn_sigma=False, num_classes=7)
    assert (config.num_tokens, config.out_channels, config.null_label) == (256, 4, 7)


# Errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DiT-XL/3", "DiT-M/2", "dit-xl/2", ""])
def test_unknown_preset(name, raises_sentence):
    with raises_sentence(repr(name), "DiT-S/2", "DiT-XL/8"):
        DiTConfig.preset(name)


@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        ({"hidden_size": 30}, ("hidden_size 30", "num_heads (4)")),
        ({"hidden_size": 18, "num_heads": 3}, ("hidden_size 18", "of 4")),
        ({"patch_size": 3}, ("input_size 8", "patch_size 3")),
        ({"patch_size": 16}, ("input_size 8", "patch_size 16")),
        ({"depth": 0}, ("depth", "0")),
        ({"in_channels": -1}, ("in_channels", "-1")),
        ({"num_heads": 0}, ("num_heads", "0")),
        ({"num_classes": 0}, ("num_classes", "0")),
        ({"hidden_size": 32.0}, ("hidden_size", "32.0")),
        ({"input_size": "8"}, ("input_size", "'8'")),
        ({"frequency_size": 255}, ("frequency_size", "255")),
        ({"frequency_size": 0}, ("frequency_size", "0")),
    ],
)
def test_impossible_shapes(tiny_config, wrong, parts, raises_sentence):
    with raises_sentence(*parts):
        DiTConfig(**{**tiny_config.to_dict(), **wrong})


def test_no_null_label_without_a_null_class(tiny_config, raises_sentence):
    config = DiTConfig(**{**tiny_config.to_dict(), "null_class": False})
    with raises_sentence("null class", "cfg_scale 1"):
        _ = config.null_label
