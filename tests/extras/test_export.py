"""Folders for diffusers' DiTPipeline: the networks, images and settings of the runs that they come from."""
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from standins import small_kl
from torch.testing import assert_close
from toys import GOLDEN, run

import model
from checkpoint import load_model, save_model
from config import Config
from objective import TRANSPORTS
from recipes import RECIPES
from sample import open_pipeline
from sampler import sample

diffusers = pytest.importorskip("diffusers")
import extras.export  # noqa: E402
from extras.scheduler import UCGMScheduler  # noqa: E402

DOUBLE = torch.float64
SIZE = dict(depth=2, hidden_size=48, num_heads=4)       # of the golden networks
FEW = {name: RECIPES["tune-dit"][name] for name in ("kappa", "rho", "gap", "sample_steps")}
MANY = dict(kappa="auto", sample_steps=5, schedule=(1.1, 0.9, 1.0), gap=(0.001, 0.01))


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(family, file of weights, settings): a run's model file. Its autoencoder has been saved locally."""
    small_kl().save_pretrained(tmp_path / "kl")

    def make(family, golden=None, vae=f"sd-ema={tmp_path / 'kl'}", **settings):
        kind = partial(model.DiT, patch_size=2, **SIZE, **model.FAMILIES[family])
        monkeypatch.setitem(model.MODELS, f"{family}-golden/2", kind)
        config = Config(model=f"{family}-golden/2", vae=vae, **settings)
        net = kind(input_size=8, in_channels=4, num_classes=10, x_pred=config.x_pred)
        if golden:
            net.load_state_dict(load_file(GOLDEN / f"{golden}.safetensors"))
        path = tmp_path / "model.safetensors"
        save_model(path, net.state_dict(), net, config, [str(k) for k in range(10)])
        return path
    return make


def export(path, out, *flags, capsys):
    """The pipeline, loaded from the folder that the command writes, and what the command prints."""
    status, said, err = run("extras/export.py", path, out, *flags, capsys=capsys)
    assert status == 0, err
    pipe = diffusers.DiTPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    return pipe, said


@pytest.mark.parametrize("family, golden, transport", [
    ("DiT", "sit_learn_sigma", "ddpm"), *(("SiT", "sit", name) for name in extras.export.SCHEDULERS)])
@pytest.mark.parametrize("settings", [FEW, MANY])
def test_the_network_and_the_images_are_the_runs_own(tmp_path, make, capsys, family, golden, transport,
                                                    settings):
    """At 50 times; then the latents and the decoded images of the run's own number of steps."""
    path = make(family, golden, transport=transport, **settings)
    pipe, _ = export(path, tmp_path / "out", capsys=capsys)
    ours = open_pipeline(path, torch.device("cpu"))
    row, t = TRANSPORTS[transport], torch.linspace(0.001, 0.999, 50)
    x, y = torch.randn(50, 4, 8, 8), torch.arange(50) % 11                          # the null class, too
    theirs = pipe.transformer(x, timestep=row.net_time(t), class_labels=y).sample
    assert_close(theirs[:, :4], ours.net(x, row.net_time(t), y), rtol=0, atol=1e-5)
    assert theirs.shape[1] == (8 if family == "DiT" else 4)

    latents, decode = [], pipe.vae.decode
    pipe.vae.decode = lambda x: latents.append(x * pipe.vae.config.scaling_factor) or decode(x)
    torch.manual_seed(3)
    z = torch.randn(6, 4, 8, 8)
    expected = sample(ours.net, z, torch.arange(6), **ours.config.sampler(),
                      noise=lambda i: torch.randn(z.shape))
    torch.manual_seed(3)
    images = pipe(list(range(6)), guidance_scale=1, num_inference_steps=settings["sample_steps"],
                  output_type="pt").images
    assert_close(latents[0], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert_close(images * 2 - 1, ours.to_images(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family, golden", [("DiT", "sit_learn_sigma"), ("SiT", "sit")])
def test_in_float64_all_digits_agree(make, family, golden):
    """At time 0, since both networks compute angles in float32."""
    net = load_model(make(family, golden))[0].double()
    theirs = extras.export.make_transformer(net).double().eval()
    x, t, y = torch.randn(11, 4, 8, 8, dtype=DOUBLE), torch.zeros(11, dtype=DOUBLE), torch.arange(11)
    found = theirs(x, timestep=t, class_labels=y).sample[:, :4]
    assert_close(found, net(x, t, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("transport", extras.export.SCHEDULERS)
def test_the_schedulers_transport_is_the_runs(transport):
    """Its path, what its network predicts, and what it is told."""
    ours, theirs = TRANSPORTS[transport], UCGMScheduler(**extras.export.SCHEDULERS[transport]).transport
    t = torch.linspace(0, 1, 101, dtype=DOUBLE)
    for one, other in zip(ours[:5], theirs[:5]):
        assert_close(one(t), other(t))
    assert ours.sign == theirs.sign


def test_what_the_folder_says(tmp_path, make, capsys):
    """The run's settings of the sampler, and the scale of its latents; --vae wins over the run's own."""
    scaled, out = dict(latent_mean=4 * (0.0,), latent_std=4 * (2.0,)), tmp_path / "out"
    path = make("DiT", transport="ddpm", **scaled, **FEW)
    small_kl(widths=(8, 8)).save_pretrained(tmp_path / "other")
    pipe, said = export(path, out, "--vae", f"sd-ema={tmp_path / 'other'}", capsys=capsys)
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline"
    assert index["transformer"] == ["extras.export", "DiTTransformer"]
    assert index["scheduler"] == ["extras.scheduler", "UCGMScheduler"]
    found = json.loads((out / "scheduler/scheduler_config.json").read_text())
    assert (found["kappa"], found["rho"], found["gap"]) == (0.0, 1.0, [0.001, 0.6])
    assert pipe.vae.config.scaling_factor == 0.5 and list(pipe.vae.config.block_out_channels) == [8, 8]
    assert "guidance_scale=1, num_inference_steps=2" in said


def test_a_pipeline_of_1000_classes_guides(tmp_path, monkeypatch, capsys):
    """As our sampler does: 1000 is the null class."""
    kind = partial(model.DiT, patch_size=2, **SIZE, **model.FAMILIES["DiT"])
    monkeypatch.setitem(model.MODELS, "DiT-golden/2", kind)
    small_kl().save_pretrained(tmp_path / "kl")
    config = Config(model="DiT-golden/2", transport="ddpm", vae=f"sd-ema={tmp_path / 'kl'}", cfg_scale=2.5)
    net, path = kind(input_size=8, in_channels=4, num_classes=1000), tmp_path / "model.safetensors"
    for value in net.parameters():
        torch.nn.init.normal_(value, std=0.1) if not value.any() else None
    save_model(path, net.state_dict(), net, config, [str(k) for k in range(1000)])
    pipe, said = export(path, tmp_path / "out", capsys=capsys)
    latents, decode = [], pipe.vae.decode
    pipe.vae.decode = lambda x: latents.append(x * pipe.vae.config.scaling_factor) or decode(x)
    pipe([3, 998], guidance_scale=2.5, num_inference_steps=4, generator=torch.Generator().manual_seed(1))
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = sample(net.eval(), z, torch.tensor([3, 998]), **config.sampler(steps=4))
    assert_close(latents[0], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert "guidance_scale=2.5, num_inference_steps=20" in said


@pytest.mark.parametrize("family, settings, words", [
    ("TiT", {}, "rotary positions, RMSNorm, norms of q and k, SwiGLU"),
    ("LightningDiT", {}, "rotary positions, RMSNorm, SwiGLU"), ("SiT", dict(x_pred=True), "has x_pred:"),
    ("SiT", dict(transport="trigflow"), "has transport trigflow:"), ("SiT", dict(vae=""), "no autoencoder"),
    ("SiT", dict(latent_mean=(0.0, 0.0, 0.0, 0.1), latent_std=4 * (1.0,)), "by channel"),
    ("SiT", dict(latent_mean=4 * (0.0,), latent_std=(1.0, 1.0, 1.0, 1.1)), "by channel")])
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, make, capsys, family, settings, words):
    out = tmp_path / "out"
    status, _, err = run("extras/export.py", make(family, **settings), out, capsys=capsys)
    assert status == 2 and words in err and err.count("\n") == 1 and not out.exists()


def test_a_network_of_another_kind_is_refused(tmp_path, monkeypatch, capsys):
    class Other(torch.nn.Module):
        num_classes, in_channels, input_size, patch_size, blocks = 3, 4, 8, 1, ()

        def __init__(self, in_channels, input_size, num_classes):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
    monkeypatch.setitem(model.MODELS, "Other", Other)
    net, path = Other(4, 8, 3), tmp_path / "model.safetensors"
    save_model(path, net.state_dict(), net, Config(model="Other"), ["a", "b", "c"])
    status, _, err = run("extras/export.py", path, tmp_path / "out", capsys=capsys)
    assert status == 2 and "the network Other" in err and err.count("\n") == 1


def test_a_folder_that_cannot_be_written_and_help(tmp_path, make, capsys):
    (tmp_path / "file").write_text("x")
    path = make("SiT", "sit")
    status, _, err = run("extras/export.py", path, tmp_path / "file", capsys=capsys)
    assert status == 2 and "cannot write" in err and err.count("\n") == 1
    for words in ([], ["-h"], [path]):
        status, said, _ = run("extras/export.py", *words, capsys=capsys)
        assert status == 0 and "--vae" in said and "runs/tune-dit OUT" in said
