"""Theorems about the sampler: peers on the grids where they agree, its order of accuracy, and its bookkeeping."""
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from objective import TRANSPORTS, predict
from sampler import count_nfe, sample, time_grid

DOUBLE = torch.float64


class Net(torch.nn.Module):
    """Any smooth function will do; counts the images that it is asked about."""
    num_classes = 3

    def __init__(self):
        super().__init__()
        self.rows, self.times = 0, []

    def forward(self, x, t, y):
        self.rows += len(x)
        self.times.append(t[0].item())
        shape = (-1, *[1] * (x.ndim - 1))
        return torch.tanh(1.3 * x + 0.4 * x.roll(1, -1)) * (0.5 + 0.01 * torch.sqrt(t.abs()).view(shape)) - 0.2 * x + 0.3 * torch.cos(y.to(x.dtype)).view(shape)


def start(n=5, dtype=DOUBLE):
    g = torch.Generator().manual_seed(2)
    return torch.randn(n, 3, 4, 4, generator=g, dtype=DOUBLE).to(dtype), torch.arange(n) % 3


# ---- the grid -----------------------------------------------------------------------------------------------------

def test_grid():
    assert_close(time_grid(2, gap=(1e-3, 0.3)), [0.999, 0.3, 0.0])
    assert_close(time_grid(5, gap=(0.0, 0.0)), [1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert time_grid(1, gap=(1e-3, 0.5)) == [0.999, 0.0]
    assert len(time_grid(9, order=2)) == 6 and len(time_grid(8, order=2)) == 5
    u = np.linspace(0.001, 0.999, 7)
    assert_close(np.array(time_grid(7, (1.17, 0.8, 1.1))[:-1]), 1 - (1 - (1 - u**1.17) ** 0.8) ** 1.1)


def test_explicit_times_are_the_grid():
    z, y = start()
    grid = time_grid(6, (1.17, 0.8, 1.1), (0.01, 0.02))
    expected = sample(Net(), z, y, steps=6, schedule=(1.17, 0.8, 1.1), gap=(0.01, 0.02), kappa=0.3)
    for times in (grid, grid[:-1], torch.tensor(grid, dtype=DOUBLE)):
        assert_close(sample(Net(), z, y, times=times, kappa=0.3), expected, rtol=0, atol=0)


# ---- peers --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spacing, gap", [("leading", lambda n: (1 / n - 0.001, 0.001)), ("trailing", lambda n: (0.0, 0.0))])
@pytest.mark.parametrize("n", [10, 50])
def test_ddpm_order_1_is_ddim(spacing, gap, n):
    diffusers = pytest.importorskip("diffusers")
    z, y = start()
    net = Net()
    scheduler = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, set_alpha_to_one=True, timestep_spacing=spacing)
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=DOUBLE), 0)
    scheduler.set_timesteps(n)
    x = z
    for k in scheduler.timesteps:
        x = scheduler.step(net(x, torch.full((len(x),), float(k), dtype=DOUBLE), y), k, x).prev_sample
    asked = list(net.times)
    net.times.clear()
    assert_close(sample(net, z, y, "ddpm", steps=n, gap=gap(n)), x, rtol=1e-6, atol=1e-6 * x.abs().max().item())
    assert_close(net.times, asked, rtol=0, atol=1e-9)


def test_linear_order_1_is_flow_matching_euler():
    diffusers = pytest.importorskip("diffusers")
    z, y = start(dtype=torch.float32)
    net, n = Net(), 8
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.001, n))
    x = z
    for k, t in zip(scheduler.timesteps, scheduler.sigmas):
        x = scheduler.step(net(x, t.expand(len(x)), y), k, x).prev_sample
    assert_close(sample(net, z, y, steps=n, gap=(0.0, 0.001)), x, rtol=1e-5, atol=1e-5)


def test_trigflow_order_1_is_ddim_as_rotation():
    """Salimans and Ho 2022, and TrigFlow: DDIM turns the pair (x, -F) by the angle of the step."""
    z, y = start()
    net, x = Net(), z
    grid = time_grid(7, gap=(0.01, 0.05))
    for now, after in zip(grid, grid[1:]):
        F_t = net(x, torch.full((len(x),), now, dtype=DOUBLE), y)
        turn = torch.tensor(np.pi / 2 * (now - after), dtype=DOUBLE)
        x = turn.cos() * x - turn.sin() * F_t
    assert_close(sample(net, z, y, "trigflow", times=grid), x)


def test_edm_order_2_is_heun_of_edm():
    """Algorithm 1 of EDM (arXiv 2206.00364) without churn, in EDM's own coordinates."""
    z, y = start()
    net, row = Net(), TRANSPORTS["edm"]
    grid = torch.tensor(time_grid(11, gap=(0.01, 0.02), order=2), dtype=DOUBLE)
    s = torch.exp(4 * (2.68 * grid - 1.59))

    def D(x, i):
        c_skip, c_out, c_in = 0.25 / (s[i] ** 2 + 0.25), s[i] * 0.5 / (s[i] ** 2 + 0.25).sqrt(), 1 / (s[i] ** 2 + 0.25).sqrt()
        return c_skip * x + c_out * net(c_in * x, grid[i].expand(len(x)), y)
    x = z / row.gamma(grid[0])
    for i in range(len(grid) - 2):
        d = (x - D(x, i)) / s[i]
        x_next = x + (s[i + 1] - s[i]) * d
        d_next = (x_next - D(x_next, i + 1)) / s[i + 1]
        x = x + (s[i + 1] - s[i]) * (d + d_next) / 2
    assert_close(sample(net, z, y, "edm", times=grid, order=2), D(x, len(grid) - 2), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["linear", "trigflow", "edm"])
def test_rho_1_is_multistep_consistency_sampling(name):
    """Algorithm 1 of consistency models (arXiv 2303.01469): denoise, add fresh noise for the next time, denoise again."""
    z, y = start()
    net, row = Net(), TRANSPORTS[name]
    eps = [torch.randn_like(z) for _ in range(3)]
    times = [0.999, 0.7, 0.4, 0.2]
    x = z
    for i, t in enumerate(times):
        x_hat = predict(net, name, x, torch.full((len(x),), t, dtype=DOUBLE), y)[1]
        if i < 3:
            after = torch.tensor(times[i + 1], dtype=DOUBLE)
            x = row.gamma(after) * x_hat + row.alpha(after) * eps[i]
    assert_close(sample(net, z, y, name, times=times, rho=1.0, noise=lambda i: eps[i]), x_hat)


def test_sde_stochasticity():
    z, y = start()
    net, eps, times = Net(), torch.ones_like(start()[0]), [0.9, 0.6, 0.3]
    x = z
    for i, t in enumerate(times):
        _, x_hat, z_hat = predict(net, "linear", x, torch.full((len(x),), t, dtype=DOUBLE), y)
        if i < 2:
            rho = min(1.0, 2 * abs(times[i + 1] - t) * t / times[i + 1] ** 2)
            x = times[i + 1] * ((1 - rho) ** 0.5 * z_hat + rho**0.5 * eps) + (1 - times[i + 1]) * x_hat
    assert_close(sample(net, z, y, times=times, rho="sde", noise=lambda i: eps), x_hat)


# ---- the order of accuracy ----------------------------------------------------------------------------------------

CENTRES = torch.tensor([[1.0, 0.5], [-1.0, 0.3], [0.2, -1.2]], dtype=DOUBLE)
WIDTHS = torch.tensor([0.15, 0.25, 0.2], dtype=DOUBLE)


def mixture_net(name):
    """The exact network for a mixture of three round Gaussians in the plane: the posterior mean of z_t given x_t."""
    row = TRANSPORTS[name]

    def net(x_t, t, y):
        alpha, gamma, alpha_hat, gamma_hat = row.at(t, x_t)
        variance = alpha**2 + gamma**2 * WIDTHS**2                                                   # (B, 3)
        off = x_t[:, None] - gamma[..., None] * CENTRES                                              # (B, 3, 2)
        share = torch.softmax(-off.square().sum(-1) / (2 * variance) - variance.log(), 1)            # (B, 3)
        x_hat = (share[..., None] * (CENTRES + (gamma * WIDTHS**2 / variance)[..., None] * off)).sum(1)
        z_hat = (share[..., None] * (alpha / variance)[..., None] * off).sum(1)
        return alpha_hat * z_hat + gamma_hat * x_hat
    return net


@pytest.mark.parametrize("name", ["linear", "trigflow", "edm"])
@pytest.mark.parametrize("schedule", [(1.0, 1.0, 1.0), (1.17, 0.8, 1.1)])
def test_auto_is_second_order_and_none_is_first(name, schedule):
    z, y = torch.randn(2000, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)), torch.zeros(2000).long()
    net = mixture_net(name)
    settings = dict(transport=name, schedule=schedule, gap=(1e-3, 1e-3))
    exact = sample(net, z, y, steps=2000, kappa="auto", **settings)
    median = {kappa: [(sample(net, z, y, steps=n, kappa=kappa, **settings) - exact).norm(dim=1).median().item() for n in (40, 80, 160)] for kappa in ("auto", 0.0)}
    for coarse, fine in zip(median["auto"], median["auto"][1:]):
        assert coarse / fine >= 3
    for coarse, fine in zip(median[0.0], median[0.0][1:]):
        assert 1.7 < coarse / fine < 2.4
    assert median["auto"][1] < median[0.0][2]


def test_auto_is_one_third_on_a_uniform_grid_and_adams_bashforth_on_any():
    """The correction that auto carries equals h^2 F'/2 by divided differences, on a grid of random steps: F is linear in t here."""
    times = np.sort(np.random.default_rng(0).uniform(0.05, 1, 12))[::-1].tolist()
    z, y = start()
    net = lambda x, t, y: (2 * t).view(-1, 1, 1, 1).expand_as(x)               # dx/dt = F = 2 t, so x = t^2 + const: AB2 is exact
    seen = {}
    sample(net, z, y, times=times, kappa="auto", on_step=lambda i, t, x_hat: seen.update({i: x_hat + 2 * t * t}))
    x = {i: seen[i] for i in seen}                                             # x_hat = x - t F, so x = x_hat + t * 2 t
    for i in range(2, 11):
        assert_close(x[i] - x[1], torch.full_like(z, times[i] ** 2 - times[1] ** 2))
    from sampler import extrapolation
    assert_close(extrapolation("auto", time_grid(9), 4), 1 / 3, rtol=1e-9, atol=0)
    assert extrapolation("auto", time_grid(9), 0) == 0 and extrapolation(0.4, time_grid(9), 1) == 0 and extrapolation(0.4, time_grid(9), 2) == 0.4


# ---- guidance and bookkeeping -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, order", [("linear", 1), ("relinear", 1), ("ddpm", 1), ("trigflow", 2)])
@pytest.mark.parametrize("scale, interval", [(1.0, (0.0, 1.0)), (2.5, (0.0, 1.0)), (2.5, (0.2, 0.61))])
def test_nfe_is_counted(name, order, scale, interval):
    z, y = start()
    net = Net()
    sample(net, z, y, name, steps=9, order=order, gap=(0.01, 0.02), cfg_scale=scale, cfg_interval=interval)
    assert count_nfe(time_grid(9, gap=(0.01, 0.02), order=order), name, order, scale, interval) == net.rows / len(z)


def test_guidance_is_linear_in_the_output_and_closed_at_its_ends():
    z, y = start()
    net, times, scale = Net(), [0.9, 0.5, 0.25], 3.0

    def guided(x, t, y):
        F_y, F_null = net(x, t, y), net(x, t, torch.full_like(y, 3))
        return F_null + scale * (F_y - F_null) if 0.25 <= t[0] <= 0.5 else F_y
    assert_close(sample(net, z, y, times=times, cfg_scale=scale, cfg_interval=(0.25, 0.5)), sample(guided, z, y, times=times))
    assert count_nfe([*times, 0.0], "linear", 1, scale, (0.25, 0.5)) == 5
    assert count_nfe([*times, 0.0], "relinear", 1, scale, (0.0, 0.2)) == 4     # its own clock runs the other way: 0.1, 0.5, 0.75
    ones = torch.ones_like(y)                                                  # against itself as the null class, guidance is nothing
    assert_close(sample(net, z, ones, times=times, cfg_scale=scale, null=1), sample(net, z, ones, times=times))


def test_dtype_gradients_and_what_on_step_sees():
    z, y = start(dtype=torch.float32)
    net, seen, weight = Net(), [], torch.ones((), requires_grad=True)
    dtypes = set()
    x = sample(lambda *a: dtypes.add((a[0].dtype, a[1].dtype)) or weight * net(*a), z, y, steps=4, kappa=0.4, on_step=lambda i, t, x_hat: seen.append((i, t, x_hat)))
    assert x.dtype == torch.float32 and not x.requires_grad and dtypes == {(torch.float32, torch.float32)}
    assert [i for i, _, _ in seen] == [0, 1, 2, 3] and [t for _, t, _ in seen] == time_grid(4)[:-1]
    assert_close(seen[-1][2], x, rtol=0, atol=0)


def test_stochastic_sampling_by_default_uses_torchs_generator():
    z, y = start()
    one, two = (torch.manual_seed(s) and sample(Net(), z, y, steps=3, rho=1.0) for s in (0, 1))
    torch.manual_seed(0)
    assert_close(sample(Net(), z, y, steps=3, rho=1.0), one)
    assert (one - two).abs().max() > 1e-3


@pytest.mark.parametrize("bad, words", [
    (dict(kappa="auto", rho=1.0), "number instead"), (dict(kappa="auto", order=2), "number instead"), (dict(order=2, gap=(0.0, 0.001)), r"gap\[0\]"),
    (dict(transport="epsilon-prediction", gap=(0.0, 0.001)), r"gap\[0\]"), (dict(kappa="fast"), "auto"), (dict(rho=2.0), "0..1"),
    (dict(times=[0.5, 0.7]), "fall"), (dict(steps=0), "at least 1"), (dict(gap=(0.6, 0.6)), "gap"), (dict(cfg_scale=2.0), "null class")])
def test_bad_settings(bad, words):
    z, y = start()
    with pytest.raises(ValueError, match=words) as error:
        sample(lambda x, t, y: x, z, y, **bad)
    assert "\n" not in str(error.value)
