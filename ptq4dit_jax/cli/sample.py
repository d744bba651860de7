"""``ptq4dit sample``: images from a model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer

from ptq4dit_jax import sampling
from ptq4dit_jax.checkpoints import Model
from ptq4dit_jax.cli.derived import Given, Group, Settings, with_options
from ptq4dit_jax.cli.options import BatchSize, Computing, Decoding, ModelArgument, ModelDevices, Repeat, Seed, Written
from ptq4dit_jax.diffusion import Sampling, chosen_sampling
from ptq4dit_jax.engine import choice
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.exported_file import load_sampler
from ptq4dit_jax.outputs import check_picture, write_picture, write_samples, written_by_first
from ptq4dit_jax.terminal import (
    all_devices_mesh,
    console,
    devices_line,
    load_model,
    parse_labels,
    read_arrays,
    read_key,
    runs_line,
    stages,
    to_run,
    wanted_labels,
    write_file,
)


@with_options
def sample(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="A .png grid, or an .npz in ADM's form (arr_0, uint8 NHWC).", show_default=False)],
    given: Annotated[Given, Settings(Sampling)],
    decoding: Annotated[Decoding, Group()],
    computing: Annotated[Computing, Group()],
    written: Annotated[Written, Group()],
    labels: Annotated[
        str | None, typer.Option(help="Class labels: 0-9, or 1,3,5-7; none of a model without classes.", show_default="0")
    ] = None,
    repeat: Repeat = 1,
    batch_size: BatchSize = None,
    model_devices: ModelDevices = 1,
    noise: Annotated[
        Path | None,
        typer.Option(help="An npz with noise (N, H, W, C) and, if wanted, step_noise (S, N, H, W, C).", metavar="FILE"),
    ] = None,
    program: Annotated[
        Path | None,
        typer.Option(
            help="An exported sampler of models like this one (see compile), so that nothing is traced. It samples as it was "
            "exported to, but for options that are given. It is code: use files that you trust.",
            metavar="FILE",
        ),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Samples images from a float or quantized model, the whole chain in one compiled program."""
    if out.suffix not in (".png", ".npz"):
        raise Ptq4ditError(f"--out must end in .png or .npz, not {out.name!r}.")
    key = read_key(seed)
    written.claim(context, out)
    mesh = all_devices_mesh(model_devices)
    # Checked before anything is loaded.
    parse_labels("0" if labels is None else labels, repeat)
    choice.checked(computing.backend)
    exported = None if program is None else load_sampler(program)
    how = chosen_sampling(None, given, Sampling() if exported is None else exported.sampling)
    loaded = to_run(load_model(model, shared_by=model_devices), computing.dtype, computing.backend)
    wanted = wanted_labels(labels, "0", repeat, loaded.config)
    _check_pictures(model, loaded, out, decoding)
    resolved = how.resolve(loaded.schedule, loaded.config)
    decoder = decoding.load()
    named = wanted if loaded.config.num_labels else None
    columns = len(wanted) // repeat if repeat > 1 and named is not None else None
    if out.suffix == ".png":
        side = loaded.config.input_size * (1 if decoder is None else decoder.config.factor)
        check_picture(len(wanted), side, side, columns)
    arrays = {} if noise is None else read_arrays(noise, ("noise",), ("step_noise",))
    console.print(f"Sampling {len(wanted)} images from {model} on {devices_line()}, {runs_line(loaded)}: {resolved}")
    started = time.perf_counter()
    with stages() as report:
        report("sample", 0, len(wanted))
        batches = sampling.sample_batches(
            cast(Any, loaded),
            wanted,
            key=key,
            sampling=how,
            batch_size=batch_size,
            decoder=decoder,
            mesh=mesh,
            program=exported,
            **arrays,
        )

        def images() -> Iterator[np.ndarray]:
            for start, batch in batches:
                report("sample", start + len(batch), len(wanted))
                yield batch

        def write(made: Iterable[np.ndarray]) -> Path:
            as_picture = lambda file: write_picture(file, made, columns)
            as_arrays = lambda file: write_samples(file, made, len(wanted), named)
            return write_file(out, as_picture if out.suffix == ".png" else as_arrays, overwrite=written.overwrite)

        where = written_by_first(write, images())
    seconds = time.perf_counter() - started
    console.print(f"{len(wanted)} images in {seconds:.1f} s, compilation included")
    console.print(f"Images: {where}")
    run = {"seconds": seconds, "runs": runs_line(loaded), **resolved.to_dict(), "seed": seed, "out": str(out)}
    written.figures({"images": len(wanted), **run})


def _check_pictures(name: str, model: Model, out: Path, decoding: Decoding) -> None:
    """Raises if pictures are requested and the model makes none."""
    channels = model.config.in_channels
    if decoding.vae is None and out.suffix == ".png" and channels not in (1, 3):
        raise Ptq4ditError(
            f"{name} makes latents of {channels} channels, not pictures; pass its VAE with --vae, or use an "
            "--out that ends in .npz."
        )
