"""What famous methods are in this loss: each test writes the target of another paper from that paper's own
formulas, and asks for the same target and the same gradient. All on the linear path, v = z - x, but sCM."""
import math

import pytest
import torch
from torch.func import jvp
from torch.testing import assert_close
from toys import Net, batch

from objective import Objective, expand, predict

PLAIN = dict(time_weight="none", label_drop=0.0, clip=0.0)          # no weight of t, no limit of D


def weight(t):
    """What UCGM multiplies D by; the other papers have 1 there."""
    return 4 * t / torch.sin(math.pi / 2 * t)


def gradients(net, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), list(net.parameters()))])


def along(net, x, z, t, y):
    """F(x_t, t) and its slope dF/dt along the straight path through x and z, by forward-mode derivatives."""
    F = lambda x_t, t: net(x_t, t, y)
    return jvp(F, ((1 - expand(t, x)) * x + expand(t, x) * z, t), (z - x, torch.ones_like(t)))


def residual(F, target):
    """The mean square (B,) of the difference to a target without gradient."""
    return (F - target.detach()).square().flatten(1).mean(1)


def ours(net, seed=1, **settings):
    x, z, t, y, drop = batch(seed=seed)
    return Objective("linear", **PLAIN | settings)(net, x, y, t, z, drop & False)


def adaptive(square, p):
    """MeanFlow's loss (arXiv 2505.13447): the square over itself, held constant, to the power p."""
    return square / square.detach() ** p


def test_meanflow_at_r_0():
    """u_target = v - t du/dt: the network is the average velocity from t to r = 0. With p .5 the gradient
    does not depend on the residual's size, so UCGM's weight, one number per image, cancels."""
    net, (x, z, t, y, _) = Net(), batch()

    def square():
        F, slope = along(net, x, z, t, y)
        return residual(F, z - x - expand(t, x) * slope)
    settings = dict(lam=1.0, derivative="jvp")
    root, log = 2 * ours(net, **settings), weight(t) * ours(net, log_loss=True, **settings)
    assert_close(gradients(net, root), gradients(net, adaptive(square(), 0.5)), rtol=1e-9, atol=1e-12)
    assert_close(gradients(net, log), gradients(net, adaptive(square(), 1)), rtol=1e-9, atol=1e-12)
    clipped = 2 * gradients(net, ours(net, **settings | dict(clip=0.1)))
    assert (clipped - gradients(net, adaptive(square(), 0.5))).norm() > 0.01 * clipped.norm()


def target_of(net, objective):
    """F and the target, from the loss alone: its slope in F is the residual over its own size."""
    x, z, t, y, drop = batch()
    outputs = []

    def keeping(x_t, t, y):
        outputs.append(net(x_t, t, y))
        return outputs[-1]
    keeping.num_classes = net.num_classes
    loss = objective(keeping, x, y, t, z, drop & False)
    slope, = torch.autograd.grad(loss.sum(), outputs[0])        # (F - target) / numel / sqrt(square + c^2)
    size = (loss + objective.huber) * x[0].numel()
    return outputs[0].detach(), (outputs[0] - slope * expand(size, x)).detach()


@pytest.mark.parametrize("lam", [0.3, 0.9])
def test_alphaflow_and_soflow(lam):
    """AlphaFlow at r = 0: alpha v + (1 - alpha) u(x_s, s), with s = lam t, alpha = 1 - lam. SoFlow at
    s = 0 (arXiv 2512.15657): (f(x_t, t) - f(x_l, l)) / (t - l) shall be 0; f = x_t - t F, l = lam t."""
    net, (x, z, t, y, _) = Net(), batch()
    F, target = target_of(net, Objective("linear", lam=lam, **PLAIN))
    at = lambda r: (1 - expand(r, x)) * x + expand(r, x) * z
    s = lam * t
    F_s = net(at(s), s, y)
    alphaflow = (1 - lam) * (z - x) + lam * F_s
    assert_close((target - F) / expand(weight(t), x), (alphaflow - F) / (1 - lam), rtol=1e-9, atol=1e-9)
    f = lambda r, F: at(r) - expand(r, x) * F
    soflow = (f(t, F) - f(s, F_s)) / expand(t - s, x)
    assert_close((target - F) / expand(weight(t), x), soflow, rtol=1e-9, atol=1e-9)


def test_rcgm_with_one_jump():
    """RCGM with N = 1 and r = 0: x_hat shall be what the network says .01 nearer to the data."""
    net, (x, z, t, y, _) = Net(), batch()
    F, target = target_of(net, Objective("linear", lam=1.0, derivative="backward", dt=0.01, **PLAIN))
    r = t - 0.01
    x_r = (1 - expand(r, x)) * x + expand(r, x) * z
    x_hat = lambda x_t, t: x_t - expand(t, x) * net(x_t, t, y)
    jump = (x_hat((1 - expand(t, x)) * x + expand(t, x) * z, t) - x_hat(x_r, r)) / 0.01
    assert_close((target - F) / expand(weight(t), x), jump, rtol=1e-9, atol=1e-9)


def test_scm_is_the_tangent_on_trigflow():
    """sCM (arXiv 2410.11081): f = cos(t) x_t - sin(t) F, and F moves by df/dt = -cos(t) (F - dx_t/dt)
    - sin(t) (x_t + dF/dt), in its time of 0 to pi / 2. The normalised tangent is the root loss with c = 0."""
    net, (x, z, t, y, drop) = Net(), batch()
    angle = expand(math.pi / 2 * t, x)
    x_t, moving = angle.cos() * x + angle.sin() * z, angle.cos() * z - angle.sin() * x
    F, slope = jvp(lambda x_t, t: net(x_t, t, y), (x_t, t), (moving * math.pi / 2, torch.ones_like(t)))
    tangent = -angle.cos() * (F - moving) - angle.sin() * (x_t + slope / (math.pi / 2))
    settings = dict(transport="trigflow", lam=1.0, derivative="jvp", **PLAIN)
    ours = Objective(**settings)(net, x, y, t, z, drop & False)
    unit = tangent / tangent.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    theirs = (F * unit.detach()).flatten(1).sum(1)                  # its gradient moves F against the tangent
    a, b = gradients(net, ours), gradients(net, theirs)
    assert torch.nn.functional.cosine_similarity(a, b, dim=0).abs() > 1 - 1e-10
    x_hat = lambda t: predict(net, "trigflow", (math.pi / 2 * expand(t, x)).cos() * x
                              + (math.pi / 2 * expand(t, x)).sin() * z, t, y)[1]
    assert_close(jvp(x_hat, (t,), (torch.ones_like(t),))[1], tangent * math.pi / 2, rtol=1e-9, atol=1e-9)


def test_the_limit_of_d_is_a_setting_and_0_is_none():
    net = Net()
    free, same = (ours(net, lam=1.0, derivative="jvp", clip=clip) for clip in (0.0, 1e9))
    assert_close(free, same, rtol=0, atol=0)
    assert (ours(net, lam=1.0, derivative="jvp", clip=1.0) < free).any()
    with pytest.raises(ValueError, match="clip -1"):
        Objective(clip=-1)
