"""Reports what runs for each layer of a quantized model, as its forward decides."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ptq4dit_jax.engine import xla
from ptq4dit_jax.engine.backends import Arithmetic
from ptq4dit_jax.engine.dispatch import Kind, watched
from ptq4dit_jax.engine.quantized_dit import QuantizedDiT
from ptq4dit_jax.networks.parts import can_fuse_attention
from ptq4dit_jax.networks.spec import Place
from ptq4dit_jax.quantizers import ActQuantizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActRanges:
    """The ranges that activations are quantized to. They are found per row at run time (``dynamic``), or there is one per
    tensor for each of ``groups`` groups of steps. ``balanced``: whether channel factors remain at run time."""

    dynamic: bool
    groups: int
    balanced: bool

    @classmethod
    def of(cls, act: ActQuantizer) -> ActRanges:
        return cls(
            dynamic=act.dynamic, groups=1 if act.dynamic else act.static_range.scale.shape[-1], balanced=act.balance is not None
        )

    def __str__(self) -> str:
        """Returns a text such as "per tensor, 5 groups of steps, balanced"."""
        if self.dynamic:
            return "per row"
        groups = "" if self.groups == 1 else f", {self.groups} groups of steps"
        return f"per tensor{groups}{', balanced' if self.balanced else ''}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What runs for a layer, or for a product of attention.

    Attributes:
      layer: its full name, such as ``blocks.qkv``, or ``blocks.q @ k`` for a product.
      lead: ``(depth,)`` in a stack, ``()`` outside.
      size: inputs K and outputs N of a layer; None for a product of attention.
      heads: the number of heads of a product of attention; None for a layer.
      weight_bits, act_bits: bits of the stored codes of both operands; for an operand that stays float, the bits of its type.
      ranges: of the activations; None if they stay float.
      dtype: the type in which the model computes between its integer products.
      backend: the backend that runs it, and the one that makes its codes if that is another.
      why: why the model's backend does not run it, or not all of it; empty if it does.
      arithmetic: what the backend multiplies in place of floats.
    """

    layer: str
    lead: tuple[int, ...]
    size: tuple[int, int] | None
    heads: int | None
    weight_bits: int
    act_bits: int
    ranges: ActRanges | None
    dtype: str
    backend: str
    why: str
    arithmetic: Arithmetic = Arithmetic.INT8

    @property
    def integer(self) -> bool:
        """Whether both operands are integers."""
        return self.ranges is not None and self.arithmetic is Arithmetic.INT8

    @property
    def shape(self) -> str:
        """The shape as text, such as "28 x 1152 -> 3456" or "28 x 16 heads"."""
        what = f"{self.heads} heads" if self.size is None else f"{self.size[0]} -> {self.size[1]}"
        return "".join(f"{depth} x " for depth in self.lead) + what

    @property
    def runs(self) -> str:
        """The arithmetic, such as "int8 x int8 -> int32"."""
        if self.ranges is not None:
            return self.arithmetic.value
        return self.dtype if self.size is None else f"{self.dtype} on de-quantized weights"

    def words(self) -> dict[str, Any]:
        """Returns the report as a row of a table or of JSON."""
        return {
            "layer": self.layer,
            "shape": self.shape,
            "weight_bits": self.weight_bits,
            "act_bits": self.act_bits,
            "ranges": "none" if self.ranges is None else str(self.ranges),
            "runs": self.runs,
            "backend": self.backend,
            "why": self.why,
            "integer": self.integer,
        }


def describe(model: QuantizedDiT) -> list[LayerReport]:
    """Returns what runs for each layer and each product of attention on the default device, as the forward decides when it is
    traced for rows that share a timestep."""
    ran, attention, on_codes = _what_runs(model)
    bits = 8 * model.dtype.itemsize
    spec = model.config.spec
    reports = []
    for name, linear in spec.linears.items():  # JAX sorts the names of a pytree it rebuilds
        layer = model.linears[name]
        reports.append(
            LayerReport(
                layer=name,
                lead=linear.place.lead,
                size=(linear.K, linear.N),
                heads=None,
                weight_bits=layer.weight.bits,
                act_bits=layer.act.bits if layer.act else bits,
                ranges=ActRanges.of(layer.act) if layer.act else None,
                dtype=model.dtype.name,
                **ran.get(name, _Runs(xla.BACKEND.name))._asdict(),
            )
        )
    for stack, (left, right) in itertools.product(spec.attending, (("q", "k"), ("probs", "v"))):
        a, b = (model.sites.get(str(Place(side, stack))) if on_codes else None for side in (left, right))
        reports.append(
            LayerReport(
                layer=f"{Place(left, stack)} @ {right}",
                lead=(stack.depth,),
                size=None,
                heads=spec.sites[str(Place("q", stack))].features[0],
                weight_bits=b.bits if b else bits,
                act_bits=a.bits if a else bits,
                ranges=ActRanges.of(a) if a else None,
                dtype=model.dtype.name,
                **attention._asdict(),
            )
        )
    return reports


class _Runs(NamedTuple):
    """The backend of a layer, with the one that makes its codes if that is another; why it is not the model's backend; and what
    it multiplies."""

    backend: str
    why: str = ""
    arithmetic: Arithmetic = Arithmetic.INT8


def _what_runs(model: QuantizedDiT) -> tuple[dict[str, _Runs], _Runs, bool]:
    """Returns what runs each integer layer, what runs attention, and whether attention multiplies integer codes."""
    rows, shape = 2, jax.ShapeDtypeStruct
    x = shape((rows, *model.config.image_shape), model.dtype)
    t, y = shape((1,), model.schedule.time_dtype), shape((rows,), jnp.int32)
    with watched() as ran:
        # A new function: JAX would not trace again what it has already traced for these shapes.
        jax.eval_shape(lambda model, *inputs: model.apply(*inputs), model, x, t, y)
    # Layers run in the order of this table, and each appears once: one trace of a block serves all blocks of its stack.
    integer = [name for name in model.config.spec.linears if model.linears[name].integer]
    products = [index for index, call in enumerate(ran) if call.kind is Kind.LINEAR]
    by_layer, before = {}, 0
    for name, index in zip(integer, products, strict=True):
        product, codes = ran[index], [call for call in ran[before:index] if call.kind is Kind.CODES]
        mixed = not {call.backend for call in codes} <= {product.backend}
        backend = f"{product.backend.name}, codes by {codes[-1].backend.name}" if mixed else product.backend.name
        why = "; ".join(dict.fromkeys(call.why for call in (*codes, product) if call.why))
        by_layer[name] = _Runs(backend, why, product.backend.arithmetic)
        before = index + 1
    attention = next((call for call in ran if call.kind is Kind.ATTENTION), None)
    if attention is None:  # it is a float model's, which is not an operation of a backend
        _, width = model.config.spec.sites[str(Place("q", model.config.spec.attending[0]))].features
        fused = can_fuse_attention(model.dtype, width)
        return by_layer, _Runs("cudnn" if fused else xla.BACKEND.name), False
    return by_layer, _Runs(attention.runs_on, attention.why), attention.backend.attends_on_codes
