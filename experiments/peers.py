"""Other samplers and other few-step methods on the same network: what RESULTS.md compares with.

    python experiments/peers.py curves --ckpt runs/shapes32 --out curves.jsonl      # samplers
    python experiments/peers.py meanflow --ckpt runs/shapes32 --seconds 60          # MeanFlow, tuned from it
    python experiments/peers.py alphaflow --ckpt runs/shapes32 --seconds 60         # AlphaFlow, likewise

The samplers are UCGM-S, Euler, Heun, DPM-Solver++(2M) and diffusers' UniPC, each at several numbers of
network calls. A line of the output has a score as fid.py reports it: FD-NAME, its floor, accuracy, N and NFE.
"""
import copy
import json
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import UserError, number_or_word, read_flags, setting
from data import noise_like_seed, open_dataset, to_uint8
from engine import autocast, pick_device, run
from extras.effnet import WithEffNet
from features import SmallFeatures
from fid import classifier_scores, collect, stream_images
from model import TimeEmbed
from objective import expand, predict, resolve
from optim import make_optimizer, set_lr
from sample import open_pipeline
from sampler import sample, time_grid


@dataclass
class Options:
    ckpt: str = setting("", "a many-step model")
    out: str = setting("peers.jsonl", "lines are added to this file")
    data: str = setting("", "real images; empty: what the model was trained on")
    num: int = setting(4000, "images per score")
    seed: int = setting(0, "seed of the images and of the training")
    batch_size: int = setting(500, "images per batch")
    effnet: bool = setting(False, "add FD-EffNet")
    nfe: str = setting("5,10,20,40,80", "network calls", "curves")
    kappas: str = setting("0,auto,0.2,0.5", "of UCGM-S")
    others: bool = setting(True, "also Heun, DPM-Solver++(2M) and UniPC")
    seconds: float = setting(60.0, "of training on one core, without compilation", "meanflow, alphaflow")
    optimizer: str = setting("radam", "as in train.py", choices=("radam", "muon"))
    lr: float = setting(1e-3, "learning rate")
    betas: tuple = setting((0.9, 0.999), "of the optimizer")
    ema: float = setting(0.99, "decay of the average that is scored")
    power: float = setting(1.0, "p of the adaptive weight")
    times: str = setting("uniform", "of t and r; lognormal: MeanFlow's for CIFAR-10, sigmoid(2 n - 2)",
                         choices=("uniform", "lognormal"))


# ---- other samplers -----------------------------------------------------------------------------------

@torch.no_grad()
def heun(net, z, y, times):
    """Heun's method in t on the velocity of the linear path, as in flow matching: two calls a step, one for
    the last.

    It is not the sampler's order 2, which is EDM's Heun in the noise level alpha / gamma: on the linear path
    that level runs away near t = 1.
    """
    x, grid = z.double(), torch.tensor(times, dtype=torch.float64)

    def velocity(x, t):
        return net(x.to(z.dtype), t.to(z).expand(len(x)), y).double()
    for t, after in zip(grid[:-1], grid[1:]):
        v = velocity(x, t)
        if after:
            v = (v + velocity(x + (after - t) * v, after)) / 2
        x = x + (after - t) * v
    return x.to(z.dtype)


@torch.no_grad()
def dpm_solver_2m(net, z, y, transport, times):
    """Second order in log(gamma / alpha), from two predictions of the data (arXiv 2211.01095, algorithm 2);
    times as time_grid's."""
    transport = resolve(transport)
    t = torch.tensor(times[:-1], dtype=torch.float64)
    alpha, gamma = transport.alpha(t), transport.gamma(t)
    log_snr, x, before = (gamma / alpha).log(), z.double(), None
    in_dtype_of_z = lambda x, t, y: net(x.to(z.dtype), t.to(z.dtype), y)
    for i in range(len(t)):
        _, x_hat, _ = predict(in_dtype_of_z, transport, x, t[i].to(x.device).expand(len(x)), y)
        if i == len(t) - 1:
            return x_hat.to(z.dtype)
        h, mean = log_snr[i + 1] - log_snr[i], x_hat
        if before is not None:
            mean = x_hat + h / (log_snr[i] - log_snr[i - 1]) / 2 * (x_hat - before)
        x, before = alpha[i + 1] / alpha[i] * x - gamma[i + 1] * torch.expm1(-h) * mean, x_hat


def unipc(net, z, y, times):
    """UniPC of order 2 on the linear path, as diffusers has it."""
    from solvers import of_diffusers
    v = lambda u, tau: net(u.to(z.dtype), torch.full_like(u[:, 0, 0, 0], tau, dtype=z.dtype), y).double()
    return of_diffusers("UniPCMultistepScheduler", 2, v, z.double(), times[:-1]).to(z.dtype)


# ---- MeanFlow -----------------------------------------------------------------------------------------

class MeanFlow(nn.Module):
    """u(x_t, r, t): the mean velocity from t down to r (arXiv 2505.13447), from a velocity network whose time
    embedding also hears t - r. The new embedding starts at zero, so it starts as that network."""

    def __init__(self, net):
        super().__init__()
        self.net, self.num_classes = copy.deepcopy(net).requires_grad_(True), net.num_classes
        self.net.t_embedder = TwoTimes(self.net.t_embedder)
        self.x_pred, self.net.x_pred = self.net.x_pred, False   # it would divide by t, here two numbers

    def forward(self, x, r, t, y):
        out = self.net(x, torch.stack([t, t - r], -1), y)
        return (x - out) / expand(t.clamp(min=0.05), x) if self.x_pred else out


class TwoTimes(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.first, self.second = first, TimeEmbed(first.mlp[2].out_features)
        nn.init.zeros_(self.second.mlp[2].weight)
        nn.init.zeros_(self.second.mlp[2].bias)

    def forward(self, t):
        return self.first(t[:, 0]) + self.second(t[:, 1])


def meanflow_loss(flow, teacher, x, y, t, r, z, power=1.0, alpha=None):
    """The loss of each sample, (B,), with the adaptive weight of power p. x, z (B, C, H, W), y, t, r (B,).

    The target is v - (t - r) du/dt. With AlphaFlow's alpha (arXiv 2510.20771), a scalar tensor above 0, it
    is alpha v + (1 - alpha) u(x_s, r, s) at s = t - alpha (t - r). For small alpha it lies alpha times as far
    from u as MeanFlow's; the weight is multiplied by alpha, too, so with p = 1 the gradients agree. v is the
    velocity of the frozen teacher: the place that fc-vs-xz gives the teacher at zeta 1.
    """
    x_t = expand(t, x) * z + (1 - expand(t, x)) * x
    with torch.no_grad():
        v = teacher(x_t, t, y)
        if alpha is None:
            with sdpa_kernel(SDPBackend.MATH):
                _, du_dt = torch.func.jvp(lambda a, b: flow(a, r, b, y), (x_t, t), (v, torch.ones_like(t)))
            target = v - expand(t - r, x) * du_dt
        else:
            s = t - alpha * (t - r)
            target = alpha * v + (1 - alpha) * flow(x_t - expand(t - s, x) * v, r, s, y)
            target = torch.where(expand(r == t, x), v, target)
    square = (flow(x_t, r, t, y) - target).square().flatten(1).mean(1)
    weight = 1 if alpha is None else torch.where(r == t, 1, alpha)
    return weight * square / (square.detach() + 1e-3) ** power


def alpha_at(progress):
    """AlphaFlow's alpha at a share 0..1 of the training: a sigmoid from 1 to 0. None, below .005,
    stands for its limit."""
    alpha = 1 / (1 + math.exp(25 * (progress - 0.5)))
    return None if alpha < 0.005 else 1.0 if alpha > 0.995 else alpha


def draw_times(count, kind):
    """t >= r, (count,) each; in a quarter of the rows r = t, which is plain flow matching."""
    both = torch.rand(2, count) if kind == "uniform" else (2 * torch.randn(2, count) - 2).sigmoid()
    t, r = both.sort(0, descending=True)[0]
    return t, torch.where(torch.rand(count) < 0.25, t, r)


def tune_meanflow(model, options, with_alpha=False):
    """(averaged MeanFlow, steps) after options.seconds of tuning from the model, which also teaches it."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    source = options.data or model.config.data
    data = open_dataset(source, model.shape[-1], options.seed)
    flow = MeanFlow(model.net)
    ema = copy.deepcopy(flow).requires_grad_(False)
    weights = [p for p in flow.parameters() if p.requires_grad]
    optimizer = make_optimizer(options, flow.net, model.dtype)
    loss_of = torch.compile(meanflow_loss)
    spent, step, bar, seen = 0.0, 0, tqdm(total=round(options.seconds), unit="s"), set()
    while spent < options.seconds:
        start, progress = time.process_time(), spent / options.seconds
        x, y = data[step * 64 + np.arange(64)]
        t, r = draw_times(64, options.times)
        alpha = alpha_at(progress) if with_alpha else None
        with autocast(model.device, model.dtype):
            loss = loss_of(flow, model.net, x, y, t, r, torch.randn_like(x), options.power,
                           alpha if alpha is None else torch.tensor(alpha)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        left = min(1, (1 - progress) / 0.7)                     # train.py's learning rate, by time
        set_lr(optimizer, options.lr * min(1, (step + 1) / 50) * (0.5 - 0.5 * math.cos(math.pi * left)))
        optimizer.step()
        optimizer.zero_grad()
        decay = min(options.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(flow.parameters()), 1 - decay)
        if (alpha is None) in seen:                             # the first step of each kind compiles
            spent += time.process_time() - start
            bar.update(round(time.process_time() - start, 3))
        seen.add(alpha is None)
        step += 1
    return ema, step


@torch.no_grad()
def sample_meanflow(flow, z, y, times):
    x = z
    for t, r in zip(times[:-1], times[1:]):
        x = x - (t - r) * flow(x, r.expand(len(x)), t.expand(len(x)), y).to(x.dtype)
    return x


# ---- scores -------------------------------------------------------------------------------------------

class Scorer:
    """Scores several ways to draw images, all with the same noise, classes and real images."""

    def __init__(self, model, options):
        self.model, self.options, num = model, options, options.num
        source = options.data or model.config.data
        name = source.partition(":")[0]
        self.name = name if name in ("shapes", "fashion") else "mnist"
        size = model.shape[-1] if self.name == "shapes" else None
        data = open_dataset(source, size, 1000, test=True)
        self.num = min(num, len(data) // 2) if hasattr(data, "__len__") else num
        own = SmallFeatures(self.name, data.shape)
        self.features = WithEffNet(own) if options.effnet else own
        self.real, self.floor = (self.statistics(stream_images(data, start, self.num, options.batch_size))
                                 for start in (0, self.num))

    def statistics(self, batches):
        return collect(batches, self.num, self.features)

    def images(self, draw):
        """(first, uint8 images, y) of draw(z, y) -> x."""
        for first in range(0, self.num, self.options.batch_size):
            start = self.options.seed * self.num + first
            seeds = range(start, start + min(self.options.batch_size, self.num - first))
            y = torch.tensor(seeds) % len(self.model.names)
            with torch.no_grad(), autocast(self.model.device, self.model.dtype):
                x = draw(noise_like_seed(seeds, self.model.shape), y)
            yield first, to_uint8(x), y

    def __call__(self, method, nfe, draw, **more):
        start = time.perf_counter()
        scores = classifier_scores(self.name, self.statistics(self.images(draw)), self.real, self.floor)
        line = {"method": method, "NFE": nfe, **{key: round(value, 4) for key, value in scores.items()},
                "N": self.num, "seed": self.options.seed, "ckpt": self.options.ckpt,
                "seconds": round(time.perf_counter() - start, 1), **more}
        print(json.dumps(line), flush=True)
        with open(self.options.out, "a") as file:
            print(json.dumps(line), file=file)


def curves(model, options):
    score, net, gap = Scorer(model, options), model.net, model.config.gap
    for nfe in map(int, options.nfe.split(",")):
        for kappa in map(number_or_word, filter(None, options.kappas.split(","))):
            name = f"UCGM-S kappa {kappa}" if kappa else "Euler"
            score(name, nfe, partial(sample, net, transport="linear", steps=nfe, kappa=kappa, gap=gap))
        if options.others:
            score("Heun", nfe - 1 + nfe % 2, partial(heun, net, times=time_grid(nfe, gap=gap, order=2)))
            times = time_grid(nfe, gap=gap)
            score("DPM-Solver++(2M)", nfe, partial(dpm_solver_2m, net, transport="linear", times=times))
            own = time_grid(nfe, gap=gap, kappa="auto")
            for name, grid in (("UniPC", times), ("UniPC on the grid of kappa auto", own)):
                score(name, nfe, partial(unipc, net, times=grid))


def meanflow(model, options, with_alpha=False):
    name = "AlphaFlow" if with_alpha else "MeanFlow"
    flow, steps = tune_meanflow(model, options, with_alpha)
    settings = {key: getattr(options, key) for key in ("optimizer", "lr", "ema", "power", "times")}
    score, cost = Scorer(model, options), dict(train_seconds=options.seconds, train_steps=steps, **settings)
    for nfe in (1, 2, 4):
        score(name, nfe, partial(sample_meanflow, flow, times=torch.linspace(1, 0, nfe + 1)), **cost)
    for t in (0.3, 0.4, 0.7):
        times = torch.tensor([1.0, t, 0.0])
        score(f"{name}, second call at {t}", 2, partial(sample_meanflow, flow, times=times), **cost)


def main(task, options):
    tasks = {"curves": curves, "meanflow": meanflow, "alphaflow": partial(meanflow, with_alpha=True)}
    if task not in tasks or not options.ckpt:
        raise UserError("expected curves, meanflow or alphaflow, then --ckpt RUN")
    model = open_pipeline(options.ckpt, pick_device("cpu"))
    if model.config.transport != "linear":
        raise UserError(f"the peers are for transport linear; {options.ckpt} has {model.config.transport}")
    tasks[task](model, options)


if __name__ == "__main__":
    task, *flags = sys.argv[1:] or ["-h"]
    if task.startswith("-"):
        task, flags = "", sys.argv[1:] or ["-h"]
    run(lambda: main(task, Options(**read_flags(Options, flags, __doc__))))
