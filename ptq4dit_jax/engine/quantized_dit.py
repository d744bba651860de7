"""The integer DiT, which users run: one forward over a pytree of stacked integer layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Integer, Num

from ptq4dit_jax.engine import choice
from ptq4dit_jax.engine.backends import Arithmetic
from ptq4dit_jax.engine.layers import QLinear
from ptq4dit_jax.engine.ops import IntegerOps
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.float8 import Weight
from ptq4dit_jax.model import FloatDiT, ModelFace, step_group
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.spec import nest_sites
from ptq4dit_jax.quantizers import ActQuantizer
from ptq4dit_jax.schedules import NoiseSchedule, Schedule
from ptq4dit_jax.straight_through import StraightThrough


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a quantized model came from: settings, source hash, versions. All are equal, so that models of one shape share
    compiled programs. Models inside those programs therefore carry none; see :class:`QuantizedDiT`."""

    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)


class QuantizedDiT(ModelFace, struct.PyTreeNode):
    """A quantized DiT, self-contained; a pytree.

    ``linears`` holds every linear layer by the names of ``config.linear_shapes``; layers of blocks carry a leading depth axis.
    ``sites`` holds the quantizers of ``blocks.q``, ``blocks.k``, ``blocks.v`` and ``blocks.probs``, or is empty if attention
    runs in float. ``label_embed`` (num_classes [+ 1], D) stays float32, because it is looked up, not multiplied; it is None if
    the model has no classes. ``position_embed`` (T, D), float32, is the model's own table of positions, or None for the fixed
    one. ``gains`` holds the gains of norms that are in no layer, by their full names, float32; most networks have none.
    ``group_edges`` (G - 1,), of the schedule's ``time_dtype``, are the noise levels that separate the groups of steps.
    ``dtype`` is the type of everything between the integer products. ``backend`` runs the products: ``auto`` takes the fastest
    that the default device has for that type (:func:`ptq4dit_jax.engine.choice.resolve`). ``fp8`` multiplies e4m3 in place of
    the integers, for another result. Unknown names are refused.

    Inside a function that JAX traces, and so in what ``jit`` returns, ``provenance`` is empty: the compiled program would give
    every model the provenance of the first. Set it with ``replace`` outside.
    """

    linears: dict[str, QLinear]
    sites: dict[str, ActQuantizer]
    label_embed: Float[Array, "labels D"] | None
    group_edges: Num[Array, " edges"]
    config: DiTConfig = struct.field(pytree_node=False)
    position_embed: Float[Array, "T D"] | None = None
    gains: dict[str, Float[Array, "... _features"]] = struct.field(default_factory=dict)
    schedule: Schedule = struct.field(pytree_node=False, default=NoiseSchedule())
    dtype: np.dtype[Any] = struct.field(pytree_node=False, default=np.dtype(np.float32))
    backend: str = struct.field(pytree_node=False, default="auto")
    provenance: Provenance = struct.field(pytree_node=False, default=Provenance())

    def __post_init__(self) -> None:
        # JAX rebuilds a pytree through its constructor, so this is where a model enters a traced function.
        if self.provenance.facts:
            tables = self.label_embed, self.position_embed, self.gains
            leaves = jax.tree.leaves((self.linears, self.sites, self.group_edges, tables))
            if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
                object.__setattr__(self, "provenance", Provenance())
        object.__setattr__(self, "backend", choice.checked(self.backend))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))  # may be given by name

    def apply(
        self, x_BHWC: Num[ArrayLike, "B H W C"], t_B: Num[ArrayLike, " #B"], y_B: Integer[ArrayLike, " #B"] | None = None
    ) -> Float[Array, "B H W outputs"]:
        """Returns the raw network output (B, H, W, out_channels). ``t_B`` may be (1,) if all rows share the timestep. The
        labels ``y_B`` are left out if the model has no classes."""
        return _forward(self, x_BHWC, jnp.asarray(t_B), y_B)

    def prepared(self) -> QuantizedDiT:
        dispatch = self.backend_choice.dispatch
        quantized = {name: layer.weight for name, layer in self.linears.items() if layer.integer}
        floats = {name: layer.stored for name, layer in self.linears.items() if not layer.integer}
        weights = {**dispatch.prepare(quantized), **dispatch.prepare_for_floats(floats)}
        return self.replace(linears={name: layer.replace(weight=weights[name]) for name, layer in self.linears.items()})

    def partitionable(self) -> QuantizedDiT:
        if self.backend not in ("auto", "xla"):
            raise Ptq4ditError(
                f"Kernels of the backend {self.backend!r} run on one device each, so devices cannot share a model that uses "
                "them; take the backend xla or auto, or a mesh without an axis 'model' (--model-devices 1)."
            )
        return self.replace(backend="xla")

    def resolved(self) -> QuantizedDiT:
        return self.replace(backend=self.backend_choice.name)

    def astype(self, dtype: DTypeLike) -> QuantizedDiT:
        """Returns the same model, computing in ``dtype`` between the integer products: float32, bfloat16 or float16."""
        return self.replace(dtype=jnp.dtype(dtype))

    @property
    def backend_choice(self) -> choice.Choice:
        """The backend that runs on the default device, and why no faster one does."""
        return choice.resolve(self.backend, self.dtype.name)

    @property
    def tables(self) -> dict[str, jax.Array]:
        """Parameters that are looked up or added, by the names in ``config.spec.tables``."""
        tables = {"label_embed": self.label_embed, "position_embed": self.position_embed}
        return {name: table for name, table in tables.items() if table is not None}

    @property
    def num_params(self) -> int:
        """The number of weights, biases, table values and gains that the model stands for, as in the float model."""
        return self.config.num_parameters


def _forward(model: QuantizedDiT, x_BHWC: ArrayLike, t_B: jax.Array, y_B: ArrayLike | None) -> jax.Array:
    group = step_group(model.group_edges, model.schedule.noise_level(t_B))
    linears = {name: layer.at_group(group) for name, layer in model.linears.items()}
    sites = {name: quantizer.at_group(group) for name, quantizer in model.sites.items()}
    dispatch = model.backend_choice.dispatch
    ops = IntegerOps.of(model.config, linears, sites, model.tables, model.gains, dispatch, model.dtype)
    return model.config.forward(ops, x_BHWC, t_B, y_B)


def site_quantizers(model: QuantizedDiT) -> dict[str, Any]:
    """Returns all quantizers by site: those of the products without weights, and those at the inputs of layers."""
    site_of = model.config.spec.site_of
    fed = {site_of[name]: layer.act for name, layer in model.linears.items() if layer.act is not None}
    return {**model.sites, **fed}


@jax.jit
def _float_layer(layer: QLinear, weight: Weight) -> dict[str, jax.Array]:
    """Returns the dequantized kernel (..., K, N) of a weight of the layer, and its bias (..., N)."""
    return {"kernel": jnp.swapaxes(weight.dequantize(), -1, -2), "bias": layer.float_bias}


def reference(model: QuantizedDiT, *, straight_through: bool = False) -> FloatDiT:
    """Returns the fake-quant twin: the float forward with dequantized weights and quantizers at the sites.

    The engine is tested against it, and reconstruction and layer-by-layer reports look into it. It is the twin of the stored
    integers, whatever the model's backend multiplies (:func:`imitation`). Like the model itself, it refuses derivatives
    through a quantizer, unless ``straight_through`` lets them pass the rounding
    (:class:`ptq4dit_jax.straight_through.StraightThrough`); its values stay the same.
    """
    quantizers = site_quantizers(model)
    if straight_through:
        quantizers = {name: StraightThrough(act) for name, act in quantizers.items()}
    return _twin(model, {}, quantizers)


def imitation(model: QuantizedDiT) -> FloatDiT:
    """Returns the twin of what the model's backend multiplies: :func:`reference` where it multiplies the stored integers.

    With another arithmetic, weights and inputs of layers are what the backend makes of them, and attention is in floats.
    """
    backend = model.backend_choice.backend
    if backend.arithmetic is Arithmetic.INT8:
        return reference(model)
    weights = backend.prepare({name: layer.weight for name, layer in model.linears.items() if layer.integer})
    attention = model.sites if backend.attends_on_codes else {}
    fed = {name: backend.imitate(act) for name, act in site_quantizers(model).items() if name not in model.sites}
    return _twin(model, weights, attention | fed)


def _twin(model: QuantizedDiT, weights: Mapping[str, Weight], quantizers: Mapping[str, Any]) -> FloatDiT:
    """Returns the float forward with these quantizers by site, and with ``weights`` in place of the model's own."""
    params: dict[str, Any] = {name: {"embedding": table} for name, table in model.tables.items()}
    layers = {name: _float_layer(layer, weights.get(name, layer.weight)) for name, layer in model.linears.items()}
    params |= nest_sites(layers | model.gains)
    return FloatDiT(
        params=params,
        config=model.config,
        schedule=model.schedule,
        quantizers=nest_sites(quantizers),
        group_edges=model.group_edges,
    )
