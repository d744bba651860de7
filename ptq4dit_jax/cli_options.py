"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ptq4dit_jax import samplers
from ptq4dit_jax.diffusion import DEFAULT_STEPS
from ptq4dit_jax.guidance import DEFAULT_SCALE
from ptq4dit_jax.vae import VAEConfig

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A model folder, a foreign checkpoint or its address, random:PRESET or random:PRESET@SIZE.", show_default=False
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.", metavar="FILE")]
Seed = Annotated[int, typer.Option(help="Seed of all noise; the same seed gives the same bytes.")]
Steps = Annotated[
    str | None,
    typer.Option(help=samplers.help_on_steps(), show_default=f"the model's own number if it has one, else {DEFAULT_STEPS}"),
]
SamplerOption = Annotated[str, typer.Option("--sampler", help=samplers.help_on_names())]
Eta = Annotated[float, typer.Option(help=samplers.help_on_eta())]
Repeat = Annotated[int, typer.Option(help="Samples of each label; of a model without classes, samples in all.")]
CfgScale = Annotated[
    float | None,
    typer.Option(
        help="Classifier-free guidance; 1 turns it off.",
        show_default=f"{DEFAULT_SCALE}, or 1 without a null class or where training has guided the model",
    ),
]
CfgChannels = Annotated[str, typer.Option(help="Guide the first3 channels, as Meta's code and SiT do, or all.")]
GuidanceInterval = Annotated[
    str | None,
    typer.Option(
        help="Guide only the steps that begin in this interval of time, which runs from 1 (noise) to 0 (data): in a flow the "
        "share of noise, else the timestep over their number.",
        metavar="LOW,HIGH",
        show_default="all steps",
    ),
]
Vae = Annotated[
    str | None,
    typer.Option(help="The VAE that makes pictures of a model's latents: a folder of diffusers or a file.", metavar="PATH"),
]
VaeScale = Annotated[
    float | None,
    typer.Option(
        help="Scaling factor of the VAE's latents, where nothing tells it.", show_default=str(VAEConfig.scaling_factor)
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(help="Images per compiled call.", show_default="up to 256 per device, fewer if memory is short"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
