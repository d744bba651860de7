"""``ptq4dit compile``: the sampler of a model as a program in a file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ptq4dit_jax import program_cache, sampling
from ptq4dit_jax.cli.derived import Given, Group, Settings, with_options
from ptq4dit_jax.cli.options import Computing, Decoding, ModelArgument, Written
from ptq4dit_jax.devices import KINDS, described, kind_named
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.engine import choice
from ptq4dit_jax.exported import export_sampler
from ptq4dit_jax.exported_file import save_sampler
from ptq4dit_jax.terminal import all_devices_mesh, console, load_model, megabytes, runs_line, to_run, working


@with_options
def compile(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="The file to write.", show_default=False, metavar="FILE")],
    batch_size: Annotated[int, typer.Option(help="Images per call, over all devices.", show_default=False)],
    given: Annotated[Given, Settings(Sampling)],
    decoding: Annotated[Decoding, Group()],
    computing: Annotated[Computing, Group()],
    written: Annotated[Written, Group()],
    platform: Annotated[
        str | None,
        typer.Option(
            help=f"The device that it is for, which need not be here: {', '.join(KINDS)}; cuda and tpu are any of the kind.",
            show_default="this one",
            metavar="NAME",
        ),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="How many devices share a batch.", show_default="all that are here; 1 with --platform")
    ] = None,
) -> None:
    """Exports the sampler of a model as a program in a file, with which sample traces nothing: see its --program."""
    kind = kind_named(platform)
    written.claim(context, out)
    choice.checked(computing.backend)
    how = Sampling.of(**given)
    mesh = all_devices_mesh()
    here = 1 if mesh is None else mesh.size
    count = devices if devices is not None else here if platform is None else 1
    loaded = load_model(model)
    decoder = decoding.load()
    with described(kind):
        loaded = to_run(loaded, computing.dtype, computing.backend)
        line = runs_line(loaded)
    resolved = how.resolve(loaded.schedule, loaded.config)
    where = str(kind) if count == 1 else f"{count} devices, each {kind}"
    console.print(f"Exporting the sampler of {model} for {batch_size} images on {where}, {line}: {resolved}")
    started = time.perf_counter()
    with working("Exporting"):
        program = export_sampler(cast(Any, loaded), batch_size, sampling=how, decoder=decoder, platform=platform, devices=count)
    saved = save_sampler(program, out, overwrite=written.overwrite)
    kept = program_cache.folder_in_use()
    if platform is None and count == here and kept is not None:
        with working("Compiling"):
            sampling.compile_exported(program, cast(Any, loaded), decoder=decoder, mesh=mesh)
        console.print(f"Compiled for this device; the result is in {kept}")
    seconds = time.perf_counter() - started
    console.print(f"Program of {megabytes(len(program.module))} in {seconds:.1f} s: {saved}")
    figures = {"batch_size": batch_size, "devices": count, "platform": platform, **resolved.to_dict()}
    written.figures({**figures, "bytes": len(program.module), "seconds": seconds, "out": str(out)})
