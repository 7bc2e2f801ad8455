"""Theorems about the loss, each against a closed form or a second derivation."""
import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from objective import TRANSPORTS, Objective, Transport, is_singular, predict, resolve
from report import forwards

REGULAR = [name for name, row in TRANSPORTS.items() if not is_singular(row)]


class Net(torch.nn.Module):
    """A small smooth network with a class input; float64, so that equalities are sharp."""
    num_classes = 3

    def __init__(self, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.a, self.b, self.c = (torch.nn.Parameter(torch.randn(n, generator=g, dtype=torch.float64) / 2) for n in (4, 2, 4))

    def forward(self, x, t, y):
        t = t.view(-1, 1, 1, 1)
        return torch.tanh(self.a[0] * x + self.a[1] * x.roll(1, -1) + self.b[0] * t) * self.a[2] + self.b[1] * t * x + self.c[y].view(-1, 1, 1, 1) * self.a[3]


def batch(n=12, seed=1):
    g = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(n, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.linspace(0.05, 0.95, n, dtype=torch.float64)
    y = torch.randint(3, (n,), generator=g)
    return x, z, t, y, torch.arange(n) % 4 == 3


def loss_and_gradient(objective, net, x, y, t, z, drop, teacher=None):
    loss = objective(net, x, y, t, z, drop, teacher)
    assert loss.shape == t.shape
    return loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss.mean(), list(net.parameters()))])


# ---- transports ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TRANSPORTS)
def test_predict_inverts_the_mixing(name):
    x, z, t, y, _ = batch()
    row = TRANSPORTS[name]
    alpha, gamma, alpha_hat, gamma_hat = row.at(t, x)
    x_t, z_t = alpha * z + gamma * x, alpha_hat * z + gamma_hat * x
    F_t, x_hat, z_hat = predict(lambda *_: row.sign * z_t, name, x_t, t, y)
    assert_close(F_t, z_t)
    assert_close(x_hat, x, rtol=1e-9, atol=1e-9)
    assert_close(z_hat, z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TRANSPORTS)
def test_identity_for_any_output(name):
    x, z, t, y, _ = batch()
    alpha, gamma, _, _ = TRANSPORTS[name].at(t, x)
    _, x_hat, z_hat = predict(Net(), TRANSPORTS[name], x, t, y)
    assert_close(alpha * z_hat + gamma * x_hat, x, rtol=1e-9, atol=1e-9)


def test_the_network_is_told_its_own_clock_and_data_come_last():
    told = {}
    t = torch.tensor([0.25], dtype=torch.float64)
    for name, row in TRANSPORTS.items():
        predict(lambda x, t, y: told.update({name: t.item()}) or x, name, torch.zeros(1, 1, 1, 1, dtype=torch.float64), t, None)
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        assert row.alpha(ends)[0] < 0.01 and row.gamma(ends)[0] > 0.99 and row.gamma(ends)[1] < 0.02 and row.alpha(ends)[1] > 0.99
    assert told.pop("relinear") == 0.75 and told.pop("ddpm") == 249 and set(told.values()) == {0.25}


def test_ddpm_is_the_thousand_step_schedule():
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    row = TRANSPORTS["ddpm"]
    assert_close(row.gamma(t), abar.sqrt())
    assert_close(row.alpha(t), (1 - abar).sqrt())
    assert row.alpha(torch.zeros(1)) == 0 and row.gamma(torch.zeros(1)) == 1
    between = row.gamma(t[:-1] + 0.0005)
    assert ((between < row.gamma(t[:-1])) & (between > row.gamma(t[1:]))).all()


def test_edm_is_karras_preconditioning():
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    row, s = TRANSPORTS["edm"], torch.exp(4 * (2.68 * t - 1.59))
    x_t, F_t = torch.randn(2, 9, dtype=torch.float64)
    x_hat = predict(lambda *_: F_t, row, x_t, t, None)[1]
    noisy = x_t / row.gamma(t)                                     # EDM's own coordinates: data + s * noise
    c_skip, c_out = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25).sqrt()
    assert_close(x_hat, c_skip * noisy + c_out * F_t)
    assert_close(row.alpha(t) / row.gamma(t), s)


# ---- lambda = 0 ---------------------------------------------------------------------------------------------------

def test_lambda_0_linear_is_flow_matching():
    x, z, t, y, drop = batch()
    net = Net()
    loss, grad = loss_and_gradient(Objective(huber=1e4, weight="none"), net, x, y, t, z, drop)
    seen = torch.where(drop, 3, y)
    t_ = t.view(-1, 1, 1, 1)
    mse = (net((1 - t_) * x + t_ * z, t, seen) - (z - x)).square().flatten(1).mean(1)
    assert_close(2e4 * loss, mse, rtol=1e-6, atol=1e-6)           # sqrt(m + c^2) - c -> m / 2c
    rms, _ = loss_and_gradient(Objective(weight="none"), net, x, y, t, z, drop)
    assert_close(rms, mse.sqrt())
    weighted, _ = loss_and_gradient(Objective(), net, x, y, t, z, drop)
    assert_close(weighted, mse.sqrt() * torch.cos(math.pi / 2 * t))


@pytest.mark.parametrize("name, target", [("x-prediction", lambda x, z, t: x), ("epsilon-prediction", lambda x, z, t: z), ("ddpm", lambda x, z, t: z),
                                          ("trigflow", lambda x, z, t: torch.cos(math.pi / 2 * t) * z - torch.sin(math.pi / 2 * t) * x)])
def test_what_the_network_regresses(name, target):
    x, z, t, y, drop = batch()
    loss = Objective(name, weight="none")(lambda *_: torch.zeros_like(x), x, y, t, z, torch.zeros_like(drop))
    assert_close(loss, target(x, z, t.view(-1, 1, 1, 1)).square().flatten(1).mean(1).sqrt())


def test_cosine_loss():
    x, z, t, y, drop = batch()
    net, t_ = Net(), t.view(-1, 1, 1, 1)
    more = Objective(cosine=True, weight="none")(net, x, y, t, z, drop) - Objective(weight="none")(net, x, y, t, z, drop)
    F_t, target = net((1 - t_) * x + t_ * z, t, torch.where(drop, 3, y)), z - x
    cosine = (F_t * target).sum(1) / (F_t.norm(dim=1) * target.norm(dim=1))
    assert_close(more, (1 - cosine).mean((1, 2)))


# ---- lambda > 0 ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", REGULAR)
def test_finite_difference_is_the_jvp_to_second_order(name):
    x, z, t, y, drop = batch()
    if name == "ddpm":      # its schedule is piecewise: stay inside the pieces
        t = (t * 1000).round() / 1000 + 0.0005
    step = 1e-4 if name == "ddpm" else 0.01
    net, row = Net(), TRANSPORTS[name]

    def slope(**how):
        with torch.no_grad():
            return Objective(name, lam=1.0, **how).slope(net, row, x, z, t, y, None)
    exact = slope(derivative="jvp")
    wide, narrow = ((slope(eps=e) - exact).flatten(1).norm(dim=1) for e in (step, step / 2))
    assert (wide > 0).all() and 3.5 < (wide / narrow).median() < 4.5
    if name != "ddpm":      # there the slope is beyond the clip of the loss everywhere
        exact = loss_and_gradient(Objective(name, lam=1.0, derivative="jvp"), net, x, y, t, z, drop)
        wide, narrow = ([(a - b).norm() for a, b in zip(loss_and_gradient(Objective(name, lam=1.0, eps=e), net, x, y, t, z, drop), exact)]
                        for e in (step, step / 2))
        assert all(3.5 < w / n < 4.5 for w, n in zip(wide, narrow))


def test_backward_difference_is_the_secant_to_the_time_before():
    """Of the same call as lambda = 1 - e / t, to data themselves where t < e; and the derivative to first order."""
    x, z, t, y, drop = batch()
    net, row, e = Net(), TRANSPORTS["linear"], 0.1        # the first of the times, .05, lies below e
    with torch.no_grad():
        _, x_hat, _ = predict(net, row, row.at(t, x)[0] * z + row.at(t, x)[1] * x, t, y)
        secants = torch.cat([Objective(lam=max(0.0, 1 - e / v.item())).slope(net, row, x[k:k + 1], z[k:k + 1], t[k:k + 1], y[k:k + 1], x_hat[k:k + 1])
                             for k, v in enumerate(t)])
        exact, wide, narrow = (Objective(lam=1.0, derivative=how, eps=width).slope(net, row, x, z, t, y, x_hat)
                               for how, width in (("jvp", 1.0), ("backward", 0.01), ("backward", 0.005)))
        assert_close(Objective(lam=1.0, derivative="backward", eps=e).slope(net, row, x, z, t, y, x_hat), secants)
    assert 1.8 < ((wide - exact).flatten(1).norm(dim=1) / (narrow - exact).flatten(1).norm(dim=1)).median() < 2.2


@pytest.mark.parametrize("derivative, largest", [("fd", lambda k, e, step: (1 + (step * math.sin(k * e) / e) ** 2) ** 0.5),
                                                 ("backward", lambda k, e, step: abs(1 - step / e * (1 - complex(math.cos(k * e), -math.sin(k * e)))))])
def test_which_difference_damps_a_wave_of_time(derivative, largest):
    """x_hat <- x_hat - step * slope on a wave exp(i k t), the estimate of every picture: the central difference lets every wave grow, the
    backward one none (step <= e). By von Neumann's analysis of an advection equation (Charney, Fjortoft, von Neumann 1950)."""
    e, step, t = 0.05, 0.03, torch.linspace(0.3, 0.7, 9, dtype=torch.float64)
    x, z, y = *torch.zeros(2, 9, 1, 1, 1, dtype=torch.float64), torch.zeros(9, dtype=torch.long)
    for k in (1.0, 10.0, 30.0, 60.0):
        def wave(phase):        # a network with x_hat = cos(k t + phase): v = (x_t - x_hat) / t on the linear path
            return lambda x_t, t, y: (x_t - torch.cos(k * t + phase).view(-1, 1, 1, 1)) / t.view(-1, 1, 1, 1)
        parts = []
        for phase in (0.0, -math.pi / 2):
            x_hat = torch.cos(k * t + phase).view(-1, 1, 1, 1)
            slope = Objective(lam=1.0, derivative=derivative, eps=e).slope(wave(phase), TRANSPORTS["linear"], x, z, t, y, x_hat)
            parts.append((x_hat - step * slope).flatten())
        assert_close(torch.hypot(*parts), torch.full_like(t, largest(k, e, step)))
        assert (torch.hypot(*parts) > 1).all() if derivative == "fd" else (torch.hypot(*parts) < 1).all()


@pytest.mark.parametrize("settings", [dict(), dict(zeta=0.5, style="ft-vs-fe"), dict(lam=0.5), dict(lam=1.0, derivative="fd"), dict(lam=1.0, derivative="backward"),
                                      dict(lam=1.0, zeta=1.0, style="fc-vs-xz", derivative="backward"), dict(lam=1.0, zeta=1.0, style="fc-vs-fe")])
def test_forwards_counts_the_calls(settings):
    """What the log and bench.py divide by: every call of network and teacher, and twice as much again for the backward pass."""
    x, z, t, y, drop = batch()
    calls, net, teacher = [], Net(), Net(7)
    for n in (net, teacher):
        n.register_forward_hook(lambda *_: calls.append(1))
    Objective("linear", **settings)(net, x, y, t, z, drop, teacher)
    assert forwards(Objective("linear", **settings)) == len(calls) + 2


def test_lambda_below_1_is_the_secant():
    x, z, t, y, drop = batch()
    net, lam, t_ = Net(), 0.6, t.view(-1, 1, 1, 1)
    seen = torch.where(drop, 3, y)
    x_t, x_r = (1 - t_) * x + t_ * z, (1 - lam * t_) * x + lam * t_ * z
    F_t, F_r = net(x_t, t, seen), net(x_r, lam * t, seen)
    D = ((x_t - t_ * F_t) - (x_r - lam * t_ * F_r)) / (t_ - lam * t_)                  # f_x = x_t - t F on the linear path
    target = F_t + t_ * 4 / torch.sin(math.pi / 2 * t_) * D.clamp(-1, 1)               # d = -1
    expected = (F_t - target).square().flatten(1).mean(1).sqrt() * torch.cos(math.pi / 2 * t)
    assert_close(Objective(lam=lam)(net, x, y, t, z, drop), expected)
    # and its limit is the consistency loss
    near, limit = (Objective(lam=v, derivative="jvp")(net, x, y, t, z, drop) for v in (1 - 1e-6, 1.0))
    assert_close(near, limit, rtol=1e-4, atol=1e-4)


def test_relinear_is_linear_with_the_clock_reversed():
    x, z, t, y, drop = batch()

    class Reversed(Net):
        def forward(self, x, t, y):
            return -super().forward(x, 1 - t, y)

    for lam, zeta, style in ((0.0, 0.5, "ft-vs-fe"), (0.5, 1.7, "fc-vs-xz"), (1.0, 1.3, "fc-vs-fe")):
        for derivative in ("fd", "jvp"):
            a = loss_and_gradient(Objective("linear", lam, zeta, style, derivative=derivative), Net(), x, y, t, z, drop, Net(7))
            b = loss_and_gradient(Objective("relinear", lam, zeta, style, derivative=derivative), Reversed(), x, y, t, z, drop, Reversed(7))
            for one, other in zip(a, b):
                assert_close(one, other, rtol=1e-9, atol=1e-9)


# ---- enhancement --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", REGULAR)
@pytest.mark.parametrize("style", ["ft-vs-fe", "fc-vs-fe", "fc-vs-xz"])
def test_enhancement_leaves_x_t_where_it_is(name, style):
    x, z, t, y, drop = batch()
    row, net, teacher = resolve(name), Net(), Net(7)
    alpha, gamma, _, _ = row.at(t, x)
    x_t = alpha * z + gamma * x
    online = predict(net, row, x_t, t, y)[1:]
    x_star, z_star = Objective(name, zeta=1.7, style=style).enhance(teacher, row, x_t, t, y, 3, drop, (x, z), online)
    assert (x_star - x).abs().max() > 0.1
    assert_close(alpha * z_star + gamma * x_star, x_t, rtol=1e-8, atol=1e-8)


def test_enhanced_target_by_row():
    """fc-vs-fe on the linear path: the target v* = z* - x* is v + zeta (v_c - v_r) inside the range, a mean with the guided velocity
    outside it, a mean with the unguided one where the label is dropped."""
    x, z, t, y, drop = batch()
    net, teacher, t_ = Net(), Net(7), t.view(-1, 1, 1, 1)
    seen = torch.where(drop, 3, y)
    x_t, v = (1 - t_) * x + t_ * z, z - x
    v_c, v_r = teacher(x_t, t, seen), teacher(x_t, t, torch.full_like(y, 3))
    target = torch.where(drop.view(-1, 1, 1, 1), (v + v_r) / 2, torch.where(t_ < 0.75, v + 1.7 * (v_c - v_r), (v + v_c) / 2))
    expected = (net(x_t, t, seen) - target).square().flatten(1).mean(1).sqrt()
    assert_close(Objective(zeta=1.7, style="fc-vs-fe", weight="none")(net, x, y, t, z, drop, teacher), expected)


# ---- the edges ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_finite_at_both_ends_of_time(name, lam):
    if lam > 0 and is_singular(TRANSPORTS[name]):
        with pytest.raises(ValueError, match="those that can: linear"):
            Objective(name, lam=lam)
        return
    x, z, _, y, drop = batch(4)
    t = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    for derivative in ("fd", "jvp"):
        for dtype in (torch.float64, torch.float32):
            loss, grad = loss_and_gradient(Objective(name, lam, derivative=derivative, weight="none"), Net().to(dtype), x.to(dtype), y, t.to(dtype), z.to(dtype), drop)
            assert loss.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("cosine", [False, True])
def test_zero_residual_has_zero_loss_and_gradient(cosine):
    x, z, t, y, drop = batch()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    for row in TRANSPORTS.values():
        alpha, gamma, alpha_hat, gamma_hat = row.at(t, x)
        loss = Objective(row, weight="none", cosine=cosine)(lambda *_: row.sign * scale * (alpha_hat * z + gamma_hat * x), x, y, t, z, torch.zeros_like(drop))
        grad, = torch.autograd.grad(loss.sum(), scale)
        assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-7)
        assert grad.isfinite() and grad.abs() < 1e-6


def test_a_zero_initialised_output_is_not_kicked_by_the_cosine_loss():
    x, z, t, y, drop = batch()
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = Objective(cosine=True)(lambda x, t, y: scale * x, x, y, t, z, torch.zeros_like(drop))
    grad, = torch.autograd.grad(loss.mean(), scale)
    assert loss.isfinite().all() and grad.abs() < 1e4


@pytest.mark.parametrize("ratio, expected", [(0.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("n", [1, 5])
def test_label_drop_at_its_ends(ratio, expected, n):
    x, y = torch.zeros(n, 3, 4, 4), torch.arange(n) % 3
    before = y.clone()
    t, z, drop = Objective(label_drop=ratio).draw(x, y, torch.Generator().manual_seed(0))
    assert drop.shape == t.shape == (n,) and z.shape == x.shape and drop.float().mean() == expected
    seen = []
    net = lambda x, t, y: seen.append(y) or x
    net.num_classes = 3
    Objective(label_drop=ratio)(net, x, y, t, z, drop)
    assert_close(y, before)
    assert_close(seen[0], torch.full_like(y, 3) if expected else y)


def test_drawing():
    objective, x, y = Objective(beta=(0.8, 1.0, 0.9), label_drop=0.1), torch.zeros(20000, 1, 1, 1), torch.zeros(20000, dtype=torch.int64)
    t, z, drop = objective.draw(x, y, torch.Generator().manual_seed(3))
    again = objective.draw(x, y, torch.Generator().manual_seed(3))
    for one, other in zip((t, z, drop), again):
        assert_close(one, other, rtol=0, atol=0)
    from scipy.stats import beta, kstest, norm
    assert kstest((t / 0.9).numpy(), beta(0.8, 1.0).cdf).pvalue > 0.01
    assert kstest(z.flatten().numpy(), norm.cdf).pvalue > 0.01
    assert abs(drop.float().mean() - 0.1) < 4 * math.sqrt(0.09 / 20000)
    assert abs(torch.corrcoef(torch.stack([t, z.flatten(), drop.float()]))[0, 1:]).max() < 0.03


def test_the_objective_is_pure():
    x, z, t, y, drop = batch()
    copies = [v.clone() for v in (x, z, t, y, drop)]
    net, teacher = Net(), Net(7)
    for lam, style in ((0.0, "ft-vs-fe"), (1.0, "fc-vs-fe")):
        first, second = (Objective(lam=lam, zeta=1.0, style=style)(net, x, y, t, z, drop, teacher) for _ in range(2))
        assert_close(first, second, rtol=0, atol=0)
        parts = torch.cat([Objective(lam=lam, zeta=1.0, style=style)(net, *(v[k:k + 3] for v in (x, y, t, z, drop)), teacher) for k in range(0, 12, 3)])
        assert_close(first, parts)
    for value, copy in zip((x, z, t, y, drop), copies):
        assert_close(value, copy, rtol=0, atol=0)


@pytest.mark.parametrize("bad, words", [
    (dict(lam=1.5), "0..1"), (dict(zeta=1.0), "needs a style"), (dict(zeta=1.0, style="ft-vs-fe", lam=1.0), "ft-vs-fe is for consistency ratio 0"),
    (dict(transport="lineer"), "nearest: linear"), (dict(style="fc"), "one of"), (dict(transport="x-prediction", lam=0.5), "those that can"),
    (dict(transport="epsilon-prediction", zeta=1.0, style="fc-vs-xz"), "those that can"), (dict(label_drop=2.0), "label drop"), (dict(eps=0.0), "eps")])
def test_bad_settings_are_one_line(bad, words):
    with pytest.raises(ValueError, match=words) as error:
        Objective(**bad)
    assert "\n" not in str(error.value)


def test_enhancement_asks_for_what_it_needs():
    x, z, t, y, drop = batch()
    with pytest.raises(ValueError, match="needs a teacher"):
        Objective(zeta=1.0, style="fc-vs-fe")(Net(), x, y, t, z, drop)
    bare = lambda x, t, y: x
    with pytest.raises(ValueError, match="null class"):
        Objective(zeta=1.0, style="fc-vs-fe")(bare, x, y, t, z, torch.zeros_like(drop), bare)
    with pytest.raises(ValueError, match="null class"):
        Objective()(bare, x, y, t, z, drop)
    assert dataclasses.is_dataclass(Objective) and isinstance(resolve("linear"), Transport)


# ---- Gaussian data: the optimum is known --------------------------------------------------------------------------

MEAN, SPREAD = 0.3, 0.6


def gaussian_output(row, x_t, t, kind):
    """The network output whose prediction is the exact denoiser E[x | x_t], or the exact consistency function, of x ~ N(MEAN, SPREAD^2)."""
    alpha, gamma, alpha_hat, gamma_hat = row.at(t, x_t)
    variance = alpha**2 + gamma**2 * SPREAD**2
    if kind == "denoiser":
        x_hat = MEAN + gamma * SPREAD**2 / variance * (x_t - gamma * MEAN)
    else:
        x_hat = MEAN + SPREAD * (x_t - gamma * MEAN) / variance.sqrt()
    return (x_hat * (alpha * gamma_hat - gamma * alpha_hat) + alpha_hat * x_t) / alpha


@pytest.mark.parametrize("name", ["linear", "trigflow", "edm"])
@pytest.mark.parametrize("lam, kind", [(0.0, "denoiser"), (1.0, "consistency")])
def test_the_exact_solution_is_a_stationary_point(name, lam, kind):
    g = torch.Generator().manual_seed(5)
    n = 200_000
    row = TRANSPORTS[name]
    x, z = (torch.randn(n, 4, 1, 1, generator=g, dtype=torch.float64) for _ in range(2))
    x = MEAN + SPREAD * x
    t = torch.rand(n, generator=g, dtype=torch.float64)
    objective = Objective(name, lam=lam, derivative="jvp", label_drop=0.0)

    def gradients(size):
        """Per-sample gradients (parameters, n) of three directions around the exact solution, `size` away from it."""
        theta = [torch.full((n, 1, 1, 1), size, dtype=torch.float64, requires_grad=True) for _ in range(3)]

        def net(x_t, t, y):
            exact = gaussian_output(row, x_t, t, kind)
            return exact * (1 + theta[0]) + theta[1] * x_t + theta[2]
        loss = objective(net, x, torch.zeros(n).long(), t, z, torch.zeros(n).bool())
        return torch.stack([d.flatten() for d in torch.autograd.grad(loss.sum(), theta)])

    at, away = gradients(0.0), gradients(0.1).mean(1)
    error = at.std(1) / n**0.5
    assert (at.mean(1).abs() < 4 * error).all()
    assert (error < 0.02 * away.abs().max()).all()
