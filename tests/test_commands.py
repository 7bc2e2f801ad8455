"""The commands as a user types them: short real runs, the pictures they leave, and one line for every mistake."""
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing import assert_close

from checkpoint import load_model
from config import RECIPES, Config, read_config

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--image_size 8 --model TiT-XXS/8 --batch_size 16 --steps 3 --sample_every 2 --log_every 1 --held_out 16 --compile no".split()


def run(script, *words, capsys=None):
    """Run a script as __main__ in this process; returns exit status, stdout, stderr."""
    argv, sys.argv = sys.argv, [script, *map(str, words)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv = argv
    return (status, *capsys.readouterr())


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(home, capsys):
    status, out, err = run("train.py", *SMALL, capsys=capsys)
    assert status == 0, err
    return home / "runs/shapes", out


def test_train_leaves_pictures_a_log_and_a_model(trained):
    folder, out = trained
    assert sorted(p.name for p in folder.glob("grid*.png")) == ["grid_0000000.png", "grid_0000002.png", "grid_0000003.png"]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3] and all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert "batch 16 = 1 process x 1 accumulation step x 16 pictures" in out
    assert "python sample.py --ckpt" in out.strip().splitlines()[-1] and "--recipe shapes-few" in out.strip().splitlines()[-1]
    net, config, names = load_model(folder)
    assert config.model == "TiT-XXS/8" and config.steps == 3 and len(names) == 8 and not net.training
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"])["recipe"] == "shapes"


def test_the_whole_job_few_step_from_many_step_then_two_step_pictures(trained, capsys):
    folder, _ = trained
    status, out, err = run("train.py", "--recipe", "shapes-few", *SMALL, capsys=capsys)
    assert status == 0, err
    status, out, err = run("sample.py", "--steps", 2, "--num", 10, capsys=capsys)
    assert status == 0 and "runs/shapes-few" in out and "NFE 2 " in out and "images/s" in out      # the newest run
    assert Image.open("samples.png").size[0] > 100
    status, out, err = run("sample.py", "--ckpt", folder, "--steps", 6, "--cfg_scale", 2, "--trajectory", "yes", "--num", 3, "--out", "strip.png", capsys=capsys)
    assert status == 0 and "NFE 12 " in out and Image.open("strip.png").size[0] == 6 * 68 - 4


PLAIN = "--data_output no --enhancement_ratio 0 --enhancement_style none".split()


@pytest.mark.parametrize("extra", [
    "--data_output yes --enhancement_ratio 0.5 --enhancement_style ft-vs-fe", "--consistency_ratio 0.5", "--consistency_ratio 1 --derivative jvp",
    "--transport ddpm --gap 0.01,0.001", "--transport edm --huber 0.5 --cosine yes --weight none", "--optimizer radam --clip 0",
    "--micro_batch 16 --batch_size 48", "--labels none", "--labels star", "--transport x-prediction", "--dtype bfloat16", "--dtype float32",
    "--grad_checkpoint yes", "--ema 0.9,0.99", "--order 2 --extrapolation 0", "--model DiT-XXS/8", "--beta 0.8,1,1 --label_drop 0"])
def test_every_switch_trains(home, capsys, extra):
    status, out, err = run("train.py", *SMALL, *PLAIN, *extra.split(), capsys=capsys)
    assert status == 0, err
    assert len(list((home / "runs/shapes").glob("grid*.png"))) == 3


def test_other_data_train_too(home, capsys):
    rng = np.random.default_rng(0)
    np.savez("d.npz", x=rng.integers(0, 256, (20, 28, 28), dtype=np.uint8), y=np.arange(20) % 10)
    for label in "ab":
        Path(f"pictures/{label}").mkdir(parents=True)
        for k in range(8):
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(f"pictures/{label}/{k}.png")
    assert run("train.py", *SMALL[4:], "--data", "npz:d.npz", "--model", "TiT-XXS/4", "--out", "npz", capsys=capsys)[0] == 0
    assert run("train.py", *SMALL, "--data", "folder:pictures", "--out", "folder", "--workers", "1", capsys=capsys)[0] == 0
    assert load_model("folder")[2] == ["a", "b"] and load_model("npz")[0].in_channels == 1


def test_same_seed_same_weights_and_micro_batches_do_not_matter(home, capsys):
    weights = {}
    for out, extra in (("a", ""), ("b", ""), ("c", "--micro_batch 16"), ("d", "--seed 1")):
        assert run("train.py", *SMALL, "--batch_size", 48, "--dtype", "float32", "--out", out, *extra.split(), capsys=capsys)[0] == 0
        weights[out] = torch.cat([p.flatten() for p in load_model(out)[0].parameters()])
    assert_close(weights["a"], weights["b"], rtol=0, atol=0)
    assert (weights["a"] - weights["c"]).norm() < 1e-6 * weights["a"].norm() < (weights["a"] - weights["d"]).norm()


def test_picture_k_depends_on_seed_k_alone(trained, capsys):
    folder, _ = trained
    from sample import noise_like_seed
    assert_close(noise_like_seed([3, 5], (3, 8, 8))[1], noise_like_seed([5], (3, 8, 8))[0], rtol=0, atol=0)
    assert_close(noise_like_seed([3, 5], (3, 8, 8), 2)[1], noise_like_seed([5], (3, 8, 8), 2)[0], rtol=0, atol=0)
    sheets = []
    for extra in ("--seeds 0-11", "--seeds 0-11 --batch_size 5", "--num 12 --batch_size 1"):
        assert run("sample.py", "--ckpt", folder, "--stochasticity", 1, "--extrapolation", 0, "--steps", 3, "--classes", "star", "--dtype", "float32",
                   "--out", "s.png", *extra.split(), capsys=capsys)[0] == 0
        sheets.append(np.asarray(Image.open("s.png")).astype(int))
    assert abs(sheets[0] - sheets[1]).max() <= 1 and abs(sheets[0] - sheets[2]).max() <= 1
    drawn = []
    for extra in ("--num 8", "--seeds 5,3"):        # the class too, and in arrays
        assert run("sample.py", "--ckpt", folder, "--steps", 3, "--dtype", "float32", "--batch_size", 3, "--out", "s.npz", *extra.split(), capsys=capsys)[0] == 0
        drawn.append(np.load("s.npz"))
    assert drawn[1]["labels"].tolist() == [5, 3] and drawn[0]["labels"].tolist() == list(range(8)) and drawn[0]["arr_0"].shape[0] == 8
    assert abs(drawn[0]["arr_0"][[5, 3]].astype(int) - drawn[1]["arr_0"]).max() <= 1


def test_the_shipped_model_draws(home, capsys):
    status, out, err = run("sample.py", "--steps", 2, "--num", 8, capsys=capsys)
    assert status == 0 and "assets" in out, err
    assert (ROOT / "assets/shapes-few.safetensors").stat().st_size < 6_000_000
    assert all(path.stat().st_size < 500_000 for path in (ROOT / "assets").glob("features-*.safetensors"))


# ---- mistakes -----------------------------------------------------------------------------------------------------

def damaged_checkpoints(home):
    save_file({"a": torch.zeros(3)}, home / "foreign.safetensors")
    (home / "text.safetensors").write_text("not a model")
    torch.save([torch.zeros(3)], home / "list.pt")
    (home / "pictures/a").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(home / "pictures/a/1.png")
    (home / "empty").mkdir()


@pytest.mark.parametrize("script, words, expected", [
    ("train.py", "--stepz 3", "unknown flag --stepz; nearest: --steps"),
    ("train.py", "--recipe shape-few", "nearest: shapes-few"),
    ("train.py", "--steps many", "invalid int value"),
    ("train.py", "--steps 0", "steps"), ("train.py", "--seed -1", "must be at least 0"),
    ("train.py", "--cosine maybe", "invalid"),
    ("train.py", "--init_from nowhere", "no model at nowhere"),
    ("train.py", "--init_from foreign.safetensors", "it lacks x_embedder.proj.weight"),
    ("train.py", "--recipe shapes-few", "no model at runs/shapes"),
    ("train.py", "--data folder:empty", "no pictures"),
    ("train.py", "--data folder:missing", "no folder missing"),
    ("train.py", "--data folder:pictures", "fewer than one batch of"),
    ("train.py", "--image_size 30", "not divisible by the model's patch size 8; patch sizes that fit: 1, 2"),
    ("train.py", "--model TiT-XXS/3", "nearest: TiT-XXS/"),
    ("train.py", "--batch_size 40", "use a multiple of 16, such as 32 or 48"),
    ("train.py", "--enhancement_ratio 1 --enhancement_style fc-vs-fe", "give --init_from"),
    ("train.py", "--enhancement_ratio 1 --enhancement_style ft-vs-fe --labels none", "null class"),
    ("train.py", "--enhancement_ratio 1 --enhancement_style ft-vs-fe --consistency_ratio 1", "ft-vs-fe is for consistency ratio 0"),
    ("train.py", "--transport epsilon-prediction --data_output no --consistency_ratio 1 --enhancement_ratio 0", "those that can"),
    ("train.py", "--transport trigflow", "data_output is for transport linear"),
    ("train.py", "--recipe shapes-few --init_from foreign.safetensors", "it lacks x_embedder.proj.weight"),
    ("train.py", "--optimizer sgd", "use adamw, radam or muon"), ("train.py", "--optimizer muon --shard yes", "leave out --shard yes"),
    ("train.py", "--device gpu", "this machine has"), ("train.py", "--shard yes", "torchrun --nproc_per_node=N train.py"),
    ("train.py", "--recipe in256-sd", "give --data latents:DIR"), ("train.py", "--gap 0.5", "it wants 2 numbers, such as"),
    ("train.py", "--labels square,star", "no class"),
    ("train.py", "--extrapolation auto --stochasticity 1", "number instead"),
    ("sample.py", "--ckpt nowhere", "no model at nowhere"),
    ("sample.py", "--ckpt text.safetensors", "not a file of weights that can be read safely"),
    ("sample.py", "--ckpt foreign.safetensors", "it lacks x_embedder.proj.weight"),
    ("sample.py", "--classes 8", "numbered 0..7"),
    ("sample.py", "--classes hart", "heart"),
    ("sample.py", "--seeds 5-x", "expected such as 0-63"),
    ("sample.py", "--num 0", "no seeds"),
    ("sample.py", "--out picture.txt", "must end in"), ("sample.py", "--out s.npz --trajectory yes", "use --out samples.png"),
    ("sample.py", "--cfg_interval 0.5", "it wants 2 numbers"), ("sample.py", "--ckpt list.pt", "it holds a list"),
    ("sample.py", "--kappa 1", "unknown flag --kappa"),
    ("sample.py", "--order 3", "either 1 or 2"),
])
def test_mistakes_end_with_one_line_and_status_2(home, capsys, script, words, expected):
    damaged_checkpoints(home)
    before = sorted(home.rglob("*"))
    status, out, err = run(script, *words.split(), capsys=capsys)
    assert status == 2 and err.startswith("error: ") and len(err.strip().splitlines()) == 1
    assert expected in err and sorted(home.rglob("*")) == before


def test_damaged_own_model(trained, capsys):
    file = trained[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    status, out, err = run("sample.py", "--ckpt", trained[0], capsys=capsys)
    assert status == 2 and "not a file of weights that can be read safely" in err and not Path("samples.png").exists()


# ---- the command line ---------------------------------------------------------------------------------------------

def test_defaults_then_recipe_then_flags():
    assert read_config([], "").out == "runs/shapes"
    few = read_config("--recipe shapes-few --lr=0 --betas 0.5,0.6 --extrapolation 0.3 --cosine true".split(), "")
    assert few.consistency_ratio == RECIPES["shapes-few"]["consistency_ratio"] == 1 and few.lr == 0 and few.betas == (0.5, 0.6)
    assert few.extrapolation == 0.3 and few.cosine is True and few.out == "runs/shapes-few"
    assert read_config(["--extrapolation", "auto"], "").extrapolation == "auto"


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_consistent(name):
    config = read_config(["--recipe", name], "")
    config.objective()
    settings = config.sampler(steps=3, gap=None)
    assert settings["steps"] == 3 and settings["gap"] == config.gap and settings["transport"] == config.transport
    assert config.batch_size % 16 == 0


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        read_config(["-h"], "Train.")
    text = capsys.readouterr().out
    assert end.value.code == 0 and all(f"--{name}" in text for name in Config.__dataclass_fields__)
    assert "kappa: a number, or auto" in text and all(name in text for name in RECIPES)


@pytest.mark.slow
def test_torchrun_two_processes_train_the_same_weights(tmp_path):
    flags = [*SMALL, "--batch_size", "64", "--dtype", "float32", "--device", "cpu"]
    for n in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", "--master_port=29517", str(ROOT / "train.py"), *flags, "--out", str(tmp_path / str(n))]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    one, two = (torch.cat([p.flatten() for p in load_model(tmp_path / str(n))[0].parameters()]) for n in (1, 2))
    assert (one - two).norm() < 1e-6 * one.norm()
