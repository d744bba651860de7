"""Second moments of the inputs of a unit's layers, summed over all rows of a walk."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float32, Int32, Shaped

from ptq4dit_jax import sharding
from ptq4dit_jax.gptq import Compensated, InputMoments
from ptq4dit_jax.networks.ops import Network
from ptq4dit_jax.networks.spec import UnitKind
from ptq4dit_jax.numerics import CALIBRATION
from ptq4dit_jax.reconstruction.rounded_units import RoundedUnit
from ptq4dit_jax.reconstruction.units import Unit, site_input
from ptq4dit_jax.reconstruction.walk import HeldRows, Walk
from ptq4dit_jax.waiting import ready

_Sums: TypeAlias = InputMoments[Compensated]


class _Networks(struct.PyTreeNode):
    """A unit twice: ``rounded``, with its ``acts`` (G,) by site, and in floats, with what folding left at its sites."""

    rounded: RoundedUnit
    acts: dict[str, Any]
    params: dict[str, Any]
    balances: dict[str, Any]


class _Seen(struct.PyTreeNode):
    """Rows (M, B, ...): the inputs of both forms of a unit, the group of steps, and how much each row counts."""

    inputs: tuple[Shaped[HeldRows, "*_shape"], ...]
    float_inputs: tuple[Shaped[HeldRows, "*_shape"], ...]
    group: Int32[HeldRows, "*rows"]
    share: Float32[HeldRows, "*rows"]


class UnitInputs:
    """A unit's input rows, cut into the walk's chunks once for all its layers.

    A program of one device sums each chunk, and the sums are added up in order. So on CPUs, every number of devices that
    divides the number of chunks gives the same moments.
    """

    def __init__(self, walk: Walk, unit: Unit) -> None:
        self._walk, self._unit = walk, unit
        inputs, exact = walk.inputs(unit)
        rows = _Seen(inputs=inputs, float_inputs=exact, group=walk.group, share=walk.share)
        self._lanes = _lanes(rows, walk.chunks)
        devices = len(sharding.places_of(walk.mesh))
        self._lane = partial(_lane, devices=devices, each=walk.chunks // devices)
        fixed = (walk.act_quantizers(unit), *walk.float_unit(unit))
        self._fixed = {device: jax.device_put(fixed, device) for device in sharding.own_places_of(walk.mesh)}

    def moments(self, layer: str, rounded: RoundedUnit) -> InputMoments[jax.Array]:
        """Returns the moments of a layer's input over all rows, with the unit as ``rounded``: arrays on the first device."""
        unit, home = self._unit, sharding.home(self._walk.mesh)
        _, params, _ = self._fixed[home]
        networks = {device: _Networks(jax.device_put(rounded, device), *fixed) for device, fixed in self._fixed.items()}
        site = unit.kind.site_of[layer]
        program = partial(_observe, config=self._walk.config, kind=unit.kind, site=site)

        def through(device: jax.Device | None, lane: _Seen, moments: _Sums, until: int) -> _Sums:
            """Adds the first ``until`` batches of a lane: at once, or one by one where they are on the host."""
            if not self._walk.plan.on_host:
                return program(networks[device], moments, lane, until)
            for m in range(until):
                batch = jax.device_put(jax.tree.map(lambda leaf, m=m: leaf[m : m + 1], lane), device)
                moments = ready(program(networks[device], moments, batch, 1))
            return moments

        nothing = jax.device_put(InputMoments.start(jnp.zeros(params[layer]["kernel"].shape[0])), home)
        deal_out = partial(sharding.deal_out, mesh=self._walk.mesh, like=lambda item: nothing)
        [start] = deal_out(lambda _, device: _about_mean(through(device, self._lanes[0], nothing, 1)), 1)
        size = self._walk.group.shape[0]
        run = lambda item, device: through(device, self._lanes[self._lane(item)], jax.device_put(start, device), size)
        found = deal_out(run, self._walk.chunks)
        by_lane = {self._lane(item): jax.device_put(m, home) for item, m in enumerate(found)}
        return _total([by_lane[lane] for lane in range(self._walk.chunks)])


def _lane(item: int, devices: int, each: int) -> int:
    """Returns the lane of an item, so that :func:`ptq4dit_jax.sharding.deal_out` deals it to the device that holds it."""
    return item % devices * each + item // devices


def _lanes(rows: _Seen, chunks: int) -> dict[int, _Seen]:
    """Cuts rows (M, B, ...) into ``chunks`` of their strata, each an array on the one device that holds it: those that are on
    this process's devices, by their number."""
    leaves, structure = jax.tree.flatten(rows)

    def cut(leaf: HeldRows) -> dict[int, HeldRows]:
        size = leaf.shape[1] // chunks
        shards = leaf.addressable_shards if isinstance(leaf, jax.Array) else ()
        held = [(shard.index[1].start or 0, shard.data) for shard in shards] or [(0, leaf)]
        starts = [(start, array, at) for start, array in held for at in range(0, array.shape[1], size)]
        return {(start + at) // size: array[:, at : at + size] for start, array, at in starts}

    cuts = [cut(leaf) for leaf in leaves]
    return {lane: jax.tree.unflatten(structure, [of_leaf[lane] for of_leaf in cuts]) for lane in sorted(cuts[0])}


@partial(jax.jit, static_argnames=("config", "kind", "site"))
def _observe(
    networks: _Networks, moments: _Sums, rows: _Seen, until: jax.Array, *, config: Network, kind: UnitKind, site: str
) -> _Sums:
    """Adds the batches of rows (M, b, ...) before ``until`` to ``moments``: a program of one device."""

    def fed(params: dict[str, Any], quantizers: dict[str, Any], inputs: tuple[Any, ...]) -> jax.Array:
        wide = lambda leaf: leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        inputs = jax.tree.map(wide, inputs)
        return site_input(config, kind, site, params, quantizers, inputs, "float32", CALIBRATION)

    params = networks.params | networks.rounded.params()

    def one(m: jax.Array, moments: _Sums) -> _Sums:
        batch = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, m, keepdims=False), rows)
        acts = {name: act.at_group(batch.group) for name, act in networks.acts.items()}
        x = fed(params, acts, batch.inputs)
        exact = fed(networks.params, networks.balances, batch.float_inputs)
        return moments.observe(x, exact, batch.share, CALIBRATION)

    return jax.lax.fori_loop(0, until, one, moments)


_total = jax.jit(InputMoments.total)
_about_mean = jax.jit(InputMoments.about_mean)
