"""Samplers as exported programs (``jax.export``): traced once, then run later and elsewhere without tracing.

A program takes the arrays of its model as arguments and holds none of their values. It is StableHLO in JAX's portable form, for
one platform, batch size and number of devices; XLA compiles it where it runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from ptq4dit_jax import memory
from ptq4dit_jax.chain import Batch, Program, Shared, sample_batch
from ptq4dit_jax.devices import DeviceKind, described, kind_named
from ptq4dit_jax.diffusion import Sampling, chosen_sampling
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.forms import ArrayForm, Form
from ptq4dit_jax.guidance import Predictor
from ptq4dit_jax.model import ModelFace
from ptq4dit_jax.vae import VAEDecoder

#: The most devices of a program; no pod has as many.
MAX_DEVICES = 2**16
#: The most images per call, for every device.
MAX_ROWS = 2**20
#: Arrays of which each device has its rows; it has all others whole.
_BY_ROWS = ("indices", "labels")
#: Calls whose form JAX does not promise to keep, and which it exports only if they are named: cuDNN's attention, which float
#: models use on GPUs. The kernels of this package need no exception, since JAX keeps the form of Mosaic's.
_UNSTABLE = ("__cudnn$fmhaSoftmax",)
_REMEDY = "use it for what it was exported for, or export another (export_sampler, ptq4dit compile)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportedSampler:
    """The sampler of all models of one form as a program: the argument ``program`` of :func:`ptq4dit_jax.sample`.

    Attributes:
      sampling: how it was exported to sample, which is the default where it is used. Its numbers are arguments of the program,
        so other settings with as many calls of the network can be asked for, such as another scale of guidance.
      batch_size: images per call, over all devices.
      devices: the number of devices that share a batch.
      kind: the device that it is for.
      form: all that the program depends on; what it is used for must have the same form.
      images: the array that it returns.
      module: the program.
      kept: positions of the arrays that the program reads, among those of the form.
      convention: JAX's number for the way in which the program is called.
      jax_version: the version of JAX that exported it.
    """

    sampling: Sampling
    batch_size: int
    devices: int
    kind: DeviceKind
    form: Form
    images: ArrayForm
    module: bytes = dataclasses.field(repr=False)
    kept: tuple[int, ...] = dataclasses.field(repr=False)
    convention: int
    jax_version: str

    def check(self, shared: Shared, batch: Batch[Any], program: Program) -> None:
        """Checks that the program is for these arguments, and that this JAX can read it.

        Raises:
          Ptq4ditError: it is not, and the first difference is named; or JAX cannot read it.
        """
        found = DeviceKind.of(_device_of(shared, program))
        if not self.kind.includes(found):
            raise Ptq4ditError(f"The exported sampler is for {self.kind}, and this device is {found}; {_REMEDY}.")
        if difference := self.form.difference(_form(shared, batch, program)):
            what, first, second = difference
            raise Ptq4ditError(f"The exported sampler does not fit: its {what} is {first}, and {second} is needed; {_REMEDY}.")
        self._lowered(shared, batch)

    def run(self, shared: Shared, batch: Batch[Any]) -> Float[Array, "B H W C"]:
        """Returns the images that :func:`~ptq4dit_jax.chain.sample_batch` makes of these arguments, which :meth:`check` has
        passed."""
        return cast(jax.Array, self._jitted(*jax.tree.leaves(_with_plain_key(shared, batch))))

    def compile(self, shared: Shared, batch: Batch[Any]) -> None:
        """Compiles the program for such arguments; later calls, and JAX's compilation cache if that is on, have it then."""
        self._lowered(shared, batch).compile()

    def _lowered(self, shared: Shared, batch: Batch[Any]) -> jax.stages.Lowered:
        try:
            return cast(jax.stages.Lowered, self._jitted.lower(*jax.tree.leaves(_with_plain_key(shared, batch))))
        except Exception as error:  # as it is read here, and anything may be raised for what was written elsewhere
            if memory.is_short(error):
                raise
            raise self.unreadable() from error

    def unreadable(self) -> Ptq4ditError:
        """Returns the error for a program that this version of JAX cannot read."""
        return Ptq4ditError(
            f"JAX {jax.__version__} cannot read a sampler that JAX {self.jax_version} exported; it reads what versions up to 6 "
            "months older or 3 weeks newer export, so export it again (export_sampler, ptq4dit compile)."
        )

    @functools.cached_property
    def _jitted(self) -> Any:
        # JAX's own files of exported programs need a package that JAX does not bring, to hold what the form says already. So a
        # program that only has the same arguments and result is exported here, and its module replaced.
        like = _exported(lambda *arrays: jnp.zeros(self.images.shape, self.images.dtype), self.form, self.devices, self.kind)
        program = dataclasses.replace(
            like,
            mlir_module_serialized=self.module,
            module_kept_var_idx=self.kept,
            calling_convention_version=self.convention,
        )

        def exported_sampler(*arrays: jax.Array) -> jax.Array:
            return cast(jax.Array, program.call(*arrays))

        return jax.jit(exported_sampler)


def export_sampler(
    model: Predictor,
    batch_size: int,
    *,
    sampling: Sampling | None = None,
    decoder: VAEDecoder | None = None,
    platform: str | None = None,
    devices: int = 1,
    **settings: object,
) -> ExportedSampler:
    """Exports the sampler of a model as a program, which all models of the same form can use.

    Args:
      model: a :class:`FloatDiT` or :class:`QuantizedDiT`; of its arrays, only shapes and types matter.
      batch_size: images per call, over all devices. The last batch of a request is padded.
      sampling: how to get from noise to image; settings left open follow the model.
      decoder: decodes the latents to pictures, within the same program.
      platform: a name in :data:`ptq4dit_jax.devices.KINDS`, which need not be at hand; None for the default device.
      devices: the number of devices that share a batch, along the axis ``data`` of a mesh.
      **settings: single settings of ``sampling``, as for :func:`ptq4dit_jax.sample`.

    Raises:
      Ptq4ditError: an argument makes no sense, or the program cannot be exported without such a device.
    """
    batch_size, devices = operator.index(batch_size), operator.index(devices)
    if not 1 <= devices <= MAX_DEVICES:
        raise Ptq4ditError(f"The number of devices must be 1 to {MAX_DEVICES:,}, not {devices}.")
    if not 1 <= batch_size <= devices * MAX_ROWS or batch_size % devices:
        raise Ptq4ditError(
            f"The batch size of an exported sampler must be a positive multiple of its number of devices, {devices}, and at "
            f"most {MAX_ROWS:,} times it, not {batch_size}."
        )
    if decoder is not None:
        decoder.check_channels(model.config.in_channels)
    kind = kind_named(platform)
    resolved = chosen_sampling(sampling, settings).resolve(model.schedule, model.config)
    program = Program.of(resolved, model.config, mesh=_mesh(devices))
    key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    shared = Shared(model=model, tables=resolved.tables(), key=key, decoder=decoder)
    numbers = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    batch = Batch[Any](indices=numbers, labels=numbers)
    structure = jax.tree.structure(_with_plain_key(shared, batch))

    def sampler(*arrays: jax.Array) -> jax.Array:
        given, rows = jax.tree.unflatten(structure, arrays)
        given = given.replace(key=jax.random.wrap_key_data(given.key, impl="threefry2x32"))
        return sample_batch(given, rows, program=program)[0]

    with described(kind):
        form = _form(shared, batch, program)
        try:
            exported = _exported(sampler, form, devices, kind)
        except RuntimeError as error:  # such as that there is no cuDNN to ask
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise Ptq4ditError(
                f"The sampler cannot be exported here for {kind} ({reason}); export it on that device."
            ) from error
    [images] = exported.out_avals
    return ExportedSampler(
        sampling=Sampling.of(**resolved.to_dict()),
        batch_size=batch_size,
        devices=devices,
        kind=kind,
        form=form,
        images=ArrayForm("images", np.dtype(images.dtype).name, images.shape),
        module=exported.mlir_module_serialized,
        kept=exported.module_kept_var_idx,
        convention=exported.calling_convention_version,
        jax_version=jax.__version__,
    )


def _exported(function: Callable[..., jax.Array], form: Form, devices: int, kind: DeviceKind) -> export.Exported:
    """Exports a function of the arrays of a form that returns an array of rows."""
    mesh = _mesh(devices)

    def place(by_rows: bool) -> NamedSharding | None:
        return None if mesh is None else NamedSharding(mesh, PartitionSpec("data") if by_rows else PartitionSpec())

    arrays = [
        jax.ShapeDtypeStruct(array.shape, np.dtype(array.dtype), sharding=place(array.path in _BY_ROWS))
        for array in form.arrays
    ]
    with _without_locations():
        return export.export(
            jax.jit(function, out_shardings=place(True)),
            platforms=["cuda" if kind.platform == "gpu" else kind.platform],
            disabled_checks=[export.DisabledSafetyCheck.custom_call(name) for name in _UNSTABLE],
        )(*arrays)


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Leaves out of programs which lines of code operations come from, and with that paths of this machine and a quarter of
    the bytes. JAX 0.11 leaves some in kernels for GPUs."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _mesh(devices: int) -> AbstractMesh | None:
    return None if devices == 1 else AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def _form(shared: Shared, batch: Batch[Any], program: Program) -> Form:
    """Returns the form of a call of the chain, on the default device or the described one."""
    mesh, model = program.mesh, shared.model
    settings = {
        "number of devices": 1 if mesh is None else mesh.size,  # along all axes
        "mesh": ", ".join(map(str, mesh.axis_names)) if mesh is not None and mesh.size > 1 else None,
        "batch size": batch.labels.shape[0],
        "number of calls of the network": shared.tables.t.shape[0],
        "noise in steps": program.stochastic,
        "learned variance": program.learned_variance,
        "guidance": program.guided,
        "jax_threefry_partitionable": bool(jax.config.jax_threefry_partitionable),  # type: ignore[attr-defined]
    }
    resolved = model.resolved() if isinstance(model, ModelFace) else model
    return Form.of(_with_plain_key(shared.replace(model=resolved), batch), settings)


def _with_plain_key(shared: Shared, batch: Batch[Any]) -> tuple[Shared, Batch[Any]]:
    """Returns the arguments with the key as its words, (2,) uint32."""
    words = jax.random.key_data if isinstance(shared.key, jax.Array) else lambda key: jax.eval_shape(jax.random.key_data, key)
    return shared.replace(key=words(shared.key)), batch


def _device_of(shared: Shared, program: Program) -> jax.Device:
    if isinstance(program.mesh, Mesh):
        return cast(jax.Device, program.mesh.devices.flat[0])
    return next(iter(jax.tree.leaves(shared.model)[0].devices()))
