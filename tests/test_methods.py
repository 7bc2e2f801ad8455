"""Which settings give which well-known method: the target that each paper defines, written from its formula.

On the linear path v = z - x, and where lam > 0 our target is F + k(t) D with k(t) = 4 t / sin(pi t/2), from
2.55 to 4; on trigflow k is 4. With huber 0 the loss is a root of the mean square, whose gradient has unit
size: then methods that differ in k alone have the same gradient.
"""
import pytest
import torch
from runs import train_nano
from test_objective import column, gradient, rms
from torch.testing import assert_close
from toys import Net, batch

import objective
from config import Config
from objective import HALF_PI, Objective
from sampler import sample

same = dict(rtol=1e-9, atol=1e-9)
x, z, t, y, _ = batch()
T, v, keep = column(t), z - x, torch.zeros(len(t), dtype=torch.bool)
k = 4 * T / torch.sin(HALF_PI * T)
size = x[0].numel()
at = lambda s: s * z + (1 - s) * x
data_of = lambda net, x_s, s: x_s - column(s) * net(x_s, s, y)       # where a straight line to t = 0 ends


def ours(net, **settings):
    """Loss (B,), output F_t and target of Objective(clip=0, time_weight="none", **settings). The root of the
    mean square has the gradient (F_t - target) / (size loss) with respect to F_t."""
    outputs, lam, teacher = [], settings.pop("moving", None), settings.pop("teacher", None)

    def watched(x_t, t, y):
        outputs.append(net(x_t, t, y))
        return outputs[-1]
    watched.num_classes = net.num_classes
    made = Objective(**dict(clip=0.0, time_weight="none") | settings)
    loss = made(watched, x, y, t, z, keep, teacher, lam)
    slope, = torch.autograd.grad(loss.sum(), outputs[0], retain_graph=True)
    return loss, outputs[0], outputs[0] - size * column(loss) * slope


def assert_is(net, theirs, weight=1.0, **settings):
    """Our target is F + weight (theirs - F), and both have the same gradient."""
    loss, F_t, target = ours(net, **settings)
    theirs, change = theirs.detach(), weight * (theirs - F_t)
    assert_close(target, F_t + change, **same)
    assert (change / k).abs().max() > 1             # which the usual clip would change
    assert_close(gradient(loss, net), gradient(rms(net(at(T), t, y) - theirs), net), **same)


# ---- targets on the linear path -----------------------------------------------------------------------

def test_meanflow_to_the_data():
    """arXiv 2505.13447 at r = 0: u = v - (t - r) du/dt along the path."""
    net = Net()
    _, du_dt = torch.func.jvp(lambda x_t, t: net(x_t, t, y), (at(T), t), (v, torch.ones_like(t)))
    assert_is(net, v - T * du_dt, k, lam=1.0, derivative="jvp")


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("lam", [0.3, 0.9])
def test_alphaflow_to_the_data(lam, moves):
    """AlphaFlow at r = 0: alpha v + (1 - alpha) u at s = (1 - alpha) t, where alpha is 1 - lam."""
    net, alpha = Net(), 1 - lam
    theirs = alpha * v + (1 - alpha) * net(at((1 - alpha) * T), (1 - alpha) * t, y)
    how = dict(lam=1.0, moving=torch.tensor(lam, dtype=t.dtype)) if moves else dict(lam=lam)
    assert_is(net, theirs, k / alpha, **how)


@pytest.mark.parametrize("lam", [0.5, 0.9])
def test_soflow_to_the_data(lam):
    """arXiv 2512.15657 at s = 0: f(x_t, t) is to equal f(x_l, l) at l < t. Over t - l their difference is D;
    over t, their distance has our gradient."""
    net, L = Net(), lam * T
    f_t, f_l = data_of(net, at(T), t), data_of(net, at(L), lam * t).detach()
    loss, F_t, target = ours(net, lam=lam)
    assert_close(target, F_t + k * (f_t - f_l) / (T - L), **same)
    assert_close(gradient(loss, net), gradient(rms(f_t - f_l) / t, net), **same)


def test_rcgm_with_one_jump():
    """A prediction of the data is to equal the one after a step of 0.01 along v. Their weight is 1, not k."""
    net = Net()
    after = data_of(net, at(T) - 0.01 * v, t - 0.01)
    difference = (data_of(net, at(T), t) - after) / 0.01
    assert_is(net, net(at(T), t, y) + difference, k, lam=1.0, derivative="backward", dt=0.01)


# ---- sCM ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lam", [0.5, 0.75])
def test_progressive_distillation_to_the_data(lam):
    """arXiv 2202.00512, to t = 0: x_hat learns what the teacher draws from x_t with calls at t and lam t."""
    net, teacher = Net(), Net(seed=1)
    drawn = [sample(teacher, at(T)[[i]], y[[i]], times=[s, lam * s]) for i, s in enumerate(t.tolist())]
    assert_is(net, (at(T) - torch.cat(drawn)) / T, k / (1 - lam), lam=lam, distil=True, teacher=teacher,
              zeta=1.0, style="fc-vs-xz", enhance_range=(0.0, 1.0))


def test_scm():
    """arXiv 2410.11081, sigma_d = 1, in its time s = pi t/2: f = cos(s) x_s - sin(s) F, and D = df/dt. Their
    tangent is g = cos(s) df/ds over |g| + c. At c = 0 their loss has our gradient."""
    net, s = Net(), HALF_PI * T
    x_s, velocity = torch.sin(s) * z + torch.cos(s) * x, torch.cos(s) * z - torch.sin(s) * x
    F_s, dF_ds = torch.func.jvp(lambda x_s, s: net(x_s, s / HALF_PI, y), (x_s, HALF_PI * t),
                                (velocity, torch.ones_like(t)))
    g = -torch.cos(s) ** 2 * (F_s - velocity) - torch.cos(s) * torch.sin(s) * (x_s + dF_ds)
    loss, F_t, target = ours(net, transport="trigflow", lam=1.0, derivative="jvp")
    assert_close(target, F_t + 4 * HALF_PI * g / torch.cos(s), **same)
    normalised = (g / column(g.flatten(1).norm(dim=1))).detach()
    theirs = (F_s - F_s.detach() - normalised).square().flatten(1).sum(1)
    assert_close(gradient(loss, net), gradient(theirs, net) / (2 * size**0.5), **same)


# ---- MeanFlow's adaptive weight -----------------------------------------------------------------------

@pytest.mark.parametrize("c", [0.0, 0.1])
@pytest.mark.parametrize("p, loss, factor", [(0.5, "root", 2 * size**0.5), (1.0, "log", 1.0)])
def test_meanflows_adaptive_weight(p, loss, factor, c):
    """|e|^2 times the constant 1 / (|e|^2 + c)^p: p = .5 is our root loss, p = 1 our logarithm."""
    net = Net()
    error = (net(at(T), t, y) - v).square().flatten(1).sum(1)
    theirs = error / (error.detach() + c) ** p
    found, _, _ = ours(net, loss=loss, huber=(c / size) ** 0.5)
    assert_close(gradient(found, net) * factor, gradient(theirs, net), **same)


def test_the_logarithm_at_lam_1_divides_meanflows_gradient_by_k():
    net = Net()
    _, du_dt = torch.func.jvp(lambda x_t, t: net(x_t, t, y), (at(T), t), (v, torch.ones_like(t)))
    error = (net(at(T), t, y) - (v - T * du_dt).detach()).square().flatten(1).sum(1)
    theirs = error / error.detach() / k.flatten()
    found, _, _ = ours(net, lam=1.0, derivative="jvp", loss="log")
    assert_close(gradient(found, net), gradient(theirs, net), **same)


# ---- the clip, and a lam that moves -------------------------------------------------------------------

def test_the_clip_limits_every_entry():
    net = Net()
    _, F_t, target = ours(net, lam=0.5)
    D = (target - F_t) / k
    for clip in (0.4, 1.0):
        assert_close(ours(net, lam=0.5, clip=clip)[2], F_t + k * D.clamp(-clip, clip), **same)
    usual = Objective(lam=0.5, time_weight="none")
    assert_close(ours(net, lam=0.5, clip=1.0)[0], usual(net, x, y, t, z, keep), rtol=0, atol=0)


@pytest.mark.parametrize("derivative", ["central", "backward", "jvp"])
def test_a_moving_lam_goes_from_flow_matching_to_the_backward_difference(derivative):
    net = Net()
    start, end = (ours(net, lam=1.0, moving=torch.tensor(lam), derivative=derivative) for lam in (0.0, 1.0))
    assert_close(start[2], start[1] + k * (v - start[1]), **same)
    assert_close(gradient(start[0], net), gradient(ours(net)[0], net), **same)
    assert_close(end[2], ours(net, lam=1.0, derivative="backward")[2], **same)


def test_lam_moves_with_the_step(home, capsys, monkeypatch):
    """From the first number at step 0 to the second at the last step, also after a resume. Other runs have a
    fixed lam."""
    seen, call = [], Objective.__call__

    def watched(self, *given):
        if torch.is_grad_enabled():
            seen.append((self.lam, given[7] if given[7] is None else given[7].item()))
        return call(self, *given)
    monkeypatch.setattr(objective.Objective, "__call__", watched)
    for steps in (2, 5):
        train_nano("--lam", "0.2:1", "--zeta", 0, "--style", "none", "--steps", steps, "--out", "a",
                   capsys=capsys)
    assert_close(torch.tensor(seen), torch.tensor([[1, 0.2], [1, 1], [1, 0.6], [1, 0.8], [1, 1]]))
    seen.clear()
    train_nano("--lam", 0.5, "--zeta", 0, "--style", "none", "--steps", 2, "--out", "b", capsys=capsys)
    assert seen == [(0.5, None)] * 2
    assert Config(lam="1:0", steps=5).lam_at(3) == 0.25 and Config(lam="1:0").objective().lam == 1
