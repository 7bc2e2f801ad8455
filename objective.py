"""The loss of UCGM-T (arXiv 2505.07447): diffusion, flow matching and consistency models as one regression.

A transport mixes noise into data, and a network F regresses one combination of the two:

    x_t = alpha(t) z + gamma(t) x       v = alpha_hat(t) z + gamma_hat(t) x       t = 0: data, t = 1: NOISE

Mind the letters: **alpha multiplies the noise, gamma the data**. Most flow-matching papers swap them.

| symbol         | meaning                                                                             |
|----------------|-------------------------------------------------------------------------------------|
| x, z, y        | data (B, C, H, W), noise z ~ N(0, I) of the same shape, class (B,)                  |
| t, x_t, v      | time (B,) in [0, 1], the mixture that the network sees, the target of its output F_t|
| F_t            | the network's output F(x_t, t, y)                                                   |
| x_hat, z_hat   | the data and the noise that F_t implies: x_t and F_t solved for x and z             |
| v_star         | v after enhancement; x_star, z_star: the data and the noise that v_star implies     |
| D, d           | d x_hat / dt along a path, and the determinant of the two equations above           |
| lam            | consistency ratio: 0 many-step diffusion or flow, 1 few-step consistency            |
| zeta           | enhancement ratio: how much guidance is trained into the network                    |
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HALF_PI = math.pi / 2       # the published code has 1.57; a module constant, so that a test can set it


def expand(t, like):
    """t (B,) as (B, 1, ...), to multiply `like` (B, ...)."""
    return t.view(-1, *[1] * (like.ndim - 1))


# ---- transports ----------------------------------------------------------------------------------------

class Transport(NamedTuple):
    """A path, a regression target, and how to call the network: elementwise functions of a tensor t."""
    alpha: Callable         # noise in x_t
    gamma: Callable         # data in x_t
    alpha_hat: Callable     # noise in the target
    gamma_hat: Callable     # data in the target
    net_time: Callable      # the time that the network receives
    sign: float             # the factor of its output

    def at(self, t, like):
        """alpha, gamma, alpha_hat, gamma_hat at t (B,), each shaped to multiply `like` (B, ...)."""
        t = expand(t, like)
        return self.alpha(t), self.gamma(t), self.alpha_hat(t), self.gamma_hat(t)

    def determinant(self, t):
        """d, elementwise. Where it is 0, F_t does not determine x_hat and z_hat."""
        return self.alpha(t) * self.gamma_hat(t) - self.gamma(t) * self.alpha_hat(t)

    def is_singular(self, least=1e-6):
        """Whether |d| is below `least` at an end."""
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        return bool((self.determinant(ends).abs() < least).any())

    def call(self, net, x_t, t, y):
        """F_t like x_t (B, ...), with the network's own time and sign. net(x, t, y) -> like x."""
        F_t = net(x_t, self.net_time(t), y)
        if F_t.shape != x_t.shape:
            raise ValueError(f"the network returns {tuple(F_t.shape)} for x {tuple(x_t.shape)}: not like x")
        return self.sign * F_t.to(x_t.dtype)

    def solve(self, F_t, x_t, t):
        """x_hat, z_hat like x_t. For any F_t, alpha z_hat + gamma x_hat = x_t."""
        alpha, gamma, alpha_hat, gamma_hat = self.at(t, x_t)
        d = alpha * gamma_hat - gamma * alpha_hat
        return (alpha * F_t - alpha_hat * x_t) / d, (gamma_hat * x_t - gamma * F_t) / d


identity = lambda t: t
one_minus = lambda t: 1 - t
zero, one = torch.zeros_like, torch.ones_like
minus_one = lambda t: -one(t)
sin = lambda t: torch.sin(HALF_PI * t)
cos = lambda t: torch.cos(HALF_PI * t)
minus_sin = lambda t: -sin(t)
random_hat = lambda t: -1 - torch.exp(-5 * t)

# EDM (arXiv 2206.00364) with sigma_data = 1/2. Its network receives log(s) / 4 of the noise level s; UCGM
# makes that linear in t, so that s runs from 0.0017 to 78 (EDM: from 0.002 to 80).
edm_s = lambda t: torch.exp(4 * (2.68 * t - 1.59))
edm_gamma = lambda t: (edm_s(t) ** 2 + 0.25) ** -0.5
edm_alpha = lambda t: edm_s(t) * edm_gamma(t)
edm_alpha_hat = lambda t: -edm_gamma(t) / 2
edm_gamma_hat = lambda t: 2 * edm_alpha(t)


def discrete_path(log_abar):
    """alpha and gamma of an N-step DDPM schedule, from log(alpha_bar): (N,), float64, all negative. Step k is
    at t = k / N; the network receives k - 1. Between steps the logarithm is interpolated."""
    padded = F.pad(log_abar, (1, 0))
    table = cache(lambda device, dtype: padded.to(device, dtype))       # copy once: the host waits for it

    def log_abar_at(t):
        values, last = table(t.device, t.dtype), len(log_abar)
        k = (last * t).clamp(0, last)
        i = k.detach().long().clamp(max=last - 1)
        return values[i] + (k - i) * (values[i + 1] - values[i])
    return lambda t: torch.sqrt(-torch.expm1(log_abar_at(t))), lambda t: torch.exp(log_abar_at(t) / 2)


DDPM_BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ddpm_alpha, ddpm_gamma = discrete_path(torch.log1p(-DDPM_BETAS).cumsum(0))
ddpm_time = lambda t: 1000 * t - 1

TRANSPORTS = {name: Transport(*row) for name, *row in (
    # name                 alpha       gamma       alpha_hat      gamma_hat      net_time   sign
    ("linear",             identity,   one_minus,  one,           minus_one,     identity,   1.0),  # flow
    ("relinear",           identity,   one_minus,  one,           minus_one,     one_minus, -1.0),  # SiT
    ("trigflow",           sin,        cos,        cos,           minus_sin,     identity,   1.0),  # sCM
    ("triglinear",         sin,        cos,        one,           minus_one,     identity,   1.0),
    ("edm",                edm_alpha,  edm_gamma,  edm_alpha_hat, edm_gamma_hat, identity,   1.0),  # EDM
    ("random",             sin,        one_minus,  one,           random_hat,    identity,   1.0),  # any
    ("x-prediction",       identity,   one_minus,  zero,          one,           identity,   1.0),
    ("epsilon-prediction", identity,   one_minus,  one,           zero,          identity,   1.0),
    ("ddpm",               ddpm_alpha, ddpm_gamma, one,           zero,          ddpm_time,  1.0),  # DiT
)}


def resolve(transport):
    """The Transport of that name; a Transport is returned unchanged. ValueError lists the names."""
    if isinstance(transport, Transport):
        return transport
    if transport not in TRANSPORTS:
        raise ValueError(f"unknown transport {transport!r}; use one of: {', '.join(TRANSPORTS)} "
                         "(linear is flow matching, trigflow the cosine path)")
    return TRANSPORTS[transport]


def predict(net, transport, x_t, t, y):
    """Call the network and solve its output for data and noise: F_t, x_hat, z_hat, each like x_t (B, ...).
    net(x, t, y) -> like x; t (B,), y (B,)."""
    transport = resolve(transport)
    F_t = transport.call(net, x_t, t, y)
    return F_t, *transport.solve(F_t, x_t, t)


def null_of(net):
    """The function from conditions y (B, ...) to the null condition, shaped like y: net.null, or one that
    returns the class net.num_classes. None if the network has no null condition."""
    num_classes = getattr(net, "num_classes", None)
    to_class = (lambda y: torch.full_like(y, num_classes)) if num_classes else None
    return getattr(net, "null", None) or to_class


# ---- the objective -------------------------------------------------------------------------------------

WEIGHTS = {"cosine": cos, "none": one}
CHOICES = {"style": ("none", "ft-vs-fe", "fc-vs-fe", "fc-vs-xz"), "time_weight": tuple(WEIGHTS),
           "derivative": ("central", "backward", "jvp"), "loss": ("root", "log")}


@dataclass(frozen=True)
class Objective:
    """UCGM-T. Draw the randomness, then call it for the loss of each sample, (B,).

        t, z, drop = objective.draw(x, generator)
        loss = objective(net, x, y, t, z, drop, teacher).mean()

    It is a pure function of tensors. Each field is also a field of config.Config.
    """
    transport: str | Transport = "linear"
    lam: float = 0.0                            # consistency ratio, 0..1
    zeta: float = 0.0                           # enhancement ratio, >= 0
    style: str = "none"                         # of the enhancement: see `enhance`
    huber: float = 0.0                          # c of the loss below; 0: RMS, not MSE
    cosine_loss: bool = False                   # add 1 - cosine similarity over the channels
    time_weight: str = "cosine"                 # cosine: weight by cos(pi t/2); none: by 1
    time_beta: tuple = (1.0, 1.0, 1.0)          # t ~ Beta(theta1, theta2) * theta3
    enhance_range: tuple = (0.0, 0.75)          # times at which the enhancement is at full strength
    label_drop: float = 0.1                     # probability of the null class
    derivative: str = "central"                 # at lam = 1: central or backward difference, or jvp (exact)
    dt: float = 0.005                           # step of these differences
    clip: float = 1.0                           # largest size of an entry of D; 0: no limit
    distil: bool = False                        # at lam t the teacher answers: one call learns its two
    loss: str = "root"                          # sqrt(mean square + c^2) - c; log: log(mean square / c^2 + 1)

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; use one of: {', '.join(allowed)}")
        in_range = {"lam": 0 <= self.lam <= 1, "label_drop": 0 <= self.label_drop <= 1, "dt": self.dt > 0,
                    "zeta": self.zeta >= 0, "huber": self.huber >= 0, "clip": self.clip >= 0,
                    "time_beta": len(self.time_beta) == 3 and all(theta > 0 for theta in self.time_beta)}
        if wrong := [f"{name} {getattr(self, name)}" for name, is_good in in_range.items() if not is_good]:
            raise ValueError(f"{', '.join(wrong)} is out of range: lam and label_drop lie in 0..1; zeta, "
                             "huber and clip are at least 0; dt and the numbers of time_beta are positive")
        if self.zeta > 0 and self.style == "none":
            raise ValueError(f"zeta {self.zeta} needs a style: ft-vs-fe, fc-vs-fe or fc-vs-xz")
        if self.zeta > 0 and self.style == "ft-vs-fe" and self.lam > 0:
            raise ValueError("style ft-vs-fe is for lam 0: use fc-vs-fe, fc-vs-xz, or without a teacher type "
                             f"python train.py --lam {self.lam:g} --zeta 0 --style none --kappa 0 --rho 1")
        if self.distil and not (self.zeta > 0 and 0 < self.lam < 1):
            raise ValueError(f"distil needs zeta > 0 and lam between 0 and 1, found {self.zeta}, {self.lam}")
        if resolve(self.transport).is_singular() and self.lam > 0:      # x_hat undefined at an end
            able = ", ".join(name for name, row in TRANSPORTS.items() if not row.is_singular())
            raise ValueError(f"{self.transport} cannot train with lam > 0; those that can: {able}")

    def draw(self, x, generator=None):
        """t (B,), z like x, drop (B,) bool, on x's device. They are drawn on the generator's device."""
        source = dict(generator=generator, device=generator.device if generator else x.device)
        *thetas, scale = self.time_beta
        thetas = torch.stack([torch.full((len(x),), theta, device=source["device"]) for theta in thetas])
        # A Beta from two Gammas, as in torch.distributions.Beta, which takes no generator.
        a, b = torch._standard_gamma(thetas, generator=generator)
        t = (scale * a / (a + b)).clamp(0, 1)
        z = torch.randn(x.shape, dtype=x.dtype, **source)
        drop = torch.rand(len(x), **source) < self.label_drop
        return t.to(x), z.to(x.device), drop.to(x.device)

    def __call__(self, net, x, y, t, z, drop, teacher=None, lam=None):
        """The loss of each sample, (B,), time weight included.

        net, teacher: (x_t, t, y) -> F like x_t. x, z (B, C, H, W), t (B,) in [0, 1], y (B,) int64 or (B, ...)
        of any kind; drop (B,) bool: rows whose y becomes null_of(net)'s. lam: where lam moves during a run,
        its current value as a scalar tensor. ValueError: zeta needs a null class, or a teacher.
        """
        transport, null = resolve(self.transport), null_of(net)
        self.check_networks(null, teacher is not None)
        if null:
            y = torch.where(expand(drop, y), null(y), y)
        else:
            drop = torch.zeros_like(drop)               # without a null class, every label stays
        t = t.clamp(1e-4, 1 - 1e-4)                     # at 0 and 1 the formulas exist only as limits
        alpha, gamma, alpha_hat, gamma_hat = transport.at(t, x)
        x_t = alpha * z + gamma * x                                                          # (B, C, H, W)
        F_t = transport.call(net, x_t, t, y)                                                 # (B, C, H, W)

        with torch.no_grad():
            v = alpha_hat * z + gamma_hat * x
            target = self.enhance(transport, teacher, v, F_t, x_t, t, y, null, drop)        # v_star
            if self.lam > 0:
                x_star, z_star = transport.solve(target, x_t, t)
                x_hat, _ = transport.solve(F_t, x_t, t)
                D = self.dx_dt(teacher if self.distil else net, transport, x_star, z_star, t, y, x_hat, lam)
                D = D.clamp(-self.clip, self.clip) if self.clip else D
                d = transport.determinant(expand(t, x))
                # Consistency asks for D = 0. x_hat changes with F_t at the rate alpha / d, which gives the
                # direction of the target. The weight 4 / sin(pi t/2) and the clip, which keeps one image from
                # dominating the batch, are the paper's choices; it gives no derivation.
                target = F_t - alpha / d * 4 / expand(sin(t), d) * D

        square = (F_t - target).square().flatten(1).mean(1)                                  # (B,)
        # At 0 the root and the logarithm have an infinite slope. The clamp makes their gradient 0.
        square = (square + self.huber**2).clamp_min(torch.finfo(x.dtype).tiny)
        loss = square.sqrt() - self.huber if self.loss == "root" else (square / (self.huber**2 or 1)).log()
        if self.cosine_loss:        # eps: torch's 1e-8 gives an output that starts at 0 a huge gradient
            loss = loss + (1 - F.cosine_similarity(F_t, target, dim=1, eps=1e-3)).flatten(1).mean(1)
        return WEIGHTS[self.time_weight](t) * loss

    def check_networks(self, null, has_teacher):
        if self.zeta > 0 and not has_teacher:
            raise ValueError(f"style {self.style} needs a teacher (train.py: give --init_from)")
        if self.zeta > 0 and self.style != "fc-vs-xz" and not null:
            raise ValueError(f"style {self.style} needs the null class: use class labels, or zeta 0")

    def enhance(self, transport, teacher, v, F_t, x_t, t, y, null, drop):
        """v_star: the target v moved along the guidance, at the same x_t. All (B, C, H, W).

        Names: ft is the online F_t; fc and fe are the teacher with and without the class ("empty"); xz is v.

        | style    | guided F                | reference F         | for                               |
        |----------|-------------------------|---------------------|-----------------------------------|
        | ft-vs-fe | the online network at y | the teacher at null | training; the teacher is its EMA  |
        | fc-vs-fe | the frozen teacher at y | the teacher at null | fine-tuning any model             |
        | fc-vs-xz | the frozen teacher at y | v itself            | fine-tuning one trained with zeta |

        v_star is v + zeta (guided - reference) inside enhance_range, (v + guided) / 2 outside it, and
        (v + reference) / 2 where the label is dropped. The halves are the paper's choice. With fc-vs-xz and
        zeta 1 the target is the teacher's output itself.
        """
        if self.zeta == 0:
            return v
        guided = F_t if self.style == "ft-vs-fe" else transport.call(teacher, x_t, t, y)
        reference = v if self.style == "fc-vs-xz" else transport.call(teacher, x_t, t, null(y))
        low, high = self.enhance_range
        inside = expand((low < t) & (t < high), x_t)
        v_star = torch.where(inside, v + self.zeta * (guided - reference), (v + guided) / 2)
        return torch.where(expand(drop, x_t), (v + reference) / 2, v_star)

    def dx_dt(self, net, transport, x_star, z_star, t, y, x_hat, lam=None):
        """D, (B, C, H, W): the rate at which the predicted data change along the path of x_star and z_star.

        x_hat: the prediction at t. D = (x_hat(t) - x_hat(lam t)) / (t - lam t); at lam = 1 it is the
        derivative (a backward difference if lam moves). A central one may leave [0, 1]; so may the path.
        net is the teacher with distil: D = 0 if x_hat is what its calls at t and lam t draw (2202.00512).
        """
        def data_at(r):
            alpha, gamma, _, _ = transport.at(r, x_star)
            return predict(net, transport, alpha * z_star + gamma * x_star, r, y)[1]

        if self.derivative == "jvp" and self.lam == 1 and lam is None:
            # fused attention has no forward-mode derivative, and torch.compile cannot trace into one
            with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
                return torch.func.jvp(data_at, (t,), (one(t),))[1]
        if self.derivative == "central" and self.lam == 1 and lam is None:
            return (data_at(t + self.dt) - data_at(t - self.dt)) / (2 * self.dt)
        r = (t - self.dt).clamp_min(0)
        if lam is not None or self.lam < 1:
            r = self.lam * t if lam is None else torch.minimum(lam * t, r)
        return (x_hat - data_at(r)) / expand(t - r, x_star)
