"""Theorems about the loss, each against a closed form or a second derivation."""
import cmath
import math

import pytest
import torch
from torch.testing import assert_close
from toys import Net, batch, calls_of

import engine
from objective import TRANSPORTS, Objective, null_of, predict, resolve
from sampler import sample

REGULAR = [name for name, row in TRANSPORTS.items() if not row.is_singular()]
null = lambda y: torch.full_like(y, 3)          # of toys.Net
column = lambda v: v.view(-1, 1, 1, 1)
rms = lambda difference: difference.square().flatten(1).mean(1).sqrt()


def loss_and_gradient(objective, net, x, y, t, z, drop, teacher=None):
    loss = objective(net, x, y, t, z, drop, teacher)
    assert loss.shape == t.shape
    return loss, gradient(loss, net)


def gradient(loss, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss.mean(), list(net.parameters()))])


# ---- transports ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TRANSPORTS)
def test_predict_inverts_the_mixing_for_any_output(name):
    """Any x_t and any F: x_hat and z_hat mix to x_t, and their target is F. So data and noise come back."""
    x, z, t, y, _ = batch()
    transport, net = resolve(name), Net()
    alpha, gamma, alpha_hat, gamma_hat = transport.at(t, x)
    x_t, z_t = alpha * z + gamma * x, alpha_hat * z + gamma_hat * x
    for F_t, x_hat, z_hat in ((x, *transport.solve(x, x_t, t)), predict(net, name, x_t, t, y)):
        assert_close(alpha * z_hat + gamma * x_hat, x_t, rtol=1e-9, atol=1e-9)
        assert_close(alpha_hat * z_hat + gamma_hat * x_hat, F_t, rtol=1e-9, atol=1e-9)
    F_t, x_hat, z_hat = predict(lambda *_: transport.sign * z_t, transport, x_t, t, y)
    for found, expected in ((F_t, z_t), (x_hat, x), (z_hat, z)):
        assert_close(found, expected, rtol=1e-9, atol=1e-9)
    d = alpha * gamma_hat - gamma * alpha_hat
    assert_close(column(transport.determinant(t)), d, rtol=0, atol=0)


@pytest.mark.parametrize("name", TRANSPORTS)
def test_the_network_is_told_its_own_time_and_data_come_last(name):
    x, _, t, y, _ = batch()
    transport, net, ends = TRANSPORTS[name], Net(), torch.tensor([0.0, 1.0], dtype=torch.float64)
    calls = calls_of(net)
    predict(net, name, x, t, y)
    assert_close(calls[0][1], {"relinear": 1 - t, "ddpm": 1000 * t - 1}.get(name, t))
    (alpha_0, alpha_1), (gamma_0, gamma_1) = transport.alpha(ends).tolist(), transport.gamma(ends).tolist()
    assert alpha_0 < 0.01 and gamma_0 > 0.99 and gamma_1 < 0.02 and alpha_1 > 0.99


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
    noisy = x_t / row.gamma(t)                                  # EDM's own coordinates: data + s * noise
    c_skip, c_out = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25).sqrt()
    assert_close(x_hat, c_skip * noisy + c_out * F_t)
    assert_close(row.alpha(t) / row.gamma(t), s)


# ---- lam = 0 ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, target", [
    ("linear", lambda x, z, t: z - x), ("x-prediction", lambda x, z, t: x),
    ("epsilon-prediction", lambda x, z, t: z), ("ddpm", lambda x, z, t: z),
    ("trigflow", lambda x, z, t: torch.cos(math.pi / 2 * t) * z - torch.sin(math.pi / 2 * t) * x)])
def test_what_the_network_regresses(name, target):
    x, z, t, y, drop = batch()
    nothing = lambda *_: torch.zeros_like(x)
    loss = Objective(name, time_weight="none")(nothing, x, y, t, z, torch.zeros_like(drop))
    assert_close(loss, rms(target(x, z, column(t))))


def test_lam_0_linear_is_flow_matching():
    """Root of the mean square, pseudo-Huber, weighted by time, and with the cosine loss."""
    x, z, t, y, drop = batch()
    net, target = Net(), z - x
    F_t = net((1 - column(t)) * x + column(t) * z, t, torch.where(drop, 3, y))
    cosine = ((F_t * target).sum(1) / (F_t.norm(dim=1) * target.norm(dim=1))).mean((1, 2))
    loss = lambda **settings: Objective(**settings)(net, x, y, t, z, drop)
    assert_close(loss(time_weight="none"), rms(F_t - target))
    assert_close(loss(), rms(F_t - target) * torch.cos(math.pi / 2 * t))
    assert_close(loss(time_weight="none", cosine_loss=True), rms(F_t - target) + 1 - cosine)
    almost_square = 2e4 * loss(time_weight="none", huber=1e4)           # sqrt(m + c^2) - c -> m / 2c
    assert_close(almost_square, rms(F_t - target).square(), rtol=1e-6, atol=1e-6)


# ---- lam > 0 ------------------------------------------------------------------------------------------

def dx_dt(objective, net, x, z, t, y, x_hat=None):
    with torch.no_grad():
        return objective.dx_dt(net, resolve(objective.transport), x, z, t, y, x_hat)


@pytest.mark.parametrize("name", REGULAR)
def test_central_difference_is_the_jvp_to_second_order(name):
    x, z, t, y, drop = batch()
    if name == "ddpm":      # its schedule is piecewise: stay inside the pieces
        t = (t * 1000).round() / 1000 + 0.0005
    step, net = 1e-4 if name == "ddpm" else 0.01, Net()
    exact, *differences = (Objective(name, lam=1.0, **how)
                           for how in (dict(derivative="jvp"), dict(dt=step), dict(dt=step / 2)))
    right, wide, narrow = (dx_dt(objective, net, x, z, t, y) for objective in (exact, *differences))
    wide, narrow = ((D - right).flatten(1).norm(dim=1) for D in (wide, narrow))
    assert (wide > 0).all() and 3.5 < (wide / narrow).median() < 4.5
    if name != "ddpm":      # there D is beyond the clip of the loss everywhere
        right, wide, narrow = (loss_and_gradient(objective, net, x, y, t, z, drop)
                               for objective in (exact, *differences))
        for value, coarse, fine in zip(right, wide, narrow):
            assert 3.5 < (coarse - value).norm() / (fine - value).norm() < 4.5


def test_backward_difference_is_the_secant_to_the_time_before():
    """D of the same call as lam = 1 - dt / t, to the data themselves where t < dt; first order in dt."""
    x, z, t, y, drop = batch()
    net, row, dt = Net(), TRANSPORTS["linear"], 0.1             # the first of the times, .05, lies below dt
    with torch.no_grad():
        _, x_hat, _ = predict(net, row, column(t) * z + (1 - column(t)) * x, t, y)
    rows = zip(*(v.split(1) for v in (x, z, t, y, x_hat)))
    secants = [dx_dt(Objective(lam=max(0.0, 1 - dt / row[2].item())), net, *row) for row in rows]

    def backward(dt):
        return dx_dt(Objective(lam=1.0, derivative="backward", dt=dt), net, x, z, t, y, x_hat)
    assert_close(backward(dt), torch.cat(secants))
    exact = dx_dt(Objective(lam=1.0, derivative="jvp"), net, x, z, t, y, x_hat)
    wide, narrow = ((backward(dt) - exact).flatten(1).norm(dim=1) for dt in (0.01, 0.005))
    assert 1.8 < (wide / narrow).median() < 2.2


@pytest.mark.parametrize("derivative, factor", [
    ("central", lambda k, dt, step: abs(1 - step * 1j * math.sin(k * dt) / dt)),
    ("backward", lambda k, dt, step: abs(1 - step / dt * (1 - cmath.exp(-1j * k * dt))))])
def test_which_difference_damps_a_wave_of_time(derivative, factor):
    """x_hat <- x_hat - step * D on a wave exp(i k t), the estimate of every image: the central difference
    lets every wave grow, the backward one none (step <= dt). By von Neumann's analysis of an advection
    equation (Charney, Fjortoft, von Neumann 1950)."""
    dt, step, t = 0.05, 0.03, torch.linspace(0.3, 0.7, 9, dtype=torch.float64)
    x, z, y = *torch.zeros(2, 9, 1, 1, 1, dtype=torch.float64), torch.zeros(9, dtype=torch.long)
    objective = Objective(lam=1.0, derivative=derivative, dt=dt)
    for k in (1.0, 10.0, 30.0, 60.0):
        parts = []
        for phase in (0.0, -math.pi / 2):
            wave = lambda t, k=k, phase=phase: column(torch.cos(k * t + phase))
            net = lambda x_t, t, y, wave=wave: (x_t - wave(t)) / column(t)      # v on the linear path
            parts.append((wave(t) - step * dx_dt(objective, net, x, z, t, y, wave(t))).flatten())
        size = torch.hypot(*parts)
        assert_close(size, torch.full_like(t, factor(k, dt, step)))
        assert (size > 1).all() if derivative == "central" else (size < 1).all()


def test_lam_below_1_is_the_secant():
    x, z, t, y, drop = batch()
    net, lam, t_, seen = Net(), 0.6, column(t), torch.where(drop, 3, y)
    x_t, x_r = (1 - t_) * x + t_ * z, (1 - lam * t_) * x + lam * t_ * z
    F_t, F_r = net(x_t, t, seen), net(x_r, lam * t, seen)
    D = ((x_t - t_ * F_t) - (x_r - lam * t_ * F_r)) / (t_ - lam * t_)           # x_hat = x_t - t F
    target = F_t + t_ * 4 / torch.sin(math.pi / 2 * t_) * D.clamp(-1, 1)        # the determinant is -1
    expected = rms(F_t - target.detach()) * torch.cos(math.pi / 2 * t)
    loss, grad = loss_and_gradient(Objective(lam=lam), net, x, y, t, z, drop)
    assert_close(loss, expected)
    assert_close(grad, gradient(expected, net))
    # and its limit is the consistency loss
    near, limit = (loss_and_gradient(Objective(lam=v, derivative="jvp"), net, x, y, t, z, drop)
                   for v in (1 - 1e-6, 1.0))
    for one, other in zip(near, limit):
        assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lam, zeta, style", [(0.0, 0.5, "ft-vs-fe"), (0.5, 1.7, "fc-vs-xz"),
                                              (1.0, 1.3, "fc-vs-fe")])
@pytest.mark.parametrize("derivative", ["central", "jvp"])
def test_relinear_is_linear_with_the_time_reversed(lam, zeta, style, derivative):
    x, z, t, y, drop = batch()

    class Reversed(Net):
        def forward(self, x, t, y):
            return -super().forward(x, 1 - t, y)

    found = []
    for name, network in (("linear", Net), ("relinear", Reversed)):
        objective = Objective(name, lam, zeta, style, derivative=derivative)
        found.append(loss_and_gradient(objective, network(), x, y, t, z, drop, network(7)))
    for one, other in zip(*found):
        assert_close(one, other, rtol=1e-9, atol=1e-9)


# ---- enhancement --------------------------------------------------------------------------------------

def move(value, guided, reference, zeta, t, drop):
    """Enhancement row by row: inside the range, outside it, and where the label is dropped."""
    inside = torch.where(column(t < 0.75), value + zeta * (guided - reference), (value + guided) / 2)
    return torch.where(column(drop), (value + reference) / 2, inside)


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("style", ["ft-vs-fe", "fc-vs-fe", "fc-vs-xz"])
def test_enhancing_the_target_is_enhancing_the_pair(name, style):
    """The paper's x* = x + zeta (x_c - x_r), z* = z + zeta (z_c - z_r) are v* solved; x_t stays."""
    x, z, t, y, drop = batch()
    row, net, teacher, y = resolve(name), Net(), Net(7), torch.where(drop, 3, y)
    alpha, gamma, alpha_hat, gamma_hat = row.at(t, x)
    x_t, v = alpha * z + gamma * x, alpha_hat * z + gamma_hat * x
    F_t, *online = predict(net, row, x_t, t, y)
    guided = online if style == "ft-vs-fe" else predict(teacher, row, x_t, t, y)[1:]
    reference = (x, z) if style == "fc-vs-xz" else predict(teacher, row, x_t, t, torch.full_like(y, 3))[1:]
    pair = [move(*values, 1.7, t, drop) for values in zip((x, z), guided, reference)]

    v_star = Objective(name, zeta=1.7, style=style).enhance(row, teacher, v, F_t, x_t, t, y, null, drop)
    for ours, expected, start in zip(row.solve(v_star, x_t, t), pair, (x, z)):
        assert_close(ours, expected, rtol=1e-8, atol=1e-8)
        assert (ours - start).abs().max() > 0.1
    assert_close(alpha * pair[1] + gamma * pair[0], x_t, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name, target", [("linear", lambda x, z: z - x), ("x-prediction", lambda x, z: x),
                                          ("epsilon-prediction", lambda x, z: z)])
@pytest.mark.parametrize("style", ["ft-vs-fe", "fc-vs-fe", "fc-vs-xz"])
def test_enhanced_target_by_row(name, target, style):
    """At lam 0 the network regresses the moved velocity, data or noise, whatever the ends determine."""
    x, z, t, y, drop = batch()
    net, teacher, seen = Net(), Net(7), torch.where(drop, 3, y)
    x_t, v = (1 - column(t)) * x + column(t) * z, target(x, z)
    guided = net(x_t, t, seen).detach() if style == "ft-vs-fe" else teacher(x_t, t, seen)
    reference = v if style == "fc-vs-xz" else teacher(x_t, t, torch.full_like(y, 3))
    expected = rms(net(x_t, t, seen) - move(v, guided, reference, 1.7, t, drop).detach())
    objective = Objective(name, zeta=1.7, style=style, time_weight="none")
    for ours, closed in zip(loss_and_gradient(objective, net, x, y, t, z, drop, teacher),
                            (expected, gradient(expected, net))):
        assert_close(ours, closed)


# ---- the edges ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_finite_at_both_ends_of_time(name, lam):
    if lam > 0 and resolve(name).is_singular():
        with pytest.raises(ValueError, match="those that can: linear"):
            Objective(name, lam=lam)
        return
    x, z, _, y, drop = batch(4)
    t = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    for derivative in ("central", "jvp"):
        objective = Objective(name, lam, derivative=derivative, time_weight="none")
        for dtype in (torch.float64, torch.float32):
            given = x.to(dtype), y, t.to(dtype), z.to(dtype), drop
            loss, grad = loss_and_gradient(objective, Net().to(dtype), *given)
            assert loss.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("cosine_loss", [False, True])
@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_residual_and_an_output_of_zero_are_not_kicked(name, cosine_loss):
    """The root of 0 and the direction of 0 have no gradient; a network starts with the output 0."""
    x, z, t, y, drop = batch()
    transport, keep = TRANSPORTS[name], torch.zeros_like(drop)
    objective = Objective(transport, time_weight="none", cosine_loss=cosine_loss)
    _, _, alpha_hat, gamma_hat = transport.at(t, x)
    target = transport.sign * (alpha_hat * z + gamma_hat * x)
    for size, limit in ((1.0, 1e-6), (0.0, 1e4)):
        scale = torch.tensor(size, dtype=torch.float64, requires_grad=True)
        loss = objective(lambda *_, scale=scale: scale * target, x, y, t, z, keep)
        grad, = torch.autograd.grad(loss.sum() if size else loss.mean(), scale)
        assert loss.isfinite().all() and grad.abs() < limit
        if size == 1:
            assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-7)


def test_times_are_kept_from_both_ends():
    """The network sees t in 1e-4 .. 1 - 1e-4, at a mixture of that time."""
    x, z, _, y, drop = batch(3)
    t, net = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), Net()
    calls = calls_of(net)
    Objective()(net, x, y, t, z, drop)
    expected = torch.tensor([1e-4, 0.5, 1 - 1e-4], dtype=torch.float64)
    assert_close(calls[0][1], expected, rtol=0, atol=1e-12)
    assert_close(calls[0][0], expected.view(-1, 1, 1, 1) * z + (1 - expected).view(-1, 1, 1, 1) * x)


@pytest.mark.parametrize("derivative, times", [("backward", [0.0, 0.0, 0.35]),
                                               ("central", [-0.03, 0.02, 0.35])])
def test_differences_near_the_data(derivative, times):
    """A step back from t < dt ends at 0, and divides by t; the central one leaves [0, 1]."""
    x, z, _, y, drop = batch(3)
    t, dt, net = torch.tensor([0.02, 0.07, 0.4], dtype=torch.float64), 0.05, Net()
    if derivative == "backward":
        t[1] = 0.05
    calls = calls_of(net)
    row, objective = resolve("linear"), Objective(lam=1.0, derivative=derivative, dt=dt)
    x_t = t.view(-1, 1, 1, 1) * z + (1 - t.view(-1, 1, 1, 1)) * x
    x_hat = predict(net, row, x_t, t, y)[1]
    D = objective.dx_dt(net, row, x, z, t, y, x_hat)
    assert_close(calls[-1][1], torch.tensor(times, dtype=torch.float64), rtol=0, atol=1e-12)

    def data_at(r):
        r = torch.tensor(r, dtype=torch.float64)
        return predict(net, row, r.view(-1, 1, 1, 1) * z + (1 - r.view(-1, 1, 1, 1)) * x, r, y)[1]
    if derivative == "backward":
        expected = (x_hat - data_at(times)) / torch.tensor([0.02, 0.05, 0.05]).double().view(-1, 1, 1, 1)
    else:
        expected = (data_at([0.07, 0.12, 0.45]) - data_at(times)) / 0.1
    assert_close(D, expected)


def test_enhancement_is_inside_an_open_range():
    """zeta (guided - reference) between the edges; half-way to the guided output at an edge and outside."""
    x, z, _, y, _ = batch(5)
    t, keep = torch.tensor([0.2, 0.3, 0.5, 0.6, 0.9], dtype=torch.float64), torch.zeros(5, dtype=torch.bool)
    objective = Objective(zeta=2.0, style="fc-vs-fe", enhance_range=(0.3, 0.6))
    row, teacher = resolve("linear"), Net(7)
    v, x_t = z - x, t.view(-1, 1, 1, 1) * z + (1 - t.view(-1, 1, 1, 1)) * x
    with torch.no_grad():
        F_y, F_null = teacher(x_t, t, y), teacher(x_t, t, torch.full_like(y, 3))
        found = objective.enhance(row, teacher, v, None, x_t, t, y, null, keep)
    assert_close(found[2], (v + 2 * (F_y - F_null))[2])
    for k in (0, 1, 3, 4):
        assert_close(found[k], ((v + F_y) / 2)[k])


@pytest.mark.parametrize("num_classes", [0, None])
@pytest.mark.parametrize("style", ["none", "fc-vs-xz"])
def test_without_a_null_class_nothing_is_dropped(style, num_classes):
    """A network with 0 classes, or one that does not say how many: labels stay, and fc-vs-xz works."""
    x, z, t, _, drop = batch()
    y, net = torch.zeros(len(x), dtype=torch.int64), Net()
    net.num_classes = num_classes
    calls, zeta = calls_of(net), float(style != "none")
    objective = Objective(zeta=zeta, style=style)
    loss = objective(net, x, y, t, z, drop, net if zeta else None)
    assert all((call[2] == 0).all() for call in calls) and drop.any()
    assert_close(loss, objective(net, x, y, t, z, torch.zeros_like(drop), net if zeta else None))


@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, 5])
def test_label_drop_at_its_ends(ratio, n):
    x, _, _, y, _ = batch(n)
    net, before, objective = Net(), y.clone(), Objective(label_drop=ratio)
    calls = calls_of(net)
    t, z, drop = objective.draw(x, torch.Generator().manual_seed(0))
    assert drop.shape == t.shape == (n,) and z.shape == x.shape and drop.double().mean() == ratio
    objective(net, x, y, t, z, drop)
    assert_close(y, before)
    assert_close(calls[0][2], torch.full_like(y, 3) if ratio else y)


def test_drawing():
    from scipy.stats import beta, kstest, norm
    objective = Objective(time_beta=(0.8, 1.0, 0.9), label_drop=0.1)
    x = torch.zeros(20000, 1, 1, 1)
    t, z, drop = objective.draw(x, torch.Generator().manual_seed(3))
    for one, other in zip((t, z, drop), objective.draw(x, torch.Generator().manual_seed(3))):
        assert_close(one, other, rtol=0, atol=0)
    assert kstest((t / 0.9).numpy(), beta(0.8, 1.0).cdf).pvalue > 0.01
    assert kstest(z.flatten().numpy(), norm.cdf).pvalue > 0.01
    assert abs(drop.float().mean() - 0.1) < 4 * math.sqrt(0.09 / 20000)
    correlation = torch.corrcoef(torch.stack([t, z.flatten(), drop.float()]))
    assert (correlation - torch.eye(3)).abs().max() < 0.03


@pytest.mark.parametrize("lam, style", [(0.0, "ft-vs-fe"), (1.0, "fc-vs-fe")])
def test_the_objective_is_pure(lam, style):
    """Twice the same, row by row the same, and what is given stays as it was."""
    given, copies = batch(), batch()
    x, z, t, y, drop = given
    objective, net, teacher = Objective(lam=lam, zeta=1.0, style=style), Net(), Net(7)
    first, second = (objective(net, x, y, t, z, drop, teacher) for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)
    parts = [objective(net, *(v[k:k + 3] for v in (x, y, t, z, drop)), teacher) for k in range(0, 12, 3)]
    assert_close(first, torch.cat(parts))
    for value, copy in zip(given, copies):
        assert_close(value, copy, rtol=0, atol=0)


bare = lambda x, t, y: x            # a network without classes
guided = dict(zeta=1.0, style="fc-vs-fe")


@pytest.mark.parametrize("settings, call, words", [
    (dict(lam=1.5), {}, "lam"), (dict(label_drop=2.0), {}, "label_drop"), (dict(zeta=-1.0), {}, "zeta"),
    (dict(dt=0.0), {}, "dt"), (dict(style="fc"), {}, "one of"), (dict(derivative="fd"), {}, "central"),
    (dict(zeta=1.0), {}, "needs a style"), (dict(transport="lineer"), {}, "lineer.*linear"),
    (dict(zeta=1.0, style="ft-vs-fe", lam=1.0), {}, "ft-vs-fe is for lam 0"),
    (dict(transport="x-prediction", lam=0.5), {}, "those that can"),
    (dict(distil=True, lam=0.5), {}, "distil needs zeta > 0"),
    (dict(distil=True, zeta=1.0, style="fc-vs-xz", lam=1.0), {}, "distil .* lam between 0 and 1"),
    (dict(transport="epsilon-prediction", lam=1.0, zeta=1.0, style="fc-vs-xz"), {}, "those that can"),
    (guided, dict(net=Net()), "teacher"), (guided, dict(net=bare, teacher=bare, drop=False), "null class"),
    (dict(), dict(net=lambda x, t, y: x[:, :1], drop=False),
     r"returns \(12, 1, 4, 4\) for x \(12, 3, 4, 4\)"),
    *((dict([(name, math.nan)]), {}, name) for name in ("zeta", "huber", "dt", "lam"))])
def test_bad_settings_are_one_line(settings, call, words):
    """When the objective is made, or when it is called with networks that cannot do it."""
    x, z, t, y, drop = batch()
    with pytest.raises(ValueError, match=words) as error:
        objective = Objective(**settings)
        assert call
        objective(call["net"], x, y, t, z, drop & call.get("drop", True), call.get("teacher"))
    assert "\n" not in str(error.value)


# ---- Gaussian data: the optimum is known --------------------------------------------------------------

MEAN, SPREAD = 0.3, 0.6


def gaussian_output(row, x_t, t, kind):
    """The output whose x_hat is E[x | x_t], or the consistency function, of x ~ N(MEAN, SPREAD^2)."""
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
    n, g, row = 200_000, torch.Generator().manual_seed(5), TRANSPORTS[name]
    x, z = (torch.randn(n, 4, 1, 1, generator=g, dtype=torch.float64) for _ in range(2))
    x, t, y = MEAN + SPREAD * x, torch.rand(n, generator=g, dtype=torch.float64), torch.zeros(n).long()
    objective = Objective(name, lam=lam, derivative="jvp", label_drop=0.0)

    def gradients(size):
        """Gradients (3, n) of each sample, in three directions, `size` away from the exact solution."""
        theta = [torch.full((n, 1, 1, 1), size, dtype=torch.float64, requires_grad=True) for _ in range(3)]

        def net(x_t, t, y):
            exact = gaussian_output(row, x_t, t, kind)
            return exact * (1 + theta[0]) + theta[1] * x_t + theta[2]
        loss = objective(net, x, y, t, z, y.bool())
        return torch.stack([d.flatten() for d in torch.autograd.grad(loss.sum(), theta)])

    at, away = gradients(0.0), gradients(0.1).mean(1)
    error = at.std(1) / n**0.5
    assert (at.mean(1).abs() < 4 * error).all()
    assert (error < 0.02 * away.abs().max()).all()


# ---- conditions that are not classes -------------------------------------------------------------------

class VectorNet(Net):
    """Net for classes as one-hot rows of floats, the last of them none: the same function in another form."""
    def forward(self, x, t, y):
        assert y.dtype == torch.float64 and y.shape[1:] == (4,)
        return super().forward(x, t, y.argmax(1))

    def null(self, y):
        return torch.eye(4, dtype=y.dtype)[3].expand_as(y)


@pytest.mark.parametrize("settings", [
    dict(), dict(zeta=0.5, style="ft-vs-fe"), dict(lam=1.0, zeta=1.5, style="fc-vs-fe"),
    dict(lam=0.5, zeta=1.0, style="fc-vs-xz")])
def test_a_condition_of_floats_is_dropped_taught_and_guided_as_a_class_is(settings):
    x, z, t, y, drop = batch()
    rows, objective = torch.eye(4, dtype=torch.float64)[y], Objective(**settings)
    losses = [objective(net(0), x, condition, t, z, drop, net(1))
              for net, condition in ((Net, y), (VectorNet, rows))]
    assert_close(*losses, rtol=0, atol=0)
    images = [sample(net(), z, condition, steps=3, cfg_scale=2.0)
              for net, condition in ((Net, y), (VectorNet, rows))]
    assert_close(*images, rtol=0, atol=0)
    with pytest.raises(ValueError, match="null class"):
        sample(lambda x, t, y: x, z, rows, steps=3, cfg_scale=2.0)


def test_a_wrapped_network_keeps_its_null_condition(monkeypatch):
    """DDP hides the methods of the network inside."""
    net, y = VectorNet(), torch.zeros(2, 4, dtype=torch.float64)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(engine, "DistributedDataParallel", lambda net, **how: torch.nn.Sequential(net))
    wrapped = engine.wrap(net, torch.device("cpu"), False)
    assert wrapped is not net and torch.equal(null_of(wrapped)(y), net.null(y))
