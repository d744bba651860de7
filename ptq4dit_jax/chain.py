"""The chain from noise to images as one compiled program, and a checked request for samples that is run batch by batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any, Generic, Protocol, TypeVar

import jax
import numpy as np
from flax import struct
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.tree_util import PyTreeDef
from jaxtyping import Array, Float32, Int, Int32

from ptq4dit_jax import memory, placement, sharding
from ptq4dit_jax.diffusion import ResolvedSampling, denoise, sample_keys, sample_noise
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.guidance import GuidedChannels, Predictor, predict
from ptq4dit_jax.model import ModelFace
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.numerics import AnyKey
from ptq4dit_jax.samplers import AnyTables
from ptq4dit_jax.vae import VAEDecoder
from ptq4dit_jax.waiting import ready

#: Called with (samples done, samples in all).
Progress = Callable[[int, int], None]
#: Images per device and call beyond which a batch is not faster: images of 8 x 8 pixels saturate two cores long before, and 64
#: images of 256 x 256 pixels saturate an H200.
_USEFUL_ROWS = 256
#: Bytes that every machine has, so that no check is needed.
_SMALL = 2**30


class Shared(struct.PyTreeNode):
    """The inputs that all samples of a batch share, replicated to each device.

    ``tables`` have S rows. ``keep_slots`` (S,) is as in :func:`~ptq4dit_jax.diffusion.denoise`, or None. With a decoder, the
    images are the decoded latents.
    """

    model: Predictor
    tables: AnyTables
    key: AnyKey
    keep_slots: Int[Array | np.ndarray, " S"] | None = None
    decoder: VAEDecoder | None = None


#: An array of NumPy or JAX, or its PartitionSpec.
_Leaf = TypeVar("_Leaf")


class Batch(struct.PyTreeNode, Generic[_Leaf]):
    """The inputs that each sample of a batch has for itself.

    ``indices`` (B,) int32 count over all samples of a request; ``labels`` (B,) int32. ``noise`` (B, H, W, C) and ``step_noise``
    (S, B, H, W, C) are None if they are drawn from the key.
    """

    indices: Int32[_Leaf, " B"]
    labels: Int32[_Leaf, " B"]
    noise: Float32[_Leaf, "B H W C"] | None = None
    step_noise: Float32[_Leaf, "S B H W C"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What determines the program of a batch besides shapes: whether steps add noise and with which variance, which channels
    are guided (None: there is no guidance), how many step inputs are kept, and over which devices the batch is sharded."""

    stochastic: bool
    learned_variance: bool
    guided: GuidedChannels | None
    num_kept: int = 0
    mesh: Mesh | AbstractMesh | None = None

    @classmethod
    def of(
        cls, sampling: ResolvedSampling, config: DiTConfig, num_kept: int = 0, mesh: Mesh | AbstractMesh | None = None
    ) -> Program:
        """Returns the program for this sampling of a model of this shape."""
        return cls(
            stochastic=sampling.stochastic,
            learned_variance=config.learn_sigma and sampling.sampler.learned_variance,
            guided=sampling.guidance.guided,
            num_kept=num_kept,
            mesh=mesh,
        )


@partial(jax.jit, static_argnames="program")
def sample_batch(shared: Shared, batch: Batch[jax.Array], *, program: Program) -> tuple[jax.Array, jax.Array]:
    """Runs one compiled program from noise to images (B, H, W, C) and kept step inputs (num_kept, B, H, W, C).

    With a decoder, the images are the decoded latents; the step inputs remain latents.

    With a mesh, every device runs the program of a single device on its share of the batch (``shard_map``). The partitioner
    would fuse the same chain differently. It would then round differently in the last bit, and a quantizer turns that into
    another code. Over an axis ``model`` it does partition the program of a share.
    """
    chain = partial(_chain, program=program)
    if program.mesh is not None:
        whole, rows, rows_of_steps = PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")
        chain = jax.shard_map(
            chain,
            mesh=program.mesh,
            in_specs=(whole, Batch(indices=rows, labels=rows, noise=rows, step_noise=rows_of_steps)),
            out_specs=(rows, rows_of_steps),
            axis_names={"data"},
            check_vma=False,
        )
    return chain(shared, batch)


def _chain(shared: Shared, batch: Batch[jax.Array], *, program: Program) -> tuple[jax.Array, jax.Array]:
    """Runs :func:`sample_batch` on one device."""
    model, shape = shared.model, shared.model.config.image_shape
    if isinstance(model, ModelFace) and sharding.model_size(program.mesh) == 1:
        model = model.prepared()
    keys_B = sample_keys(shared.key, batch.indices)
    x_T = sample_noise(keys_B, 0, shape) if batch.noise is None else batch.noise

    def draw(step: jax.Array) -> jax.Array:
        return sample_noise(keys_B, step + 1, shape) if batch.step_noise is None else batch.step_noise[step]

    x, inputs = denoise(
        lambda x, t, scale: predict(model, x, t[None], batch.labels, scale, program.guided),
        shared.tables,
        x_T,
        draw if program.stochastic else None,
        learned_variance=program.learned_variance,
        keep_slots=shared.keep_slots,
        num_kept=program.num_kept,
    )
    return x if shared.decoder is None else shared.decoder.decode(x), inputs


class ExportedProgram(Protocol):
    """What a request needs of a program that was exported earlier and stands for :func:`sample_batch`."""

    @property
    def batch_size(self) -> int: ...

    @property
    def devices(self) -> int: ...

    def check(self, shared: Shared, batch: Batch[Any], program: Program) -> None: ...

    def run(self, shared: Shared, batch: Batch[Any]) -> jax.Array: ...

    def compile(self, shared: Shared, batch: Batch[Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Request:
    """What to sample, checked. Model and decoder (with a mesh, also tables and key) are where they run; the rest is on the
    host. With ``exported``, that program runs instead of a traced one."""

    model: Predictor
    labels_N: np.ndarray
    sampling: ResolvedSampling
    tables: AnyTables
    key: AnyKey
    noise: np.ndarray | None
    step_noise: np.ndarray | None
    decoder: VAEDecoder | None
    mesh: Mesh | None
    keep_steps: np.ndarray | None
    what: str
    exported: ExportedProgram | None = None

    @property
    def total(self) -> int:
        return len(self.labels_N)

    def batch_size(self, wanted: int | None) -> int:
        """Returns the samples per call, a multiple of the mesh's parts: as wanted, or as many as are useful and fit into
        memory."""
        batch = self._batch_size(wanted)
        self._check_attention(batch)
        return batch

    def _check_attention(self, batch: int) -> None:
        """Raises if a batch cannot fit because attention's logits alone do not: on a CPU, all of them are held at once.

        A batch of one sample per device is never compiled to measure it, and with a large input it can need more memory than
        any machine has.
        """
        config, devices = self.model.config, list(jax.tree.leaves(self.model)[0].devices())
        if devices[0].platform != "cpu":
            return
        rows = batch // sharding.data_size(self.mesh) * (1 if self.sampling.guidance.guided is None else 2)
        needed = 4 * rows * config.num_heads * config.num_tokens**2
        if needed > _SMALL:
            what = f"Attention over {config.num_tokens:,} tokens, {rows} images at once per device,"
            remedy = "choose a smaller input or batch_size (--batch-size)"
            memory.check_fits(what, needed, memory.free_bytes(devices), remedy)

    def _batch_size(self, wanted: int | None) -> int:
        parts = sharding.data_size(self.mesh)
        if wanted is not None and wanted < 1:
            raise Ptq4ditError(f"batch_size must be positive, not {wanted}.")
        if self.exported is not None:
            return self._exported_size(self.exported, wanted)
        if wanted is None and self.total <= parts:  # there is nothing to choose, and a single image must not wait
            return parts
        placed = jax.tree.leaves((self.model, self.decoder))
        resident = sum(map(sharding.bytes_per_device, placed))

        def needed(batch: int) -> int:
            arguments, program = self.call(np.minimum(np.arange(batch), self.total - 1))
            return _needed_bytes(*_signature(arguments), program) - resident

        def free() -> int | None:
            return sharding.least(self.mesh, memory.free_bytes(list(placed[0].devices())))

        if wanted is None:
            return memory.largest_batch(self.total, parts, _USEFUL_ROWS, free(), needed)
        batch = -(-min(wanted, self.total) // parts) * parts
        if batch // parts > _USEFUL_ROWS:  # a user's choice is measured only if it is larger than useful
            remedy = "choose a smaller batch_size (--batch-size)"
            memory.check_fits(f"A batch of {batch:,} images", needed(batch), free(), remedy)
        return batch

    def _exported_size(self, exported: ExportedProgram, wanted: int | None) -> int:
        """Returns the batch size of an exported program, which is checked to be for this request."""
        batch, parts = exported.batch_size, sharding.data_size(self.mesh)
        if parts != exported.devices:
            raise Ptq4ditError(
                f"The exported sampler is for batches over {_devices(exported.devices)}, and here {_devices(parts)} would "
                "share one; use as many as it was exported for (mesh), or export another."
            )
        if wanted is not None and wanted != batch:
            raise Ptq4ditError(
                f"The exported sampler makes {batch} images per call, not {wanted}; leave out batch_size (--batch-size), or "
                "export another."
            )
        if self.noise is not None or self.step_noise is not None:
            raise Ptq4ditError(
                "An exported sampler draws all noise from the key, so it takes no noise or step_noise (--noise); leave out one "
                "of both."
            )
        arguments, program = self.call(self._cut(batch)[0])
        exported.check(*arguments, program)
        return batch

    def compile(self) -> None:
        """Compiles the exported program of a request for its device, without running it."""
        assert self.exported is not None
        arguments, _ = self.call(self._cut(self.batch_size(None))[0])
        self.exported.compile(*arguments)

    def call(
        self, rows: np.ndarray, keep_steps: np.ndarray | None = None, *, decode: bool = True
    ) -> tuple[tuple[Shared, Batch[jax.Array | np.ndarray]], Program]:
        """Returns the arguments of :func:`sample_batch` for the samples ``rows`` (B,)."""
        mesh = self.mesh
        keep = self.keep_steps if keep_steps is None else keep_steps
        num_kept = 0 if keep is None else len(keep)
        slots: np.ndarray | jax.Array | None = None
        if keep is not None:
            slots = np.full(self.tables.num_steps, num_kept, np.int32)
            slots[keep] = np.arange(num_kept)
            slots = slots if mesh is None else sharding.replicate(mesh, slots)

        def of_rows(array: np.ndarray, axis: int = 0) -> np.ndarray | jax.Array:
            chosen = np.take(array, rows, axis)
            return chosen if mesh is None else sharding.shard(mesh, chosen, axis)

        indices = rows.astype(np.int32) if mesh is None else sharding.shard(mesh, rows.astype(np.int32))
        shared = Shared(
            model=self.model,
            tables=self.tables,
            key=self.key,
            keep_slots=slots,
            decoder=self.decoder if decode else None,
        )
        batch = Batch(
            indices=indices,
            labels=of_rows(self.labels_N),
            noise=None if self.noise is None else of_rows(self.noise),
            step_noise=None if self.step_noise is None else of_rows(self.step_noise, 1),
        )
        return (shared, batch), Program.of(self.sampling, self.model.config, num_kept=num_kept, mesh=mesh)

    def begin(
        self, rows: np.ndarray, keep_steps: np.ndarray | None = None, *, decode: bool = True
    ) -> tuple[jax.Array, jax.Array | np.ndarray]:
        """Returns the result of :meth:`run`, still on the device and perhaps not computed yet."""
        # These transfers are intended, even if a caller forbids others.
        placing = partial(jax.transfer_guard_host_to_device, "allow") if self.mesh is None else nullcontext
        arguments, program = self.call(rows, keep_steps, decode=decode)
        with placing():
            if self.exported is None or program.num_kept:
                return sample_batch(*arguments, program=program)
            images = self.exported.run(*arguments)
            return images, np.zeros((0, len(rows), *self.model.config.image_shape), np.float32)

    def run(
        self, rows: np.ndarray, keep_steps: np.ndarray | None = None, *, decode: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Samples ``rows`` (B,): images (B, H, W, C) and kept inputs (num_kept, B, H, W, C), float32 on the host."""
        images, inputs = sharding.to_host(self.begin(rows, keep_steps, decode=decode))
        return np.asarray(images, np.float32), np.asarray(inputs, np.float32)

    def batches(self, batch: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields, for each batch, the index of its first sample, its images and its kept inputs.

        The last batch is padded with the last sample, so that all batches have one shape. The padding is not returned.
        """
        return self._checked(batch, map(self.run, self._cut(batch)))

    def _cut(self, batch: int) -> list[np.ndarray]:
        """Returns the samples of each batch (B,); all batches have one size."""
        return [np.minimum(np.arange(start, start + batch), self.total - 1) for start in range(0, self.total, batch)]

    def _checked(
        self, batch: int, outputs: Iterable[tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for start, (images, kept) in zip(range(0, self.total, batch), outputs, strict=True):
            count = min(batch, self.total - start)
            images, kept = np.asarray(images, np.float32)[:count], np.asarray(kept, np.float32)[:, :count]
            finite = np.isfinite(images).all((1, 2, 3)) & np.isfinite(kept).all((0, 2, 3, 4))
            if not finite.all():
                raise self.fault(start + int(np.argmin(finite)))
            yield start, images, kept

    def collect(self, batch: int, progress: Progress | None) -> tuple[np.ndarray, np.ndarray]:
        """Returns all images and kept inputs."""
        return self._collected(self.batches(batch), progress)

    def collect_from_devices(
        self, batch: int, mesh: Mesh | None, ahead: int, progress: Progress | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the same for a request without a mesh, with batches dealt out to ``mesh``: see :func:`sharding.deal_out`."""
        cuts = self._cut(batch)
        at = {place: self._at(place) for place in sharding.own_places_of(mesh, len(cuts))}
        begin = lambda item, place: at[place].begin(cuts[item])
        like = lambda item: jax.eval_shape(lambda: self.begin(cuts[item]))
        dealt = sharding.deal_out(begin, len(cuts), mesh, like=like, ahead=ahead)
        outputs = (jax.device_get(ready(output)) for output in dealt)
        return self._collected(self._checked(batch, outputs), progress)

    def _at(self, place: sharding.Place) -> Request:
        """Returns the same request with everything at one place."""
        model, key, decoder = placement.put((self.model, self.key, self.decoder), place)
        moved = dataclasses.replace(self, model=model, key=key, decoder=decoder)
        if not isinstance(place, Mesh):
            return moved
        return dataclasses.replace(moved, tables=sharding.put(self.tables, place), mesh=place)

    def _collected(
        self, batches: Iterable[tuple[int, np.ndarray, np.ndarray]], progress: Progress | None
    ) -> tuple[np.ndarray, np.ndarray]:
        self._check_results()
        images, kept = np.zeros(0), np.zeros(0)
        for start, some, inputs in batches:
            stop = start + len(some)
            if not start:  # allocated once, so that the peak is the result plus one batch
                images = np.empty((self.total, *some.shape[1:]), np.float32)
                kept = np.empty((len(inputs), self.total, *inputs.shape[2:]), np.float32)
            images[start:stop], kept[:, start:stop] = some, inputs
            if progress is not None:
                progress(stop, self.total)
        return images, kept

    def _check_results(self) -> None:
        """Raises if all images and kept inputs together exceed the host's free memory."""
        height, width, channels = self.model.config.image_shape
        inputs = 0 if self.keep_steps is None else len(self.keep_steps) * height * width * channels
        if self.decoder is not None:
            decoder = self.decoder.config
            height, width, channels = height * decoder.factor, width * decoder.factor, decoder.out_channels
        memory.check_fits(
            f"The result of {self.total:,} samples",
            4 * self.total * (height * width * channels + inputs),
            memory.free_on_host(),
            "ask for fewer samples or calibration rows",
        )

    def fault(self, sample: int) -> Ptq4ditError:
        """Returns the error for a sample that is not finite. Runs its chain again, alone, and keeps the inputs of all steps."""
        steps = self.tables.num_steps
        latents, inputs = self.run(np.full(sharding.data_size(self.mesh), sample), np.arange(steps), decode=False)
        states = np.isfinite(np.concatenate([inputs[:, 0], latents[:1]])).all((1, 2, 3))
        name = f"{self.what} {sample} (label {self.labels_N[sample]})"
        if states.all() and self.decoder is not None:
            dtype = np.dtype(self.decoder.dtype).name
            remedy = (
                "check that it is the one that the model was trained with"
                if dtype == "float32"
                else ("decode in float32 (VAEDecoder.astype)")
            )
            return Ptq4ditError(
                f"{name} holds NaN or infinity: its latents are finite, but what the VAE makes of them in {dtype} is not; "
                f"{remedy}."
            )
        where = ""
        if not states.all():
            call = int(np.argmin(states))  # the step that made it; the initial noise is finite
            calls_per_step = self.sampling.sampler.calls_per_step
            t = np.asarray(self.tables.t)[call - 1]
            where = f" from step {-(-call // calls_per_step)} of {steps // calls_per_step} on (t = {t:g})"
        dtype = np.dtype(getattr(self.model, "dtype", np.float32)).name
        hints = [] if dtype == "float32" else ["compute in float32 (astype, --dtype float32)"]
        if (guidance := self.sampling.guidance).guided is not None:
            hints.append(f"lower the guidance (cfg_scale, --cfg-scale), which is {guidance.scale:g}")
        hints.append("take another number of steps or another sampler" if hints else "check the checkpoint and the sampler")
        return Ptq4ditError(f"{name} holds NaN or infinity{where}, computed in {dtype}; {', or '.join(hints)}.")


def _devices(count: int) -> str:
    return "one device" if count == 1 else f"{count} devices"


def _signature(arguments: tuple[Shared, Batch[jax.Array | np.ndarray]]) -> tuple[PyTreeDef, tuple[Any, ...]]:
    """Returns what determines the program for these arguments, hashable: their structure, and the shape, type (and whether it
    is weak) and sharding of each leaf."""
    leaves, structure = jax.tree.flatten(arguments)
    place = lambda leaf: leaf.sharding if getattr(leaf, "committed", False) else None
    return structure, tuple((leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False), place(leaf)) for leaf in leaves)


@lru_cache(maxsize=64)
def _needed_bytes(structure: PyTreeDef, leaves: tuple[Any, ...], program: Program) -> int:
    """Returns the bytes per device of :func:`sample_batch`'s program. Calls with such arguments then reuse what it compiles."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype, weak_type=weak, sharding=place) for shape, dtype, weak, place in leaves]
    lowered = sample_batch.lower(*jax.tree.unflatten(structure, shapes), program=program)
    return memory.program_bytes(lowered.compile())
