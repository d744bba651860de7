"""The integer DiT: one forward over a pytree of stacked integer layers. What users run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike, DTypeLike

from ptq4dit_jax import dit
from ptq4dit_jax.dit import DiTConfig
from ptq4dit_jax.engine import choice, xla
from ptq4dit_jax.engine.dispatch import Dispatch, Kind, watched
from ptq4dit_jax.engine.layers import Fed, QLinear, attention, in_unit_steps
from ptq4dit_jax.engine.stacks import Leaf, of_layer
from ptq4dit_jax.model import FloatDiT, step_group
from ptq4dit_jax.quantizers import ActQuantizer
from ptq4dit_jax.schedules import NoiseSchedule, Schedule
from ptq4dit_jax.straight_through import StraightThrough


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a quantized model came from: settings, source hash, versions. Equal to any other, so that models of one shape share
    compiled programs; and therefore left out of models inside of them, see :class:`QuantizedDiT`."""

    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)


@struct.dataclass
class QuantizedDiT:
    """A quantized DiT, self-contained; a pytree.

    ``linears`` holds every linear layer by the names of ``config.linear_shapes``; layers of blocks carry a leading depth axis.
    ``sites`` holds the quantizers of ``blocks.q``, ``blocks.k``, ``blocks.v`` and ``blocks.probs``, or none, where attention is
    computed in float. ``label_embed``
    (num_classes [+ 1], D) stays float32: it is looked up, not multiplied; it is None where the model has no classes.
    ``position_embed`` (T, D), float32, is the model's own table of positions, None for the fixed one.
    ``group_edges`` (G - 1,), of the schedule's
    ``time_dtype``, are the noise levels that part the groups of steps. ``dtype`` is the type of everything between the integer
    products. ``backend`` runs them: ``auto`` takes the fastest that the default device has for that type
    (:func:`ptq4dit_jax.engine.choice.resolve`). A name that no backend has is refused.

    Inside a function that JAX traces, and so in what ``jit`` returns, ``provenance`` is empty: the program would give every
    model that of the first. Set it with ``replace`` outside.
    """

    linears: dict[str, QLinear]
    sites: dict[str, ActQuantizer]
    label_embed: Any
    group_edges: Any
    config: DiTConfig = struct.field(pytree_node=False)
    position_embed: Any = None
    schedule: Schedule = struct.field(pytree_node=False, default=NoiseSchedule())
    dtype: str = struct.field(pytree_node=False, default="float32")
    backend: str = struct.field(pytree_node=False, default="auto")
    provenance: Provenance = struct.field(pytree_node=False, default=Provenance())

    def __post_init__(self) -> None:
        # A pytree is put together by its constructor, so this is where a model enters a traced function.
        if self.provenance.facts:
            leaves = jax.tree.leaves((self.linears, self.sites, self.label_embed, self.group_edges, self.position_embed))
            if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
                object.__setattr__(self, "provenance", Provenance())
        object.__setattr__(self, "backend", choice.checked(self.backend))

    def apply(self, x_BHWC: ArrayLike, t_B: ArrayLike, y_B: ArrayLike | None = None) -> jax.Array:
        """Raw network output (B, H, W, out_channels); ``t_B`` may be (1,) where all rows share the timestep, and the labels
        ``y_B`` are left out where the model has no classes."""
        return _forward(self, jnp.asarray(x_BHWC, self.dtype), jnp.asarray(t_B), y_B)

    def astype(self, dtype: DTypeLike) -> QuantizedDiT:
        """The same model computing in ``dtype`` between the integer products: float32, bfloat16 or float16."""
        return self.replace(dtype=jnp.dtype(dtype).name)  # type: ignore[attr-defined]

    @property
    def backend_choice(self) -> choice.Choice:
        """The backend that runs on the default device, and why it is not a faster one."""
        return choice.resolve(self.backend, self.dtype)

    @property
    def num_groups(self) -> int:
        return self.group_edges.shape[0] + 1

    @property
    def nbytes(self) -> int:
        """Bytes of all integers, scales and biases."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def _split_blocks(by_name: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("blocks."): value for name, value in by_name.items() if name.startswith("blocks.")}


def _forward(model: QuantizedDiT, x_BHWC: jax.Array, t_B: jax.Array, y_B: ArrayLike | None) -> jax.Array:
    config, dispatch = model.config, model.backend_choice.dispatch
    group = step_group(model.group_edges, model.schedule.noise_level(t_B))
    linears = {name: layer.at_group(group) for name, layer in model.linears.items()}
    sites = _split_blocks({name: quantizer.at_group(group) for name, quantizer in model.sites.items()})

    tokens = linears["patch_embed"](dit.patchify(config, x_BHWC), dispatch)
    x_BTD = tokens + dit.positions(config, model.position_embed, model.dtype)
    hidden = jax.nn.silu(linears["time_fc1"](dit.timestep_frequencies(config, t_B).astype(model.dtype), dispatch))
    condition = linears["time_fc2"](hidden, dispatch)
    if model.label_embed is not None:
        condition = condition + model.label_embed[dit.required_labels(config, y_B)].astype(model.dtype)
    silu_c_BD = dit.condition_of_rows(jax.nn.silu(condition), x_BTD.shape[0])

    layers = _split_blocks(linears)
    modulation = layers.pop("adaLN").product_each(silu_c_BD, 6, dispatch)  # all blocks see the same condition
    x_BTD = _blocks(config, (layers, sites, modulation), x_BTD, dispatch)

    shift, scale = jnp.split(linears["final_adaLN"](silu_c_BD, dispatch), 2, axis=-1)
    h_BTD = dit.modulate(dit.layer_norm(x_BTD), shift, scale)
    return dit.unpatchify(config, linears["final"](h_BTD, dispatch))


#: A block's linears, the sites of its attention (None where a kernel of ours ends it in codes), and its modulation in six
#: parts; or stacks.
_OfBlock: TypeAlias = tuple[dict[str, QLinear], dict[str, ActQuantizer] | None, Sequence[Leaf]]


def _blocks(config: DiTConfig, of_blocks: _OfBlock, x_BTD: jax.Array, dispatch: Dispatch) -> jax.Array:
    """All blocks in turn. In a scan each block's arrays are cut out of their stacks; in line, backends are given the stacks and
    an index."""
    if dispatch.scans_blocks:
        return jax.lax.scan(lambda x_BTD, block: (_block(config, block, x_BTD, dispatch), None), x_BTD, of_blocks)[0]

    linears, _, modulation = of_blocks
    proj = of_layer(linears["proj"], jnp.int32(0))
    like_x = jax.ShapeDtypeStruct(x_BTD.shape, x_BTD.dtype)
    if proj.integer and dispatch.covers(dispatch.attention_codes, like_x, like_x, like_x, config.num_heads, proj.act):
        qkv, proj = in_unit_steps(linears["qkv"], linears["proj"])
        of_blocks = linears | {"qkv": qkv, "proj": proj}, None, modulation

    @jax.jit
    def block(of_blocks: _OfBlock, index: jax.Array, x_BTD: jax.Array) -> jax.Array:
        return _block(config, of_layer(of_blocks, index), x_BTD, dispatch)

    # One function that is called for each: in a loop its counter and the constants of a block would be launches of their own.
    for index in range(config.depth):
        x_BTD = block(of_blocks, jnp.int32(index), x_BTD)
    return x_BTD


def _block(config: DiTConfig, of_block: _OfBlock, x_BTD: jax.Array, dispatch: Dispatch) -> jax.Array:
    linears, sites, (shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp) = of_block
    weights = dispatch.prepared({name: layer.weight for name, layer in linears.items() if layer.integer}, x_BTD)
    linears = {name: dataclasses.replace(layer, weight=weights.get(name, layer.weight)) for name, layer in linears.items()}

    qkv, proj = linears["qkv"], linears["proj"]
    h = qkv.feed_modulated(x_BTD, shift_attn, scale_attn, 1e-6, dispatch)
    q_BTD, k_BTD, v_BTD = qkv.product_parts(h, 3, x_BTD.dtype, dispatch)
    fed: Fed
    if sites is None:
        assert proj.act is not None
        fed = dispatch.attention_codes(q_BTD, k_BTD, v_BTD, config.num_heads, proj.act)
    else:
        fed = proj.feed(attention(q_BTD, k_BTD, v_BTD, config.num_heads, sites, dispatch), dispatch)
    x_BTD = proj.product_residual(fed, gate_attn, x_BTD, dispatch)

    fc1, fc2 = linears["fc1"], linears["fc2"]
    h = fc1.feed_modulated(x_BTD, shift_mlp, scale_mlp, config.mlp_norm_eps, dispatch)
    return fc2.product_residual(fc1.product_gelu(h, fc2, x_BTD.dtype, dispatch), gate_mlp, x_BTD, dispatch)


def site_quantizers(model: QuantizedDiT) -> dict[str, Any]:
    """All quantizers by site, those of the products without weights and those at the inputs of layers."""
    fed = {dit.SITE_OF_LAYER[name]: layer.act for name, layer in model.linears.items() if layer.act is not None}
    return {**model.sites, **fed}


@jax.jit
def _float_layer(layer: QLinear) -> dict[str, jax.Array]:
    """De-quantized kernel (..., K, N) and bias (..., N)."""
    return {"kernel": jnp.swapaxes(layer.weight.dequantize(), -1, -2), "bias": layer.float_bias}


def reference(model: QuantizedDiT, *, straight_through: bool = False) -> FloatDiT:
    """The fake-quant twin: the float forward with de-quantized weights and quantizers at the sites.

    It is what the engine is tested against, and what reconstruction and layer-by-layer reports look into. Like the model itself
    it has no derivatives through a quantizer and refuses them, unless ``straight_through`` lets them pass the rounding
    (:class:`ptq4dit_jax.straight_through.StraightThrough`); its values stay the same.
    """
    tables = {"label_embed": model.label_embed, "position_embed": model.position_embed}
    params: dict[str, Any] = {name: {"embedding": table} for name, table in tables.items() if table is not None}
    params["blocks"] = {}
    for name, layer in model.linears.items():
        tree = _float_layer(layer)
        if name.startswith("blocks."):
            params["blocks"][name.removeprefix("blocks.")] = tree
        else:
            params[name] = tree
    quantizers = site_quantizers(model)
    if straight_through:
        quantizers = {name: StraightThrough(act) for name, act in quantizers.items()}
    return FloatDiT(
        params=params,
        config=model.config,
        schedule=model.schedule,
        quantizers=dit.nest_sites(quantizers),
        group_edges=model.group_edges,
    )


def describe(model: QuantizedDiT) -> list[dict[str, Any]]:
    """What runs for each layer and each product of attention on the default device: name, shape, bits, input ranges, the
    arithmetic, and the backend, as the forward decides it while it is traced for rows of one timestep. Bits of what stays float
    are those of its type. ``why`` says why it is not, or not all of it, the model's backend; empty where it is."""
    ran, attention, on_codes = _what_runs(model)
    bits = 8 * jnp.dtype(model.dtype).itemsize
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
                "act_bits": layer.act.bits if layer.act else bits,
                "ranges": _ranges(layer.act),
                "runs": "int8 x int8 -> int32" if layer.integer else f"{model.dtype} on de-quantized weights",
                **ran.get(name, _Runs(xla.BACKEND.name, ""))._asdict(),
                "integer": layer.integer,
            }
        )
    for product, (left, right) in {"q @ k": ("q", "k"), "probs @ v": ("probs", "v")}.items():
        a, b = (model.sites.get(f"blocks.{side}") if on_codes else None for side in (left, right))
        rows.append(
            {
                "layer": f"blocks.{product}",
                "shape": f"{model.config.depth} x {model.config.num_heads} heads",
                "weight_bits": b.bits if b else bits,
                "act_bits": a.bits if a else bits,
                "ranges": _ranges(a),
                "runs": "int8 x int8 -> int32" if a else model.dtype,
                **attention._asdict(),
                "integer": a is not None,
            }
        )
    return rows


class _Runs(NamedTuple):
    """The backend of a layer, and whose codes it takes if not its own; and why that is not the model's backend."""

    backend: str
    why: str


def _what_runs(model: QuantizedDiT) -> tuple[dict[str, _Runs], _Runs, bool]:
    """What runs each integer layer, what runs attention, and whether that multiplies integer codes."""
    rows, shape = 2, jax.ShapeDtypeStruct
    x = shape((rows, *model.config.image_shape), model.dtype)
    t, y = shape((1,), model.schedule.time_dtype), shape((rows,), jnp.int32)
    with watched() as ran:
        # A function of its own: one that JAX has traced for these shapes it would not trace again.
        jax.eval_shape(lambda *args: _forward(*args), model, x, t, y)
    # Layers run in the order of this table, each once: that of a block is traced once for all of them.
    integer = [name for name in model.config.linear_shapes if model.linears[name].integer]
    products = [index for index, call in enumerate(ran) if call.kind is Kind.LINEAR]
    by_layer, before = {}, 0
    for name, index in zip(integer, products, strict=True):
        product, codes = ran[index], [call for call in ran[before:index] if call.kind is Kind.CODES]
        mixed = not {call.backend for call in codes} <= {product.backend}
        backend = f"{product.backend.name}, codes by {codes[-1].backend.name}" if mixed else product.backend.name
        by_layer[name] = _Runs(backend, "; ".join(dict.fromkeys(call.why for call in (*codes, product) if call.why)))
        before = index + 1
    attention = next((call for call in ran if call.kind is Kind.ATTENTION), None)
    if attention is None:  # a float model's, which is no operation of a backend
        fused = dit.can_fuse_attention(model.dtype, model.config.head_width)
        return by_layer, _Runs("cudnn" if fused else xla.BACKEND.name, ""), False
    return by_layer, _Runs(attention.runs_on, attention.why), attention.backend.attends_on_codes


def _ranges(act: ActQuantizer | None) -> str:
    if act is None:
        return "none"
    if act.dynamic:
        return "per row"
    groups = act.scale.shape[-1]
    return ("per tensor" if groups == 1 else f"per tensor, {groups} groups of steps") + (
        ", balanced" if act.balance is not None else ""
    )
