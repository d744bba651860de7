"""The program as its help shows it. Imports nothing of ours, since :mod:`ptq4dit_start` runs it without the library."""

from __future__ import annotations

import typer

#: What the commands do, by name: the first lines of their own help.
COMMANDS = {
    "info": "Shows what a model is: its shape, its size and, if quantized, what runs for each layer.",
    "convert": "Imports a checkpoint of DiT, SiT, diffusers or a JAX code base, or exports one in Meta's layout; no code in it "
    "is run.",
    "quantize": "Quantizes a float model after training: calibrate, balance and fold, choose ranges, pack, save.",
    "sample": "Samples images from a float or quantized model, the whole chain in one compiled program.",
    "evaluate": "Measures a model against the float model on the same noise and writes a report with pictures.",
}


def program() -> typer.Typer:
    """Makes the program without its commands."""
    return typer.Typer(
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
