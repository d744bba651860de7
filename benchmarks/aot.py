"""Programs of the package compiled ahead of time for TPUs, on a machine without one; models have shapes and no weights."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ptq4dit_jax import placement, sharding
from ptq4dit_jax.chain import Batch, Program, Shared, sample_batch
from ptq4dit_jax.checkpoints.quantized_dit import skeleton_of
from ptq4dit_jax.config import QuantConfig
from ptq4dit_jax.devices import DeviceKind, described
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.engine import QuantizedDiT
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.spec import Residual
from ptq4dit_jax.quantization.choices import balanced_sites, integer_sites
from ptq4dit_jax.schedules import NoiseSchedule

#: Topologies by generation and number of chips. The smallest that libtpu describes has four chips; of that, one is used.
TOPOLOGIES: dict[str, dict[int, str]] = {
    "v5e": {1: "2x2", 16: "4x4", 64: "8x8"},
    "v6e": {1: "2x2", 16: "4x4", 64: "8x8"},
    "v5p": {1: "2x2x1", 16: "2x2x4", 64: "4x4x4"},
    "tpu7x": {1: "2x2x1", 16: "2x2x4", 64: "4x4x4"},
}


def missing() -> str:
    """Returns why nothing can be compiled for a TPU in this process; empty if it can."""
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu, the compiler for TPUs, is not installed; install the extra tpu, or libtpu alone (docs/tpu.md)"
    return ""


def libtpu_version() -> str:
    """Returns the version of the compiler."""
    return importlib.metadata.version("libtpu")


def devices(generation: str, chips: int) -> list[Any]:
    """Returns the described devices of so many chips: one each, or two on Ironwood (``tpu7x``)."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling holds no device that others could want
    name = f"{generation}:{TOPOLOGIES[generation][chips]}"
    found: list[Any] = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    kept = list(dict.fromkeys(tuple(device.coords) for device in found))[:chips]
    return [device for device in found if tuple(device.coords) in kept]


def float_model(network: DiTConfig, dtype: str) -> FloatDiT:
    """Returns a float model with shapes as leaves."""
    return jax.eval_shape(lambda: FloatDiT.init(network, key=jax.random.key(0)).astype(dtype))


def quantized_model(network: DiTConfig, settings: QuantConfig, dtype: str) -> QuantizedDiT:
    """Returns, with shapes as leaves, the model that :func:`ptq4dit_jax.quantize` makes with these settings."""
    settings, spec = settings.for_network(network), network.spec
    rules, integer, dynamic = settings.rules(spec), integer_sites(settings, spec), settings.activations.dynamic_sites or ()
    residual = [name for name in balanced_sites(settings, spec) if isinstance(spec.sites[name].home, Residual)]

    def act(site: str) -> dict[str, Any] | None:
        if site not in integer:
            return None
        return {
            "bits": settings.activations.bits,
            "dynamic": site in dynamic,
            "balanced": site in residual,
            "nonnegative": site in dynamic and spec.sites[site].nonnegative,
        }

    linears = {
        layer: {"weight_bits": rules.layers[layer].weight_bits, "act": act(site)} for layer, site in spec.site_of.items()
    }
    sites = {name: act(name) for name in spec.attention if name in integer}
    made = skeleton_of(network, NoiseSchedule(), linears, sites, settings.activations.step_groups)
    return made.replace(dtype=dtype)


def placed(tree: Any, where: Sharding) -> Any:
    """Returns the tree with the shape of each array, placed."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)

    return jax.tree.map(one, tree)


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a program's arguments lie: whole on every device, or by rows over ``mesh`` (None: there is one device). Models are
    cut over its axis ``model``, if it has one."""

    mesh: Mesh | None
    whole: Sharding
    rows: Sharding

    @classmethod
    def on(cls, devices: list[Any], model: int = 1) -> Places:
        """Returns the places on these devices, of which so many hold a model between them."""
        if len(devices) == 1:
            alone = SingleDeviceSharding(devices[0])
            return cls(None, alone, alone)
        mesh = sharding.data_mesh(devices, model=model)
        return cls(mesh, NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data")))

    def of_model(self, model: FloatDiT | QuantizedDiT) -> Any:
        """Returns a model with the shape of each array, placed."""
        if sharding.model_size(self.mesh) == 1:
            return placed(model, self.whole)
        assert self.mesh is not None
        model, mesh = model.partitionable(), self.mesh
        cut = lambda leaf, spec: placed(leaf, NamedSharding(mesh, spec))
        return jax.tree.map(cut, model, placement.specs(model, sharding.model_size(mesh)))


def arguments(
    model: FloatDiT | QuantizedDiT, devices: list[Any], images: int, sampling: Sampling, share: int = 1
) -> tuple[tuple[Shared, Batch[Any]], Program]:
    """Returns what :func:`ptq4dit_jax.sample` gives :func:`ptq4dit_jax.chain.sample_batch` for ``images`` on each device, with
    shapes as leaves. The model is held by ``share`` devices between them, which then share the images of all of these too."""
    resolved, places = sampling.resolve(model.schedule, model.config), Places.on(devices, share)
    numbers = jax.ShapeDtypeStruct((images * len(devices),), jnp.int32, sharding=places.rows)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shared = Shared(places.of_model(model), *placed((resolved.tables(), key), places.whole))
    return (shared, Batch[Any](numbers, numbers)), Program.of(resolved, model.config, mesh=places.mesh)


def sampler(model: FloatDiT | QuantizedDiT, devices: list[Any], images: int, sampling: Sampling, share: int = 1) -> Any:
    """Lowers the chain for ``images`` samples on each device; ``share`` is as in :func:`arguments`."""
    given, program = arguments(model, devices, images, sampling, share)
    with described(DeviceKind.of(devices[0])):
        return sample_batch.lower(*given, program=program)
