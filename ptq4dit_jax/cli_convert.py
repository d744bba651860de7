"""The command ``ptq4dit convert``: checkpoints of others into model folders, and models into Meta's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ptq4dit_jax import checkpoints
from ptq4dit_jax.checkpoints import foreign, store
from ptq4dit_jax.cli_options import Json, Overwrite
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.summary import in_words, summary_of
from ptq4dit_jax.terminal import claim_target, console, copied, load_model, print_table, stages, working, write_json


def convert(
    context: typer.Context,
    src: Annotated[
        str, typer.Argument(help="A checkpoint file or folder, its address, or a model folder.", show_default=False)
    ],
    dst: Annotated[Path, typer.Argument(help="A folder; a .safetensors file with --to meta.", show_default=False)],
    to: Annotated[str, typer.Option(help="ptq4dit, a model folder, or meta, Meta's names in a safetensors file.")] = "ptq4dit",
    num_heads: Annotated[int | None, typer.Option(help="Heads of attention, where the file does not tell.")] = None,
    input_size: Annotated[int | None, typer.Option(help="Side of the latents, where the file does not tell.")] = None,
    classes: Annotated[
        int | None, typer.Option(help="Number of classes, without a null class, where the file does not tell.", metavar="N")
    ] = None,
    null_class: Annotated[
        bool | None,
        typer.Option("--null-class/--no-null-class", help="Whether the last label means no class.", show_default=False),
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema/--model-weights", help="Averaged weights if there are any, or those being trained.")
    ] = True,
    weights: Annotated[
        str | None, typer.Option(help="The set of weights to take, by the prefix of its names in the file.", metavar="NAME")
    ] = None,
    as_diffusers: Annotated[
        bool, typer.Option("--as-diffusers", help="Compute what diffusers computes, instead of Meta's code, from its folder.")
    ] = False,
    objective: Annotated[
        str | None,
        typer.Option(help="What it predicts, noise or velocity, where nothing tells a SiT from a DiT.", show_default=False),
    ] = None,
    data_time: Annotated[
        int | None, typer.Option(help="The time of a flow at which x is data, 0 or 1, where the file does not tell.")
    ] = None,
    timesteps: Annotated[int | None, typer.Option(help="Steps of the noise schedule, where the file does not tell.")] = None,
    beta_start: Annotated[float | None, typer.Option(help="Its first beta.")] = None,
    beta_end: Annotated[float | None, typer.Option(help="Its last beta.")] = None,
    flow_steps: Annotated[
        int | None,
        typer.Option(
            help="Euler steps that a network made for a step size is for; 0 for size 0 and any number of steps.",
            show_default="128 for shortcut models, 1 for mean flows",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="A key of its configuration, or a file beside it, to leave out; may be repeated.", metavar="KEY"),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = None,
) -> None:
    """Imports a checkpoint of DiT, SiT, diffusers or a JAX code base, or exports one in Meta's layout; no code in it is run."""
    if to not in ("ptq4dit", "meta"):
        raise Ptq4ditError(f"--to must be ptq4dit or meta, not {to!r}.")
    if to == "meta" and dst.suffix != ".safetensors":
        raise Ptq4ditError(f"With --to meta, DST must end in .safetensors, not {dst.name!r}.")
    claim_target(context, dst, overwrite, "config.json" if to == "ptq4dit" else None)
    claim_target(context, json, overwrite=True)
    facts: dict[str, Any] = {}
    model: checkpoints.Model
    with copied(src) as where:
        if store.is_model(where):
            if to == "ptq4dit":
                raise Ptq4ditError(f"{src} is a model of this program already; --to meta exports one.")
            model = load_model(str(where))
        else:
            with stages() as report:
                model, found = foreign.import_checkpoint(
                    where,
                    num_heads=num_heads,
                    input_size=input_size,
                    classes=classes,
                    null_class=null_class,
                    ema=ema,
                    weights=weights,
                    as_diffusers=as_diffusers,
                    objective=objective,
                    flow_steps=flow_steps,
                    data_time=data_time,
                    timesteps=timesteps,
                    beta_start=beta_start,
                    beta_end=beta_end,
                    ignore=ignore or (),
                    progress=lambda done, total: report("read", done, total),
                )
            facts = {"layout": found.layout, "weights": found.words, "dtype": found.dtype, "evidence": found.evidence}
            facts |= {"notes": list(found.notes)}
    summary = facts | summary_of(model)
    evidence, notes = facts.get("evidence", {}), facts.get("notes", [])
    shown = in_words({key: value for key, value in summary.items() if key not in ("evidence", "notes")})
    shown |= {f"it says: {what}": source for what, source in evidence.items()}
    print_table(src, [{"fact": key, "found": value} for key, value in shown.items()])
    for note in notes:
        console.print(note)
    with working(f"Writing {dst}"):
        if to == "meta":
            where = foreign.export_meta(model, dst, overwrite=overwrite)
        else:
            where = checkpoints.save(model, dst, provenance={"source": src, **facts}, overwrite=overwrite)
    console.print(f"{'Weights' if to == 'meta' else 'Model'}: {where}")
    write_json(json, {**summary, "config": model.config.to_dict(), "out": str(dst)})
