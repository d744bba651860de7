"""What runs for each layer of a quantized model, as its forward decides it."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ptq4dit_jax.engine import xla
from ptq4dit_jax.engine.dispatch import Kind, watched
from ptq4dit_jax.engine.quantized_dit import QuantizedDiT
from ptq4dit_jax.networks.parts import can_fuse_attention
from ptq4dit_jax.networks.spec import Place
from ptq4dit_jax.quantizers import ActQuantizer


def describe(model: QuantizedDiT) -> list[dict[str, Any]]:
    """What runs for each layer and each product of attention on the default device: name, shape, bits, input ranges, the
    arithmetic, and the backend, as the forward decides it while it is traced for rows of one timestep. Bits of what stays float
    are those of its type. ``why`` says why it is not, or not all of it, the model's backend; empty where it is."""
    ran, attention, on_codes = _what_runs(model)
    bits = 8 * jnp.dtype(model.dtype).itemsize
    rows = []
    spec = model.config.spec
    for name, linear in spec.linears.items():  # JAX sorts the names of a pytree it rebuilds
        layer = model.linears[name]
        rows.append(
            {
                "layer": name,
                "shape": "".join(f"{depth} x " for depth in linear.place.lead) + f"{linear.K} -> {linear.N}",
                "weight_bits": layer.weight.bits,
                "act_bits": layer.act.bits if layer.act else bits,
                "ranges": _ranges(layer.act),
                "runs": "int8 x int8 -> int32" if layer.integer else f"{model.dtype} on de-quantized weights",
                **ran.get(name, _Runs(xla.BACKEND.name, ""))._asdict(),
                "integer": layer.integer,
            }
        )
    for stack, (left, right) in itertools.product(spec.attending, (("q", "k"), ("probs", "v"))):
        a, b = (model.sites.get(str(Place(side, stack))) if on_codes else None for side in (left, right))
        heads = spec.sites[str(Place("q", stack))].features[0]
        rows.append(
            {
                "layer": f"{Place(left, stack)} @ {right}",
                "shape": f"{stack.depth} x {heads} heads",
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
        jax.eval_shape(lambda model, *inputs: model.apply(*inputs), model, x, t, y)
    # Layers run in the order of this table, each once: that of a block is traced once for all of them.
    integer = [name for name in model.config.spec.linears if model.linears[name].integer]
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
        _, width = model.config.spec.sites[str(Place("q", model.config.spec.attending[0]))].features
        fused = can_fuse_attention(model.dtype, width)
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
