"""``ptq4dit evaluate``: compares a model with the float model that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ptq4dit_jax import sampling
from ptq4dit_jax.cli.derived import Given, Group, Settings, with_options
from ptq4dit_jax.cli.options import BackendName, BatchSize, Decoding, ModelArgument, Repeat, Seed, Written
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.engine import QuantizedDiT, choice, describe
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.evaluation import SQNR_MEAN, SQNR_POOLED, Comparison, compare, plain, write_report
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.terminal import (
    all_devices_mesh,
    console,
    devices_line,
    load_model,
    megabytes,
    print_table,
    read_key,
    runs_line,
    stages,
    to_run,
    wanted_labels,
    working,
)


@with_options
def evaluate(
    context: typer.Context,
    model: ModelArgument,
    against: Annotated[str, typer.Option(help="The float model to compare with.", show_default=False)],
    given: Annotated[Given, Settings(Sampling)],
    decoding: Annotated[Decoding, Group()],
    written: Annotated[Written, Group()],
    out: Annotated[Path, typer.Option(help="Folder for the report: Markdown, plots, JSON.", show_default=False)] = Path(
        "report"
    ),
    labels: Annotated[
        str | None, typer.Option(help="Class labels: 0-9, or 1,3,5-7; all classes by default, none of a model without.")
    ] = None,
    repeat: Repeat = 4,
    batch_size: BatchSize = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type that the model computes in: float32, bfloat16 or float16.", show_default="its own", metavar="TYPE"
        ),
    ] = None,
    backend: BackendName = "auto",
    seed: Seed = 0,
) -> None:
    """Measures a model against the float model on the same noise and writes a report with pictures."""
    key = read_key(seed)
    written.claim(context, out, "report.json")
    how = Sampling.of(**given)
    choice.checked(backend)
    reference, other = load_model(against), load_model(model)
    own = other.dtype.name if isinstance(other, QuantizedDiT) else "auto"
    other = to_run(other, own if dtype is None else dtype, backend)
    if not isinstance(reference, FloatDiT):
        raise Ptq4ditError(f"--against must be a float model; {against} is quantized.")
    decoder = decoding.load()
    wanted = wanted_labels(labels, f"0-{min(reference.config.num_classes, 64) - 1}", repeat, reference.config)
    sampling.check_labels(wanted, reference.config)
    name = Path(model).resolve().name
    if decoder is not None:
        decoder.check_channels(reference.config.in_channels)
    resolved = how.resolve(reference.schedule, reference.config)
    runs = runs_line(other)
    console.print(f"Comparing {model} with {against} on {devices_line()}, {runs}: {len(wanted)} images, {resolved}")
    with stages() as report:
        comparison = compare(
            reference,
            {name: cast(Any, other)},
            labels=wanted,
            key=key,
            sampling=how,
            batch_size=batch_size,
            seed=seed,
            decoder=decoder,
            mesh=all_devices_mesh(),
            progress=report,
        )
    rows, made = None, cast(Mapping[str, Any], {})
    if isinstance(other, QuantizedDiT):
        rows, made = describe(other), other.provenance.facts
    with working(f"Writing {out}"):
        where = write_report(
            out,
            comparison,
            title=f"{name} against {Path(against).resolve().name}",
            describe_rows=rows,
            settings={"model": model, "against": against, "runs": runs, "seed": seed}
            | ({} if decoder is None else {"vae": decoding.vae}),
            reconstruction=made.get("reconstruction"),
            rounding=made.get("rounding"),
            balancing=made.get("balancing"),
            overwrite=written.overwrite,
        )
    _print_figures(comparison, reference.schedule.objective)
    console.print(f"Report: {where / 'report.md'}")
    written.figures(plain(comparison.to_json()))


def _print_figures(comparison: Comparison, objective: str) -> None:
    print_table(
        f"Same noise, against the float model; SQNR of predicted {objective}",
        [
            {
                "model": name,
                SQNR_MEAN: figures.sqnr_mean_db,
                SQNR_POOLED: figures.sqnr_pooled_db,
                "PSNR (dB)": figures.psnr_interval.mean,
                "SSIM": figures.ssim_interval.mean,
                "size": megabytes(figures.num_bytes),
            }
            for name, figures in comparison.figures.items()
        ],
    )
