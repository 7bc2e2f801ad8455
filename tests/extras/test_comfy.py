"""sample_ucgm, as k-diffusion and ComfyUI call it, is sampler.sample on the same network."""
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from toys import Net, batch

from extras.comfy import NODE_CLASS_MAPPINGS, sample_ucgm
from objective import TRANSPORTS, predict
from sampler import sample, time_grid

DOUBLE = torch.float64
SETTINGS = [dict(kappa="auto"), dict(kappa=0.0), dict(kappa=0.4), dict(kappa=0.0, rho=1.0),
            dict(kappa=0.3, rho=0.2)]


class CONST:
    """ComfyUI's mark of a flow."""


class ModelSampling(torch.nn.Module, CONST):
    pass


class Model:
    """A network as ComfyUI's denoiser, on the grid of its sigmas. Flow: its model_sampling lies two deep."""

    def __init__(self, transport, times, dtype=DOUBLE):
        self.net, self.row, self.seen = Net().to(dtype), TRANSPORTS[transport], []
        t = torch.tensor(times, dtype=DOUBLE)
        alpha, gamma = self.row.alpha(t), self.row.gamma(t)
        self.times, self.gammas = t, torch.ones_like(t) if transport == "linear" else gamma
        self.sigmas = (alpha / self.gammas * (t > 0)).to(dtype)     # at 0 EDM's would be .0017
        sampling = ModelSampling() if transport == "linear" else torch.nn.Module()
        self.inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling))

    def __call__(self, x, sigma, y, seed=None):
        self.seen.append(sigma)
        k = (self.sigmas[:, None] - sigma.cpu()).abs().argmin(0)                        # (B,)
        x_t = self.gammas[k].to(x).view(-1, 1, 1, 1) * x
        return predict(self.net, self.row, x_t, self.times[k].to(x), y)[1]


def both(transport, times, how, dtype=DOUBLE, seed=None):
    """The images of sample_ucgm and of sampler.sample, from the same noise and with the same fresh noise."""
    model, (_, z, _, y, _) = Model(transport, times, dtype), batch(5, dtype=dtype)
    extra_args = {"y": y} | ({} if seed is None else {"seed": seed})
    torch.manual_seed(3)
    x = z / model.gammas[0].to(dtype)
    found = sample_ucgm(model, x, model.sigmas, extra_args, **how)
    generator = torch.Generator().manual_seed(3 if seed is None else seed + 1)
    noise = lambda i: torch.randn(z.shape, generator=generator)
    return found, sample(model.net, z, y, transport, times=times, noise=noise, **how)


@pytest.mark.parametrize("transport", ["linear", "edm", "ddpm", "trigflow"])
@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("dtype, tolerance", [(DOUBLE, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("seed", [None, 7])
def test_the_images_are_those_of_our_sampler(transport, how, dtype, tolerance, seed):
    times = time_grid(7, kappa=how["kappa"], transport=transport)
    found, expected = both(transport, times, how, dtype, seed)
    assert found.dtype == dtype
    assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("transport", ["linear", "edm"])
@pytest.mark.parametrize("how", SETTINGS)
def test_images_to_images(transport, how):
    """From the middle of a grid on."""
    found, expected = both(transport, time_grid(9)[4:], how)
    assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("transport", ["linear", "edm"])
@pytest.mark.parametrize("how", SETTINGS)
def test_sigmas_that_do_not_end_in_0_end_where_the_whole_run_comes_through(transport, how):
    """What the model is asked in the fifth step of a run is what a run of four steps returns."""
    model, (_, z, _, y, _), seen = Model(transport, time_grid(8)), batch(5), []
    call = dict(extra_args={"y": y, "seed": 1}, **how)
    sample_ucgm(model, 9 * z, model.sigmas, callback=seen.append, **call)
    found = sample_ucgm(model, 9 * z, model.sigmas[:5], **call)
    assert_close(found, seen[4]["x"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transport", ["linear", "edm"])
@pytest.mark.parametrize("last", [5, 9])
def test_kappa_0_is_euler_of_k_diffusion(transport, last):
    """x moves along (x - denoised) / sigma, also to a sigma above 0."""
    model, (_, x, _, y, _) = Model(transport, time_grid(8)), batch(5)
    sigmas = model.sigmas[:last]
    found = sample_ucgm(model, x, sigmas, {"y": y}, kappa=0.0)
    for now, after in zip(sigmas, sigmas[1:]):
        x = x + (x - model(x, now.expand(5), y)) / now * (after - now)
    assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_a_model_without_model_sampling_is_k_diffusions():
    """Its inner_model is any network. The sigmas of both end at 1, so that they alone do not tell."""
    sigmas, x = torch.tensor([1.0, 0.5, 0.2], dtype=DOUBLE), batch(3)[1]
    plain = lambda x, sigma: x.tanh()
    k_diffusion, comfy = Wrapped(plain, torch.nn.Linear(1, 1)), Wrapped(plain, None)
    comfy.inner_model = SimpleNamespace(model_sampling=ModelSampling())
    results = [sample_ucgm(model, x, sigmas) for model in (plain, k_diffusion, comfy)]
    assert torch.equal(results[0], results[1]) and not torch.allclose(results[0], results[2])


class Wrapped:
    def __init__(self, call, inner_model):
        self.call, self.inner_model = call, inner_model

    def __call__(self, *inputs):
        return self.call(*inputs)


@pytest.mark.parametrize("transport", ["linear", "edm"])
@pytest.mark.parametrize("how", [*SETTINGS, dict(kappa=0.0, rho="sde")])
def test_float16_stays_finite(transport, how):
    """Noise levels to 78: the state is float64, and float16 is only what the model sees and returns."""
    times = time_grid(20, kappa=how["kappa"], transport=transport)
    model, (_, z, _, y, _) = Model(transport, times), batch(5, dtype=torch.float16)
    x = (z / model.gammas[0]).half()
    found = sample_ucgm(model, x, model.sigmas.half(), {"y": y, "seed": 1}, **how)
    expected = sample_ucgm(model, x.double(), model.sigmas, {"y": y, "seed": 1}, **how)
    assert found.dtype == torch.float16 and found.isfinite().all()
    assert_close(found.double(), expected, rtol=0, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize("kappa", ["auto", 0.0])
def test_a_thousand_steps_in_float16_round_once(kappa):
    """Where the data are 0, x is sigma times the noise."""
    x, sigmas = batch(5, dtype=torch.float16)[1], torch.linspace(8, 2, 1001)
    found = sample_ucgm(lambda x, sigma: torch.zeros_like(x), x, sigmas, kappa=kappa)
    assert torch.equal(found, x / 4)


def test_what_the_model_and_the_callback_receive(capsys):
    """One call per sigma, and the dict that k-diffusion's samplers give. disable hides the bar."""
    model, (_, z, _, y, _), seen = Model("edm", time_grid(4)), batch(5), []
    for disable in (True, False):
        sample_ucgm(model, z, model.sigmas, {"y": y}, seen.append, disable)
        assert ("4/4" in capsys.readouterr().err) != disable
    assert_close(torch.stack(model.seen[:4]), model.sigmas[:4, None].expand(4, 5), rtol=0, atol=0)
    for i, given in enumerate(seen[:4]):
        assert given.keys() == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert given["i"] == i and given["sigma"] == given["sigma_hat"] == model.sigmas[i]
        expected = model(given["x"], given["sigma"].expand(5), y)
        assert_close(given["denoised"], expected, rtol=0, atol=0)


def test_a_callback_that_raises_stops_the_run():
    """ComfyUI interrupts a run in this way."""
    model, (_, z, _, y, _) = Model("linear", time_grid(8)), batch(5)

    def stop(given):
        if given["i"] == 2:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        sample_ucgm(model, z, model.sigmas, {"y": y}, stop)
    assert len(model.seen) == 3


@pytest.mark.parametrize("sigmas, how, words", [
    ([1.0, 2.0, 0.0], {}, "fall"), ([2.0, 1.0, 0.0], dict(rho=0.5), "give a number"),
    ([2.0, 1.0, 0.0], dict(kappa=0.0, rho=2.0), "rho 2.0")])
def test_mistakes_end_in_one_line(sigmas, how, words):
    with pytest.raises(ValueError, match=words) as error:
        sample_ucgm(lambda x, sigma: x, torch.zeros(1, 2), torch.tensor(sigmas), **how)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kappa, rho", [("auto", 0.0), ("0.3", 0.5)])
def test_the_node_makes_a_sampler_of_comfyui(monkeypatch, kappa, rho):
    """KSAMPLER(function, options) of comfy.samplers calls the function in this way."""
    class KSAMPLER:
        def __init__(self, function, options):
            self.sample = lambda *inputs, **how: function(*inputs, **how, **options)
    comfy = types.ModuleType("comfy")
    comfy.samplers = types.ModuleType("comfy.samplers")
    comfy.samplers.KSAMPLER = KSAMPLER
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.samplers", comfy.samplers)
    kind = NODE_CLASS_MAPPINGS["UCGM-S"]
    fields = kind.INPUT_TYPES()["required"]
    assert kind.RETURN_TYPES == ("SAMPLER",) and fields["kappa"][1]["default"] == "auto"
    (sampler,) = getattr(kind(), kind.FUNCTION)(kappa=kappa, rho=rho)
    model, (_, z, _, y, _) = Model("linear", time_grid(5)), batch(5)
    extra_args = {"y": y, "seed": 4}
    found = sampler.sample(model, z, model.sigmas, extra_args=extra_args, callback=lambda given: None,
                           disable=True)
    number = kappa if kappa == "auto" else float(kappa)
    expected = sample_ucgm(model, z, model.sigmas, extra_args, kappa=number, rho=rho)
    assert torch.equal(found, expected)
