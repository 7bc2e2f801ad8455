"""Theorems about the sampler: famous methods that it is, its order of accuracy, and its bookkeeping."""
import numpy as np
import pytest
import torch
from torch.testing import assert_close
from toys import Net, batch, calls_of

from objective import TRANSPORTS, identity, predict
from sample import count_nfe
from sampler import next_u, sample, tau_at, time_grid

DOUBLE = torch.float64


def start(dtype=DOUBLE):
    _, z, _, y, _ = batch(5, dtype=dtype)
    return z, y


def at(t, x):
    """The time t of a whole batch x."""
    return torch.full((len(x),), t, dtype=x.dtype)


# ---- the grid -----------------------------------------------------------------------------------------

def test_grid():
    assert_close(time_grid(2, gap=(1e-3, 0.3)), [0.999, 0.3, 0.0])
    assert_close(time_grid(5, gap=(0.0, 0.0)), [1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert time_grid(1, gap=(1e-3, 0.5)) == [0.999, 0.0]
    assert len(time_grid(9, order=2)) == 6 and len(time_grid(8, order=2)) == 5
    u = np.linspace(0.001, 0.999, 7)
    warped = 1 - (1 - (1 - u**1.17) ** 0.8) ** 1.1
    grid = time_grid(7, (1.17, 0.8, 1.1))
    assert_close(np.array(grid), np.append(warped, 0.0))
    # and times are the grid, with or without the last
    z, y = start()
    expected = sample(Net(), z, y, steps=7, kappa=0.3, schedule=(1.17, 0.8, 1.1))
    for times in (grid, grid[:-1], torch.tensor(grid, dtype=DOUBLE)):
        assert_close(sample(Net(), z, y, times=times, kappa=0.3), expected, rtol=0, atol=0)


def test_the_grid_of_auto_is_the_same_on_every_transport():
    """Even in tau + log(tau / (1 - tau)) / 32 from the tau of gap[0] to (N - 1)^-1.5 or the tau of gap[1]; it
    may begin where tau is 1."""
    for name, row in TRANSPORTS.items():
        tau = tau_at(row, torch.tensor(time_grid(9, gap=(0.01, 1e-3), kappa="auto", transport=name)[:-1]))
        first, last = tau_at(row, torch.tensor([0.99, 1e-3])).tolist()
        assert_close(tau[[0, -1]].float(), torch.tensor([first, max(last, 8**-1.5)]), rtol=0, atol=1e-6)
        clock = tau + (tau / (1 - tau)).log() / 32
        steps = clock.diff()
        assert_close(steps, steps.mean().expand(8), rtol=1e-3, atol=0)
    assert all(time_grid(n, gap=(0.0, 0.05), kappa="auto")[0] == 1 for n in (1, 9))
    assert_close(time_grid(1, kappa="auto"), [0.999, 0.0])


# ---- famous methods, written a second time (test_peers.py has those of libraries) ---------------------

def test_trigflow_order_1_is_ddim_as_rotation():
    """Salimans and Ho 2022, and TrigFlow: DDIM turns the pair (x, -F) by the angle of the step."""
    z, y = start()
    net, x, grid = Net(), z, time_grid(7, gap=(0.01, 0.05))
    for now, after in zip(grid, grid[1:]):
        turn = np.pi / 2 * (now - after)
        x = np.cos(turn) * x - np.sin(turn) * net(x, at(now, x), y)
    assert_close(sample(net, z, y, "trigflow", times=grid), x.detach())


def test_edm_order_2_is_heun_of_edm():
    """Algorithm 1 of EDM (arXiv 2206.00364) without churn, in EDM's own coordinates."""
    z, y = start()
    net, row = Net(), TRANSPORTS["edm"]
    grid = torch.tensor(time_grid(11, gap=(0.01, 0.02), order=2), dtype=DOUBLE)
    s = torch.exp(4 * (2.68 * grid - 1.59))

    def D(x, i):
        root = (s[i] ** 2 + 0.25).sqrt()
        return 0.25 / root**2 * x + 0.5 * s[i] / root * net(x / root, grid[i].expand(len(x)), y)
    x = z / row.gamma(grid[0])
    for i in range(len(grid) - 2):
        d = (x - D(x, i)) / s[i]
        x_next = x + (s[i + 1] - s[i]) * d
        d_next = (x_next - D(x_next, i + 1)) / s[i + 1]
        x = x + (s[i + 1] - s[i]) * (d + d_next) / 2
    expected = D(x, len(grid) - 2).detach()
    assert_close(sample(net, z, y, "edm", times=grid, order=2), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["linear", "trigflow", "edm"])
@pytest.mark.parametrize("rho", [1.0, "sde"])
def test_rho_1_is_multistep_consistency_sampling_and_sde_a_share_of_it(name, rho):
    """rho 1 is algorithm 1 of consistency models (arXiv 2303.01469): denoise, add fresh noise, and again."""
    x, y = start()
    net, transport, times = Net(), TRANSPORTS[name], torch.tensor([0.999, 0.7, 0.4, 0.2], dtype=DOUBLE)
    z, eps = x, [torch.randn_like(x) for _ in range(3)]
    for i, now in enumerate(times):
        _, x_hat, z_hat = predict(net, name, x, now.expand(len(x)), y)
        if i < 3:
            after, noise = times[i + 1], eps[i]
            if rho == "sde":
                share = 2 * (now - after) * transport.alpha(now) / transport.alpha(after) ** 2
                share = min(1.0, share.item())
                noise = (1 - share) ** 0.5 * z_hat + share**0.5 * noise
            x = transport.gamma(after) * x_hat + transport.alpha(after) * noise
    ours = sample(net, z, y, name, times=times, rho=rho, noise=lambda i: eps[i])
    assert_close(ours, x_hat.detach())


# ---- the order of accuracy ----------------------------------------------------------------------------

CENTRES = torch.tensor([[1.0, 0.5], [-1.0, 0.3], [0.2, -1.2]], dtype=DOUBLE)
WIDTHS = torch.tensor([0.15, 0.25, 0.2], dtype=DOUBLE)


def mixture_net(row):
    """The exact network of a mixture of three round Gaussians in the plane: the mean of z_t given x_t."""
    def net(x_t, t, y):
        alpha, gamma, alpha_hat, gamma_hat = row.at(t, x_t)
        variance = alpha**2 + gamma**2 * WIDTHS**2                                      # (B, 3)
        off = x_t[:, None] - gamma[..., None] * CENTRES                                 # (B, 3, 2)
        share = torch.softmax(-off.square().sum(-1) / (2 * variance) - variance.log(), 1)[..., None]
        inward = (gamma * WIDTHS**2 / variance)[..., None] * off
        x_hat = (share * (CENTRES + inward)).sum(1)                                     # (B, 2)
        z_hat = (share * (alpha / variance)[..., None] * off).sum(1)                    # (B, 2)
        return alpha_hat * z_hat + gamma_hat * x_hat
    return net


@pytest.mark.parametrize("name", ["linear", "trigflow", "edm"])
@pytest.mark.parametrize("schedule", [(1.0, 1.0, 1.0), (1.17, 0.8, 1.1)])
def test_auto_is_third_order_one_third_second_and_none_first(name, schedule):
    """Half the step leaves an eighth, a quarter, a half of the error. 1/3 is for even steps of t."""
    z, y = torch.randn(100, 2, dtype=DOUBLE), torch.zeros(100).long()
    net = mixture_net(TRANSPORTS[name])
    draw = lambda steps, kappa: sample(net, z, y, name, steps, kappa, schedule=schedule)
    exact = draw(500, "auto")
    errors = {kappa: [(draw(n, kappa) - exact).norm(dim=1).median().item() for n in (50, 100)]
              for kappa in ("auto", 1 / 3, 0.0)}
    ratio = {kappa: coarse / fine for kappa, (coarse, fine) in errors.items()}
    assert ratio["auto"] > 6 and 1.7 < ratio[0.0] < 2.4 and (ratio[1 / 3] > 3 or schedule[0] > 1)
    assert 5 * errors["auto"][1] < errors[1 / 3][1] < errors[0.0][1]


def test_the_corrector_is_exact_for_a_velocity_quadratic_in_tau():
    """du/dtau = 3 + tau^2 has the solution 3 tau + tau^3 / 3 + c, here on random steps."""
    taus = np.sort(np.random.default_rng(0).uniform(0.05, 1, 12))[::-1].tolist()
    calls, u, corrected = [], torch.zeros(1, 1, dtype=DOUBLE), []
    for now, after in zip(taus, taus[1:]):
        u = next_u(calls, now, after, u, torch.full_like(u, 3 + now**2))
        corrected.append(calls[-1][1].item() - 3 * now - now**3 / 3)
    assert_close(corrected[2:], corrected[1:2] * 9, rtol=0, atol=1e-12)
    assert abs(corrected[1] - corrected[0]) > 1e-6              # the first step has two velocities alone


def test_auto_draws_the_same_images_on_every_transport():
    """One grid of tau, one u at its start, and each row's own exact network."""
    u, y = torch.randn(20, 2, dtype=DOUBLE), torch.zeros(20).long()
    taus, images = torch.linspace(0.98, 0.03, 9, dtype=DOUBLE), {}
    for name, row in TRANSPORTS.items():
        row = row._replace(net_time=identity, sign=1.0)
        low, high = torch.zeros_like(taus), torch.ones_like(taus)
        for _ in range(60):                                     # bisection: the times of these taus
            middle = (low + high) / 2
            is_below = tau_at(row, middle) < taus
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        z = (row.alpha(high[0]) + row.gamma(high[0])) * u
        images[name] = sample(mixture_net(row), z, y, row, times=high, kappa="auto")
    for name in images:
        assert_close(images[name], images["linear"], rtol=0, atol=1e-9)


def test_kappa_0_is_the_plain_mixture_to_the_bit():
    z, y = start()
    for name, row in TRANSPORTS.items():
        times, x = torch.tensor(time_grid(6, gap=(0.01, 0.02)), dtype=DOUBLE), z
        for i in range(6):
            _, x_hat, z_hat = predict(Net(), row, x, at(times[i].item(), x), y)
            x = row.alpha(times[i + 1]).item() * z_hat + row.gamma(times[i + 1]).item() * x_hat
        assert torch.equal(sample(Net(), z, y, name, 6, 0.0, gap=(0.01, 0.02)), x_hat)


@pytest.mark.parametrize("order", [1, 2])
def test_renewed_noise_keeps_the_deviation(order):
    """Gaussian data of deviation .5, their exact network: Heun's correction does not magnify fresh noise."""
    def net(x, t, y):                                           # z_hat - x_hat
        t = t.view(-1, 1)
        return (t - (1 - t) * 0.25) / (t**2 + (1 - t) ** 2 * 0.25) * x
    z = torch.randn(4000, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    deviation = sample(net, z, torch.zeros(4000).long(), steps=40, rho=0.3, order=order).std().item()
    assert 0.2 < deviation < 0.55


# ---- guidance and bookkeeping -------------------------------------------------------------------------

@pytest.mark.parametrize("name, order", [("linear", 1), ("relinear", 1), ("ddpm", 1), ("trigflow", 2)])
@pytest.mark.parametrize("scale, interval", [(1.0, (0.0, 1.0)), (2.5, (0.0, 1.0)), (2.5, (0.2, 0.61))])
def test_nfe_is_counted(name, order, scale, interval):
    z, y = start()
    net, gap, guidance = Net(), (0.01, 0.02), dict(cfg_scale=scale, cfg_interval=interval)
    calls = calls_of(net)
    sample(net, z, y, name, steps=9, order=order, gap=gap, **guidance)
    images = sum(len(x) for x, _, _ in calls)
    assert count_nfe(time_grid(9, gap=gap, order=order), name, order, **guidance) == images / len(z)


def test_guidance_is_linear_in_the_output_and_closed_at_its_ends():
    z, y = start()
    net, times, scale = Net(), [0.9, 0.5, 0.25], 3.0

    def guided(x, t, y):
        F_y, F_null = net(x, t, y), net(x, t, torch.full_like(y, 3))
        return F_null + scale * (F_y - F_null) if 0.25 <= t[0] <= 0.5 else F_y
    ours = sample(net, z, y, times=times, cfg_scale=scale, cfg_interval=(0.25, 0.5))
    assert_close(ours, sample(guided, z, y, times=times))
    assert count_nfe([*times, 0.0], "linear", 1, scale, (0.25, 0.5)) == 5
    # relinear's own time runs the other way: 0.1, 0.5, 0.75
    assert count_nfe([*times, 0.0], "relinear", 1, scale, (0.0, 0.2)) == 4
    # against itself as the null class, guidance is nothing
    ones, net.num_classes = torch.ones_like(y), 1
    ours = sample(net, z, ones, times=times, cfg_scale=scale)
    assert_close(ours, sample(net, z, ones, times=times))


@pytest.mark.parametrize("kappa", [0.4, "auto"])
def test_dtype_gradients_and_what_on_step_sees(kappa):
    """on_step sees the network's own answers, and the images are the last of them."""
    z, y = start(dtype=torch.float32)
    net, seen = Net().float(), []
    calls = calls_of(net)
    x = sample(net, z, y, steps=4, kappa=kappa, on_step=lambda *given: seen.append(given))
    assert {v.dtype for x_t, t, _ in calls for v in (x_t, t)} == {torch.float32} == {x.dtype}
    assert not x.requires_grad and all(p.requires_grad for p in net.parameters())
    assert [given[:2] for given in seen] == list(enumerate(time_grid(4, kappa=kappa)[:-1]))
    assert_close(seen[-1][2], x, rtol=0, atol=0)


def test_stochastic_sampling_by_default_uses_torchs_generator():
    z, y = start()
    one, two, again = (torch.manual_seed(s) and sample(Net(), z, y, steps=3, rho=1.0) for s in (0, 1, 0))
    assert_close(again, one, rtol=0, atol=0)
    assert (one - two).abs().max() > 1e-3


@pytest.mark.parametrize("bad, words", [
    (dict(kappa="auto", rho=1.0), "kappa"), (dict(kappa="auto", order=2), "kappa"), (dict(rho=2.0), "rho"),
    (dict(kappa="fast"), "auto"), (dict(gap=(0.6, 0.6)), "gap"), (dict(times=[0.5, 0.7]), "fall"),
    (dict(order=2, gap=(0.0, 0.001)), r"gap\[0\]"), (dict(cfg_scale=2.0), "null class"),
    (dict(transport="epsilon-prediction", gap=(0.0, 0.001)), r"gap\[0\]"),
    (dict(steps=0), "steps 0 must be >= 1")])
def test_bad_settings(bad, words):
    z, y = start()
    with pytest.raises(ValueError, match=words) as error:
        sample(lambda x, t, y: x, z, y, **bad)
    assert "\n" not in str(error.value)


def test_a_network_without_classes_cannot_be_guided():
    """Its only row is class 0, which must not be taken for the null class."""
    (z, y), net = start(), Net()
    net.num_classes = 0
    assert sample(net, z, 0 * y, steps=2).isfinite().all()
    with pytest.raises(ValueError, match="guidance 2.0 needs a null class"):
        sample(net, z, 0 * y, steps=2, cfg_scale=2.0)


@pytest.mark.parametrize("wrong, words", [
    (dict(gap=0.5), "gap 0.5 two >= 0"), (dict(gap=(0.1,)), r"gap \(0.1,\) two >= 0"),
    (dict(schedule=1.0), "schedule 1.0 three"), (dict(schedule=(1, 1)), r"schedule \(1, 1\) three")])
def test_a_gap_is_two_numbers_and_a_schedule_three(wrong, words):
    with pytest.raises(ValueError, match=words):
        time_grid(4, **wrong)


@pytest.mark.parametrize("kappa", [0.0, "auto"])
def test_the_state_is_float64_between_the_calls(kappa):
    """A float32 network in 1,000 steps ends where it ends in float64, to float32's rounding of one call: sums
    in float32 would be a hundred times further off."""
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(64, 6, generator=g), torch.zeros(64, dtype=torch.int64)
    net = lambda x, t, y: x - 0.3 * torch.sin(x) * t[:, None]
    found = sample(net, z, y, "linear", 1000, kappa)
    exact = sample(net, z.double(), y, "linear", 1000, kappa)
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 3e-7 * exact.abs().max()
