"""The chain from noise to images as one compiled program, and a checked request for samples, run batch by batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh, PartitionSpec
from jax.tree_util import PyTreeDef
from jaxtyping import Array, Float32, Int, Int32

from ptq4dit_jax import memory, sharding
from ptq4dit_jax.diffusion import ResolvedSampling, denoise, sample_keys, sample_noise
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.guidance import GuidedChannels, Predictor, predict
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.numerics import AnyKey
from ptq4dit_jax.samplers import AnyTables
from ptq4dit_jax.vae import VAEDecoder
from ptq4dit_jax.waiting import ready

#: Called with (samples done, samples in all).
Progress = Callable[[int, int], None]
#: Images per device and call beyond which a batch is not faster: 8 x 8 pixels fill two cores long before, and 64 images of
#: 256 x 256 pixels an H200.
_USEFUL_ROWS = 256
#: Bytes that every machine has, so that nothing is asked of it.
_SMALL = 2**30


class Shared(struct.PyTreeNode):
    """What every sample of a batch is made with, whole on each device.

    ``tables`` have S rows. ``keep_slots`` (S,) is that of :func:`~ptq4dit_jax.diffusion.denoise`, or None. With a decoder the
    images are the pictures that it makes of the latents.
    """

    model: Predictor
    tables: AnyTables
    key: AnyKey
    keep_slots: Int[Array | np.ndarray, " S"] | None = None
    decoder: VAEDecoder | None = None


#: An array of NumPy or of JAX, or where its rows lie.
_Leaf = TypeVar("_Leaf")


class Batch(struct.PyTreeNode, Generic[_Leaf]):
    """What the samples of a batch have of their own.

    ``indices`` (B,) int32 count over all samples of a request; ``labels`` (B,) int32. ``noise`` (B, H, W, C) and ``step_noise``
    (S, B, H, W, C) are None where the key makes them.
    """

    indices: Int32[_Leaf, " B"]
    labels: Int32[_Leaf, " B"]
    noise: Float32[_Leaf, "B H W C"] | None = None
    step_noise: Float32[_Leaf, "S B H W C"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What decides the program of a batch besides shapes: whether steps add noise and by which variance, which channels are
    guided (None: there is no guidance), how many step inputs are kept, and over which devices the batch is spread."""

    stochastic: bool
    learned_variance: bool
    guided: GuidedChannels | None
    num_kept: int = 0
    mesh: Mesh | None = None

    @classmethod
    def of(cls, sampling: ResolvedSampling, config: DiTConfig, num_kept: int = 0, mesh: Mesh | None = None) -> Program:
        """The program that samples a model of this shape so."""
        return cls(
            stochastic=sampling.stochastic,
            learned_variance=config.learn_sigma and sampling.sampler.learned_variance,
            guided=sampling.guidance.guided,
            num_kept=num_kept,
            mesh=mesh,
        )


@partial(jax.jit, static_argnames="program")
def sample_batch(shared: Shared, batch: Batch[jax.Array], *, program: Program) -> tuple[jax.Array, jax.Array]:
    """One compiled program from noise to images: (B, H, W, C) and the kept step inputs (num_kept, B, H, W, C).

    With a decoder the images are the pictures that it makes of the latents; the step inputs remain latents.

    With a mesh every device runs the program of a single device on its share of the batch (``shard_map``). Left to the
    partitioner, the same chain is fused differently, rounds differently in the last bit, and a quantizer turns that into
    another code.
    """
    chain = partial(_chain, program=program)
    if program.mesh is not None:
        whole, rows, rows_of_steps = PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")
        chain = jax.shard_map(
            chain,
            mesh=program.mesh,
            in_specs=(whole, Batch(indices=rows, labels=rows, noise=rows, step_noise=rows_of_steps)),
            out_specs=(rows, rows_of_steps),
            check_vma=False,
        )
    return chain(shared, batch)


def _chain(shared: Shared, batch: Batch[jax.Array], *, program: Program) -> tuple[jax.Array, jax.Array]:
    """:func:`sample_batch` on one device."""
    model, shape = shared.model, shared.model.config.image_shape
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


@dataclasses.dataclass(frozen=True)
class Request:
    """What to sample, checked: the model, decoder, tables and key where they run, everything per sample on the host."""

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

    @property
    def total(self) -> int:
        return len(self.labels_N)

    def batch_size(self, wanted: int | None) -> int:
        """Samples per call, a multiple of the mesh's parts: as wanted, or by default what is useful and fits into memory."""
        batch = self._batch_size(wanted)
        self._check_attention(batch)
        return batch

    def _check_attention(self, batch: int) -> None:
        """Raises where a batch cannot fit, since attention's logits alone do not: on a CPU all of them are held at once.

        One sample per device is never measured by compiling it, and a large input takes much more than any machine has.
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
        if wanted is None and self.total <= parts:  # there is nothing to choose, and a single image must not wait
            return parts
        placed = jax.tree.leaves((self.model, self.decoder))
        resident = sum(leaf.nbytes for leaf in placed)

        def needed(batch: int) -> int:
            arguments, program = self.call(np.minimum(np.arange(batch), self.total - 1))
            return _needed_bytes(*_signature(arguments), program) - resident

        def free() -> int | None:
            return memory.free_bytes(list(placed[0].devices()))

        if wanted is None:
            return memory.largest_batch(self.total, parts, _USEFUL_ROWS, free(), needed)
        batch = -(-min(wanted, self.total) // parts) * parts
        if batch // parts > _USEFUL_ROWS:  # what a user has chosen is measured where it is larger than of use
            remedy = "choose a smaller batch_size (--batch-size)"
            memory.check_fits(f"A batch of {batch:,} images", needed(batch), free(), remedy)
        return batch

    def call(
        self, rows: np.ndarray, keep_steps: np.ndarray | None = None, *, decode: bool = True
    ) -> tuple[tuple[Shared, Batch[jax.Array | np.ndarray]], Program]:
        """The arguments of :func:`sample_batch` for the samples ``rows`` (B,)."""
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
    ) -> tuple[jax.Array, jax.Array]:
        """What :meth:`run` returns, still on the device and perhaps not computed yet."""
        # Those transfers are meant, should a caller forbid others.
        placing = partial(jax.transfer_guard_host_to_device, "allow") if self.mesh is None else nullcontext
        arguments, program = self.call(rows, keep_steps, decode=decode)
        with placing():
            return sample_batch(*arguments, program=program)

    def run(
        self, rows: np.ndarray, keep_steps: np.ndarray | None = None, *, decode: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Samples ``rows`` (B,): images (B, H, W, C) and kept inputs (num_kept, B, H, W, C), float32 on the host."""
        images, inputs = jax.device_get(ready(self.begin(rows, keep_steps, decode=decode)))
        return np.asarray(images, np.float32), np.asarray(inputs, np.float32)

    def batches(self, batch: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The first sample of each batch, its images and its kept inputs.

        The last batch repeats the last sample, so that every batch has one shape.
        """
        return self._checked(batch, map(self.run, self._cut(batch)))

    def _cut(self, batch: int) -> list[np.ndarray]:
        """The samples of each batch (B,), all of one size."""
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
        """All images and kept inputs."""
        return self._collected(self.batches(batch), progress)

    def collect_from_devices(
        self, batch: int, mesh: Mesh | None, ahead: int, progress: Progress | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same by a request without a mesh, whose batches the devices of ``mesh`` share: see :func:`sharding.deal_out`."""
        cuts = self._cut(batch)
        placed = {
            device: dataclasses.replace(
                self,
                model=jax.device_put(self.model, device),
                key=jax.device_put(self.key, device),
                decoder=jax.device_put(self.decoder, device),
            )
            for device in sharding.devices_of(mesh)[: len(cuts)]
        }
        begin = lambda item, device: placed[device].begin(cuts[item])
        dealt = sharding.deal_out(begin, len(cuts), mesh, ahead=ahead)
        outputs = (jax.device_get(ready(output)) for output in dealt)
        return self._collected(self._checked(batch, outputs), progress)

    def _collected(
        self, batches: Iterable[tuple[int, np.ndarray, np.ndarray]], progress: Progress | None
    ) -> tuple[np.ndarray, np.ndarray]:
        self._check_results()
        images, kept = np.zeros(0), np.zeros(0)
        for start, some, inputs in batches:
            stop = start + len(some)
            if not start:  # allocated once, so that the peak is the result and a batch
                images = np.empty((self.total, *some.shape[1:]), np.float32)
                kept = np.empty((len(inputs), self.total, *inputs.shape[2:]), np.float32)
            images[start:stop], kept[:, start:stop] = some, inputs
            if progress is not None:
                progress(stop, self.total)
        return images, kept

    def _check_results(self) -> None:
        """Raises where all images and kept inputs together are more than the host's memory."""
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
        """What to say of a sample that is not finite; its chain is run again, alone, with the inputs of all steps kept."""
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


def _signature(arguments: tuple[Shared, Batch[jax.Array | np.ndarray]]) -> tuple[PyTreeDef, tuple[Any, ...]]:
    """What decides the program of such arguments, hashable: their structure, and of each leaf shape, type (and whether it is
    weak) and place."""
    leaves, structure = jax.tree.flatten(arguments)
    place = lambda leaf: leaf.sharding if getattr(leaf, "committed", False) else None
    return structure, tuple((leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False), place(leaf)) for leaf in leaves)


@lru_cache(maxsize=64)
def _needed_bytes(structure: PyTreeDef, leaves: tuple[Any, ...], program: Program) -> int:
    """Bytes per device of the program of :func:`sample_batch`, which calls with such arguments then use: it compiles once."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype, weak_type=weak, sharding=place) for shape, dtype, weak, place in leaves]
    lowered = sample_batch.lower(*jax.tree.unflatten(structure, shapes), program=program)
    return memory.program_bytes(lowered.compile())
