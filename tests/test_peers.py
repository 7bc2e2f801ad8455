"""Libraries of requirements-dev.txt that compute the same, and the peers under experiments/."""
import numpy as np
import pytest
import torch
from torch.testing import assert_close
from toys import Net, batch, calls_of, images_of

from shapes import Shapes
from experiments.peers import (MeanFlow, alpha_at, dpm_solver_2m, draw_times, heun, meanflow_loss,
                               sample_meanflow)
from experiments.pose import draws
from features import Inception
from fid import precision_recall
from model import DiT
from sampler import sample, time_grid

DOUBLE = torch.float64


# ---- samplers -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("spacing, gap", [("leading", lambda n: (1 / n - 0.001, 0.001)),
                                          ("trailing", lambda n: (0.0, 0.0))])
@pytest.mark.parametrize("n", [10, 50])
def test_ddpm_order_1_is_ddim(spacing, gap, n):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
                                        clip_sample=False, set_alpha_to_one=True, timestep_spacing=spacing)
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=DOUBLE), 0)
    scheduler.set_timesteps(n)
    _, z, _, y, _ = batch(5)
    x, net = z, Net().requires_grad_(False)
    calls = calls_of(net)
    for k in scheduler.timesteps:
        x = scheduler.step(net(x, torch.full((5,), float(k), dtype=DOUBLE), y), k, x).prev_sample
    ours = sample(net, z, y, "ddpm", steps=n, gap=gap(n))
    assert_close(ours, x, rtol=1e-6, atol=1e-6 * x.abs().max().item())
    told = [t[0].item() for _, t, _ in calls]
    assert len(told) == 2 * n
    assert_close(told[n:], told[:n], rtol=0, atol=1e-9)


def test_linear_order_1_is_flow_matching_euler():
    diffusers = pytest.importorskip("diffusers")
    scheduler, n = diffusers.FlowMatchEulerDiscreteScheduler(), 8
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.001, n))
    _, z, _, y, _ = batch(5, dtype=torch.float32)
    x, net = z, Net().float().requires_grad_(False)
    for k, t in zip(scheduler.timesteps, scheduler.sigmas):
        x = scheduler.step(net(x, t.expand(5), y), k, x).prev_sample
    assert_close(sample(net, z, y, steps=n, gap=(0.0, 0.001)), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [5, 20])
def test_dpm_solver_is_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", algorithm_type="dpmsolver++", solver_order=2,
        lower_order_final=False, final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    times = torch.tensor(time_grid(steps), dtype=DOUBLE)
    scheduler.sigmas, scheduler.timesteps = times, times[:-1] * 1000
    _, z, _, y, _ = batch(5)
    x, net = z, Net().requires_grad_(False)
    for t in times[:-1]:
        x = scheduler.step(net(x, t.expand(5), y), t * 1000, x).prev_sample
    assert_close(dpm_solver_2m(net, z, y, "linear", times.tolist()), x, rtol=1e-5, atol=1e-5)


def test_heun_is_of_second_order():
    """dx/dt = x - 2 t has the solution 2 t + 2 + c e^t; half the step is a quarter of the error."""
    z, y, errors = torch.ones(1, 1, 1, 1, dtype=DOUBLE), torch.zeros(1).long(), []
    net = lambda x, t, y: x - 2 * t.view(-1, 1, 1, 1)
    for steps in (20, 40):
        times = [*torch.linspace(1, 0, steps + 1, dtype=DOUBLE).tolist()[:-1], 1e-9, 0.0]
        errors.append(abs(heun(net, z, y, times).item() - (2 + (1 - 4) / torch.e)))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("x_pred", [False, True])
def test_meanflow_starts_as_the_velocity_and_knows_straight_paths(x_pred):
    """Untrained it is the network whatever r is, and sampling is Euler's method. Where the velocity is
    constant along the path, the mean velocity is the velocity: the target is v."""
    net = DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3,
              norm="rms", rope=True, x_pred=x_pred)
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    flow, x, y, t = MeanFlow(net), torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]), torch.rand(4)
    with torch.no_grad():
        assert_close(flow(x, t / 2, t, y), net(x, t, y))
        euler = sample(net, x, y, times=[1.0, 0.75, 0.5, 0.25])
        assert_close(sample_meanflow(flow, x, y, torch.linspace(1, 0, 5)), euler, rtol=1e-4, atol=1e-4)
    constant = lambda value: lambda x_t, *rest: torch.full_like(x_t, value)
    loss = meanflow_loss(constant(5.0), constant(2.0), x, y, t, t / 2, torch.randn_like(x))
    assert_close(loss, torch.full((4,), 9 / 9.001))


@pytest.mark.parametrize("power", [0.0, 0.75])
def test_alphaflow_goes_from_the_velocity_to_meanflow(power):
    """For u(x, r, t) = x + t^2 - r, the teacher's v = x / 2 and alpha: at 1 the target is v; at alpha it is
    alpha v + (1 - alpha) u(x - alpha (t - r) v, r, t - alpha (t - r)); where r = t it is v. For small alpha
    it lies alpha times as far from u as MeanFlow's. In all but those rows the weight carries alpha, too."""
    half = lambda x, t, y: x / 2
    flow = lambda x, r, t, y: x + (t**2 - r).view(-1, 1, 1, 1)
    x, z = torch.randn(2, 4, 1, 2, 2, dtype=DOUBLE)
    t = torch.tensor([0.9, 0.8, 0.5, 0.7], dtype=DOUBLE)
    r = torch.tensor([0.1, 0.0, 0.4, 0.7], dtype=DOUBLE)
    loss = lambda alpha: meanflow_loss(flow, half, x, None, t, r, z, power, alpha)
    wide = lambda t: t.view(-1, 1, 1, 1)
    x_t = wide(t) * z + (1 - wide(t)) * x
    for alpha in (1.0, 0.4):
        step = alpha * (t - r)
        after = flow(x_t - wide(step) * x_t / 2, r, t - step, None)
        target = torch.where(wide(r == t), x_t / 2, alpha * x_t / 2 + (1 - alpha) * after)
        square = (flow(x_t, r, t, None) - target).square().flatten(1).mean(1)
        weight = torch.tensor([alpha, alpha, alpha, 1], dtype=DOUBLE)
        assert_close(loss(torch.tensor(alpha, dtype=DOUBLE)), weight * square / (square + 1e-3) ** power)
    small = torch.tensor(1e-5, dtype=DOUBLE)
    near = meanflow_loss(flow, half, x, None, t, r, z, 0.0, small) / torch.where(r == t, 1, small**3)
    assert_close(near, meanflow_loss(flow, half, x, None, t, r, z, 0.0), rtol=1e-3, atol=1e-9)


def test_alphaflow_s_curriculum_and_meanflow_s_times():
    assert [alpha_at(progress) for progress in (0.0, 0.5, 1.0)] == [1.0, 0.5, None]
    assert alpha_at(0.4) == pytest.approx(1 / (1 + np.exp(-2.5)))
    for kind, median in (("uniform", 0.5), ("lognormal", 1 / (1 + np.exp(2)))):
        t, r = draw_times(40_000, kind)
        assert (t >= r).all() and (t == r).float().mean().item() == pytest.approx(0.25, abs=0.01)
        both = torch.cat([t, r])[(t != r).repeat(2)]
        assert both.median().item() == pytest.approx(median, abs=0.01)


# ---- scores -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [32, 300])
def test_the_features_are_those_of_torch_fidelity(weights, size):
    peer = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    peer = peer("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))
    x = torch.from_numpy(images_of(size, 3, 2)).permute(0, 3, 1, 2)
    out, (pool, scores) = Inception(str(weights))(x), peer(x)
    assert_close(out["pool"], pool, rtol=1e-4, atol=1e-5)
    assert_close(out["scores"], scores, rtol=1e-4, atol=1e-4)


def test_the_network_is_that_of_pytorch_fid(weights, monkeypatch):
    """At 299 pixels, where nothing is resized; pytorch-fid resizes and scales images by rules of its own."""
    peer = pytest.importorskip("pytorch_fid.inception")
    stored = lambda *given, **more: torch.load(weights, weights_only=True)
    monkeypatch.setattr(peer, "load_state_dict_from_url", stored)
    x = torch.from_numpy(images_of(299, 3, 2)).permute(0, 3, 1, 2)
    net = peer.InceptionV3(resize_input=False, normalize_input=False).eval()
    with torch.no_grad():
        pool = net((x.float() - 128) / 128)[0].flatten(1)
    assert_close(Inception(str(weights))(x)["pool"], pool, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n, m, k", [(200, 200, 3), (150, 90, 5)])
def test_precision_and_recall_are_torch_fidelity_s(n, m, k):
    metric = pytest.importorskip("torch_fidelity.metric_prc").prc_features_to_metric
    a, b = torch.randn(n, 12), 1.2 * torch.randn(m, 12)
    peer = metric(a, b, prc_neighborhood=k, prc_batch_size=64, save_cpu_ram=False, verbose=False)
    assert precision_recall(a, b, k) == pytest.approx((peer["precision"], peer["recall"]), rel=1e-5)


# ---- the numbers of a drawing -------------------------------------------------------------------------

def test_the_numbers_of_a_drawing_are_those_it_was_drawn_from():
    """The images are those of shapes.Shapes with classes in turn; narrowing a number narrows that one alone,
    and afterwards all is as before."""
    positions, stream = np.arange(64), Shapes(32, 3)
    x, y, u = draws(3, positions)
    assert y.tolist() == [k % 8 for k in range(64)]
    still, _, _ = draws(3, positions, [(number, lambda u: 0 * u + 0.5) for number in (1, 2)])
    plain, y_plain = stream[positions]
    same_class = (y_plain == y).nonzero()[:, 0]
    assert len(same_class) > 0
    assert_close(plain[same_class], x[same_class], rtol=0, atol=0)
    place, circles = torch.arange(32) + 0.5, y == 0
    ink = lambda x: (x - x[..., :1, :1]).abs().sum(1)                   # what is not paper, (B, S, S)
    centre = lambda x: (ink(x).sum(1) @ place) / ink(x).sum((1, 2)) - 16
    assert centre(still)[circles].abs().max() < 0.05
    assert_close(centre(x)[circles], 0.12 * 32 * u[circles, 0], rtol=0, atol=0.05)
