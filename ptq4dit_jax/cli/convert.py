"""``ptq4dit convert``: converts checkpoints of other code bases to model folders, and models to Meta's layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ptq4dit_jax import checkpoints, processes
from ptq4dit_jax.checkpoints import foreign, store
from ptq4dit_jax.checkpoints.foreign.options import ImportOptions
from ptq4dit_jax.cli.derived import Given, Group, Settings, with_options
from ptq4dit_jax.cli.options import Written
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.settings import options_given
from ptq4dit_jax.summary import in_words, summary_of
from ptq4dit_jax.terminal import console, copied, load_model, print_table, stages, working


@with_options
def convert(
    context: typer.Context,
    src: Annotated[
        str, typer.Argument(help="A checkpoint file or folder, its address, or a model folder.", show_default=False)
    ],
    dst: Annotated[Path, typer.Argument(help="A folder; a .safetensors file with --to meta.", show_default=False)],
    given: Annotated[Given, Settings(ImportOptions)],
    written: Annotated[Written, Group()],
    to: Annotated[str, typer.Option(help="ptq4dit, a model folder, or meta, Meta's names in a safetensors file.")] = "ptq4dit",
) -> None:
    """Imports a checkpoint of DiT, SiT, diffusers or a JAX code base, or exports one in Meta's layout; no code in it is run."""
    if to not in ("ptq4dit", "meta"):
        raise Ptq4ditError(f"--to must be ptq4dit or meta, not {to!r}.")
    if to == "meta" and dst.suffix != ".safetensors":
        raise Ptq4ditError(f"With --to meta, DST must end in .safetensors, not {dst.name!r}.")
    written.claim(context, dst, "config.json" if to == "ptq4dit" else None)
    facts: dict[str, Any] = {}
    model: checkpoints.Model
    with copied(src) as where:
        if store.is_model(where):
            if to == "ptq4dit":
                raise Ptq4ditError(f"{src} is a model of this program already; --to meta exports one.")
            if given:
                options = ", ".join(options_given(ImportOptions, given))
                raise Ptq4ditError(f"{src} is a model of this program, which says all of itself; leave out {options}.")
            model = load_model(str(where))
        else:
            with stages() as report:
                progress = partial(report, "read")
                model, found = foreign.import_checkpoint(where, progress=progress, **given)
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
            where = Path(processes.on_first(lambda: str(foreign.export_meta(model, dst, overwrite=written.overwrite))))
        else:
            where = checkpoints.save(model, dst, provenance={"source": src, **facts}, overwrite=written.overwrite)
    console.print(f"{'Weights' if to == 'meta' else 'Model'}: {where}")
    written.figures({**summary, "config": model.config.to_dict(), "out": str(dst)})
