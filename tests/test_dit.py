"""The float network against Meta's DiT (golden arrays), and its sites."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from flax.traverse_util import unflatten_dict
from helpers import num_programs

from ptq4dit_jax.guidance import combine_guidance, predict
from ptq4dit_jax.model import FloatDiT, has_nonfinite
from ptq4dit_jax.networks import dit, parts
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.spec import flatten_sites, nest_sites

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "dit.npz"))
TOLERANCE = 2e-5
SITES = DiTConfig.example().spec.sites
#: For programs that XLA optimizes on CPU for far longer than they run.
UNOPTIMIZED: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


# Meta's parameters as ours ---------------------------------------------------------------------------


def _linear(weight: np.ndarray) -> np.ndarray:
    """(out, in) to (in, out)."""
    return weight.T


def _patch_convolution(weight: np.ndarray) -> np.ndarray:
    """(D, C, P, P) to (P * P * C, D), channel fastest."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _same(array: np.ndarray) -> np.ndarray:
    return array


#: Meta's module, our module, Meta's weight name, our weight name, how the weight changes. Block modules follow.
_EDGE_TABLE = (
    ("x_embedder.proj", "patch_embed", "kernel", _patch_convolution),
    ("t_embedder.mlp.0", "time_fc1", "kernel", _linear),
    ("t_embedder.mlp.2", "time_fc2", "kernel", _linear),
    ("y_embedder.embedding_table", "label_embed", "embedding", _same),
    ("final_layer.adaLN_modulation.1", "final_adaLN", "kernel", _linear),
    ("final_layer.linear", "final", "kernel", _linear),
)
_BLOCK_TABLE = (
    ("adaLN_modulation.1", "adaLN", "kernel", _linear),
    ("attn.qkv", "qkv", "kernel", _linear),
    ("attn.proj", "proj", "kernel", _linear),
    ("mlp.fc1", "fc1", "kernel", _linear),
    ("mlp.fc2", "fc2", "kernel", _linear),
)


def params_from_meta(meta: dict[str, np.ndarray], depth: int) -> dict[str, Any]:
    """Meta's flat dictionary as our tree; every entry must be used."""
    left = dict(meta)
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for theirs, ours, weight, change in _EDGE_TABLE:
        flat[ours, weight] = change(left.pop(f"{theirs}.weight"))
        if weight == "kernel":
            flat[ours, "bias"] = left.pop(f"{theirs}.bias")
    for theirs, ours, weight, change in _BLOCK_TABLE:
        names = [f"blocks.{i}.{theirs}" for i in range(depth)]
        flat["blocks", ours, weight] = np.stack([change(left.pop(f"{name}.weight")) for name in names])
        flat["blocks", ours, "bias"] = np.stack([left.pop(f"{name}.bias") for name in names])
    assert not left, f"unused: {sorted(left)}"
    return jax.tree.map(jnp.asarray, unflatten_dict(flat))


@pytest.fixture(scope="module")
def meta_model() -> FloatDiT:
    prefix = "params/"
    meta = {name.removeprefix(prefix): array for name, array in GOLDEN.items() if name.startswith(prefix)}
    config = DiTConfig(
        input_size=8, patch_size=2, in_channels=4, hidden_size=96, depth=2, num_heads=int(GOLDEN["heads"]), num_classes=10
    )
    return FloatDiT(params=params_from_meta(meta, config.depth), config=config)


def nhwc(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 2, 3, 1)


def largest_relative_difference(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


X, T, Y = nhwc(GOLDEN["x"]), GOLDEN["t"].astype(np.int32), GOLDEN["y"].astype(np.int32)
APPLY: dict[str, Any] = {
    "plain": lambda model, *args: model.apply(*args),
    "jit": jax.jit(lambda model, *args: model.apply(*args)),
}


# Parity ----------------------------------------------------------------------------------------------


def test_meta_parameters_fill_our_tree_exactly(meta_model):
    expected = jax.eval_shape(lambda: dit.init_params(meta_model.config, jax.random.key(0)))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), meta_model.params) == jax.tree.map(lambda a: (a.shape, a.dtype), expected)


@pytest.mark.parametrize(("golden", "how"), [("out", "plain"), ("out", "jit"), ("out_null", "jit")])
def test_forward_is_metas_at_each_timestep(meta_model, golden, how):
    assert T.tolist() == [0, 500, 999]
    labels = Y if golden == "out" else np.full_like(Y, meta_model.config.null_label)
    out = APPLY[how](meta_model, X, T, labels)
    for row, expected in enumerate(nhwc(GOLDEN[golden])):
        assert largest_relative_difference(out[row], expected) < TOLERANCE, f"t = {T[row]}"


@pytest.mark.parametrize(
    ("golden", "overrides"),
    [
        ("out_freq_shift_1", {"freq_shift": 1.0}),
        ("out_mlp_norm_eps_0.1", {"mlp_norm_eps": 0.1}),
        ("out_diffusers", {"freq_shift": 1.0, "mlp_norm_eps": 1e-5}),
    ],
)
def test_forward_variants(meta_model, golden, overrides):
    config = DiTConfig(**{**meta_model.config.to_dict(), **overrides})
    out = APPLY["jit"](meta_model.replace(config=config), X, T, Y)
    assert largest_relative_difference(out, nhwc(GOLDEN[golden])) < TOLERANCE
    assert largest_relative_difference(GOLDEN[golden], GOLDEN["out"]) > 5 * TOLERANCE  # the variant is seen


def test_guided_forward(meta_model):
    @jax.jit
    def guided(model: FloatDiT, x: Any, t: Any, y: Any, scale: Any) -> tuple[jax.Array, jax.Array]:
        return predict(model, x, t, y, scale, "first3"), predict(model, x, t, y, scale, "all")

    outputs = guided(meta_model, X, T, Y, float(GOLDEN["cfg_scale"]))
    for out, golden in zip(outputs, ("guided_3", "guided_4"), strict=True):
        expected = nhwc(GOLDEN[golden])[: len(X)]  # the second half are the null twins, which a sampler drops
        for row in range(len(X)):
            assert largest_relative_difference(out[row], expected[row]) < TOLERANCE, f"{golden}, t = {T[row]}"


def test_guidance_never_reaches_the_variance_of_a_one_channel_model():
    rng = np.random.default_rng(0)
    conditional, unconditional = rng.standard_normal((2, 5, 4, 4, 2)).astype(np.float32)
    for channels in ("first3", "all"):
        out = combine_guidance(jnp.asarray(conditional), jnp.asarray(unconditional), 2.5, 1, channels)
        np.testing.assert_allclose(out[..., 0], unconditional[..., 0] * -1.5 + conditional[..., 0] * 2.5, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(out[..., 1], conditional[..., 1])


def test_one_timestep_may_stand_for_all_rows(meta_model):
    alone = APPLY["jit"](meta_model, X, T[1:2], Y)
    repeated = APPLY["jit"](meta_model, X, np.repeat(T[1:2], 3), Y)
    assert largest_relative_difference(alone, repeated) < 1e-6


def test_bfloat16_computes_the_same_function_coarsely(meta_model):
    half = meta_model.astype(jnp.bfloat16)
    out = APPLY["jit"].lower(half, X, T, Y).compile(compiler_options=UNOPTIMIZED)(half, X, T, Y)
    assert half.dtype == out.dtype == jnp.bfloat16
    assert 1e-4 < largest_relative_difference(out, nhwc(GOLDEN["out"])) < 5e-2


# Pieces ----------------------------------------------------------------------------------------------


def test_position_embedding(meta_model):
    np.testing.assert_allclose(dit.position_embedding(meta_model.config), GOLDEN["pos_embed"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("jit", [False, True])
def test_timestep_frequencies(meta_model, jit):
    function = jax.jit(parts.timestep_frequencies, static_argnums=0) if jit else parts.timestep_frequencies
    features = function(meta_model.config.frequency_size, jnp.asarray(T))
    # An angle of t radians in float32 is off by up to t * 2**-24 and a frequency by as much again.
    for row, t in enumerate(T):
        np.testing.assert_allclose(features[row], GOLDEN["time_features"][row], rtol=0, atol=2e-7 + t * 2.0**-23)


@pytest.mark.parametrize(("patch_size", "in_channels"), [(2, 4), (4, 1), (1, 3), (8, 2)])
def test_patchify_orders_row_column_channel(patch_size, in_channels):
    config = DiTConfig(input_size=8, patch_size=patch_size, in_channels=in_channels, hidden_size=8, depth=1, num_heads=2)
    x = np.random.default_rng(0).standard_normal((2, 8, 8, in_channels)).astype(np.float32)
    tokens = np.asarray(parts.patchify(jnp.asarray(x), config.patch_size))
    side = 8 // patch_size
    assert tokens.shape == (2, config.num_tokens, patch_size**2 * in_channels)
    for token in range(side**2):
        row, column = (i * patch_size for i in divmod(token, side))
        patch = x[:, row : row + patch_size, column : column + patch_size]
        np.testing.assert_array_equal(tokens[:, token], patch.reshape(2, -1))
    np.testing.assert_array_equal(
        parts.unpatchify(jnp.asarray(tokens), config.patch_size, config.input_size // config.patch_size), x
    )


@pytest.mark.parametrize("eps", [1e-6, 0.1])
@pytest.mark.parametrize("jit", [False, True])
def test_layer_norm_and_modulate(eps, jit):
    rng = np.random.default_rng(0)
    x = (3 + 0.5 * rng.standard_normal((2, 5, 16))).astype(np.float32)
    shift, scale = rng.standard_normal((2, 2, 16)).astype(np.float32)
    x64 = x.astype(np.float64)
    norm = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + eps)

    def function(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
        return parts.modulate(parts.layer_norm(x, eps), shift, scale)

    out = (jax.jit(function) if jit else function)(*map(jnp.asarray, (x, shift, scale)))
    np.testing.assert_allclose(out, norm * (1.0 + scale[:, None]) + shift[:, None], rtol=1e-5, atol=1e-5)


def test_layer_norm_and_softmax_reduce_half_precision_in_float32():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 4096)), jnp.bfloat16)
    x64 = np.asarray(x, np.float64)
    exact: dict[Callable[[jax.Array], jax.Array], np.ndarray] = {
        parts.layer_norm: (x64 - x64.mean(-1, keepdims=True)) / x64.std(-1, keepdims=True),
        parts.softmax: np.exp(x64) / np.exp(x64).sum(-1, keepdims=True),
    }
    for function, expected in exact.items():
        out = function(x)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2.0**-8, atol=2.0**-12)


# Sites -----------------------------------------------------------------------------------------------


@struct.dataclass
class Multiply:
    """A quantizer that can be seen: ``x * factor``."""

    factor: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * jnp.broadcast_to(self.factor, x.shape)


@struct.dataclass
class Recorder:
    """An observer that keeps what it was last given."""

    value: Any

    def observe(self, x: jax.Array) -> "Recorder":
        return Recorder(x)


def record(model: FloatDiT, names: list[str], *args: Any) -> tuple[jax.Array, dict[str, np.ndarray]]:
    """The output and what each site received."""

    @jax.jit
    def run(model: FloatDiT, *args: Any) -> tuple[jax.Array, Any]:
        empty = {name: Recorder(jnp.zeros(model.config.depth * name.startswith("blocks."))) for name in names}
        return model.observe(nest_sites(empty), *args)

    out, seen = run(model, *args)
    return out, {name: np.asarray(recorder.value) for name, recorder in flatten_sites(seen).items()}


def all_sites(config: DiTConfig) -> list[str]:
    return [*config.site_features, *map(str, config.spec.outputs[2:])]


@pytest.fixture(scope="module")
def batch(tiny_config: DiTConfig) -> tuple[np.ndarray, ...]:
    x = np.random.default_rng(1).standard_normal((2, *tiny_config.image_shape)).astype(np.float32)
    return x, np.array([7, 731], np.int32), np.array([2, 10], np.int32)


@pytest.fixture(scope="module")
def recorded(tiny_model, batch):
    return record(tiny_model, all_sites(tiny_model.config), *batch)


@pytest.fixture(scope="module")
def apply_with_factors(tiny_model, batch) -> Callable[..., np.ndarray]:
    """The output with a ``Multiply`` at every site that can be quantized, 1 where no other factor is given; one compilation."""
    config = tiny_model.config
    ones = {
        name: np.ones(((config.depth,) if name.startswith("blocks.") else ()) + features, np.float32)
        for name, features in config.site_features.items()
    }

    @jax.jit
    def run(params: Any, factors: dict[str, jax.Array]) -> jax.Array:
        quantizers = nest_sites({name: Multiply(factor) for name, factor in factors.items()})
        return tiny_model.replace(params=params, quantizers=quantizers).apply(*batch)

    def apply(factors: dict[str, np.ndarray], params: Any = None) -> np.ndarray:
        full = {name: np.broadcast_to(factors.get(name, one), one.shape) for name, one in ones.items()}
        return np.asarray(run(tiny_model.params if params is None else params, full))

    return apply


def test_block_outputs_are_metas(meta_model):
    _, seen = record(meta_model, ["blocks.block_out", "blocks.adaLN_in"], X, T, Y)
    for block, expected in zip(seen["blocks.block_out"], GOLDEN["blocks"], strict=True):
        assert largest_relative_difference(block, expected) < TOLERANCE
    silu_c = GOLDEN["c"] / (1 + np.exp(-GOLDEN["c"]))
    for block in seen["blocks.adaLN_in"]:
        assert largest_relative_difference(block, silu_c) < TOLERANCE


def test_every_observer_is_given_its_activation(tiny_model, batch, recorded):
    config, (out, seen) = tiny_model.config, recorded
    assert set(seen) == set(all_sites(config))
    B, L, A, T, D = len(batch[0]), config.depth, config.num_heads, config.num_tokens, config.hidden_size
    middle = {"adaLN_in": (), "q": (T,), "k": (T,), "v": (T,), "probs": (A, T)}
    middle |= dict.fromkeys(("qkv_in", "proj_in", "fc1_in", "fc2_in", "patch_in", "final_in"), (T,))
    for name, features in config.site_features.items():
        lead = (L, B) if name.startswith("blocks.") else (B,)
        assert seen[name].shape == lead + middle.get(name.removeprefix("blocks."), ()) + features, name
    for name in ("proj_out", "fc1_out", "fc2_out", "block_out"):
        assert seen[f"blocks.{name}"].shape == (L, B, T, config.mlp_size if name == "fc1_out" else D), name
    np.testing.assert_allclose(out, APPLY["jit"](tiny_model, *batch), rtol=1e-5, atol=1e-5)


def test_observed_activations_are_the_layers_inputs_and_outputs(tiny_model, batch, recorded):
    config, params, (out, seen) = tiny_model.config, jax.tree.map(np.asarray, tiny_model.params), recorded
    blocks = params["blocks"]

    def through(layer: str, x: np.ndarray) -> np.ndarray:
        return np.einsum("lbtk,lkn->lbtn", x, blocks[layer]["kernel"]) + blocks[layer]["bias"][:, None, None]

    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_array_equal(seen["patch_in"], parts.patchify(jnp.asarray(batch[0]), config.patch_size))
    np.testing.assert_allclose(through("proj", seen["blocks.proj_in"]), seen["blocks.proj_out"], **close)
    np.testing.assert_allclose(through("fc1", seen["blocks.fc1_in"]), seen["blocks.fc1_out"], **close)
    np.testing.assert_allclose(through("fc2", seen["blocks.fc2_in"]), seen["blocks.fc2_out"], **close)
    np.testing.assert_allclose(jax.nn.gelu(seen["blocks.fc1_out"], approximate=True), seen["blocks.fc2_in"], **close)
    qkv = np.stack([seen[f"blocks.{name}"] for name in "qkv"], axis=3)
    np.testing.assert_allclose(through("qkv", seen["blocks.qkv_in"]), qkv.reshape(*qkv.shape[:3], -1), **close)
    logits = np.einsum("lbqad,lbkad->lbaqk", seen["blocks.q"], seen["blocks.k"]) / math.sqrt(config.head_width)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(probs, seen["blocks.probs"], **close)
    attended = np.einsum("lbaqk,lbkad->lbqad", seen["blocks.probs"], seen["blocks.v"])
    np.testing.assert_allclose(attended.reshape(seen["blocks.proj_in"].shape), seen["blocks.proj_in"], **close)
    tokens = seen["final_in"] @ params["final"]["kernel"] + params["final"]["bias"]
    np.testing.assert_allclose(
        parts.unpatchify(jnp.asarray(tokens), config.patch_size, config.input_size // config.patch_size), out, **close
    )


def test_a_model_without_variables_and_one_with_factors_of_one_agree(tiny_model, batch, apply_with_factors):
    plain = APPLY["jit"](tiny_model, *batch)
    assert largest_relative_difference(apply_with_factors({}), plain) < 1e-6


@pytest.mark.parametrize("name", SITES)
def test_zero_at_any_site_changes_the_output(tiny_config, apply_with_factors, name):
    assert name in tiny_config.site_features
    assert largest_relative_difference(apply_with_factors({name: np.float32(0)}), apply_with_factors({})) > 1e-3


@pytest.mark.parametrize("name", [name for name, site in SITES.items() if site.feeds is not None])
def test_a_site_reaches_the_layer_it_names_and_no_other(tiny_model, apply_with_factors, name):
    """Scaling an input channel is scaling that row of the kernel, in each block on its own."""
    params, config = tiny_model.params, tiny_model.config
    in_block = name.startswith("blocks.")
    feeds = SITES[name].feeds
    assert feeds is not None
    layer = feeds.place.name
    shape = ((config.depth,) if in_block else ()) + config.site_features[name]
    factor = np.random.default_rng(2).uniform(0.5, 1.5, shape).astype(np.float32)
    part = params["blocks"] if in_block else params
    changed = {**part, layer: {**part[layer], "kernel": part[layer]["kernel"] * factor[..., None]}}
    expected = apply_with_factors({}, {**params, "blocks": changed} if in_block else changed)
    assert largest_relative_difference(apply_with_factors({name: factor}), expected) < TOLERANCE
    assert largest_relative_difference(expected, apply_with_factors({})) > 1e-3


@pytest.mark.parametrize("index", range(3))
def test_a_factor_on_q_k_or_v_is_one_on_its_columns_of_qkv(tiny_model, apply_with_factors, index):
    config, qkv = tiny_model.config, tiny_model.params["blocks"]["qkv"]
    shape = (config.depth, config.num_heads, config.head_width)
    factor = np.random.default_rng(3).uniform(0.5, 1.5, shape).astype(np.float32)
    columns = np.ones((config.depth, 3, config.hidden_size), np.float32)
    columns[:, index] = factor.reshape(config.depth, -1)
    columns = columns.reshape(config.depth, -1)
    changed = {"kernel": qkv["kernel"] * columns[:, None], "bias": qkv["bias"] * columns}
    params = {**tiny_model.params, "blocks": {**tiny_model.params["blocks"], "qkv": changed}}
    out = apply_with_factors({f"blocks.{'qkv'[index]}": factor})
    assert largest_relative_difference(out, apply_with_factors({}, params)) < TOLERANCE


def test_a_factor_on_probs_is_one_on_v(apply_with_factors):
    by_block = np.array([0.5, 2.0, 1.5], np.float32)
    out = apply_with_factors({"blocks.probs": by_block[:, None]})
    assert largest_relative_difference(out, apply_with_factors({"blocks.v": by_block[:, None, None]})) < TOLERANCE


def test_observers_see_what_the_quantizer_returns(tiny_model, batch, recorded):
    factor = np.array([2.0, 3.0, 4.0], np.float32)
    model = tiny_model.replace(quantizers=nest_sites({"blocks.qkv_in": Multiply(factor), "patch_in": Multiply(np.float32(1))}))
    _, seen = record(model, ["blocks.qkv_in", "patch_in"], *batch)
    np.testing.assert_allclose(seen["blocks.qkv_in"][0], 2 * recorded[1]["blocks.qkv_in"][0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(seen["patch_in"], recorded[1]["patch_in"])


def test_nest_and_flatten_sites_are_inverse():
    flat = {"blocks.q": 1, "final_in": 2, "blocks.fc1_in": 3}
    tree = {"blocks": {"q": 1, "fc1_in": 3}, "final_in": 2}
    assert nest_sites(flat) == tree
    assert flatten_sites(tree) == flat
    assert nest_sites({"final_in": 2}) == flatten_sites({"final_in": 2}) == {"final_in": 2}


# The model as a value --------------------------------------------------------------------------------


def test_adaln_zero_starts_as_the_zero_function(tiny_config, batch):
    init = jax.jit(
        lambda: (dit.init_params(tiny_config, jax.random.key(0)), FloatDiT.init(tiny_config, key=jax.random.key(0)).params)
    )
    params, alive = init.lower().compile(compiler_options=UNOPTIMIZED)()
    leaves = jax.tree_util.tree_leaves_with_path(alive)
    assert all(np.asarray(leaf).std() > 0 for path, leaf in leaves if path[-1].key != "bias")
    model = FloatDiT(params=params, config=tiny_config)
    out, seen = record(model, ["blocks.block_out"], *batch)
    assert np.abs(out).max() == 0
    np.testing.assert_array_equal(seen["blocks.block_out"][0], seen["blocks.block_out"][-1])
    assert np.abs(seen["blocks.block_out"]).max() > 0
    for name in ("qkv", "fc1", "fc2", "proj"):
        kernels = np.asarray(params["blocks"][name]["kernel"])
        assert kernels.std() > 0
        assert not np.array_equal(kernels[0], kernels[1]), "each block has its own draw"


def test_jitted_shares_one_program_between_models_of_one_shape(tiny_model, batch):
    out = tiny_model.jitted()(*batch)
    other = tiny_model.replace(params=jax.tree.map(lambda a: jnp.asarray(1.1 * np.asarray(a)), tiny_model.params))
    programs = num_programs(tiny_model.jitted().func)
    other_out = other.jitted()(*batch)
    assert num_programs(other.jitted().func) == programs
    assert largest_relative_difference(out, other_out) > 1e-3


def test_has_nonfinite_names_the_leaves():
    ones = np.ones((2, 3), np.float32)
    with_nan, with_inf = ones.copy(), ones.copy()
    with_nan[1, 2], with_inf[0, 0] = np.nan, -np.inf
    assert has_nonfinite({"final": {"bias": ones}}) == []
    broken = {"blocks": {"qkv": {"kernel": with_nan, "bias": ones}}, "final": {"bias": with_inf, "kernel": ones}}
    assert sorted(has_nonfinite(broken)) == ["blocks/qkv/kernel", "final/bias"]
