"""The presets' sizes, custom shapes, and shapes that are refused."""

import jax
import jax.numpy as jnp
import pytest

from ptq4dit_jax.checkpoints.float_dit import expected_arrays
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks import dit
from ptq4dit_jax.networks.dit import LARGEST, MAX_POSITION_VALUES, MAX_TOKENS, PRESETS, DiTConfig

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
    shapes = jax.eval_shape(lambda: FloatDiT.init(config, key=jax.random.key(0)))
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
    model = jax.eval_shape(lambda: FloatDiT.init(config, key=jax.random.key(0)))
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


# Bounds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        {"input_size": 128},  # 1024 px through a VAE of factor 8
        {"input_size": 128, "num_classes": 100_000},
        {"input_size": 1024, "patch_size": 16, "in_channels": 3},  # 1024 px themselves
        {"input_size": 256, "num_classes": 0, "null_class": False, "position_table": True},
        {"depth": 80, "hidden_size": 8192, "num_heads": 64},
    ],
)
def test_what_people_train_is_far_from_the_bounds(shape):
    config = DiTConfig.preset("DiT-XL/2", **shape)
    for name, most in LARGEST.items():
        assert 4 * getattr(config, name) <= most
    assert 4 * config.num_tokens <= MAX_TOKENS
    assert 4 * config.num_tokens * config.hidden_size <= MAX_POSITION_VALUES


@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        *(({name: most * 2}, (name, str(most), str(most * 2))) for name, most in LARGEST.items() if name != "mlp_ratio"),
        ({"input_size": 10**30}, ("input_size", str(10**30))),
        ({"depth": 10**1000}, ("depth", "a int")),
        ({"input_size": 1024}, ("262,144 tokens", "65,536")),
        ({"input_size": 512, "hidden_size": 4096}, ("65,536 tokens", "268,435,456 values", "134,217,728")),
        ({"hidden_size": 2**16, "depth": 2**10, "input_size": 4}, ("parameters", "1,099,511,627,776")),
        ({"mlp_ratio": float("inf")}, ("mlp_ratio", "inf")),
        ({"mlp_ratio": float("nan")}, ("mlp_ratio", "nan")),
        ({"mlp_ratio": -4.0}, ("mlp_ratio", "-4.0")),
        ({"mlp_ratio": 1e300}, ("mlp_ratio", "1e+300")),
        ({"mlp_ratio": 0.01}, ("mlp_ratio 0.01", "no width")),
        ({"mlp_ratio": "4"}, ("mlp_ratio", "'4'")),
        ({"freq_shift": 128.0}, ("freq_shift", "128.0")),
        ({"freq_shift": float("nan")}, ("freq_shift", "nan")),
        ({"frequencies": (1.0, 2.0)}, ("frequencies", "128 numbers", "not 2")),
        ({"frequencies": [1.0] * 128}, ("frequencies", "128 numbers", "a list")),
        ({"frequencies": (*(1.0,) * 127, float("nan"))}, ("frequencies", "1,048,576", "nan")),
        ({"frequencies": ("1\x1b[2J",) * 128}, ("frequencies", "1,048,576")),
        ({"mlp_norm_eps": -1e-6}, ("mlp_norm_eps", "-1e-06")),
        ({"mlp_norm_eps": float("inf")}, ("mlp_norm_eps", "inf")),
        ({"frequency_size": "256\x1b[2J"}, ("frequency_size", "even")),
        ({"frequency_size": 256.0}, ("frequency_size", "256.0")),
    ],
)
def test_sizes_that_no_network_has(tiny_config, wrong, parts, raises_sentence):
    with raises_sentence(*parts):
        DiTConfig(**{**tiny_config.to_dict(), **wrong})


def test_the_count_of_parameters_is_that_of_the_network(tiny_config):
    for change in ({}, {"position_table": True}, {"num_classes": 0, "null_class": False}, {"mlp_ratio": 2.5}):
        config = DiTConfig(**{**tiny_config.to_dict(), **change})
        model = jax.eval_shape(lambda c=config: FloatDiT.init(c, key=jax.random.key(0)))
        assert config.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(model.params))


def test_shapes_of_parameters_cost_no_table_of_positions(tiny_config, monkeypatch):
    """They are read before anything tells whether a file's sizes are true."""
    made, make = [], dit.position_embedding

    def noted(config):
        made.append(config.num_tokens)
        return make(config)

    monkeypatch.setattr(dit, "position_embedding", noted)
    for table in (False, True):
        config = DiTConfig(**{**tiny_config.to_dict(), "input_size": 512, "position_table": table})
        shapes = expected_arrays(config, "float32")
        assert ("position_embed/embedding" in shapes) == table
    assert shapes["position_embed/embedding"].shape == (65_536, 32)
    assert set(made) == {1}
