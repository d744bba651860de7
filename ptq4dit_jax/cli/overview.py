"""The program as its help shows it. Imports nothing of ours, since :mod:`ptq4dit_start` runs it without the library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

#: What the commands do, by name: the first lines of their own help.
COMMANDS = {
    "info": "Shows what a model is: its shape, its size and, if quantized, what runs for each layer.",
    "convert": "Imports a checkpoint of DiT, SiT, diffusers or a JAX code base, or exports one in Meta's layout; no code in it "
    "is run.",
    "quantize": "Quantizes a float model after training: calibrate, balance and fold, choose ranges, pack, save.",
    "sample": "Samples images from a float or quantized model, the whole chain in one compiled program.",
    "compile": "Exports the sampler of a model as a program in a file, with which sample traces nothing: see its --program.",
    "evaluate": "Measures a model against the float model on the same noise and writes a report with pictures.",
}


_PANEL = "Several hosts"


def _begin(
    context: typer.Context,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="Run as one of several processes, one on each host of a pod or cluster, with the devices of all of them. "
            "Start the same command on every host. Process 0 writes and prints. JAX detects TPU pods, Slurm, Open MPI and "
            "Kubernetes; elsewhere, also pass the other three.",
            rich_help_panel=_PANEL,
        ),
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(
            help="Address of process 0 and a free port there, the same in all processes: 10.0.0.1:1234.",
            envvar="JAX_COORDINATOR_ADDRESS",
            metavar="HOST:PORT",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(help="How many processes there are.", envvar="JAX_NUM_PROCESSES", rich_help_panel=_PANEL)
    ] = None,
    process_id: Annotated[
        int | None,
        typer.Option(help="Which of them this is, from 0.", envvar="JAX_PROCESS_ID", rich_help_panel=_PANEL),
    ] = None,
    compilation_cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps compiled programs, so that the next start compiles nothing; with --distributed, one that "
            "all hosts share. Whoever can write to it can run code as you.",
            show_default="JAX_COMPILATION_CACHE_DIR, or ptq4dit_jax/programs in your cache folder; none with --distributed",
            metavar="FOLDER",
        ),
    ] = None,
    no_compilation_cache: Annotated[
        bool, typer.Option("--no-compilation-cache", help="Compile everything anew, and keep nothing.")
    ] = False,
) -> None:
    from ptq4dit_jax.cli.compilation_cache import keep_programs
    from ptq4dit_jax.cli.distributed import connect

    connect(context, distributed, coordinator, num_processes, process_id)
    keep_programs(context, compilation_cache, no_compilation_cache)


def program() -> typer.Typer:
    """Makes the program without its commands."""
    return typer.Typer(
        callback=_begin,
        name="ptq4dit",
        help="Post-training quantization of Diffusion Transformers: W8A8 and W4A8 with real integers, in JAX.",
        epilog="A MODEL is a folder written by this program, a checkpoint of another code base (see convert), the address of"
        " one, or random:PRESET (random weights), for example random:DiT-S/2.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )


def show(arguments: list[str]) -> None:
    """Shows the help of the whole program, and ends the process."""
    app = program()
    for name, does in COMMANDS.items():
        app.command(name, help=does)(lambda: None)
    app(args=arguments, prog_name="ptq4dit")
