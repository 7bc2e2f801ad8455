"""The loss of UCGM-T (arXiv 2505.07447): diffusion, flow matching and consistency models as one regression.

A transport mixes noise into data, and a network regresses one linear combination of the two:

    x_t = alpha(t) z + gamma(t) x        z_t = alpha_hat(t) z + gamma_hat(t) x        t = 0 is data, t = 1 is NOISE

Trained on z_t it is a many-step model, lambda = 0. For lambda > 0 its estimate of the data, x_hat = (alpha F - alpha_hat x_t) / d with
d = alpha gamma_hat - gamma alpha_hat, is also to be the same all along a path: the target is F_t - (alpha / d) (4 / sin(pi t/2)) D with

    D = (x_hat(t) - x_hat(lambda t)) / ((1 - lambda) t)        at lambda = 1: d x_hat / dt        clipped to [-1, 1]

Mind the letters: **alpha multiplies the noise, gamma the data**; SiT and most flow papers have it the other way round.

| symbol             | meaning                                                                          |
|--------------------|----------------------------------------------------------------------------------|
| x, z, y            | data (B, C, H, W), noise z ~ N(0, I) of the same shape, class (B,)               |
| t, x_t, z_t        | time (B,) in [0, 1], the mixture that the network sees, the target of its output |
| F_t                | the network's output F(x_t, t, y)                                                |
| x_hat, z_hat       | the data and the noise that F_t implies (`predict`)                              |
| x_star, z_star     | data and noise after enhancement: they point along the guided path               |
| lam                | consistency ratio: 0 many-step diffusion or flow, 1 few-step consistency         |
| zeta               | enhancement ratio: how much guidance is trained into the network                 |
| kappa, rho         | the sampler's extrapolation and stochasticity (sampler.py)                       |

The objective is a pure function of tensors: randomness comes in as t, z and drop; it knows no optimiser, EMA or device.
"""
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HALF_PI = math.pi / 2       # the published code writes 1.57; looked up at every call, so that a test can do the same


# ---- transports ---------------------------------------------------------------------------------------------------

class Transport(NamedTuple):
    """One row: the path, the regression target, and how to ask the network. Functions of a tensor t, elementwise."""
    alpha: Callable         # noise in x_t
    gamma: Callable         # data in x_t
    alpha_hat: Callable     # noise in the network's target
    gamma_hat: Callable     # data in the network's target
    clock: Callable         # the time that the network is told
    sign: float             # what its output is multiplied by

    def at(self, t, like):
        """alpha, gamma, alpha_hat, gamma_hat at t (B,), shaped to multiply `like` (B, ...)."""
        t = t.view(-1, *[1] * (like.ndim - 1))
        return self.alpha(t), self.gamma(t), self.alpha_hat(t), self.gamma_hat(t)

    def d(self, t):
        """The determinant of the mixing; where it is 0, F_t does not determine x_hat and z_hat."""
        return self.alpha(t) * self.gamma_hat(t) - self.gamma(t) * self.alpha_hat(t)


same = lambda t: t
reverse = lambda t: 1 - t
zero, one = torch.zeros_like, torch.ones_like
minus_one = lambda t: -one(t)
sin = lambda t: torch.sin(HALF_PI * t)
cos = lambda t: torch.cos(HALF_PI * t)
minus_sin = lambda t: -sin(t)
random_gamma_hat = lambda t: -1 - torch.exp(-5 * t)

# EDM: its noise level s runs from 0.0017 to 78 as t runs from 0 to 1; sigma_data = 1/2.
edm_s = lambda t: torch.exp(4 * (2.68 * t - 1.59))
edm_gamma = lambda t: (edm_s(t) ** 2 + 0.25) ** -0.5
edm_alpha = lambda t: edm_s(t) * edm_gamma(t)
edm_alpha_hat = lambda t: -edm_gamma(t) / 2
edm_gamma_hat = lambda t: 2 * edm_alpha(t)

# DDPM: betas linear from 1e-4 to 0.02 in 1000 steps, log(abar) interpolated so that t is continuous; entry k is t = k/1000.
LOG_ABAR = torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumsum(0)])


def log_abar(t):
    k = (1000 * t).clamp(0, 1000)
    i = k.detach().long().clamp(max=999)
    table = LOG_ABAR.to(t.device, t.dtype)
    return table[i] + (k - i) * (table[i + 1] - table[i])


ddpm_alpha = lambda t: torch.sqrt(-torch.expm1(log_abar(t)))
ddpm_gamma = lambda t: torch.exp(log_abar(t) / 2)
ddpm_clock = lambda t: 1000 * t - 1

TRANSPORTS = {name: Transport(*row) for name, *row in (
    # name                 alpha       gamma       alpha_hat      gamma_hat         clock       sign
    ("linear",             same,       reverse,    one,           minus_one,        same,        1.0),   # flow matching, rectified flow: v = z - x
    ("relinear",           same,       reverse,    one,           minus_one,        reverse,    -1.0),   # networks with data at t = 1: SiT, LightningDiT
    ("trigflow",           sin,        cos,        cos,           minus_sin,        same,        1.0),   # sCM's TrigFlow
    ("triglinear",         sin,        cos,        one,           minus_one,        same,        1.0),
    ("edm",                edm_alpha,  edm_gamma,  edm_alpha_hat, edm_gamma_hat,    same,        1.0),   # EDM, EDM2
    ("random",             sin,        reverse,    one,           random_gamma_hat, same,        1.0),   # any smooth choice with d != 0 works
    ("x-prediction",       same,       reverse,    zero,          one,              same,        1.0),   # linear path, the network outputs x
    ("epsilon-prediction", same,       reverse,    one,           zero,             same,        1.0),   # linear path, it outputs the noise
    ("ddpm",               ddpm_alpha, ddpm_gamma, one,           zero,             ddpm_clock,  1.0),   # DDPM, ADM, DiT
)}


def resolve(transport):
    """A row from its name; a row passes through. ValueError names the nearest transports."""
    if isinstance(transport, Transport):
        return transport
    if transport not in TRANSPORTS:
        near = difflib.get_close_matches(str(transport), TRANSPORTS, cutoff=0) or TRANSPORTS
        raise ValueError(f"unknown transport {transport!r}; nearest: {', '.join(near)}")
    return TRANSPORTS[transport]


def is_singular(row):
    return bool((row.d(torch.tensor([0.0, 1.0], dtype=torch.float64)).abs() < 1e-6).any())


def predict(net, transport, x_t, t, y):
    """Ask the network and solve its answer for data and noise; loss and sampler share this one place.

    net(x, t, y) -> like x; x_t (B, ...), t (B,), y (B,). Returns F_t, x_hat, z_hat, each like x_t, with
    alpha z_hat + gamma x_hat = x_t for whatever the network said.
    """
    row = resolve(transport)
    alpha, gamma, alpha_hat, gamma_hat = row.at(t, x_t)
    F_t = row.sign * net(x_t, row.clock(t), y).to(x_t.dtype)
    d = alpha * gamma_hat - gamma * alpha_hat
    return F_t, (alpha * F_t - alpha_hat * x_t) / d, (gamma_hat * x_t - gamma * F_t) / d


# ---- the objective ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Objective:
    """UCGM-T. Draw the randomness, then call: a loss per sample, (B,), to be averaged.

        t, z, drop = objective.draw(x, y, generator)
        loss = objective(net, x, y, t, z, drop, teacher).mean()

    Styles of enhancement, guided (c) against reference (r), used when zeta > 0:
        ft-vs-fe   the online network at y      against the teacher (its EMA) at the null class; lam = 0, training from nothing
        fc-vs-fe   the (frozen) teacher at y    against the teacher at the null class; tuning a model that has a null class
        fc-vs-xz   the (frozen) teacher at y    against the data and noise themselves; tuning one's own many-step model
    """
    transport: str | Transport = "linear"
    lam: float = 0.0                            # consistency ratio, 0..1
    zeta: float = 0.0                           # enhancement ratio, >= 0
    style: str = "none"                         # see above
    huber: float = 0.0                          # c of the pseudo-Huber loss; 0: the root mean square, large: like the mean square
    cosine: bool = False                        # add 1 - cosine similarity over the channels
    weight: str = "cosine"                      # weight by time: cosine, cos(pi t/2), or none
    beta: tuple = (1.0, 1.0, 1.0)               # t ~ Beta(theta1, theta2) * theta3
    enhance_range: tuple = (0.0, 0.75)          # times at which the enhancement works in full
    label_drop: float = 0.1                     # probability of the null class
    derivative: str = "fd"                      # lam = 1: fd, the central difference, backward, that to the time before, or jvp, exact (forward mode)
    eps: float = 0.005                          # e of the two differences

    def __post_init__(self):
        row = resolve(self.transport)
        for name, value, allowed in (("style", self.style, ("none", "ft-vs-fe", "fc-vs-fe", "fc-vs-xz")), ("weight", self.weight, ("cosine", "none")),
                                     ("derivative", self.derivative, ("fd", "backward", "jvp"))):
            if value not in allowed:
                raise ValueError(f"unknown {name} {value!r}; one of: {', '.join(allowed)}")
        if not 0 <= self.lam <= 1:
            raise ValueError(f"the consistency ratio is {self.lam}; it must lie in 0..1 (0: many-step, 1: few-step)")
        if self.zeta < 0 or self.huber < 0 or not 0 <= self.label_drop <= 1:
            raise ValueError(f"enhancement ratio {self.zeta}, huber {self.huber} must be >= 0, label drop {self.label_drop} in 0..1")
        if self.eps <= 0 or len(self.beta) != 3 or min(self.beta) <= 0:
            raise ValueError(f"eps {self.eps} must be positive and beta {self.beta} three positive numbers, such as 1,1,1")
        if self.zeta > 0 and self.style == "none":
            raise ValueError(f"enhancement ratio {self.zeta} needs a style: ft-vs-fe to train, fc-vs-fe or fc-vs-xz to tune")
        if self.zeta > 0 and self.style == "ft-vs-fe" and self.lam > 0:
            raise ValueError(f"style ft-vs-fe is for consistency ratio 0, found {self.lam}; use fc-vs-fe or fc-vs-xz with a frozen teacher")
        if (self.lam > 0 or self.zeta > 0) and is_singular(row):
            able = ", ".join(name for name, other in TRANSPORTS.items() if not is_singular(other))
            raise ValueError(f"transport {self.transport!r} has an end where its output does not determine x and z; "
                             f"it trains with consistency ratio 0 and enhancement ratio 0 only; those that can: {able}")

    def draw(self, x, y, generator=None):
        """t (B,), z like x, drop (B,) bool, on x's device. A generator draws on its own device."""
        source = dict(generator=generator, device=generator.device if generator else x.device)
        theta1, theta2, theta3 = self.beta
        ones = torch.ones(2, len(x), device=source["device"]) * torch.tensor([[theta1], [theta2]], device=source["device"])
        a, b = torch._standard_gamma(ones, generator=generator)        # as torch.distributions.Beta does, which takes no generator
        t = (theta3 * a / (a + b)).clamp(0, 1)
        z = torch.randn(x.shape, dtype=x.dtype, **source)
        drop = torch.rand(len(x), **source) < self.label_drop
        return t.to(x), z.to(x.device), drop.to(x.device)

    def time_weight(self, t):
        """(B,) to (B,): cos(pi t/2), nearly nothing at pure noise, or 1."""
        return cos(t) if self.weight == "cosine" else torch.ones_like(t)

    def __call__(self, net, x, y, t, z, drop, teacher=None):
        """The loss of each sample, (B,), time weight included.

        net and teacher: (x_t, t, y) -> F like x_t; `net.num_classes` is the null class. x, z (B, C, H, W), t (B,) in [0, 1],
        y (B,) int64 as the data have it, drop (B,) bool: these rows become the null class. ValueError: no null class, no teacher.
        """
        row, null = resolve(self.transport), getattr(net, "num_classes", None)
        if self.zeta > 0 and teacher is None:
            raise ValueError(f"enhancement ratio {self.zeta} with style {self.style} needs a teacher: its EMA, or a frozen model (--init_from)")
        if self.zeta > 0 and self.style != "fc-vs-xz" and not null:
            raise ValueError(f"style {self.style} compares with the null class and the network has none: use class labels, or enhancement ratio 0")
        if null is not None:
            y = torch.where(drop, null, y)
        elif drop.any():
            raise ValueError("labels are dropped but the network has no null class: give it num_classes, or set label drop to 0")
        t = t.clamp(1e-4, 1 - 1e-4)                                     # 0 and 1 are limits of what follows, not values
        alpha, gamma, alpha_hat, gamma_hat = row.at(t, x)
        x_t = alpha * z + gamma * x                                                                  # (B, C, H, W)
        F_t, x_hat, z_hat = predict(net, row, x_t, t, y)

        with torch.no_grad():
            x_star, z_star = self.enhance(teacher, row, x_t, t, y, null, drop, (x, z), (x_hat, z_hat))
            if self.lam == 0:
                target = alpha_hat * z_star + gamma_hat * x_star
            else:
                slope = self.slope(net, row, x_star, z_star, t, y, x_hat.detach()).clamp(-1, 1)
                d = alpha * gamma_hat - gamma * alpha_hat
                target = F_t - alpha / d * 4 / sin(t).view_as(d) * slope

        residual = (F_t - target).square().flatten(1).mean(1)                                        # (B,)
        root = (residual + self.huber**2).clamp_min(torch.finfo(x.dtype).tiny).sqrt()                # gradient 0, not NaN, at 0
        loss = root - self.huber
        if self.cosine:     # eps: below this length a vector has no direction; 1e-8 would kick a zero-initialised output
            loss = loss + (1 - F.cosine_similarity(F_t, target, dim=1, eps=1e-3)).flatten(1).mean(1)
        return self.time_weight(t) * loss

    def enhance(self, teacher, row, x_t, t, y, null, drop, true, online):
        """x_star, z_star: moved along the guidance so that alpha z_star + gamma x_star is still x_t."""
        if self.zeta == 0:
            return true
        guided = online if self.style == "ft-vs-fe" else predict(teacher, row, x_t, t, y)[1:]
        reference = true if self.style == "fc-vs-xz" else predict(teacher, row, x_t, t, torch.full_like(y, null))[1:]
        low, high = self.enhance_range
        inside, dropped = (v.view(-1, *[1] * (x_t.ndim - 1)) for v in ((low < t) & (t < high), drop))
        return tuple(torch.where(dropped, (v + r) / 2, torch.where(inside, v + self.zeta * (c - r), (v + c) / 2))
                     for v, c, r in zip(true, guided, reference))

    def slope(self, net, row, x_star, z_star, t, y, x_hat):
        """How fast the predicted data change along the path: (B, C, H, W). On its own flow a consistent model has slope 0; on the line
        through one x and z, 0 on average."""
        def g(r):
            alpha, gamma, _, _ = row.at(r, x_star)
            return predict(net, row, alpha * z_star + gamma * x_star, r, y)[1]

        if self.lam < 1 or self.derivative == "backward":
            r = self.lam * t if self.lam < 1 else (t - self.eps).clamp_min(0)
            return (x_hat - g(r)) / (t - r).view(-1, *[1] * (x_star.ndim - 1))
        if self.derivative == "fd":
            return (g(t + self.eps) - g(t - self.eps)) / (2 * self.eps)
        with sdpa_kernel(SDPBackend.MATH):                              # fused attention has no forward mode
            return torch.func.jvp(g, (t,), (torch.ones_like(t),))[1]
