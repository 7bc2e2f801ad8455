"""Published checkpoints: their dictionaries, what they lack, and fine-tuning that starts from them."""
import argparse
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from standins import small_kl, write_shards
from torch.testing import assert_close
from toys import GOLDEN, run

import extras.published as published
import model
from checkpoint import load_model
from config import Config
from recipes import RECIPES
from train import load_start


@pytest.fixture(autouse=True)
def golden_size(monkeypatch):
    """The golden networks' size, so that the number of heads is known: it cannot be told from weights."""
    monkeypatch.setitem(model.SIZES, "golden", dict(depth=2, hidden_size=48, num_heads=4))


def wrapped(kind, tensors):
    """A golden state dict in the dictionary of its publisher."""
    other = {name: torch.zeros_like(value) for name, value in tensors.items()}
    projector = {"projectors.0.0.weight": torch.zeros(3, 48), "projectors.0.0.bias": torch.zeros(3)}
    args = argparse.Namespace(model="SiT-XL/2", legacy=False, lr=1e-4, exp_name="x")

    def add(prefix, names):
        return {prefix + name: value for name, value in names.items()}
    if kind == "ucgm":
        return {"model": other, "ema": add("module._orig_mod.", tensors), "opt": {"state": {}},
                "unigen": {"x": other}, "config": {"lr": 1e-4}}
    if kind == "repa":
        return {"model": other, "ema": {**tensors, **projector}, "opt": {}, "args": args, "steps": 400000}
    if kind == "repa-e":
        return {"model": add("module.", other), "ema": add("module.", {**tensors, **projector}), "opt": {},
                "args": args, "steps": 1}
    if kind in ("sit", "dit"):
        args.model = f"{'S' if kind == 'sit' else 'D'}iT-XL/2"
        return {"model": other, "ema": tensors, "opt": {}, "args": args}
    if kind == "lightningdit":
        return {"model": other, "ema": add("module.", tensors), "opt": {}, "config": {}}
    return tensors


def assert_golden(net, golden):
    numbers = np.load(GOLDEN / "models.npz")
    with torch.no_grad():
        out = net(*(torch.from_numpy(numbers[name]) for name in ("x", "t", "y")))
    assert_close(out, torch.from_numpy(numbers[f"{golden}_out"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("golden, kind, transport", [
    ("tit", "ucgm", "linear"), ("tit", "raw", "linear"),
    ("sit", "repa", "linear"), ("sit", "repa-e", "linear"), ("sit", "raw", "linear"),
    ("sit_learn_sigma", "sit", "relinear"), ("sit_learn_sigma", "dit", "ddpm"),
    ("lightningdit", "lightningdit", "relinear"), ("lightningdit", "raw", "relinear")])
@pytest.mark.parametrize("new_zip", [True, False])
def test_published_dictionaries_give_the_golden_outputs(tmp_path, golden, kind, transport, new_zip):
    tensors = wrapped(kind, load_file(GOLDEN / f"{golden}.safetensors"))
    torch.save(tensors, tmp_path / "0400000.pt", _use_new_zipfile_serialization=new_zip)
    net, config, names = load_model(tmp_path / "0400000.pt")
    assert config.transport == transport and len(names) == 10
    assert_golden(net, golden)


def test_ddt_gives_the_golden_output(tmp_path, monkeypatch):
    """2 of 3 blocks encode; its file holds neither positions nor size, so the recipe's size is taken."""
    monkeypatch.setitem(model.SIZES, "golden3", dict(depth=3, hidden_size=48, num_heads=4))
    monkeypatch.setitem(published.ENCODER, "golden3", 2)
    monkeypatch.setitem(RECIPES, "ddt", {**RECIPES["ddt"], "model": "DDT-golden3/2", "image_size": 64})
    weights = load_file(GOLDEN / "ddt.safetensors")
    lightning = {f"denoiser.{name}": torch.zeros_like(value) for name, value in weights.items()}
    lightning |= {f"ema_denoiser.{name}": value for name, value in weights.items()}
    torch.save({"state_dict": lightning}, tmp_path / "ddt.ckpt")
    net, config, _ = load_model(tmp_path / "ddt.ckpt", recipe="ddt")
    assert config.transport == "relinear"
    assert_golden(net, "ddt")


def test_what_cannot_be_told_is_asked(tmp_path, monkeypatch):
    """DiT's raw files and SiT's are alike: a recipe says which. An error names the recipe or the tensors."""
    tensors = load_file(GOLDEN / "sit_learn_sigma.safetensors")
    path = tmp_path / "x.pt"
    torch.save(tensors, path)
    with pytest.raises(ValueError, match="--recipe dit or --recipe sit"):
        load_model(path)
    for recipe, transport in (("dit", "ddpm"), ("sit", "relinear")):
        family = RECIPES[recipe]["model"].split("-")[0]
        monkeypatch.setitem(RECIPES[recipe], "model", f"{family}-golden/2")
        assert load_model(path, recipe=recipe)[1].transport == transport
    for trained_as, recipe, transport in (("DiT-XL/2", "sit", "relinear"), ("SiT-XL/2", "dit", "ddpm")):
        torch.save({"ema": tensors, "args": argparse.Namespace(model=trained_as)}, path)
        assert load_model(path, recipe=recipe)[1].transport == transport        # the user's word decides
    torch.save({"ema": tensors, "args": argparse.Namespace(lr=1e-4)}, path)
    with pytest.raises(ValueError, match="--recipe dit or --recipe sit"):
        load_model(path)
    with pytest.raises(ValueError, match="in256-sd.*TiT-XL/2"):
        load_model(GOLDEN / "sit.safetensors", recipe="in256-sd")
    torch.save({**tensors, "extra.weight": torch.zeros(1), "blocks.1.mlp.fc1.bias": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="extra.weight.*fc1.bias"):
        load_model(path, recipe="sit")
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="x_embedder.proj.weight"):
        load_model(path)


def test_prefixes_and_strange_keys_of_published_weights(tmp_path, monkeypatch):
    """Wrapped in safetensors as in torch.save; a float under "ema", integer keys, {"model": weights}."""
    weights = load_file(GOLDEN / "tit.safetensors")
    wrapped = {f"module._orig_mod.{name}": value for name, value in weights.items()}
    wrapped["projectors.0"] = torch.zeros(1)
    tensors, found = published.clean(wrapped, {})
    assert found["projectors"] and tensors.keys() == {k for k in weights if not k.startswith("feat_rope.")}
    files = ({"model": weights}, {"ema": 0.999, "model": weights}, {**weights, 3: torch.zeros(2)})
    monkeypatch.delitem(model.SIZES, "golden")
    for k, stored in enumerate(files):
        torch.save(stored, tmp_path / f"{k}.pt")
        with pytest.raises(ValueError, match="2 blocks of width 48"):       # read, but of no published size
            load_model(tmp_path / f"{k}.pt")
    torch.save({"ema": {}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="no tensors by name"):
        load_model(tmp_path / "x.pt")


@pytest.mark.parametrize("rows", [10, 100, 1000])
def test_a_table_without_a_null_row_is_said(tmp_path, rows):
    """As many rows as CIFAR and ImageNet have classes: there the last row is a class, not none."""
    weights = load_file(GOLDEN / "tit.safetensors")
    weights["y_embedder.embedding_table.weight"] = torch.zeros(rows, 48)
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"{rows} rows .*none for the null class"):
        load_model(tmp_path / "x.safetensors")


@pytest.mark.parametrize("recipe, kind", [("tune-dit", "raw"), ("tune-sit", "raw"), ("tune-sit", "sit")])
def test_a_dit_and_a_raw_sit_are_tuned(tmp_path, monkeypatch, capsys, recipe, kind):
    """From a file as its publisher has it, with DDPM's variances: the start gives the golden output, 20 steps
    change it, and the run is sampled at 2 steps. A SiT goes on without the variances."""
    pytest.importorskip("diffusers")
    family = {"tune-dit": "DiT", "tune-sit": "SiT"}[recipe]
    net = partial(model.DiT, patch_size=2, **model.SIZES["golden"], **model.FAMILIES[family])
    monkeypatch.setitem(model.MODELS, f"{family}-golden/2", net)
    monkeypatch.setitem(RECIPES[recipe], "model", f"{family}-golden/2")
    file, out, folder = tmp_path / "published.pt", tmp_path / "out", tmp_path / "latents"
    weights = load_file(GOLDEN / "sit_learn_sigma.safetensors")
    torch.save(wrapped(kind, weights), file)
    write_shards(folder, 1, 40, (4, 8, 8), classes=10)
    small_kl().save_pretrained(tmp_path / "kl")
    flags = ["--steps", 20, "--batch_size", 16, "--data", f"latents:{folder}", "--device", "cpu",
             "--vae", f"sd-ema={tmp_path / 'kl'}", "--no-compile", "--log_every", 1, "--out", out]
    status, said, err = run("train.py", "--recipe", recipe, "--init_from", file, *flags, capsys=capsys)
    assert status == 0 and "not finite" not in said, err
    state = load_file(next(out.glob("state_*20.*")))
    start, tuned = net(8, num_classes=10).eval(), net(8, num_classes=10).eval()
    start.load_state_dict({name[8:]: value for name, value in state.items() if name.startswith("teacher.")})
    assert_golden(start, "sit_learn_sigma")
    tuned.load_state_dict({name[4:]: value for name, value in state.items() if name.startswith("net.")})
    with pytest.raises(AssertionError):
        assert_golden(tuned, "sit_learn_sigma")
    if family == "DiT":                                 # row k of a patch: 4 of epsilon, 4 of sigma
        rows = [w["final_layer.linear.weight"].unflatten(0, (4, 8)) for w in (tuned.state_dict(), weights)]
        changed = (rows[0] != rows[1]).any(2).any(0).tolist()
        assert changed == 4 * [True] + 4 * [False]
    page = tmp_path / "page.png"
    status, said, err = run("sample.py", "--ckpt", out, "--steps", 2, "--num", 4, "--device", "cpu",
                            "--out", page, capsys=capsys)
    assert status == 0 and page.is_file() and "NFE 2" in said, err


def test_a_start_of_one_class_less_is_said_to_lack_the_null_row(tmp_path):
    net = model.DiT(8, 2, 4, **model.SIZES["golden"], num_classes=11)
    torch.save(load_file(GOLDEN / "sit.safetensors"), tmp_path / "x.pt")
    config = Config(model="SiT-golden/2", init_from=str(tmp_path / "x.pt"))
    with pytest.raises(ValueError, match="10 classes.*11 classes.*no null row"):
        load_start(config, net, [str(k) for k in range(11)])


@pytest.mark.parametrize("size, encoder, blocks", [("B", 8, 12), ("L", 20, 24), ("XL", 22, 28)])
def test_the_depths_of_ddt(size, encoder, blocks):
    """Those of arXiv 2504.05741, in which B/2 is 8 + 4, L/2 is 20 + 4, XL/2 is 22 + 6."""
    with torch.device("meta"):
        net = published.MODELS[f"DDT-{size}/2"](input_size=32, in_channels=4, num_classes=1000)
    assert (net.encoder_depth, len(net.blocks)) == (encoder, blocks)
