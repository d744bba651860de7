"""``ptq4dit quantize``: makes an integer model from a float model."""

from __future__ import annotations

import dataclasses
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer

from ptq4dit_jax import checkpoints, processes, quantization
from ptq4dit_jax.calibration import CalibrationData, stored_rows
from ptq4dit_jax.cli.derived import Given, Group, Settings, with_options
from ptq4dit_jax.cli.options import ModelArgument, ModelDevices, Seed, Written
from ptq4dit_jax.config import Calibration, QuantConfig, Reconstruction
from ptq4dit_jax.engine import QuantizedDiT, describe
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.evaluation import num_bytes
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.quality import REFUSE_BELOW, WARN_BELOW, PoorQuality, Quality
from ptq4dit_jax.reconstruction import forget_journal, journal_beside
from ptq4dit_jax.settings import changed, options_given
from ptq4dit_jax.staging import claim
from ptq4dit_jax.terminal import (
    all_devices_mesh,
    calibration_line,
    console,
    devices_line,
    load_model,
    megabytes,
    print_layers,
    read_calibration,
    read_key,
    stages,
    working,
)
from ptq4dit_jax.unfinished import expect_journal


@dataclasses.dataclass(frozen=True)
class Stored:
    """Calibration rows from a file."""

    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Stored rows instead: an npz or file of torch.save with x (M, H, W, C), t (M,) and y (M,), or, as PTQ4DiT's "
            "authors store them, xs (S, N, C, H, W), ts and y.",
            metavar="FILE",
        ),
    ] = None
    calibration_layout: Annotated[
        str, typer.Option(help="Axes of the stored images, NHWC or NCHW; auto goes by the model's image shape.")
    ] = "auto"

    def check(self, given: Given) -> None:
        """Raises if an option is for rows of the other kind, stored or sampled."""
        if self.calibration is None and self.calibration_layout != "auto":
            raise Ptq4ditError("--calibration-layout is of stored rows; pass those with --calibration, or leave it out.")
        if self.calibration is not None and (unused := options_given(Calibration, given)):
            raise Ptq4ditError(
                f"{', '.join(unused)} would decide how rows are sampled, and --calibration gives them; leave out one of both."
            )

    def read(self, model: FloatDiT) -> tuple[CalibrationData | None, str]:
        """Reads the rows for a model, and describes them in words; returns None and nothing if there is no file."""
        if self.calibration is None:
            return None, ""
        with working(f"Reading {self.calibration}"):
            arrays = read_calibration(self.calibration, labelled=bool(model.config.num_labels))
        rows = stored_rows(
            arrays["x"],
            arrays["t"],
            arrays.get("y"),
            config=model.config,
            schedule=model.schedule,
            layout=cast(Any, self.calibration_layout),
        )
        return rows, calibration_line(rows, arrays["x"].size // int(np.prod(model.config.image_shape)))


@dataclasses.dataclass(frozen=True)
class Preset:
    """The settings to start from."""

    paper: Annotated[
        bool, typer.Option("--paper", help="Start from exactly the paper's settings; other options change single ones.")
    ] = False
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Learn roundings (AdaRound) and activation scales, block by block.")
    ] = False

    def config(self, given: Given) -> QuantConfig:
        """Returns the requested settings.

        Raises:
          Ptq4ditError: options of learning without learning.
        """
        learned = given.pop("reconstruction", {})
        if self.reconstruct or given.get("rounding") == "adaround":
            given = given | {"reconstruction": changed(Reconstruction(), learned)}
        elif learned:
            option, *_ = options_given(Reconstruction, learned)
            raise Ptq4ditError(
                f"{option} is for learning, and nothing is learned; pass --reconstruct or --rounding adaround, or leave it out."
            )
        return (QuantConfig.paper if self.paper else QuantConfig.of)(**given)


@dataclasses.dataclass(frozen=True)
class Conduct:
    """How a run is carried out; none of this affects its numbers."""

    row_batch: Annotated[int | None, typer.Option(help="Rows per calibration pass, to bound memory.")] = None
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start --reconstruct over instead of going on where an earlier run stopped.")
    ] = False
    keep_poor: Annotated[
        bool,
        typer.Option("--keep-poor", help=f"Write a model that predicts below {REFUSE_BELOW:g} dB of SQNR, too."),
    ] = False


@with_options
def quantize(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Folder to write the quantized model to.", show_default=False)],
    preset: Annotated[Preset, Group()],
    given: Annotated[Given, Settings(QuantConfig)],
    stored: Annotated[Stored, Group()],
    conduct: Annotated[Conduct, Group()],
    written: Annotated[Written, Group()],
    model_devices: ModelDevices = 1,
    seed: Seed = 0,
) -> None:
    """Quantizes a float model after training: calibrate, balance and fold, choose ranges, pack, save."""
    stored.check(given)
    config = preset.config(given)
    if conduct.fresh and config.learning is None:
        raise Ptq4ditError("--fresh starts a reconstruction over, and nothing is learned here; leave it out.")
    key = read_key(seed)
    written.claim(context, out, "config.json")
    mesh = all_devices_mesh(model_devices)
    state = None if config.learning is None else journal_beside(out)
    if state is not None:
        processes.on_first(partial(_claim_journal, context, state, conduct.fresh))
    dit = load_model(model, shared_by=model_devices)
    if not isinstance(dit, FloatDiT):
        raise Ptq4ditError(f"{model} is quantized already; quantize the float model that it came from.")
    rows, on_rows = stored.read(dit)
    if rows is None:
        config = config.resolve(dit.schedule, dit.config)
        calibration = config.calibration
        resolved = calibration.sampling.resolve(dit.schedule, dit.config)
        on_rows = f"Calibrating on {calibration.rows} rows at {calibration.steps} steps of the chain: {resolved}"
    balanced = "weights only" if config.weights_only else f"balance {config.balancing.method}"
    console.print(f"Quantizing {model} to {config.name} on {devices_line()}: {balanced}, policy {config.policy}")
    console.print(on_rows)
    started = time.perf_counter()
    with stages() as report, warnings.catch_warnings():
        warnings.simplefilter("ignore", PoorQuality)  # reported below
        quantized = quantization.quantize(
            dit,
            config,
            key=key,
            calibration=rows,
            mesh=mesh,
            state=state,
            progress=report,
            **dataclasses.asdict(conduct),
        )
    seconds = time.perf_counter() - started
    layers = [layer.words() for layer in describe(quantized)]
    print_layers(layers)
    with working(f"Writing {out}"):
        where = checkpoints.save(quantized, out, provenance={"source": model, "seed": seed}, overwrite=written.overwrite)
    if state is not None and not processes.on_first(partial(forget_journal, state)):
        console.print(f"The state of the reconstruction, which is of no more use, could not be removed: {state}")
    quality = Quality.of(quantized)
    _print_result(dit, quantized, quality, seconds)
    console.print(f"Model: {where}")
    figures = {
        "float_bytes": num_bytes(dit),
        "bytes": num_bytes(quantized),
        "seconds": seconds,
        "quality": quality and quality.to_dict(),
        "settings": quantized.provenance.facts["settings"],
    }
    written.figures({**figures, "layers": layers, "out": str(out)})


def _claim_journal(context: typer.Context, state: Path, fresh: bool) -> None:
    context.with_resource(claim(state))
    expect_journal(state, fresh=fresh)


def _print_result(dit: FloatDiT, quantized: QuantizedDiT, quality: Quality | None, seconds: float) -> None:
    before, after = num_bytes(dit), num_bytes(quantized)
    console.print(f"{megabytes(before)} -> {megabytes(after)} ({before / after:.1f}x smaller) in {seconds:.1f} s")
    if quality is not None:
        of = f"the predicted {dit.schedule.objective} on {quality.steps} x {quality.rows} calibration rows"
        console.print(f"Quality: {quality}, of {of}")
        if quality.is_poor:
            remedy = "use more bits, another policy or more rows"
            console.print(f"Warning: below {WARN_BELOW:g} dB samples are visibly worse; {remedy}.")
