"""UCGMScheduler in the pipelines of diffusers, with random weights: what it equals there, and its order."""
import copy
import functools
import json
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from standins import pipeline
from test_documents import blocks
from test_sampler import mixture_net
from torch.testing import assert_close
from toys import ROOT, Net, batch, run

import extras
from data import noise_like_seed
from experiments.accelerate import as_epsilon, dit
from objective import TRANSPORTS, identity, predict
from sampler import sample, time_grid

diffusers = pytest.importorskip("diffusers")
from extras.scheduler import UCGMScheduler  # noqa: E402

DOUBLE = torch.float64
BETAS = {"linear": {}, "scaled_linear": dict(beta_start=0.00085, beta_end=0.012),
         "squaredcos_cap_v2": {}, "trained": dict(trained_betas=np.linspace(1e-3, 0.01, 1000).tolist())}


def trace(pipe, call, seed=0, **more):
    """(N, B, ...): what each step of the pipeline's scheduler returns; pipe.first: x and t of its first.
    seed: of the pipeline's generator, or None."""
    seen, step = [], pipe.scheduler.step

    @functools.wraps(step)
    def watched(model_output, timestep, x, **how):
        pipe.first = pipe.first if seen else (x, timestep)
        out = step(model_output, timestep, x, **how)
        seen.append(out[0] if isinstance(out, tuple) else out.prev_sample)
        return out
    pipe.scheduler.step = watched
    try:
        pipe(**call, generator=None if seed is None else torch.Generator().manual_seed(seed), **more)
    finally:
        pipe.scheduler.step = step
    return torch.stack(seen)


def ours(pipe, **settings):
    """Another scheduler for the pipeline, and the pipeline."""
    pipe.scheduler = UCGMScheduler.from_config(pipe.scheduler.config, **settings)
    return pipe


def assert_same(found, expected, tolerance=1e-5):
    """Up to this part of the largest |x|."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def guided(name):
    """Guidance, by the name that this pipeline has for it."""
    return {} if name == "flux" else {"guidance_scale": 2.5}


# ---- the same as the schedulers of diffusers ----------------------------------------------------------

@pytest.mark.parametrize("name", ["dit", "sd", "sdxl"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_kappa_0_is_ddim(name, prediction, guidance):
    """On DDIM's grid, which ends at timestep 0 for DiT and 1 for Stable Diffusion. Every step is compared."""
    pipe, call = pipeline(name)
    n, last, how = 5, 0.001 if name == "dit" else 0.002, {"guidance_scale": guidance}
    pipe.scheduler.register_to_config(prediction_type=prediction)
    theirs = trace(pipe, call, num_inference_steps=n, **how)
    x = trace(ours(pipe, kappa=0.0, gap=(1 / n - last, last)), call, num_inference_steps=n, **how)
    half = slice(None, 2)                               # DiT's pipeline carries the unguided half along
    assert_same(x[:, half], theirs[:, half])


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_every_schedule_of_betas_is_that_of_ddim(betas, zero_snr):
    """On the "trailing" grid, whose first call is at the last beta. Without any signal there, v is left."""
    words = dict(BETAS[betas], beta_schedule=betas if betas != "trained" else "linear", clip_sample=False,
                 rescale_betas_zero_snr=zero_snr, timestep_spacing="trailing", prediction_type="v_prediction")
    theirs, net = diffusers.DDIMScheduler(**words), Net().float().requires_grad_(False)
    scheduler = UCGMScheduler.from_config(theirs.config, kappa=0.0, gap=(0.0, 0.0))
    out = []
    for each in (theirs, scheduler):
        x, y = batch(5, dtype=torch.float32)[1], torch.zeros(5).long()
        each.set_timesteps(8)
        for t in each.timesteps:
            x = each.step(net(x, t.expand(5) / 1000, y), t, x).prev_sample
        out.append(x)
    assert theirs.timesteps.tolist() == scheduler.timesteps.round().tolist()
    assert_same(out[1], out[0])


@pytest.mark.parametrize("name", ["sd3", "flux", "sana"])
@pytest.mark.parametrize("sigmas", [None, [1.0, 0.8, 0.5, 0.1]])
@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_on_flow_it_is_flow_matching_euler(name, sigmas, rho):
    """rho 1: with stochastic_sampling. The usual sigmas give way to a grid, here of the same times; a user's
    own stay. Without a generator the noise is torch's own."""
    pipe, call = pipeline(name)
    call |= {"sigmas": sigmas or np.linspace(1, 1 / 4, 4).tolist(), "num_inference_steps": 4} | guided(name)
    theirs = type(pipe.scheduler).from_config(pipe.scheduler.config, stochastic_sampling=rho == 1)
    pipe.scheduler = theirs
    torch.manual_seed(3)
    expected = trace(pipe, call, seed=None)
    ours(pipe, kappa=0.0, rho=rho, gap=(0.0, 0.25))
    torch.manual_seed(3)
    assert_same(trace(pipe, call, seed=None), expected)
    assert_close(pipe.scheduler.timesteps, theirs.timesteps)


@pytest.mark.parametrize("words, mu", [
    ({}, None), (dict(shift=3.0), None), (dict(use_dynamic_shifting=True), 0.8),
    (dict(use_dynamic_shifting=True, time_shift_type="linear"), 2.0),
    (dict(use_dynamic_shifting=True, shift_terminal=0.02), 0.8), (dict(invert_sigmas=True, shift=2.0), None)])
def test_the_times_of_flow_are_shifted_as_theirs(words, mu):
    theirs, given = diffusers.FlowMatchEulerDiscreteScheduler(**words), [1.0, 0.7, 0.35, 0.1]
    scheduler, net = UCGMScheduler.from_config(theirs.config, kappa=0.0), Net().float().requires_grad_(False)
    out = []
    for each in (theirs, scheduler):
        each.set_timesteps(sigmas=given, mu=mu)
        x, y = batch(5, dtype=torch.float32)[1], torch.zeros(5).long()
        for t in each.timesteps:
            x = each.step(net(x, t.expand(5) / 1000, y), t, x).prev_sample
        out.append(x)
    assert_close(scheduler.timesteps, theirs.timesteps)
    assert_same(out[1], out[0])


def test_the_usual_sigmas_give_way_to_our_grid():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler = UCGMScheduler.from_config(theirs.config, gap=(0.01, 0.02), kappa=0.0)
    for given in (dict(num_inference_steps=5), dict(sigmas=np.linspace(1, 0.2, 5)), dict(sigmas=[0.9, 0.2])):
        scheduler.set_timesteps(**given)
        expected = given["sigmas"] if len(scheduler.timesteps) == 2 else time_grid(5, gap=(0.01, 0.02))[:-1]
        assert_close(scheduler.grid, torch.tensor([*expected, 0.0], dtype=DOUBLE))


def test_timesteps_of_ones_own_are_told_as_they_are():
    for theirs in (diffusers.DDIMScheduler(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)):
        scheduler = UCGMScheduler.from_config(theirs.config)
        scheduler.set_timesteps(timesteps=[999, 650, 320.5, 20])
        assert_close(scheduler.timesteps, torch.tensor([999, 650, 320.5, 20]))
        assert len(scheduler) == 1000 and scheduler.num_inference_steps == 4


# ---- the same as our sampler --------------------------------------------------------------------------

def network_of(name, pipe, call):
    """(net(x, t, y), transport) of a pipeline: y = 0, 1 are its prompts, 2 the negative one."""
    def table(key):
        return torch.cat([call[key], call[f"negative_{key}"][:1]]) if f"negative_{key}" in call else call[key]
    words = table("prompt_embeds") if name != "dit" else None
    pooled = table("pooled_prompt_embeds") if name in ("sd3", "flux") else None
    if name == "dit":
        net, labels = dit(pipe.transformer), torch.tensor([1, 2, 1000])
        return lambda x, t, y: net(x, t, labels[y])
    if name == "sd":
        return lambda x, t, y: pipe.unet(x, t, words[y]).sample
    if name == "sd3":
        return lambda x, t, y: pipe.transformer(x, words[y], pooled[y], 1000 * t, return_dict=False)[0]
    if name == "sana":
        return lambda x, t, y: pipe.transformer(x, words[y], 1000 * t, return_dict=False)[0]
    places = pipe._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)
    return lambda x, t, y: pipe.transformer(x, words[y], pooled[y], t, places, torch.zeros(5, 3),
                                            return_dict=False)[0]


@pytest.mark.parametrize("name", ["dit", "sd", "sd3", "flux", "sana"])
@pytest.mark.parametrize("how", [dict(kappa="auto"), dict(kappa=0.4), dict(kappa=0.3, rho="sde"),
                                 dict(kappa="auto", schedule=(1.17, 0.8, 1.1), gap=(0.01, 0.05))])
def test_it_is_our_sampler_on_the_network_of_the_pipeline(name, how):
    """Its own grid, guidance and all: two ways from one noise. DiT's transport is the row ddpm."""
    pipe, call = pipeline(name)
    ours(pipe, **how)
    torch.manual_seed(5)
    x = trace(pipe, call, num_inference_steps=7, **guided(name))[-1]
    z, scale = pipe.first[0], 1.0 if name == "flux" else 2.5
    kept = slice(None, 2)
    transport = {"dit": "ddpm", "sd": pipe.scheduler.transport}.get(name, "linear")
    g, torchs = torch.Generator().manual_seed(0), torch.Generator().manual_seed(5)
    torch.randn(z.shape, generator=g)                   # SD and SANA hand the generator of z on to the steps
    source = g if name in ("sd", "sana") else torchs
    noise = lambda i: torch.randn(z.shape, generator=source)[kept]
    settings = {"kappa": how["kappa"], "rho": how.get("rho", 0.0), "times": pipe.scheduler.grid}
    net = network_of(name, pipe, call)
    net.num_classes = 2
    expected = sample(net, z[kept], torch.tensor([0, 1]), transport, **settings, cfg_scale=scale, noise=noise)
    assert_same(x[kept], expected)
    if name == "dit":
        schedule, gap = how.get("schedule", (1.0, 1.0, 1.0)), how.get("gap", (1e-3, 1e-3))
        grid = time_grid(7, schedule, gap, kappa=how["kappa"], transport="ddpm")
        assert_close(pipe.scheduler.grid, torch.tensor(grid, dtype=DOUBLE))


# ---- what pipelines ask -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_images_to_images(name):
    """kappa 0 is the pipeline's own scheduler from the middle of the grid on; "auto" counts from its first
    call there, and is our sampler on the rest of the grid."""
    pipe, call = pipeline(name, image=True)
    call |= {"num_inference_steps": 10, "strength": 0.6} | guided(name)
    steps = {"gap": (0.1 - 0.002, 0.002)}
    if name in ("sd3", "flux"):
        steps = {"gap": (0.0, 0.1)}
        call["sigmas"] = np.linspace(1, 0.1, 10).tolist()
    expected = trace(pipe, call)
    assert len(expected) == 6
    assert_same(trace(ours(pipe, kappa=0.0, **steps), call), expected)
    if name != "sdxl":
        x = trace(ours(pipe, kappa="auto"), call)[-1]
        (z, t), scheduler = pipe.first, pipe.scheduler
        assert_close(t, scheduler.timesteps[4])
        transport = scheduler.transport if name == "sd" else "linear"
        net = network_of(name, pipe, call)
        net.num_classes = 2
        same = sample(net, z, torch.tensor([0, 1]), transport, kappa="auto", times=scheduler.grid[4:],
                      cfg_scale=1.0 if name == "flux" else 2.5)
        assert_same(x, same)


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_two_runs_in_a_row_and_a_run_that_was_broken_off(name):
    pipe, call = pipeline(name)
    first = trace(ours(pipe), call, num_inference_steps=4)
    trace(pipe, call, seed=1, num_inference_steps=6)
    pipe.scheduler.set_timesteps(3)
    pipe.scheduler.step(pipe.first[0], pipe.scheduler.timesteps[0], pipe.first[0])
    assert_close(trace(pipe, call, num_inference_steps=4), first, rtol=0, atol=0)


def test_bfloat16_goes_in_and_out_and_float32_is_between():
    pipe, call = pipeline("sd3")
    pipe.to(torch.bfloat16)
    call = {key: v.bfloat16() if isinstance(v, torch.Tensor) else v for key, v in call.items()}
    call |= {"sigmas": [1.0, 0.75, 0.5, 0.25], "num_inference_steps": 4}
    theirs = trace(pipe, call)
    x = trace(ours(pipe, kappa=0.0, gap=(0.0, 0.25)), call)
    assert x.dtype == torch.bfloat16
    assert_same(x, theirs, 2**-6)                       # both round float32 to bfloat16 after each step
    assert trace(ours(pipe, kappa="auto"), call)[-1].isfinite().all()


def test_a_generator_decides_the_noise_where_the_pipeline_hands_it_on():
    for name, handed in (("sd", True), ("flux", False)):
        pipe, call = pipeline(name)
        ours(pipe, kappa=0.0, rho=0.5)
        runs = [torch.manual_seed(s) and trace(pipe, call, num_inference_steps=3)[-1] for s in (0, 1, 0)]
        assert torch.equal(runs[0], runs[2]) and torch.equal(runs[0], runs[1]) == handed


def test_a_scheduler_is_saved_and_loaded(tmp_path):
    """With what another scheduler left at its default, which the base class would drop."""
    for theirs in (diffusers.HeunDiscreteScheduler(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)):
        scheduler = UCGMScheduler.from_config(theirs.config, kappa=0.3, gap=(0.01, 0.02))
        scheduler.save_pretrained(tmp_path)
        again = UCGMScheduler.from_pretrained(tmp_path)
        written = json.loads((tmp_path / "scheduler_config.json").read_text())
        assert json.loads(json.dumps(dict(again.config))) == written
        copied = UCGMScheduler.from_config(scheduler.config)
        for each in (scheduler, again, copied):
            each.set_timesteps(5)
            assert_close(each.timesteps, scheduler.timesteps, rtol=0, atol=0)
            assert each.config.kappa == 0.3
            assert {name: each.config[name] for name in theirs.config if name[0] != "_"}.items() >= {
                name: value for name, value in theirs.config.items() if name[0] != "_"
                and name != "_class_name"}.items()
        theirs.save_pretrained(tmp_path)                # a published folder, opened as ours
        found = UCGMScheduler.from_pretrained(tmp_path, kappa=0.0)
        assert found.config.prediction_type == scheduler.config.prediction_type
        assert found.config.beta_start == scheduler.config.beta_start


# ---- the order of accuracy ----------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["DDIMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_auto_is_third_order_and_none_is_first(kind):
    """A mixture of Gaussians, whose epsilon and velocity are known: half the step, an eighth of the error."""
    theirs, z = getattr(diffusers, kind)(), torch.randn(500, 2, dtype=DOUBLE)
    row = TRANSPORTS["ddpm" if kind == "DDIMScheduler" else "linear"]._replace(net_time=identity)
    net = mixture_net(row)

    def draw(steps, kappa):
        scheduler, x = UCGMScheduler.from_config(theirs.config, kappa=kappa, gap=(0.02, 0.02)), z.float()
        scheduler.set_timesteps(steps)
        for t, now in zip(scheduler.timesteps, scheduler.grid):
            x = scheduler.step(net(x.double(), now.expand(len(x)), None), t, x).prev_sample
        return x.double()
    exact = sample(net, z, torch.zeros(500).long(), row, 1500, "auto", gap=(0.02, 0.02))
    errors = {kappa: [(draw(n, kappa) - exact).norm(dim=1).median().item() for n in (40, 80, 160)]
              for kappa in ("auto", 0.0)}
    assert errors["auto"][0] > 25 * errors["auto"][2]           # 64 less what float32 leaves
    for coarse, fine in zip(errors[0.0], errors[0.0][1:]):
        assert 1.7 < coarse / fine < 2.4


# ---- documents ----------------------------------------------------------------------------------------

def test_the_pipeline_in_the_readme(monkeypatch):
    """Its five lines, with random weights: 20 steps with guidance, as `kappa` auto takes them."""
    lines = blocks((ROOT / "README.md").read_text(), "python", "<!-- a pipeline -->")[0]
    pipe, names = pipeline("dit")[0], {}
    seen, call = [], pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda *x, **how: seen.append(0) or call(*x, **how))
    monkeypatch.setattr(diffusers.DiTPipeline, "from_pretrained", lambda name: pipe)
    exec(lines, names)
    assert len(lines.splitlines()) == 5 and len(names["images"]) == 2 and len(seen) == 20
    assert isinstance(pipe.scheduler, UCGMScheduler) and pipe.scheduler.config.kappa == "auto"


def test_experiments_accelerate_draws_both_ways(tmp_path, monkeypatch, capsys):
    """From the same noise the last row, by the pipeline, is that of kappa auto in sampler.sample."""
    pipeline("dit")[0].save_pretrained(tmp_path / "dit")
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor",
                        lambda shape, **how: noise_like_seed(range(4), shape[1:]))
    page = tmp_path / "page.png"
    flags = ["--model", tmp_path / "dit", "--steps", 3, "--out", page, "--device", "cpu"]
    status, _, err = run("experiments/accelerate.py", *flags, capsys=capsys)
    assert status == 0, err
    image = np.asarray(Image.open(page)).astype(int)
    side = (len(image) - 12) // 4                                   # four rows, four pixels between them
    *_, auto, pipes = (image[k * (side + 4):][:side] for k in range(4))
    assert abs(auto - pipes).max() <= 1 and abs(auto - auto[:, ::-1]).max() > 50


def test_a_velocity_as_epsilon_sees_the_same_data_and_noise():
    """The two paths of the table of experiments/accelerate.py: x_t of one is that of the other, scaled."""
    (_, x, t, y, _), net = batch(), Net()
    alpha, gamma, _, _ = TRANSPORTS["ddpm"].at(t, x)
    on_ddpm = predict(as_epsilon(net), "ddpm", x, t, y)[1:]
    on_linear = predict(net, "linear", x / (alpha + gamma), (alpha / (alpha + gamma)).flatten(), y)[1:]
    assert_close(on_ddpm, on_linear)


# ---- mistakes -----------------------------------------------------------------------------------------

DYNAMIC, THREE = dict(use_flow_sigmas=True, use_dynamic_shifting=True), dict(num_inference_steps=3)


@pytest.mark.parametrize("settings, call, words", [
    (dict(kappa="auto", rho=1.0), {}, "give a number"), (dict(kappa="fast"), {}, "auto"),
    (dict(prediction_type="x"), {}, "v_prediction"), (dict(beta_schedule="x"), {}, "trained_betas"),
    ({}, dict(sigmas=[3.0, 1.0]), "timesteps"), ({}, {}, "num_inference_steps"),
    ({}, dict(timesteps=[10, 20]), "fall"), (dict(gap=(0.7, 0.7)), THREE, "gap"), (DYNAMIC, THREE, "mu"),
    (dict(rescale_betas_zero_snr=True, gap=(0.0, 0.0)), THREE, r"gap\[0\]"),
    ("EDMEulerScheduler", THREE, "beta_schedule"), ("CogVideoXDDIMScheduler", THREE, "beta_schedule")])
def test_mistakes_end_in_one_line(settings, call, words):
    if isinstance(settings, str):
        make = lambda: UCGMScheduler.from_config(getattr(diffusers, settings)().config)
    else:
        make = lambda: UCGMScheduler.from_config(diffusers.DDIMScheduler().config, **settings)
    with pytest.raises(ValueError, match=words) as error:
        make().set_timesteps(**call)
    assert "\n" not in str(error.value)


# ---- what the base library's own schedulers do --------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_sigmas_with_timesteps_are_the_grid_and_what_the_network_is_told(dtype):
    """As CogView4 calls FlowMatchEulerDiscreteScheduler."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    ours = UCGMScheduler.from_config(theirs.config, kappa=0.0)
    told = torch.linspace(1000, 1, 6)[:-1].to(dtype)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=(told / 1000).double().numpy(), timesteps=told.numpy(), mu=0.8)
    assert_close(ours.timesteps, told.float(), rtol=0, atol=0)
    assert_close(ours.grid.float(), theirs.sigmas.float())
    assert_close(theirs.timesteps.float(), ours.timesteps)


def test_a_single_step_begins_with_noise():
    """Where the last sigma is stretched to shift_terminal, a grid of one has none to stretch."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)
    scheduler = UCGMScheduler.from_config(theirs.config)
    scheduler.set_timesteps(1)
    assert scheduler.grid[0] == pytest.approx(0.999)
    scheduler.set_timesteps(2)
    assert scheduler.grid[1] == pytest.approx(0.1)


@pytest.mark.parametrize("theirs", [diffusers.DDIMScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()])
def test_a_second_loop_needs_no_new_grid(theirs):
    scheduler, z = UCGMScheduler.from_config(theirs.config), torch.randn(2, 3, 4, 4)
    scheduler.set_timesteps(5)

    def loop():
        x = z
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), t, x).prev_sample
        return x
    assert torch.equal(loop(), loop())


def test_a_misspelled_setting_is_refused():
    with pytest.raises(ValueError, match="no setting kapa"):
        UCGMScheduler.from_config(diffusers.DDIMScheduler().config, kapa=0.3)


@pytest.mark.parametrize("theirs", [diffusers.DDIMScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()])
def test_noise_is_added_wherever_the_timesteps_lie(theirs):
    """Pipelines leave them on the CPU; the meta device stands for a GPU. On the CPU it is DDIM's own."""
    scheduler, x, noise = UCGMScheduler.from_config(theirs.config), *torch.randn(2, 2, 3, 4, 4)
    scheduler.set_timesteps(5)
    for t in (scheduler.timesteps[:2], scheduler.timesteps[2:3]):
        for add in (scheduler.add_noise, lambda x, noise, t: scheduler.scale_noise(x, t, noise)):
            assert add(x.to("meta"), noise.to("meta"), t).device.type == "meta"
    if hasattr(theirs, "add_noise"):
        t = torch.tensor([17, 801])
        assert_close(scheduler.add_noise(x, noise, t), theirs.add_noise(x, noise, t), rtol=1e-4, atol=1e-5)


def test_what_a_step_returns():
    """(prev_sample, pred_original_sample), as DDIM has them; keywords of other schedulers are ignored."""
    theirs = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    ours, (x, made) = UCGMScheduler.from_config(theirs.config, kappa=0.0), torch.randn(2, 2, 3, 4, 4)
    theirs.set_timesteps(4)
    ours.set_timesteps(timesteps=theirs.timesteps.tolist(), original_inference_steps=50)
    expected = theirs.step(made, theirs.timesteps[0], x)
    found = ours.step(made, ours.timesteps[0], x, eta=0.0, variance_noise=None)
    assert_close(found.prev_sample, expected.prev_sample, rtol=1e-4, atol=1e-4)
    assert_close(found.pred_original_sample, expected.pred_original_sample, rtol=1e-4, atol=1e-3)
    ours.set_timesteps(4)
    pair = ours.step(made, ours.timesteps[0], x, return_dict=False)
    assert len(pair) == 2 and pair[0].shape == pair[1].shape == x.shape


def test_it_can_be_copied_and_pickled_in_the_middle_of_a_run(monkeypatch):
    """Also into a process that has yet to import it."""
    ours, x = UCGMScheduler.from_config(diffusers.DDIMScheduler().config), torch.randn(2, 3, 4, 4)
    ours.set_timesteps(4)
    for t in ours.timesteps[:2]:
        x = ours.step(torch.tanh(x), t, x).prev_sample
    stored = pickle.dumps(ours)
    copies = [copy.deepcopy(ours), pickle.loads(stored)]
    monkeypatch.setattr(extras, "scheduler", extras.scheduler)          # restored at the end
    monkeypatch.delitem(sys.modules, "extras.scheduler")
    copies.append(pickle.loads(stored))
    assert type(copies[1]) is UCGMScheduler and type(copies[2]) is extras.scheduler.UCGMScheduler
    assert extras.scheduler.UCGMScheduler is not UCGMScheduler
    t = ours.timesteps[2]
    expected = ours.step(torch.tanh(x), t, x).prev_sample
    assert all(torch.equal(each.step(torch.tanh(x), t, x).prev_sample, expected) for each in copies)


@pytest.mark.parametrize("name", [name for name in dir(diffusers) if name.startswith("FlowMatch")])
def test_every_flow_scheduler_has_a_config_that_is_read(name):
    """Its path is the straight one, told in thousandths, and the grid is shifted as it says."""
    try:
        theirs = getattr(diffusers, name)(shift=3.0)
    except TypeError:
        theirs = getattr(diffusers, name)()
    ours = UCGMScheduler.from_config(theirs.config)
    ours.set_timesteps(10)
    shift = theirs.config.get("shift", 1.0)
    even = torch.tensor(time_grid(10, kappa="auto"), dtype=DOUBLE)[:-1]
    assert_close(ours.grid[:-1], shift * even / (shift * even + 1 - even))
    assert_close(ours.timesteps.double(), 1000 * ours.grid[:-1], rtol=1e-6, atol=1e-3)


def test_a_step_before_its_grid_and_an_output_of_another_shape():
    scheduler, x = UCGMScheduler(), torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 1, x)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="not like x"):     # DDPM's variances, which a pipeline splits off
        scheduler.step(torch.zeros(1, 8, 2, 2), scheduler.timesteps[0], x)


def test_a_flow_shift_is_a_shift():
    """UniPC has the one, the flow schedulers have the other; where a config has both, they multiply."""
    given = [dict(shift=6.0), dict(flow_shift=6.0), dict(shift=2.0, flow_shift=3.0)]
    grids = []
    for how in given:
        scheduler = UCGMScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, **how)
        scheduler.set_timesteps(5)
        grids.append(scheduler.sigmas)
    assert_close(grids[1], grids[0])
    assert_close(grids[2], grids[0])
