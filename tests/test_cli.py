"""The commands as a user types them: short runs, the images they leave, one line for every mistake."""
import dataclasses
import itertools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image
from runs import NANO, TIT_NANO, log_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toys import ROOT, SMALL, calls_of, run, script_command

import engine
import model
import sample
import train
from checkpoint import find_model, load_model
from config import Config, read_config
from data import noise_like_seed
from recipes import RECIPES
from sample import generate, open_pipeline


pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def trained(home, capsys):
    status, out, err = run("train.py", *SMALL, capsys=capsys)
    assert status == 0, err
    return home / "runs/shapes", out


# ---- runs ---------------------------------------------------------------------------------------------

def test_train_leaves_images_a_log_and_a_model(trained):
    folder, out = trained
    grids = ["grid_0000000.png", "grid_0000002.png", "grid_0000003.png"]
    assert sorted(path.name for path in folder.glob("grid*.png")) == grids
    lines = log_of(folder)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 2, 3]
    assert all(np.isfinite(line.get("loss", 0) + line.get("held_out_loss", 0)) for line in lines)
    assert Image.open(folder / "loss.png").size == (900, 420)
    assert "batch 16 = 1 process x 1 accumulation step x 16 images" in out
    assert "python sample.py --ckpt runs/shapes" in out and "--recipe shapes-few" in out.splitlines()[-1]
    net, config, names = load_model(folder)
    assert (config.model, config.steps, len(names), net.training) == ("TiT-XXS/8", 3, 8, False)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"])["recipe"] == "shapes"


def test_the_whole_job_many_step_then_few_step_then_two_step_images(trained, capsys):
    """sample.py takes the newest run and says the network evaluations; a trajectory has a column a step."""
    status, _, err = run("train.py", "--recipe", "shapes-few", *SMALL, capsys=capsys)
    assert status == 0, err
    status, out, _ = run("sample.py", "--steps", 2, "--num", 10, capsys=capsys)
    assert status == 0 and "runs/shapes-few" in out and "NFE 2 " in out and "images/s" in out
    assert Image.open("samples.png").size == (8 * 68 - 4, 18 + 2 * 68 - 4)   # 18: names
    status, out, _ = run("sample.py", "--ckpt", trained[0], "--steps", 6, "--cfg_scale", 2, "--trajectory",
                         "--num", 3, "--out", "strip.png", capsys=capsys)
    assert status == 0 and "NFE 12 " in out and Image.open("strip.png").size == (6 * 68 - 4, 18 + 3 * 68 - 4)
    status, out, _ = run("sample.py", "--steps", 6, "--order", 2, "--kappa", 0, "--rho", 0, capsys=capsys)
    assert status == 0 and "NFE 5 " in out


OLD_RUN = Path(__file__).resolve().parent / "old_run"
PLAIN = "--model TiT-nano/4 --no-x_pred --zeta 0 --style none --sample_steps 2 --dtype float32".split()


def what_came(out):
    """The losses of a run in its log; the bytes of its weights and of its last page of images."""
    losses = [line[name] for line in log_of(out) for name in ("loss", "held_out_loss") if name in line]
    tensors = load_file(Path(out) / "model.safetensors").values()
    weights = b"".join(value.numpy().tobytes() for value in tensors)
    return losses, weights, sorted(Path(out).glob("grid*.png"))[-1].read_bytes()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    out = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.MODELS, "TiT-nano/4", TIT_NANO)
        train.main(read_config([*SMALL, *PLAIN, "--device", "cpu", "--out", str(out)], ""))
    return what_came(out)


@pytest.mark.parametrize("extra", [
    "--x_pred --zeta 0.5 --style ft-vs-fe", "--lam 0.5", "--lam 1 --derivative jvp",
    "--transport ddpm --gap 0.01,0.001", "--transport edm --huber 0.5 --time_weight none",
    "--lam 0:1 --clip 0", "--loss log --huber 0.1",
    "--optimizer radam --grad_clip 0", "--micro_batch 16 --batch_size 48", "--labels none", "--labels star",
    "--transport x-prediction", "--dtype bfloat16", "--grad_checkpoint", "--ema 0.05,0.99",
    "--kappa 0 --rho 1", "--model DiT-XXS/8", "--time_beta 0.8,1,1 --label_drop 0", "--optimizer adamw"])
def test_every_switch_trains(plain, home, capsys, extra):
    """To other losses, weights or images than without it, but for what says only how to compute."""
    status, _, err = run("train.py", *SMALL, *PLAIN, *extra.split(), capsys=capsys)
    assert status == 0, err
    losses, *_ = came = what_came("runs/shapes")
    assert len(losses) == 6 and np.isfinite(losses).all()
    assert (came == plain) == (extra == "--grad_checkpoint")


def test_other_data_train_too(capsys):
    rng = np.random.default_rng(0)
    np.savez("d.npz", x=rng.integers(0, 256, (20, 28, 28), dtype=np.uint8), y=np.arange(20) % 10)
    for label in "ab":
        Path(f"images/{label}").mkdir(parents=True)
        for k in range(8):
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(f"images/{label}/{k}.png")
    for data, out, size in (("npz:d.npz", "npz", 28), ("folder:images", "folder", 8)):
        status, _, err = run("train.py", *SMALL, *PLAIN, "--image_size", size, "--data", data, "--out", out,
                             capsys=capsys)
        assert status == 0, err
    assert load_model("folder")[2] == ["a", "b"] and load_model("npz")[0].in_channels == 1


def test_image_k_depends_on_seed_k_alone(capsys):
    """Noise, classes, pages and arrays: whatever else is drawn with it, in batches of any size."""
    pair = noise_like_seed([3, 5], (3, 8, 8))
    assert torch.equal(pair[1], noise_like_seed([5], (3, 8, 8))[0]) and not torch.equal(pair[0], pair[1])
    assert torch.equal(noise_like_seed([3, 5], (3, 8, 8), 2)[1], noise_like_seed([5], (3, 8, 8), 2)[0])

    def draw(out, words):
        shipped = ROOT / "assets/shapes-few.safetensors"
        common = ["--ckpt", shipped, "--steps", 2, "--dtype", "float32", "--out", out]
        assert run("sample.py", *common, *words.split(), capsys=capsys)[0] == 0
    pages = []
    for words in ("--seeds 0-11", "--seeds 0-11 --batch_size 5", "--num 12 --batch_size 1"):
        draw("s.png", f"--rho 1 --kappa 0 --classes star,heart,moon {words}")
        pages.append(np.asarray(Image.open("s.png")).astype(int))
    assert abs(pages[0] - pages[1]).max() <= 1 and abs(pages[0] - pages[2]).max() <= 1
    drawn = []
    for words in ("--num 8 --batch_size 3", "--seeds 5,3 --batch_size 3"):
        draw("s.npz", words)
        drawn.append(dict(np.load("s.npz")))
    assert drawn[0]["labels"].tolist() == list(range(8)) and drawn[1]["labels"].tolist() == [5, 3]
    x, others = drawn[0]["arr_0"].astype(int), drawn[1]["arr_0"]
    assert abs(x[[5, 3]] - others).max() <= 1 and abs(x[5] - x[3]).max() > 50
    assert drawn[0]["seeds"].tolist() == list(range(8)) and x.shape == (8, 32, 32, 3)


def test_classes_go_on_from_batch_to_batch():
    """Image k is of classes[k % their number], or of its seed modulo the model's, in batches of any size."""
    pipeline = open_pipeline(ROOT / "assets/shapes-few.safetensors", torch.device("cpu"), "float32")
    for classes, expected in (([5, 0, 3], [5, 0, 3, 5, 0, 3, 5]), (None, [11 % 8, 12 % 8, 5, 6, 7, 0, 1])):
        batches = list(generate(pipeline, range(11, 18), 3, classes=classes, steps=1, rho=0.0))
        assert [first for first, _, _ in batches] == [0, 3, 6]
        assert torch.cat([y for _, _, y in batches]).tolist() == expected
        whole = next(generate(pipeline, range(11, 18), 7, classes=classes, steps=1, rho=0.0))[1]
        torch.testing.assert_close(torch.cat([x for _, x, _ in batches]), whole, rtol=0, atol=1e-4)


def test_page_and_arrays_show_the_same_picture(capsys):
    """Upright, of its class, in the right colours: an image of the arrays is the cell of the page, magnified,
    and the last one in its row of a trajectory."""
    model = ROOT / "assets/shapes-few.safetensors"
    classes = ["--num", 8, "--classes", "7,6,5,4,3,2,1,0"]
    shipped = ["--ckpt", model, "--steps", 2, "--dtype", "float32", *classes]
    for out, *more in (("page.png",), ("all.npz",), ("strip.png", "--trajectory")):
        assert run("sample.py", *shipped, "--out", out, *more, capsys=capsys)[0] == 0
    strip = np.asarray(Image.open("strip.png")).astype(int)
    page, arrays = np.asarray(Image.open("page.png")).astype(int), np.load("all.npz")["arr_0"]
    for k, image in enumerate(arrays):
        top, left = 18 + k // 8 * 68, k % 8 * 68
        cell = page[top:top + 64:2, left:left + 64:2]
        assert abs(cell - image).max() <= 1 and abs(cell - image[:, ::-1]).max() > 50
        assert abs(strip[18 + k * 68:, 68:][:64:2, ::2] - image).max() <= 1
        assert abs(cell - image[..., ::-1]).max() > 20 or image.std(-1).max() < 10


def test_the_newest_run_is_drawn(home):
    for time, name in enumerate("ba"):
        file = home / f"runs/{name}/model.safetensors"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (time, time))
    assert sample.newest_model("") == Path("runs/a/model.safetensors")


def test_a_pipeline_has_the_autoencoder_and_the_precision_that_were_asked_for(monkeypatch):
    """Rather than those of the model; and one image that is not finite is said."""
    net, config, names = load_model(ROOT / "assets/shapes-few.safetensors")
    config.vae, made, low = "sd-ema", MagicMock(), []
    monkeypatch.setattr(sample, "load_model", lambda *given: (net, config, names))
    monkeypatch.setattr("extras.latents.Autoencoder", made)
    for vae, expected in (("vavae", "vavae"), ("", "sd-ema")):
        pipeline = open_pipeline("it", torch.device("cpu"), "bfloat16", vae=vae)._replace(decode=None)
        assert made.call_args.args[0] == expected
    net.register_forward_pre_hook(lambda *given: low.append(torch.is_autocast_enabled("cpu")))
    for dtype in (torch.bfloat16, torch.float32):
        next(generate(pipeline._replace(dtype=dtype), [0], 1, steps=1))
    assert low == [True, False]
    net.register_forward_hook(lambda module, given, out: out.index_fill(0, torch.tensor(1), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        next(generate(pipeline, [0, 1], 2, steps=1))


def test_interrupted_arrays_draw_no_batch_twice(home, monkeypatch):
    """But with other settings or weights they do. In the end nothing else is left."""
    pipeline = open_pipeline(ROOT / "assets/shapes-few.safetensors", torch.device("cpu"), "float32")
    calls, weight, save = calls_of(pipeline.net), pipeline.net.final_layer.linear.weight, sample.save_arrays

    def stopped(path, **arrays):
        if path == "x.npz":
            raise KeyboardInterrupt
        save(path, **arrays)

    def draw(**more):
        options = sample.Options(out="x.npz", batch_size=2, steps=1, **more)
        sample.draw_npz(pipeline, [5, 3, 4, 1], options, [])
        return len(calls), len(list(home.glob("x.npz.parts*")))
    with monkeypatch.context() as patch:
        patch.setattr(sample, "save_arrays", stopped)
        with pytest.raises(KeyboardInterrupt):
            draw()
    assert draw(rho=0.5) == (4, 1)
    weight.mul_(2)
    assert draw() == (6, 1)
    weight.div_(2)
    assert draw() == (6, 0) and np.load("x.npz")["seeds"].tolist() == [5, 3, 4, 1]


def test_the_sampler_of_an_opened_model_is_that_of_its_recipe(capsys):
    """Stored with the weights; a recipe that is named wins over it, and what is given over both."""
    small = "--image_size 8 --model TiT-nano/4 --x_pred --batch_size 16 --steps 1 --no-compile".split()
    for recipe, more in (("shapes", "--out start"), ("shapes-few", "--out few --init_from start")):
        assert run("train.py", "--recipe", recipe, *small, *more.split(), capsys=capsys)[0] == 0
    few, row = open_pipeline("few", torch.device("cpu")).config.sampler(), Config(**RECIPES["shapes-few"])
    assert few == {"transport": "linear", "kappa": 0.0, "rho": 1.0, "schedule": (1.0, 1.0, 1.0),
                   "gap": (0.001, 0.5), "cfg_scale": 1.0, "cfg_interval": (0.0, 1.0), "steps": 2}
    assert few == row.sampler()
    other = load_model("few", recipe="shapes")[1]
    assert other.sampler() == Config(**RECIPES["shapes"]).sampler() != few and other.lam == 1
    assert load_model("few", recipe="shapes")[1].sampler(steps=7, kappa=0.1)["steps"] == 7


def test_the_shipped_model_draws(monkeypatch, capsys):
    """After a clone: avatars, one column per class, named; on a clock that ticks 8 s, ten a second."""
    monkeypatch.setattr("time.perf_counter", itertools.count(0, 8).__next__)
    status, out, err = run("sample.py", "--steps", 2, capsys=capsys)
    assert status == 0 and "80 images" in out and "assets" in out and " 10.0 images/s" in out, err
    assert Image.open("samples.png").size == (10 * 68 - 4, 18 + 8 * 68 - 4)
    assert load_model(ROOT / "assets/avatars-few.safetensors")[2][9] == "thumbs"
    assert sum(path.stat().st_size for path in (ROOT / "assets").glob("*-few.safetensors")) < 17_100_000
    assert all(path.stat().st_size < 600_000 for path in (ROOT / "assets").glob("features-*.safetensors"))


# ---- mistakes -----------------------------------------------------------------------------------------

MISTAKES = [        # script, flags, and a word that the line must have
    ("train.py", "--stepz 3", "--steps"),
    ("train.py", "--recipe shape-few", "shapes-few"),
    ("train.py", "--steps many", "--steps"),
    ("train.py", "--fsdp maybe", "maybe"),
    ("train.py", "--init_from nowhere", "nowhere"),
    ("train.py", "--init_from foreign.safetensors", "x_embedder.proj.weight"),
    ("train.py", "--recipe shapes-few", "runs/shapes"),
    ("train.py", "--recipe shapes-few --init_from foreign.safetensors", "x_embedder.proj.weight"),
    ("train.py", "--data folder:empty", "folder"),
    ("train.py", "--data folder:missing", "missing"),
    ("train.py", "--data folder:images", "batch_size"),
    ("train.py", "--image_size 30", "patch"),
    ("train.py", "--model TiT-XXS/3", "TiT-XXS/"),
    ("train.py", "--batch_size 40", "32 or 48"),
    ("train.py", "--micro_batch 8", "micro_batch"),
    ("train.py", "--zeta 1 --style fc-vs-fe", "init_from"),
    ("train.py", "--zeta 1 --style ft-vs-fe --labels none", "null class"),
    ("train.py", "--zeta 1 --style ft-vs-fe --lam 1", "ft-vs-fe"),
    ("train.py", "--transport epsilon-prediction --no-x_pred --lam 1 --zeta 0", "trigflow"),
    ("train.py", "--transport trigflow", "x_pred"),
    ("train.py", "--optimizer sgd", "radam"),
    ("train.py", "--optimizer muon --fsdp", "fsdp"),
    ("train.py", "--device gpu", "cpu"),
    ("train.py", "--transport cosine --no-x_pred", "trigflow the cosine path"),
    ("train.py", "--model tit-xs/8", "nearest: TiT-XS/8,"),
    ("train.py", "shapes-few", "such as --recipe shapes-few"),
    ("train.py", "--fresh yes", "--no-FLAG"),
    ("train.py", "--resume runs/shapes", "the same command resumes"),
    ("train.py", "--workers 4", "four workers"),
    ("train.py", "--no_compile", "write --no-compile"),
    ("train.py", "--learning_rate 1e-3", "use --lr"),
    ("train.py", "--wandb", "--report_to wandb"),
    ("train.py", "--guidance 4", "--cfg_scale"),
    ("train.py", "--epochs 3", "use --steps"),
    ("train.py", "--batch-size 64", "write --batch_size"),
    ("train.py", "--output_dir x", "use --out"),
    ("train.py", "--model_name TiT-S/2", "use --model"),
    ("train.py", "--compile=False", "--compile/--no-compile: takes no value"),
    ("train.py", "--steps 1.5", "steps"),
    ("train.py", "--steps inf", "steps"),
    ("train.py", "--steps 1e999", "steps"),
    ("train.py", "--num_images 4", "nearest: "),
    ("train.py", "--ema=", "ema"),
    ("train.py", "--ema .9,.90000001", "distinct"),
    ("sample.py", "list.pt", "such as --ckpt list.pt"),
    ("sample.py", "--num_images 4", "use --num"),
    ("sample.py", "--trajectory --steps 2000", "samples.npz"),
    ("train.py", "--recipe Shapes", "nearest: shapes,"),
    ("train.py", "--data images", "give folder:images"),
    ("train.py", "--data scores.npz", "give npz:scores.npz"),
    ("train.py", "--optimizer adamw --fsdp", "torchrun"),
    ("train.py", "--recipe in256-sd", "latents:DIR"),
    ("train.py", "--gap 0.5", "gap"),
    ("train.py", "--labels square,star", "square,star"),
    ("train.py", "--kappa auto --rho 1", "kappa"),
    ("sample.py", "--ckpt nowhere", "nowhere"),
    ("sample.py", "--ckpt text.safetensors", "text.safetensors"),
    ("sample.py", "--ckpt foreign.safetensors", "x_embedder.proj.weight"),
    ("sample.py", "--ckpt list.pt", "list"),
    ("sample.py", "--classes 10", "there are 10, numbered from 0"),
    ("sample.py", "--classes thumb", "thumbs"),
    ("sample.py", "--seeds 5-x", "5-x"),
    ("sample.py", "--num 0", "num"),
    ("sample.py", "--out image.txt", "image.txt"),
    ("sample.py", "--out s.npz --trajectory", "trajectory"),
    ("sample.py", "--beside nowhere", "must end in .gif"),
    ("sample.py", "--batch_size 0", "batch_size"),
    ("sample.py", "--seeds 18446744073709551616", "18446744073709551616"),
    ("sample.py", "--out missing.jpg --num 300000", "missing.jpg"),
    ("sample.py", "--out file/x.png", "file"),
    ("sample.py", "--out x.webp --num 2400", "samples.npz"),
    ("sample.py", "--recipe shapes-few", "no model at runs/shapes-few"),
    ("sample.py", "--ckpt cut.safetensors", "cut.safetensors"),
    ("sample.py", "--cfg_interval 0.5", "cfg_interval"),
    ("sample.py", "--extrapolation 1", "--extrapolation"),
    ("sample.py", "--order 3", "order"),
    ("fid.py", "--batch_size 0", "batch_size"),
    ("fid.py", "--image_size -1 --train", "image_size"),
    ("extras/latents.py", "encode --data shapes", "folder:PATH"),
    ("extras/latents.py", "encode --shard 0", "shard"),
    ("extras/latents.py", "encode --size 0", "size"),
    ("extras/latents.py", "decode", "encode"),
    ("fid.py", "--ckpt nowhere", "nowhere")]


@pytest.mark.parametrize("script, words, named", MISTAKES)
def test_a_mistake_ends_with_one_line_and_status_2(home, capsys, monkeypatch, script, words, named):
    """The line names what was wrong or what to type. It comes before anything is trained or drawn; nothing
    is left behind."""
    monkeypatch.setattr("sampler.sample", None)
    monkeypatch.setattr("optim.optimizer_step", None)
    whole = (OLD_RUN / "many/model.safetensors").read_bytes()
    (home / "cut.safetensors").write_bytes(whole[:-100])
    save_file({"a": torch.zeros(3)}, home / "foreign.safetensors")
    (home / "text.safetensors").write_text("not a model")
    torch.save([torch.zeros(3)], home / "list.pt")
    (home / "images/a").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(home / "images/a/1.png")
    (home / "empty").mkdir()
    (home / "scores.npz").touch()
    (home / "file").touch()                     # below it not even root can make a folder
    before = sorted(home.rglob("*"))
    status, _, err = run(script, *words.split(), capsys=capsys)
    assert status == 2 and err.startswith("error: ") and err.strip().count("\n") == 0
    assert named in err and sorted(home.rglob("*")) == before


FORBIDDEN = ["data.open_dataset", "checkpoint.load_model", "features.Inception", "features.train_features",
             "extras.latents.Autoencoder"]


@pytest.mark.parametrize("script, words, named", [
    ("train.py", "--image_size 30", "patch size 8; patch sizes that fit: 1, 2"),
    ("train.py", "--data folder:images --image_size 30", "patch size 8"),
    ("train.py", "--data mnist --model TiT-XXS/8", "image size 28"),
    ("train.py", "--data cifar10 --model TiT-XXXS/8", "nearest: TiT-XXS/8"),
    ("train.py", "--data folder:images --out file/run", "cannot write into file/run"),
    ("train.py", "--recipe cifar10-few", "no model at runs/cifar10"),
    ("sample.py", "--ckpt hf://user/repo --out file/x.png", "cannot write into file"),
    ("fid.py", "--ckpt hf://user/repo --ref nowhere.npz", "no images at nowhere.npz"),
    ("fid.py", "--images folder:nowhere --ref folder:images", "no images at nowhere"),
    ("fid.py", "--ckpt hf://user/repo --num 1", "num is 1; it must be finite and from 4"),
    ("fid.py", "--stats folder:nowhere", "no images at nowhere"),
    ("fid.py", "--stats folder:images --out file/x.npz", "cannot write into file"),
    ("extras/latents.py", "encode --data folder:images --out file/x", "cannot write into file/x")])
def test_what_can_be_checked_is_checked_first(home, capsys, monkeypatch, script, words, named):
    """Nothing is read, downloaded or trained before the mistake is named."""
    import extras.latents       # noqa: F401
    import fid                  # noqa: F401
    for name in FORBIDDEN:
        monkeypatch.setattr(name, None)
    (home / "file").touch()
    (home / "images").mkdir()
    status, _, err = run(script, *words.split(), capsys=capsys)
    assert status == 2 and err.startswith("error: ") and named in err and err.count("\n") == 1, err


# ---- the command line ---------------------------------------------------------------------------------

@pytest.mark.parametrize("script", ["train.py", "sample.py", "fid.py", "extras/latents.py"])
def test_help_explains_every_flag(capsys, script):
    status, out, err = run(script, "-h", capsys=capsys)
    assert status == 0 and not err
    for f in dataclasses.fields(runpy.run_path(str(ROOT / script)).get("Options", Config)):
        assert not f.metadata or f"--{f.name}" in out and f.metadata["help"].split()[0] in out
    if script == "train.py":
        assert "lambda" in out and "extrapolation" in out
        assert all(name in out and row["about"] in out for name, row in RECIPES.items())


def test_help_has_the_values_of_the_recipe(capsys):
    for recipe in ("shapes-few", "mnist"):
        _, out, _ = run("train.py", "--recipe", recipe, "-h", capsys=capsys)
        out, config = " ".join(out.split()), Config(**RECIPES[recipe])
        assert f"after warm-up [{config.lr:g}]" in out
        assert f"training steps [{config.steps}]" in out and f"latents:DIR [{config.data}]" in out


@pytest.mark.parametrize("script, words, status, said", [
    ("train.py", "-h", 0, "recipes:"), ("train.py", "--recipe shapes-few -h", 0, "recipes:"),
    ("sample.py", "-h", 0, "--classes"), ("fid.py", "-h", 0, "FD-EffNet"),
    ("extras/latents.py", "", 0, "fetch"),
    ("train.py", "--sed 3", 2, "--seed"), ("sample.py", "--step 2", 2, "--steps"),
    ("fid.py", "--num 0", 2, "num"), ("extras/latents.py", "decode", 2, "encode")])
def test_help_and_mistakes_do_not_wait_for_torch(tmp_path, script, words, status, said):
    """A torch that cannot be imported comes first on the path."""
    (tmp_path / "torch.py").write_text("raise SystemExit(99)")
    done = subprocess.run([*script_command(script), *words.split()], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == status and said in done.stdout + done.stderr


def test_cublas_is_set_before_torch_is_loaded():
    """It reads its setting when it is loaded. --exact keeps its word whatever the environment says."""
    name = "CUBLAS_WORKSPACE_CONFIG"
    code = f"import os, sys, config; print('torch' in sys.modules, os.environ['{name}'])"
    env = {key: value for key, value in os.environ.items() if key != name}
    for given in ({}, {name: ""}):
        done = subprocess.run([sys.executable, "-c", code], env={**env, **given}, cwd=ROOT,
                              capture_output=True, text=True)
        assert done.stdout.split() == ["False", ":4096:8"]


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="needs Linux")
@pytest.mark.parametrize("idle, threads", [(0, 1), (0.3, 1), (1.6, 2), (2.7, 3), (3.4, 3), (3.6, 0), (4, 0)])
def test_threads_are_as_many_as_cores_are_idle(idle, threads, monkeypatch):
    """0: as many as torch would use. Of four cores, some are idle and some wait for a disk."""
    stat = "cpu  {user} 0 0 {idle} {iowait} 0 0 0 0 0\ncpu0 9 9 9 9 9 9 9 9 9 9\n"
    before, half = dict(user=0, idle=5, iowait=7), int(500 * idle)
    texts = iter(stat.format(**before) if k == 0 else
                 stat.format(user=4000 - 2 * half, idle=5 + half, iowait=7 + half) for k in range(2))
    monkeypatch.setattr(Path, "read_text", lambda path: next(texts))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(engine.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert engine.spare_threads() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert engine.spare_threads() == 0


def test_a_run_keeps_its_threads(home, capsys, monkeypatch):
    """Chosen at its start, unless given, and kept on resume: another number gives other bits."""
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    for steps, spare, more in ((1, 2, ()), (2, 3, ()), (3, 3, ("--threads", 1))):
        monkeypatch.setattr(engine, "spare_threads", lambda spare=spare: spare)
        _, out, _ = run("train.py", *NANO, "--steps", steps, *more, capsys=capsys)
        assert f"threads {used[-1]} of" in out
    assert used == [2, 2, 1]


@pytest.mark.parametrize("flags", [
    "--seed 18446744073709551616", "--seed -1", "--image_size -32", "--grad_clip -1", "--ema .9,.9",
    "--ema 1.5", "--lam x", "--lam 0:1:0", "--lam :1", "--lam 1..2", "--lam 0:nan",
    "--cfg_interval .8,.1", "--lr nan", "--gap nan,.1", "--warmdown -1", "--micro_batch -4", "--steps 0",
    "--time_beta 1,1", "--huber inf", "--time_beta nan,1,1"])
def test_values_that_mean_nothing_are_refused(flags):
    with pytest.raises(ValueError) as error:
        read_config(flags.split(), "")
    assert flags.split()[0][2:] in str(error.value) and "\n" not in str(error.value)


def test_home_is_expanded_wherever_a_path_stands(monkeypatch):
    monkeypatch.setenv("HOME", "/home/u")
    config = read_config("--out=~/r --data folder:~/p --vae sd-ema=~/v".split(), "")
    assert (config.out, config.data, config.vae) == ("/home/u/r", "folder:/home/u/p", "sd-ema=/home/u/v")
    assert read_config(["--labels", "a~b"], "").labels == "a~b"


def test_a_name_on_the_hub_is_user_repo_and_a_path(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name: f"{repo}: {name}")
    for ckpt, expected in (("hf://user/repo", "user/repo: model.safetensors"),
                           ("hf://user/repo/a/b.safetensors", "user/repo: a/b.safetensors")):
        assert str(find_model(ckpt)) == expected


def test_processes_agree_on_the_precision(monkeypatch):
    """The try of process 0 decides; another process does not even make one."""
    asked = []
    monkeypatch.setattr(sample, "pick_dtype", lambda *given: asked.append(given) or torch.bfloat16)
    monkeypatch.setattr(sample, "from_rank0", lambda make: torch.float32)
    model = open_pipeline(ROOT / "assets/shapes-few.safetensors", torch.device("cpu"))
    assert model.dtype == torch.float32 and not asked
