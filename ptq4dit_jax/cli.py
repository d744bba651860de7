"""The command line: ``ptq4dit info | convert | quantize | sample | evaluate``. Thin; all work is in the library."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import numpy as np
import typer

from ptq4dit_jax import checkpoints, ending, quantization, sampling
from ptq4dit_jax.calibration import stored_rows
from ptq4dit_jax.checkpoints import foreign, store
from ptq4dit_jax.cli_convert import convert
from ptq4dit_jax.cli_options import (
    BatchSize,
    CfgChannels,
    CfgScale,
    Eta,
    GuidanceInterval,
    Json,
    ModelArgument,
    Overwrite,
    Repeat,
    SamplerOption,
    Seed,
    Steps,
    Vae,
    VaeScale,
)
from ptq4dit_jax.cli_overview import program
from ptq4dit_jax.config import QuantConfig, Reconstruction
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.engine import QuantizedDiT, choice, describe
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.evaluation import SQNR_MEAN, SQNR_POOLED, compare, num_bytes, plain, write_report
from ptq4dit_jax.guidance import Guidance
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.registry import known_specs
from ptq4dit_jax.outputs import check_picture, write_picture, write_samples
from ptq4dit_jax.policy import POLICIES, attention_of
from ptq4dit_jax.quality import REFUSE_BELOW, WARN_BELOW, PoorQuality, Quality
from ptq4dit_jax.reconstruction import forget_journal, journal_beside
from ptq4dit_jax.staging import claim
from ptq4dit_jax.summary import in_words, summary_of
from ptq4dit_jax.terminal import (
    all_devices_mesh,
    calibration_line,
    claim_target,
    console,
    copied,
    devices_line,
    load_model,
    load_vae,
    megabytes,
    parse_interval,
    parse_labels,
    print_layers,
    print_table,
    read_arrays,
    read_calibration,
    read_key,
    runs_line,
    stages,
    to_run,
    wanted_labels,
    working,
    write_file,
    write_json,
)
from ptq4dit_jax.unfinished import expect_journal

app = program()

#: The tables of a DiT, for the names in help.
_DIT = known_specs()[0]


def _provenance(path: str | Path) -> dict[str, Any]:
    """What a model folder says of its origin; nothing for a checkpoint of others, and for random weights."""
    if isinstance(path, str) or foreign.is_foreign(path):
        return {}
    return store.read_config(path).get("provenance", {})


@app.command()
def info(context: typer.Context, model: ModelArgument, json: Json = None) -> None:
    """Shows what a model is: its shape, its size and, if quantized, what runs for each layer."""
    claim_target(context, json, overwrite=True)
    with contextlib.ExitStack() as stack:
        where = model if model.startswith("random:") else stack.enter_context(copied(model))
        loaded = load_model(str(where))
        facts = _provenance(where)
    summary = summary_of(loaded)
    for key, value in in_words(summary).items():
        console.print(f"{key:>14}  {value}")
    rows = []
    if isinstance(loaded, QuantizedDiT):
        running = to_run(loaded, "auto", "auto")
        console.print(f"{'runs':>14}  {runs_line(running)}")
        rows = describe(running)
        print_layers(rows)
    for key, value in facts.items():
        if key == "evidence" and isinstance(value, dict):
            value = ", ".join(f"{what} by {source}" for what, source in value.items()) or "none"
        for line in value if isinstance(value, list) else [value]:
            console.print(f"{key.replace('_', ' '):>14}  {line}")
    write_json(json, {**summary, "config": loaded.config.to_dict(), "layers": rows, "provenance": facts})


app.command()(convert)


@app.command()
def quantize(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Folder to write the quantized model to.", show_default=False)],
    weight_bits: Annotated[int, typer.Option(help="Width of the weights, 2 to 8.")] = 8,
    act_bits: Annotated[int, typer.Option(help="Width of the activations, 2 to 8; 16 leaves them float (weights only).")] = 8,
    balance: Annotated[
        str | None,
        typer.Option(
            help="Salience balancing: none, csb, csb+ssc, or search: for each layer what errs least.",
            show_default=f"{QuantConfig.balance}; csb+ssc with --paper",
        ),
    ] = None,
    ssc: Annotated[
        str, typer.Option(help="SSC (--balance csb+ssc) weighs steps (the paper) or rows (the official code).")
    ] = "steps",
    temperature: Annotated[float, typer.Option(help="Temperature of SSC's softmax.")] = 1.0,
    calib_steps: Annotated[
        int | None, typer.Option(help="Evenly spaced sampler steps to calibrate on.", show_default="25, or all if fewer")
    ] = None,
    calib_rows: Annotated[int, typer.Option(help="Rows at each of them; half are null twins under guidance.")] = 64,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Stored rows instead: an npz or file of torch.save with x (M, H, W, C), t (M,) and y (M,), or, as PTQ4DiT's "
            "authors store them, xs (S, N, C, H, W), ts and y.",
            metavar="FILE",
        ),
    ] = None,
    calibration_layout: Annotated[
        str, typer.Option(help="Axes of the stored images, NHWC or NCHW; auto goes by the model's image shape.")
    ] = "auto",
    steps: Steps = None,
    sampler: SamplerOption = Sampling.sampler,
    eta: Eta = Sampling.eta,
    cfg_scale: CfgScale = Guidance.scale,
    cfg_channels: CfgChannels = Guidance.channels,
    policy: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(POLICIES)}; then layer=bits or layer=bits:float, or {attention_of(_DIT)}=float. "
            f"Layers: {', '.join(_DIT.linears)}.",
            show_default=QuantConfig.policy,
        ),
    ] = None,
    step_groups: Annotated[
        int | None, typer.Option(help="Activation ranges per group of steps.", show_default=str(QuantConfig.step_groups))
    ] = None,
    dynamic: Annotated[
        str | None,
        typer.Option(
            help="Sites scaled per token at run time, comma-separated, or none.",
            show_default=",".join(name for name, site in _DIT.sites.items() if site.reduced),
        ),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="The paper's settings to the letter, but for the options above.")
    ] = False,
    row_batch: Annotated[int | None, typer.Option(help="Rows per calibration pass, to bound memory.")] = None,
    rounding: Annotated[
        str | None,
        typer.Option(
            help="Of the weights: nearest; gptq, in closed form from the inputs of each layer; or adaround, learned.",
            show_default="gptq, or adaround with --reconstruct; nearest with --paper",
        ),
    ] = None,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Learn roundings (AdaRound) and activation scales, block by block.")
    ] = False,
    iterations: Annotated[int, typer.Option(help="Iterations of --reconstruct for each block.")] = Reconstruction.iterations,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start --reconstruct over instead of going on where an earlier run stopped.")
    ] = False,
    keep_poor: Annotated[
        bool,
        typer.Option("--keep-poor", help=f"Write a model that predicts below {REFUSE_BELOW:g} dB of SQNR, too."),
    ] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: Json = None,
) -> None:
    """Quantizes a float model after training: calibrate, balance and fold, choose ranges, pack, save."""
    options: dict[str, Any] = {
        "weight_bits": weight_bits,
        "act_bits": act_bits,
        "ssc": ssc,
        "temperature": temperature,
        "calib_steps": calib_steps,
        "calib_rows": calib_rows,
        "sampler": sampler,
        "steps": steps,
        "eta": eta,
        "cfg_scale": cfg_scale,
        "cfg_channels": cfg_channels,
    }
    sites = None if dynamic is None else tuple(name.strip() for name in dynamic.split(",") if name.strip() not in ("", "none"))
    # None is the default of whichever settings are started from.
    given = {
        "balance": balance,
        "policy": policy,
        "step_groups": step_groups,
        "dynamic_sites": sites,
        "rounding": rounding,
    }
    options |= {name: value for name, value in given.items() if value is not None}
    if reconstruct or rounding == "adaround":
        options["reconstruction"] = Reconstruction(iterations=iterations)
    config = (QuantConfig.paper if paper else QuantConfig)(**cast(Any, options))
    key = read_key(seed)
    claim_target(context, out, overwrite, "config.json")
    state = None if config.learning is None else journal_beside(out)
    if state is not None:
        context.with_resource(claim(state))
        expect_journal(state, fresh=fresh)
    claim_target(context, json, overwrite=True)
    dit = load_model(model)
    if not isinstance(dit, FloatDiT):
        raise Ptq4ditError(f"{model} is quantized already; quantize the float model that it came from.")
    rows = None
    if calibration is None:
        config = config.resolve(dit.schedule, dit.config)
    else:
        with working(f"Reading {calibration}"):
            arrays = read_calibration(calibration, labelled=bool(dit.config.num_labels))
        rows = stored_rows(
            arrays["x"],
            arrays["t"],
            arrays.get("y"),
            config=dit.config,
            schedule=dit.schedule,
            layout=cast(Any, calibration_layout),
        )

    balanced = "weights only" if config.weights_only else f"balance {config.balance}"
    console.print(f"Quantizing {model} to {config.name} on {devices_line()}: {balanced}, policy {config.policy}")
    if rows is None:
        console.print(
            f"Calibrating on {config.calib_rows} rows at {config.calib_steps} steps of the chain: "
            f"{config.sampling.resolve(dit.schedule, dit.config)}"
        )
    else:
        console.print(calibration_line(rows, arrays["x"].size // int(np.prod(dit.config.image_shape))))
    started = time.perf_counter()
    with stages() as report, warnings.catch_warnings():
        warnings.simplefilter("ignore", PoorQuality)  # it is said below
        quantized = quantization.quantize(
            dit,
            config,
            key=key,
            calibration=rows,
            row_batch=row_batch,
            mesh=all_devices_mesh(),
            state=state,
            fresh=fresh,
            keep_poor=keep_poor,
            progress=report,
        )
    seconds = time.perf_counter() - started
    print_layers(describe(quantized))
    with working(f"Writing {out}"):
        where = checkpoints.save(quantized, out, provenance={"source": model, "seed": seed}, overwrite=overwrite)
    if state is not None and not forget_journal(state):
        console.print(f"The state of the reconstruction, which is of no more use, could not be removed: {state}")
    before, after = num_bytes(dit), num_bytes(quantized)
    console.print(f"{megabytes(before)} -> {megabytes(after)} ({before / after:.1f}x smaller) in {seconds:.1f} s")
    if (quality := Quality.of(quantized)) is not None:
        of = f"the predicted {dit.schedule.objective} on {quality.steps} x {quality.rows} calibration rows"
        console.print(f"Quality: {quality}, of {of}")
        if quality.is_poor:
            remedy = "use more bits, another policy or more rows"
            console.print(f"Warning: below {WARN_BELOW:g} dB samples are visibly worse; {remedy}.")
    console.print(f"Model: {where}")
    figures = {
        "float_bytes": before,
        "bytes": after,
        "seconds": seconds,
        "quality": quality and quality.to_dict(),
        "settings": quantized.provenance.facts["settings"],
    }
    write_json(json, {**figures, "layers": describe(quantized), "out": str(out)})


@app.command()
def sample(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="A .png grid, or an .npz in ADM's form (arr_0, uint8 NHWC).", show_default=False)],
    labels: Annotated[
        str | None, typer.Option(help="Class labels: 0-9, or 1,3,5-7; none of a model without classes.", show_default="0")
    ] = None,
    repeat: Repeat = 1,
    steps: Steps = None,
    sampler: SamplerOption = Sampling.sampler,
    eta: Eta = Sampling.eta,
    cfg_scale: CfgScale = Guidance.scale,
    cfg_channels: CfgChannels = Guidance.channels,
    guidance_interval: GuidanceInterval = None,
    batch_size: BatchSize = None,
    vae: Vae = None,
    vae_scale: VaeScale = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="auto (bfloat16 for a quantized model on a GPU or TPU, float32 for a model stored in float16), float32, "
            "bfloat16 or float16.",
            metavar="TYPE",
        ),
    ] = "auto",
    backend: Annotated[str, typer.Option(help=f"What runs integer products: {', '.join(choice.names())}.")] = "auto",
    noise: Annotated[
        Path | None,
        typer.Option(help="An npz with noise (N, H, W, C) and, if wanted, step_noise (S, N, H, W, C).", metavar="FILE"),
    ] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: Json = None,
) -> None:
    """Samples images from a float or quantized model, the whole chain in one compiled program."""
    if out.suffix not in (".png", ".npz"):
        raise Ptq4ditError(f"--out must end in .png or .npz, not {out.name!r}.")
    key = read_key(seed)
    claim_target(context, out, overwrite)
    claim_target(context, json, overwrite=True)
    # Mistakes in these cost no loading.
    parse_labels("0" if labels is None else labels, repeat)
    choice.checked(backend)
    interval = cast(Any, parse_interval(guidance_interval))
    how = Sampling(sampler, steps, eta, Guidance(cfg_scale, cast(Any, cfg_channels), interval))
    loaded = to_run(load_model(model), dtype, backend)
    wanted = wanted_labels(labels, "0", repeat, loaded.config)
    channels = loaded.config.in_channels
    if vae is None and out.suffix == ".png" and channels not in (1, 3):
        raise Ptq4ditError(
            f"{model} makes latents of {channels} channels, not pictures; pass its VAE with --vae, or use an "
            "--out that ends in .npz."
        )
    resolved = how.resolve(loaded.schedule, loaded.config)
    decoder = None if vae is None else load_vae(vae, vae_scale)
    named = wanted if loaded.config.num_labels else None
    columns = len(wanted) // repeat if repeat > 1 and named is not None else None
    if out.suffix == ".png":
        side = loaded.config.input_size * (1 if decoder is None else decoder.config.factor)
        check_picture(len(wanted), side, side, columns)
    given = {} if noise is None else read_arrays(noise, ("noise",), ("step_noise",))
    console.print(f"Sampling {len(wanted)} images from {model} on {devices_line()}, {runs_line(loaded)}: {resolved}")
    started = time.perf_counter()
    with stages() as report:
        report("sample", 0, len(wanted))
        batches = sampling.sample_batches(
            cast(Any, loaded),
            wanted,
            key,
            sampling=how,
            batch_size=batch_size,
            decoder=decoder,
            mesh=all_devices_mesh(),
            **given,
        )

        def images() -> Iterator[np.ndarray]:
            for start, batch in batches:
                report("sample", start + len(batch), len(wanted))
                yield batch

        if out.suffix == ".png":
            where = write_file(out, lambda file: write_picture(file, images(), columns), overwrite=overwrite)
        else:
            where = write_file(out, lambda file: write_samples(file, images(), len(wanted), named), overwrite=overwrite)
    seconds = time.perf_counter() - started
    console.print(f"{len(wanted)} images in {seconds:.1f} s, compilation included")
    console.print(f"Images: {where}")
    write_json(
        json,
        {
            "images": len(wanted),
            "seconds": seconds,
            **resolved.to_dict(),
            "seed": seed,
            "out": str(out),
        },
    )


@app.command()
def evaluate(
    context: typer.Context,
    model: ModelArgument,
    against: Annotated[str, typer.Option(help="The float model to compare with.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the report: Markdown, plots, JSON.", show_default=False)] = Path(
        "report"
    ),
    labels: Annotated[
        str | None, typer.Option(help="Class labels: 0-9, or 1,3,5-7; all classes by default, none of a model without.")
    ] = None,
    repeat: Repeat = 4,
    steps: Steps = None,
    sampler: SamplerOption = Sampling.sampler,
    eta: Eta = Sampling.eta,
    cfg_scale: CfgScale = Guidance.scale,
    cfg_channels: CfgChannels = Guidance.channels,
    guidance_interval: GuidanceInterval = None,
    batch_size: BatchSize = None,
    vae: Vae = None,
    vae_scale: VaeScale = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: Json = None,
) -> None:
    """Measures a model against the float model on the same noise and writes a report with pictures."""
    key = read_key(seed)
    claim_target(context, out, overwrite, "report.json")
    claim_target(context, json, overwrite=True)
    interval = cast(Any, parse_interval(guidance_interval))
    how = Sampling(sampler, steps, eta, Guidance(cfg_scale, cast(Any, cfg_channels), interval))
    reference, other = load_model(against), load_model(model)
    if not isinstance(reference, FloatDiT):
        raise Ptq4ditError(f"--against must be a float model; {against} is quantized.")
    decoder = None if vae is None else load_vae(vae, vae_scale)
    wanted = wanted_labels(labels, f"0-{min(reference.config.num_classes, 64) - 1}", repeat, reference.config)
    sampling.check_labels(wanted, reference.config)
    name = Path(model).resolve().name
    if decoder is not None:
        decoder.check_channels(reference.config.in_channels)
    resolved = how.resolve(reference.schedule, reference.config)
    console.print(f"Comparing {model} with {against} on {devices_line()}: {len(wanted)} images, {resolved}")
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
            progress=lambda done, total: report("sample on the same noise", done, total),
            stage=report,
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
            settings={"model": model, "against": against, "seed": seed} | ({} if vae is None else {"vae": vae}),
            reconstruction=made.get("reconstruction"),
            rounding=made.get("rounding"),
            balancing=made.get("balancing"),
            overwrite=overwrite,
        )
    print_table(
        f"Same noise, against the float model; SQNR of predicted {reference.schedule.objective}",
        [
            {
                "model": key,
                SQNR_MEAN: f.sqnr_mean_db,
                SQNR_POOLED: f.sqnr_pooled_db,
                "PSNR (dB)": f.psnr_interval.mean,
                "SSIM": f.ssim_interval.mean,
                "size": megabytes(f.num_bytes),
            }
            for key, f in comparison.figures.items()
        ],
    )
    console.print(f"Report: {where / 'report.md'}")
    write_json(json, plain(comparison.to_json()))


def main(arguments: list[str] | None = None) -> int:
    """Runs the program and returns its exit status; a user's mistake becomes one sentence on stderr and 1."""
    return ending.status_of(lambda: app(args=arguments, prog_name="ptq4dit", standalone_mode=True))


def entry() -> NoReturn:
    """The console script, which ends the process."""
    ending.run(lambda: sys.exit(main()))


if __name__ == "__main__":
    entry()
