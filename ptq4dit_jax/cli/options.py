"""Arguments and options that several commands share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ptq4dit_jax.engine import choice
from ptq4dit_jax.engine.backends import Arithmetic
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.terminal import claim_target, load_vae, write_json
from ptq4dit_jax.vae import VAEConfig, VAEDecoder

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A model folder, a foreign checkpoint or its address, random:PRESET or random:PRESET@SIZE.", show_default=False
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.", metavar="FILE")]
Seed = Annotated[int, typer.Option(help="Seed of all noise; the same seed gives the same bytes.")]
Repeat = Annotated[int, typer.Option(help="Samples of each label; of a model without classes, samples in all.")]
BatchSize = Annotated[
    int | None,
    typer.Option(help="Images per compiled call.", show_default="up to 256 per device, fewer if memory is short"),
]
ModelDevices = Annotated[
    int,
    typer.Option(
        help="How many devices hold the model between them, if it is too large for one; quantized layers then run on xla."
    ),
]
_ELSE = [
    f"{backend.name} multiplies {backend.arithmetic.value}, derived from the stored integers and not equal to them"
    for backend in choice.BACKENDS
    if backend.arithmetic is not Arithmetic.INT8
]
BackendName = Annotated[
    str, typer.Option("--backend", help=f"What runs quantized layers: {', '.join(choice.names())}. {'; '.join(_ELSE)}.")
]


@dataclasses.dataclass(frozen=True)
class Written:
    """How a command's results are written."""

    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False
    json: Json = None

    def claim(self, context: typer.Context, out: Path, folder_with: str | None = None) -> None:
        """Ensures that both outputs can be written, and that no other process writes them until the command ends."""
        claim_target(context, out, self.overwrite, folder_with)
        claim_target(context, self.json, overwrite=True)

    def figures(self, figures: Mapping[str, Any]) -> None:
        """Writes the command's figures, if requested."""
        write_json(self.json, figures)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How latents become pictures."""

    vae: Annotated[
        str | None,
        typer.Option(help="The VAE that makes pictures of a model's latents: a folder of diffusers or a file.", metavar="PATH"),
    ] = None
    vae_scale: Annotated[
        float | None,
        typer.Option(
            help="Scaling factor of the VAE's latents, where nothing tells it.", show_default=str(VAEConfig.scaling_factor)
        ),
    ] = None

    def load(self) -> VAEDecoder | None:
        """Loads the decoder, if one was given; prints what was decided and guessed."""
        if self.vae is None and self.vae_scale is not None:
            raise Ptq4ditError("--vae-scale is of a VAE; pass that with --vae, or leave it out.")
        return None if self.vae is None else load_vae(self.vae, self.vae_scale)


@dataclasses.dataclass(frozen=True)
class Computing:
    """The type in which samples are computed, and the backend."""

    dtype: Annotated[
        str,
        typer.Option(
            help="auto (bfloat16 for a quantized model on a GPU or TPU, float32 for a model stored in float16), float32, "
            "bfloat16 or float16.",
            metavar="TYPE",
        ),
    ] = "auto"
    backend: BackendName = "auto"
