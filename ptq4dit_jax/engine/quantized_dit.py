"""The integer DiT: one forward over a pytree of stacked integer layers. What users run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike, DTypeLike

from ptq4dit_jax import dit
from ptq4dit_jax.dit import DiTConfig
from ptq4dit_jax.engine import backends, matmul
from ptq4dit_jax.engine.attention import attention, attention_codes, covers_codes
from ptq4dit_jax.engine.layers import Fed, QLinear, in_unit_steps
from ptq4dit_jax.engine.stacks import Leaf, of_layer
from ptq4dit_jax.model import FloatDiT, step_group
from ptq4dit_jax.quantizers import ActQuantizer
from ptq4dit_jax.schedules import NoiseSchedule, Schedule


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a quantized model came from: settings, source hash, versions. Equal to any other, so that ``jit`` treats two
    models of one shape alike."""

    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)


@struct.dataclass
class QuantizedDiT:
    """A quantized DiT, self-contained; a pytree.

    ``linears`` holds every linear layer by the names of ``config.linear_shapes``; layers of blocks carry a leading depth axis.
    ``sites`` holds the quantizers of ``blocks.q``, ``blocks.k``, ``blocks.v`` and ``blocks.probs``. ``label_embed``
    (num_classes [+ 1], D) stays float32: it is looked up, not multiplied. ``group_edges`` (G - 1,), of the schedule's
    ``time_dtype``, are the noise levels that part the groups of steps. ``dtype`` is the type of everything between the integer
    products. ``backend`` runs them: ``auto`` takes the fastest that the default device has for that type
    (:func:`ptq4dit_jax.engine.backends.resolve`).
    """

    linears: dict[str, QLinear]
    sites: dict[str, ActQuantizer]
    label_embed: Any
    group_edges: Any
    config: DiTConfig = struct.field(pytree_node=False)
    schedule: Schedule = struct.field(pytree_node=False, default=NoiseSchedule())
    dtype: str = struct.field(pytree_node=False, default="float32")
    backend: str = struct.field(pytree_node=False, default="auto")
    provenance: Provenance = struct.field(pytree_node=False, default=Provenance())

    def apply(self, x_BHWC: ArrayLike, t_B: ArrayLike, y_B: ArrayLike) -> jax.Array:
        """Raw network output (B, H, W, out_channels); ``t_B`` may be (1,) where all rows share the timestep."""
        return _forward(self, jnp.asarray(x_BHWC, self.dtype), jnp.asarray(t_B), jnp.asarray(y_B))

    def astype(self, dtype: DTypeLike) -> QuantizedDiT:
        """The same model computing in ``dtype`` between the integer products: float32, bfloat16 or float16."""
        return self.replace(dtype=jnp.dtype(dtype).name)  # type: ignore[attr-defined]

    @property
    def backend_choice(self) -> backends.Choice:
        """The backend that runs on the default device, and why it is not a faster one."""
        return backends.resolve(self.backend, self.dtype)

    @property
    def num_groups(self) -> int:
        return self.group_edges.shape[0] + 1

    @property
    def nbytes(self) -> int:
        """Bytes of all integers, scales and biases."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def _split_blocks(by_name: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("blocks."): value for name, value in by_name.items() if name.startswith("blocks.")}


def _forward(model: QuantizedDiT, x_BHWC: jax.Array, t_B: jax.Array, y_B: jax.Array) -> jax.Array:
    config, backend = model.config, model.backend_choice.name
    group = step_group(model.group_edges, model.schedule.noise_level(t_B))
    linears = {name: layer.at_group(group) for name, layer in model.linears.items()}
    sites = _split_blocks({name: quantizer.at_group(group) for name, quantizer in model.sites.items()})

    positions_TD = jnp.asarray(dit.position_embedding(config), model.dtype)
    x_BTD = linears["patch_embed"](dit.patchify(config, x_BHWC), backend) + positions_TD[None]
    hidden = jax.nn.silu(linears["time_fc1"](dit.timestep_frequencies(config, t_B).astype(model.dtype), backend))
    silu_c_BD = jax.nn.silu(linears["time_fc2"](hidden, backend) + model.label_embed[y_B].astype(model.dtype))

    layers = _split_blocks(linears)
    modulation = layers.pop("adaLN").product_each(silu_c_BD, 6, backend)  # all blocks see the same condition
    x_BTD = _blocks(config, (layers, sites, modulation), x_BTD, backend)

    shift, scale = jnp.split(linears["final_adaLN"](silu_c_BD, backend), 2, axis=-1)
    h_BTD = dit.modulate(dit.layer_norm(x_BTD), shift, scale)
    return dit.unpatchify(config, linears["final"](h_BTD, backend))


#: A block's linears, the sites of its attention (None where that ends in codes), and its modulation in six parts; or stacks.
_OfBlock: TypeAlias = tuple[dict[str, QLinear], dict[str, ActQuantizer] | None, Sequence[Leaf]]


def _blocks(config: DiTConfig, of_blocks: _OfBlock, x_BTD: jax.Array, backend: str) -> jax.Array:
    """All blocks in turn. XLA cuts each block's arrays out of their stacks; kernels are given the stacks and an index."""
    if backend == "xla":
        return jax.lax.scan(lambda x_BTD, block: (_block(config, block, x_BTD, backend), None), x_BTD, of_blocks)[0]

    linears, _, modulation = of_blocks
    proj = of_layer(linears["proj"], jnp.int32(0))
    if proj.integer and covers_codes(x_BTD.shape, x_BTD.dtype, config.num_heads, proj.act, backend):
        qkv, proj = in_unit_steps(linears["qkv"], linears["proj"])
        of_blocks = linears | {"qkv": qkv, "proj": proj}, None, modulation

    @jax.jit
    def block(of_blocks: _OfBlock, index: jax.Array, x_BTD: jax.Array) -> jax.Array:
        return _block(config, of_layer(of_blocks, index), x_BTD, backend)

    # One function that is called for each: in a loop its counter and the constants of a block would be launches of their own.
    for index in range(config.depth):
        x_BTD = block(of_blocks, jnp.int32(index), x_BTD)
    return x_BTD


def _block(config: DiTConfig, of_block: _OfBlock, x_BTD: jax.Array, backend: str) -> jax.Array:
    linears, sites, (shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp) = of_block
    weights = matmul.prepared({name: layer.weight for name, layer in linears.items() if layer.integer}, x_BTD, backend=backend)
    linears = {name: dataclasses.replace(layer, weight=weights.get(name, layer.weight)) for name, layer in linears.items()}

    qkv, proj = linears["qkv"], linears["proj"]
    h = qkv.feed_modulated(x_BTD, shift_attn, scale_attn, 1e-6, backend)
    q_BTD, k_BTD, v_BTD = qkv.product_parts(h, 3, x_BTD.dtype, backend)
    fed: Fed
    if sites is None:
        assert proj.act is not None
        fed = attention_codes(q_BTD, k_BTD, v_BTD, config.num_heads, proj.act, backend=backend)
    else:
        fed = proj.feed(attention(q_BTD, k_BTD, v_BTD, config.num_heads, sites, backend=backend), backend)
    x_BTD = proj.product_residual(fed, gate_attn, x_BTD, backend)

    fc1, fc2 = linears["fc1"], linears["fc2"]
    h = fc1.feed_modulated(x_BTD, shift_mlp, scale_mlp, config.mlp_norm_eps, backend)
    return fc2.product_residual(fc1.product_gelu(h, fc2, x_BTD.dtype, backend), gate_mlp, x_BTD, backend)


def site_quantizers(model: QuantizedDiT) -> dict[str, Any]:
    """All quantizers by site, those of the products without weights and those at the inputs of layers."""
    fed = {dit.SITE_OF_LAYER[name]: layer.act for name, layer in model.linears.items() if layer.act is not None}
    return {**model.sites, **fed}


@jax.jit
def _float_layer(layer: QLinear) -> dict[str, jax.Array]:
    """De-quantized kernel (..., K, N) and bias (..., N)."""
    return {"kernel": jnp.swapaxes(layer.weight.dequantize(), -1, -2), "bias": layer.float_bias}


def reference(model: QuantizedDiT) -> FloatDiT:
    """The fake-quant twin: the float forward with de-quantized weights and quantizers at the sites.

    It is what the engine is tested against, and what reconstruction and layer-by-layer reports look into.
    """
    params: dict[str, Any] = {"label_embed": {"embedding": model.label_embed}, "blocks": {}}
    for name, layer in model.linears.items():
        tree = _float_layer(layer)
        if name.startswith("blocks."):
            params["blocks"][name.removeprefix("blocks.")] = tree
        else:
            params[name] = tree
    return FloatDiT(
        params=params,
        config=model.config,
        schedule=model.schedule,
        quantizers=dit.nest_sites(site_quantizers(model)),
        group_edges=model.group_edges,
    )


def describe(model: QuantizedDiT) -> list[dict[str, Any]]:
    """What runs for each layer and each product of attention on the default device: name, shape, bits, input ranges, the
    arithmetic, and the backend, as the forward decides it while it is traced for rows of one timestep."""
    ran, attention_by = _what_runs(model)
    rows = []
    for name in model.config.linear_shapes:  # JAX sorts the names of a pytree it rebuilds
        layer = model.linears[name]
        in_block = name.startswith("blocks.")
        N, K = layer.weight.shape[-2:]
        rows.append(
            {
                "layer": name,
                "shape": f"{model.config.depth} x {K} -> {N}" if in_block else f"{K} -> {N}",
                "weight_bits": layer.weight.bits,
                "act_bits": layer.act.bits if layer.act else 32,
                "ranges": _ranges(layer.act),
                "runs": "int8 x int8 -> int32" if layer.integer else "float32 on de-quantized weights",
                "backend": ran.get(name, "xla"),
                "integer": layer.integer,
            }
        )
    floats = attention_by != "xla"
    for product, (left, right) in {"q @ k": ("q", "k"), "probs @ v": ("probs", "v")}.items():
        a, b = model.sites[f"blocks.{left}"], model.sites[f"blocks.{right}"]
        rows.append(
            {
                "layer": f"blocks.{product}",
                "shape": f"{model.config.depth} x {model.config.num_heads} heads",
                "weight_bits": 16 if floats else b.bits,
                "act_bits": 16 if floats else a.bits,
                "ranges": "none" if floats else _ranges(a),
                "runs": "bfloat16" if floats else "int8 x int8 -> int32",
                "backend": attention_by,
                "integer": not floats,
            }
        )
    return rows


def _what_runs(model: QuantizedDiT) -> tuple[dict[str, str], str]:
    """The backend of each integer layer, and whose codes it takes if not its own; and the backend of attention."""
    rows, shape = 2, jax.ShapeDtypeStruct
    x = shape((rows, *model.config.image_shape), model.dtype)
    t, y = shape((1,), model.schedule.time_dtype), shape((rows,), jnp.int32)
    with backends.watched() as ran:
        # A function of its own: one that JAX has traced for these shapes it would not trace again.
        jax.eval_shape(lambda *args: _forward(*args), model, x, t, y)
    # Layers run in the order of this table, each once: that of a block is traced once for all of them.
    integer = [name for name in model.config.linear_shapes if model.linears[name].integer]
    products = [index for index, call in enumerate(ran) if call.operation.startswith("linear")]
    by_layer, before = {}, 0
    for name, index in zip(integer, products, strict=True):
        product, codes = ran[index].backend, [call.backend for call in ran[before:index] if call.package == "encode"]
        by_layer[name] = product if set(codes) <= {product} else f"{product}, codes by {codes[-1]}"
        before = index + 1
    attention = next(call for call in ran if call.package == "attention")
    # Where no kernel of ours fits, Hopper's backend runs cuDNN's.
    cudnn = attention.backend == "mosaic_gpu" and attention.operation == "attention"
    return by_layer, "cudnn" if cudnn else attention.backend


def _ranges(act: ActQuantizer | None) -> str:
    if act is None:
        return "none"
    if act.dynamic:
        return "per row"
    groups = act.scale.shape[-1]
    return ("per tensor" if groups == 1 else f"per tensor, {groups} groups of steps") + (
        ", balanced" if act.balance is not None else ""
    )
