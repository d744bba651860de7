"""What a checkpoint says about itself decides its import, is refused by name, or is named; what it does not say is a guess."""

import argparse
import json
import shutil
from types import SimpleNamespace

import foreign_files
import numpy as np
import pytest
import yaml
from foreign_files import DIFFUSERS, META, save_safetensors, write_pickle
from mutations import mutated_bytes

from ptq4dit_jax.checkpoints.foreign import import_checkpoint, open_tensors
from ptq4dit_jax.checkpoints.foreign.evidence import CONFIG_FILES
from ptq4dit_jax.schedules import FlowSchedule, NoiseSchedule


@pytest.fixture(scope="module")
def meta():
    """Width 24, depth 2, patch 2, 8 x 8 x 4, 11 rows of labels, learned sigma; by Meta's names."""
    return {name.removeprefix("ema."): t.read() for name, t in open_tensors(META).items() if name.startswith("ema.")}


@pytest.fixture
def with_args(meta, tmp_path):
    """Imports a training script's file with these arguments."""

    def imported(arguments, **options):
        path = write_pickle(tmp_path / "last.pkl", {"ema": meta, "args": argparse.Namespace(**arguments), "epoch": 3})
        return import_checkpoint(path, **{"num_heads": 3, **options})

    return imported


def guesses(found):
    return [note for note in found.notes if note.startswith("Guess")]


@pytest.mark.parametrize(
    ("arguments", "schedule"),
    [
        ({"path_type": "Linear", "prediction": "velocity"}, FlowSchedule()),
        ({"model": "SiT-XS/2"}, FlowSchedule()),
        ({"path_type": "linear", "prediction": "v", "proj_coeff": 0.5, "enc_type": "dinov2-vit-b"}, FlowSchedule(data_time=0)),
        ({"noise_schedule": "linear", "diffusion_steps": 400}, NoiseSchedule(num_timesteps=400)),
        ({"prediction_type": "epsilon", "beta_start": 1e-3, "beta_end": 0.01}, NoiseSchedule(beta_start=1e-3, beta_end=0.01)),
    ],
)
def test_the_objective_of_a_script(arguments, schedule, with_args):
    model, found = with_args(arguments)
    assert model.schedule == schedule
    assert not any("predicts" in guess for guess in guesses(found)) or isinstance(schedule, NoiseSchedule)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"path_type": "VP"}, ("args.path_type = 'VP'", "straight path", "--ignore path_type")),
        ({"prediction": "score"}, ("args.prediction = 'score'", "--ignore prediction")),
        ({"path_type": "Linear", "prediction": "noise"}, ("args.prediction (noise)", "args.path_type", "only velocity")),
        ({"noise_schedule": "squaredcos_cap_v2"}, ("noise_schedule", "linear schedule")),
        ({"predict_xstart": True}, ("args.predict_xstart = True",)),
        ({"parameterization": "v"}, ("args.parameterization (v)", "v of a noise schedule", "--objective velocity")),
        ({"use_rope": True}, ("args.use_rope = True", "another network")),
        ({"qk_norm": "rms"}, ("args.qk_norm (True)", "norms of queries and keys False", "--ignore qk_norm")),
        ({"act_layer": "silu"}, ("args.act_layer = 'silu'", "GELU")),
        ({"norm_eps": 1e-5}, ("args.norm_eps = 1e-05", "1e-6")),
        ({"norm_eps": 2**1100}, ("args.norm_eps", "1e-6")),  # more than a float holds
        ({"beta_start": 2**1100}, ("args.beta_start", "no number of at least 0")),
        ({"pos_embed_type": "rope2d"}, ("pos_embed_type = 'rope2d'",)),
        ({"model": "LightningDiT-XS/2"}, ("LightningDiT", "'lightningdit'", "--ignore model")),
        ({"model": "DiT-B/2"}, ("args.model", "depth 2, width 24")),
        ({"hidden_size": 32}, ("args.hidden_size (32)", "width 24", "--ignore hidden_size")),
        ({"depth": 12}, ("args.depth (12)", "depth 2")),
        ({"learn_sigma": False}, ("args.learn_sigma", "learned variance True")),
        ({"num_classes": 7}, ("args.num_classes (7)", "11 rows")),
        ({"num_classes": 10, "class_dropout_prob": 0.0}, ("args.num_classes (10)", "without a null class")),
        ({"num_heads": 4}, ("has 4 as its number of heads", "not 3")),
        ({"head_dim": 7}, ("args.head_dim (7)", "24 is no multiple")),
        ({"head_dim": 6, "num_heads": 3}, ("args.num_heads (3)", "args.head_dim (6)")),
        ({"latent_size": 16}, ("args.latent_size (16)", "8 x 8")),
        ({"num_heads": "several"}, ("args.num_heads = 'several'", "no whole number")),
    ],
)
def test_evidence_that_is_refused(arguments, parts, with_args, raises_sentence):
    with raises_sentence(*parts):
        with_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "classes", "null"),
    [
        ({"num_classes": 11}, 11, False),
        ({"num_classes": 10}, 10, True),
        ({"class_dropout_prob": 0.0}, 11, False),
        ({"cfg_prob": 0.1}, 10, True),
    ],
)
def test_classes_and_dropout_decide(arguments, classes, null, with_args):
    config, found = with_args(arguments)[0].config, with_args(arguments)[1]
    assert (config.num_classes, config.null_class) == (classes, null)
    assert not any("labels" in guess for guess in guesses(found))


def test_options_say_what_the_file_does_not(with_args, raises_sentence):
    config = with_args({}, null_class=False)[0].config
    assert (config.num_classes, config.null_class) == (11, False)
    config = with_args({}, classes=10)[0].config
    assert (config.num_classes, config.null_class) == (10, True)
    assert with_args({}, timesteps=250, beta_end=0.03)[0].schedule == NoiseSchedule(num_timesteps=250, beta_end=0.03)
    assert with_args({}, objective="velocity", data_time=0)[0].schedule == FlowSchedule(data_time=0)
    with raises_sentence("11 rows", "you say 9 classes", "correct the option"):
        with_args({}, classes=9)
    with raises_sentence("args.path_type", "you say that it predicts noise"):
        with_args({"path_type": "Linear"}, objective="noise")
    with raises_sentence("args.diffusion_steps (400)", "you say 500"):
        with_args({"diffusion_steps": 400}, timesteps=500)


def test_every_guess_names_its_option(with_args):
    _, found = with_args({})
    text = " ".join(guesses(found))
    for option in ("--classes", "--no-null-class", "--objective", "--timesteps", "--beta-start"):
        assert option in text
    _, found = with_args({"num_classes": 10, "prediction_type": "epsilon", "diffusion_steps": 1000})
    assert guesses(found) == []


def test_unknown_keys_are_named_and_harmless_ones_are_not(with_args):
    harmless = {"lr": 1e-4, "global_batch_size": 256, "wandb_project": "x", "vae": "ema", "num_workers": 4, "results_dir": "r"}
    _, found = with_args({**harmless, "window_size": 7, "time_shift": 3.0})
    [note] = [note for note in found.notes if note.startswith("Not understood")]
    assert "args.window_size = 7" in note
    assert "args.time_shift = 3.0" in note
    assert not any(key in note for key in harmless)


def test_ignoring_evidence(with_args, raises_sentence):
    model, found = with_args({"path_type": "GVP", "num_classes": 7}, ignore=["path_type", "num_classes"])
    assert model.schedule == NoiseSchedule()
    assert "path" not in found.evidence
    with raises_sentence("named path_tpye", "cannot be ignored"):
        with_args({"path_type": "Linear"}, ignore=["path_tpye"])


SAID = {"model": {"num_heads": 3, "num_classes": 11, "_target_": "models.DiT"}, "vae": {"in_channels": 3, "num_heads": 5}}


@pytest.mark.parametrize("name", ["config.json", "hparams.yaml", "args.yml", "model.json"])
def test_configurations_beside_the_weights(name, meta, tmp_path):
    save_safetensors(tmp_path / "model.safetensors", meta)
    (tmp_path / name).write_text(json.dumps(SAID) if name.endswith("json") else yaml.safe_dump(SAID))
    model, found = import_checkpoint(tmp_path)
    assert (model.config.num_heads, model.config.num_classes, model.config.null_class) == (3, 11, False)
    assert found.evidence["number of heads"] == f"{name}: model.num_heads (3)"


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_an_index_is_no_configuration(index, meta, tmp_path):
    places = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(meta)}
    for shard in set(places.values()):
        save_safetensors(tmp_path / shard, {name: meta[name] for name, place in places.items() if place == shard})
    (tmp_path / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    for path in (tmp_path, tmp_path / index):
        assert not any("Not understood" in note for note in import_checkpoint(path, num_heads=3)[1].notes)


def test_a_file_of_the_working_directory(meta, tmp_path, monkeypatch):
    save_safetensors(tmp_path / "x.safetensors", meta)
    (tmp_path / "config.json").write_text('{"num_heads": 3}')
    monkeypatch.chdir(tmp_path)
    assert import_checkpoint("x.safetensors")[1].evidence["number of heads"] == "config.json: num_heads (3)"


def test_a_configuration_of_the_run(meta, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    folder.mkdir()
    (tmp_path / "run" / ".hydra" / "config.yaml").write_text("network: {num_heads: 3, class_dropout_prob: 0}")
    save_safetensors(folder / "0001000.safetensors", meta)
    assert import_checkpoint(folder / "0001000.safetensors")[0].config.num_classes == 11


def test_metadata_of_safetensors(meta, tmp_path):
    path = save_safetensors(tmp_path / "x.safetensors", meta)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = {"config": json.dumps({"num_heads": 3, "num_classes": 11}), "format": "pt"}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    model, found = import_checkpoint(path)
    assert (model.config.num_heads, model.config.num_classes) == (3, 11)
    assert found.evidence["classes"] == "metadata.config.num_classes (11)"


def test_settings_of_a_pickle_in_other_containers(meta, tmp_path):
    omegaconf, ml_collections = {"_content": {"num_heads": {"_val": 3}}}, SimpleNamespace(_fields={"num_heads": 3})
    nested = {"network": {"params": {"n_heads": 3}}}
    for settings in ({"num_heads": 3}, SimpleNamespace(num_heads=3), nested, omegaconf, ml_collections):
        path = write_pickle(tmp_path / "x.pkl", {"state_dict": meta, "hyper_parameters": settings})
        assert import_checkpoint(path)[0].config.num_heads == 3


WORDS = [
    "train.py",
    "--num-heads",
    "3",
    "--num_classes=11",
    "--class-names",
    "a",
    "b",
    "model.hidden_size=24",
    "--verbose",
    "-x",
    "-1",
]


@pytest.mark.parametrize(
    "arguments",
    [WORDS, tuple(WORDS), [*WORDS, *(f"--lr{i}" for i in range(60))], json.dumps({"num_heads": 3, "num_classes": 11})],
)
def test_arguments_that_are_kept_as_text(arguments, meta, tmp_path, raises_sentence):
    path = write_pickle(tmp_path / "x.pkl", {"ema": meta, "args": arguments})
    config = import_checkpoint(path)[0].config
    assert (config.num_heads, config.num_classes, config.null_class) == (3, 11, False)
    with raises_sentence("args.num", "--ignore num_heads"):
        import_checkpoint(write_pickle(path, {"ema": meta, "args": arguments, "config": {"num_heads": 4}}))


def test_text_that_is_no_arguments(meta, tmp_path):
    long = json.dumps({"num_heads": 3, "notes": "x" * 5000})
    assert import_checkpoint(write_pickle(tmp_path / "x.pkl", {"ema": meta, "args": long}))[0].config.num_heads == 3
    for text in ("{num_heads: 3", '{"num_heads": 3, "num_heads": 3}', "{" * 5000):
        _, found = import_checkpoint(write_pickle(tmp_path / "x.pkl", {"ema": meta, "args": text}), num_heads=3)
        assert any("Not understood: args.text" in note for note in found.notes)


def test_two_sources_that_disagree(meta, tmp_path, raises_sentence):
    path = write_pickle(tmp_path / "x.pkl", {"ema": meta, "args": {"num_heads": 3}})
    (tmp_path / "config.json").write_text('{"num_heads": 4}')
    with raises_sentence("args.num_heads (3)", "config.json: num_heads (4)", "--ignore num_heads"):
        import_checkpoint(path)
    assert import_checkpoint(path, ignore=["config.json"])[0].config.num_heads == 3


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("config.json", b"{", "no"),
        ("config.yaml", b"a: [1", "YAML of plain values"),
        ("metadata.json", b'{"step": 1}\n{"step": 2}\n', "not valid JSON"),
        ("options.json", b'{"lr": 1 // the rate\n}', "not valid JSON"),
        ("hparams.yaml", b"a: &a [*a]", "nests"),
        ("model_config.json", b'{"depth": 2, "depth": 3}', "'depth' is there twice"),
        pytest.param("args.json", b" " * (2**22 + 1), "larger than any configuration", id="4 MiB"),
    ],
)
def test_configurations_that_cannot_be_read(name, content, part, meta, tmp_path, raises_sentence):
    path = save_safetensors(tmp_path / "x.safetensors", meta)
    (tmp_path / name).write_bytes(content)
    with raises_sentence(name, part, f"--ignore {name}"):
        import_checkpoint(path, num_heads=3)
    assert import_checkpoint(path, num_heads=3, ignore=[name])[0].config.num_heads == 3


def test_objects_of_python_in_yaml_are_plain_values(meta, tmp_path):
    path = save_safetensors(tmp_path / "x.safetensors", meta)
    lines = (
        "num_heads: !!python/tuple [3, 3]",
        "run: !!python/object/apply:os.system ['touch ran']",
        "args: !!python/object:a.B {num_classes: 11}",
    )
    (tmp_path / "hparams.yaml").write_text("\n".join(lines))
    model, _ = import_checkpoint(path)
    assert (model.config.num_heads, model.config.num_classes) == (3, 11)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_classes": None, "head_dim": "None", "path_type": "", "prediction": "???", "beta_start": "null"},
        {"vae": {"embed_dim": 4}, "projector": {"hidden_dim": 9}, "fid": {"image_size": 299}, "encoder": {"num_classes": 0}},
        {"image_size": "64x64", "latent_size": "8, 8", "num_experts": 0},
        {"model": {"num_heads": "${num_heads}"}, "loss_type": "mse", "dtype": "bf16"},
        {"model": "DiT-XS/2", "arch": "DiT_XS_2"},
        {"image_size": 28},
    ],
)
def test_settings_that_say_nothing_against_it(settings, meta, tmp_path):
    path = save_safetensors(tmp_path / "x.safetensors", meta)
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 3, **settings}))
    assert import_checkpoint(path)[0].config.num_classes == 10


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"model": {"name": "SiT-B/2"}}, "depth 2"),
        ({"noise_schedule": {"name": "cosine"}}, "linear schedule"),
        ({"activation": {"type": "silu"}}, "GELU"),
        ({"linear_start": 0.0015, "linear_end": 0.0195}, "latent-diffusion"),
        ({"enforce_zero_terminal_snr": True}, "linear schedule"),
        ({"mlp_ratio": "-"}, "no number"),
        ({"depth": float("nan")}, "no whole number"),
        ({"depth": float("inf")}, "no whole number"),
    ],
)
def test_other_spellings_that_are_refused(settings, part, meta, tmp_path, raises_sentence):
    path = save_safetensors(tmp_path / "x.safetensors", meta)
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 3, **settings}))
    with raises_sentence("config.json", part, "--ignore"):
        import_checkpoint(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"noise_scheduler": "cosine"},
        {"timestep_scaling_factor": 1000},
        {"loss_target": "x0"},
        {"attn_scaling": 2.0},
        {"scheduler": "FlowMatchEuler"},
        {"activation": "gelu"},
    ],
)
def test_suspicious_settings_are_named(settings, meta, tmp_path):
    path = save_safetensors(tmp_path / "x.safetensors", meta)
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 3, **settings}))
    [(key, value)] = settings.items()
    assert any(key in note and str(value) in note for note in import_checkpoint(path)[1].notes)


def test_a_configuration_of_another_network_is_left_out(meta, tmp_path):
    path = save_safetensors(tmp_path / "x.safetensors", meta)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "in_channels": 3, "act_fn": "silu"}))
    _, found = import_checkpoint(path, num_heads=3)
    assert any("AutoencoderKL" in note for note in found.notes)


def test_numbers_kept_as_arrays_and_classes_as_values(meta, tmp_path, raises_sentence):
    settings = {"num_classes": np.int64(11), "num_heads": np.array(3)}
    assert import_checkpoint(write_pickle(tmp_path / "x.pkl", {"ema": meta, "args": settings}))[0].config.num_classes == 11
    path = write_pickle(tmp_path / "y.pkl", {"ema": meta, "args": {"num_heads": 3, "act_layer": argparse.Namespace}})
    with raises_sentence("argparse.Namespace", "GELU"):
        import_checkpoint(path)


def test_a_table_of_labels_that_is_gone_is_no_unconditional_model(meta, tmp_path, raises_sentence):
    arrays = {name: array for name, array in meta.items() if not name.startswith("y_embedder")}
    path = write_pickle(tmp_path / "x.pkl", {"ema": arrays, "args": {"num_classes": 10}})
    with raises_sentence("args.num_classes (10)", "no table of labels"):
        import_checkpoint(path, num_heads=3)


def test_tables_of_a_schedule_beside_the_weights(meta, tmp_path, raises_sentence):
    linear = NoiseSchedule().betas.astype(np.float32)
    buffers = {"betas": linear, "alphas_cumprod": np.cumprod(1 - linear), "n_averaged": np.int64(3)}
    assert import_checkpoint(write_pickle(tmp_path / "x.pkl", {**meta, **buffers}), num_heads=3)[0].schedule == NoiseSchedule()
    scaled = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    path = write_pickle(tmp_path / "y.pkl", {**meta, "betas": scaled})
    with raises_sentence("betas", "--beta-start", "--ignore betas"):
        import_checkpoint(path, num_heads=3)
    assert import_checkpoint(path, num_heads=3, ignore=["betas"])[0].schedule == NoiseSchedule()


def test_what_is_not_read_beside_the_weights_is_named(meta, tmp_path):
    tree = {"ema": meta, "history": np.array([None], object), "args": {"num_heads": 3}}
    _, found = import_checkpoint(write_pickle(tmp_path / "x.pkl", tree))
    assert "Not read, as nothing here understands it: 1 x numpy.ndarray." in found.notes


def test_something_among_the_weights_that_cannot_be_read(meta, tmp_path, raises_sentence):
    tree = {"ema": {**meta, "freqs": np.array([None], object)}}
    with raises_sentence("among its weights", "ema.freqs", "numpy.ndarray"):
        import_checkpoint(write_pickle(tmp_path / "x.pkl", tree), num_heads=3)


def test_a_scheduler_beside_weights_of_other_names(meta, tmp_path, raises_sentence):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "scheduler").mkdir()
    path = save_safetensors(tmp_path / "transformer" / "x.safetensors", meta)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    with raises_sentence("FlowMatchEulerDiscreteScheduler"):
        import_checkpoint(path, num_heads=3)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "DDPMScheduler", "num_train_timesteps": 400}'
    )
    assert import_checkpoint(path, num_heads=3)[0].schedule == NoiseSchedule(num_timesteps=400)
    (tmp_path / "transformer_ema").mkdir()
    with raises_sentence("transformer_ema", "--model-weights"):
        import_checkpoint(path, num_heads=3)


def test_training_steps_are_no_steps_of_a_mean_flow(tmp_path):
    params, _ = foreign_files.flow("meanflow")
    tree = foreign_files.nested(params, "/")
    path = write_pickle(tmp_path / "x.pkl", {"ema_params": tree, "config": {"num_timesteps": 1000, "denoise_timesteps": 0}})
    model, found = import_checkpoint(path, num_heads=2, input_size=8, ignore=["denoise_timesteps"])
    assert model.schedule.steps == 1
    assert any("num_timesteps (1000) is not used" in note for note in found.notes)


def test_mutated_configurations_are_harmless(meta, tmp_path):
    from test_mutations import survives

    path, rng = save_safetensors(tmp_path / "x.safetensors", meta), np.random.default_rng(0)
    content = yaml.safe_dump({**SAID, "a": [1, 2, {"b": "c"}], "objective": "noise"}).encode()
    for i in range(60):
        (tmp_path / ("config.yaml" if i % 2 else "config.json")).write_bytes(mutated_bytes(content, rng))
        survives(path, lambda path: import_checkpoint(path, num_heads=3))


def test_the_size_of_a_file_without_positions(meta, tmp_path):
    arrays = {name: array for name, array in meta.items() if name != "pos_embed"}
    path = write_pickle(tmp_path / "x.pkl", {"ema": arrays, "args": {"image_size": 64}})
    model, found = import_checkpoint(path, num_heads=3)
    assert model.config.input_size == 8
    assert any("args.image_size = 64" in guess and "--input-size" in guess for guess in guesses(found))
    assert import_checkpoint(path, num_heads=3, input_size=16)[0].config.input_size == 16


def with_json(folder, file, **changes):
    content = {**json.loads((folder / file).read_text()), **changes}
    (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


SCHEDULER, TRANSFORMER = "scheduler/scheduler_config.json", "transformer/config.json"


@pytest.mark.parametrize(
    ("file", "changes", "part"),
    [
        (SCHEDULER, {"clip_sample": True}, "clip_sample = True"),
        (SCHEDULER, {"thresholding": True}, "thresholding = True"),
        (SCHEDULER, {"variance_type": "fixed_large"}, "'fixed_large'"),
        (SCHEDULER, {"trained_betas": [0.1, 0.2]}, "trained_betas"),
        (SCHEDULER, {"_class_name": "LCMScheduler"}, "'LCMScheduler'"),
        (SCHEDULER, {"_class_name": "FlowMatchHeunDiscreteScheduler"}, "'FlowMatchHeunDiscreteScheduler'"),
        (SCHEDULER, {"use_flow_sigmas": True}, "use_flow_sigmas = True"),
        (SCHEDULER, {"brand_new": 3}, "brand_new = 3, which this version does not understand"),
        (TRANSFORMER, {"_class_name": "PixArtTransformer2DModel"}, "'PixArtTransformer2DModel'"),
        (TRANSFORMER, {"caption_channels": 4096}, "caption_channels = 4096"),
        (TRANSFORMER, {"num_embeds_ada_norm": 11, "attention_head_dim": 12}, "11"),
        (TRANSFORMER, {"attention_head_dim": 8}, "attention_head_dim"),
        (TRANSFORMER, {"num_layers": 3}, "depth 2"),
        (TRANSFORMER, {"use_rope": True}, "use_rope = True, which this version does not understand"),
        (TRANSFORMER, {"norm_eps": "small"}, "norm_eps"),
    ],
)
def test_a_diffusers_folder(file, changes, part, tmp_path, raises_sentence):
    folder = shutil.copytree(DIFFUSERS, tmp_path / "pipeline")
    with_json(folder, file, **changes)
    if part == "11":  # eleven classes and a table of eleven rows: no null class
        assert import_checkpoint(folder)[0].config.num_classes == 11
        return
    with raises_sentence(part, "--ignore"):
        import_checkpoint(folder)


def test_what_a_scheduler_does_not_change(tmp_path):
    folder = shutil.copytree(DIFFUSERS, tmp_path / "pipeline")
    with_json(folder, SCHEDULER, timestep_spacing="trailing", use_karras_sigmas=True, _class_name="DPMSolverMultistepScheduler")
    model, found = import_checkpoint(folder)
    assert model.schedule == NoiseSchedule(num_timesteps=500, beta_start=2e-4, beta_end=0.03)
    assert [sum(key in note for note in found.notes) for key in ("timestep_spacing", "use_karras_sigmas")] == [1, 1]
    with_json(folder, SCHEDULER, clip_sample=True)
    assert import_checkpoint(folder, ignore=["clip_sample"])[0].schedule == model.schedule


def test_the_betas_that_a_class_means(tmp_path):
    folder = shutil.copytree(DIFFUSERS, tmp_path / "pipeline")
    with_json(folder, SCHEDULER, beta_start="absent", beta_end="absent", num_train_timesteps="absent")
    assert import_checkpoint(folder)[0].schedule == NoiseSchedule()
    with_json(folder, SCHEDULER, _class_name="HeunDiscreteScheduler")
    assert import_checkpoint(folder)[0].schedule == NoiseSchedule(beta_start=0.00085, beta_end=0.012)


def test_shortcut_models_say_their_steps(tmp_path):
    params, _ = foreign_files.flow("shortcut")
    tree = foreign_files.nested(params, "/")
    for settings, steps in (({"denoise_timesteps": 64}, 64), ({"train_type": "naive", "denoise_timesteps": 64}, 0)):
        path = write_pickle(tmp_path / "x.pkl", {"params_ema": tree, "config": settings})
        model, _ = import_checkpoint(path, num_heads=2, input_size=8)
        assert model.schedule == FlowSchedule(data_time=1, steps=steps)


def test_the_names_of_configurations_are_files():
    assert "config.json" in CONFIG_FILES
    assert len(set(CONFIG_FILES)) == len(CONFIG_FILES)
