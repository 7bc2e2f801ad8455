"""Other samplers and another few-step method on the same network: what RESULTS.md compares with.

    python experiments/peers.py curves --ckpt runs/shapes32 --out curves.jsonl      # samplers
    python experiments/peers.py meanflow --ckpt runs/shapes32 --seconds 60          # MeanFlow, tuned from it

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
from sample import open_pipeline
from sampler import sample, time_grid


@dataclass
class Options:
    ckpt: str = setting("", "a many-step model")
    out: str = setting("peers.jsonl", "lines are added to this file")
    data: str = setting("", "real images; empty: what the model was trained on")
    num: int = setting(4000, "images per score")
    seed: int = setting(0, "seed of the images and of MeanFlow's training")
    batch_size: int = setting(500, "images per batch")
    effnet: bool = setting(False, "add FD-EffNet")
    nfe: str = setting("5,10,20,40,80", "network calls", "curves")
    kappas: str = setting("0,auto,0.2,0.5", "of UCGM-S")
    others: bool = setting(True, "also Heun, DPM-Solver++(2M) and UniPC")
    seconds: float = setting(60.0, "of training, compilation not counted", "meanflow")
    lr: float = setting(1e-3, "learning rate (RAdam, as our few-step recipe)")


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


def meanflow_loss(flow, teacher, x, y, t, r, z):
    """The identity u = v - (t - r) du/dt, with the frozen teacher's velocity as v, which is the place that
    fc-vs-xz gives the teacher at zeta 1; and the adaptive weight of the paper, p = 1."""
    x_t = expand(t, x) * z + (1 - expand(t, x)) * x
    with torch.no_grad():
        v = teacher(x_t, t, y)
        with sdpa_kernel(SDPBackend.MATH):
            _, du_dt = torch.func.jvp(lambda a, b: flow(a, r, b, y), (x_t, t), (v, torch.ones_like(t)))
        target = v - expand(t - r, x) * du_dt
    square = (flow(x_t, r, t, y) - target).square().flatten(1).mean(1)
    return square / (square.detach() + 1e-3)


def tune_meanflow(model, options):
    """(averaged MeanFlow, steps) after options.seconds of tuning from the model, which also teaches it."""
    torch.manual_seed(options.seed)
    source = options.data or model.config.data
    data = open_dataset(source, model.shape[-1], options.seed)
    flow = MeanFlow(model.net)
    ema = copy.deepcopy(flow).requires_grad_(False)
    weights = [p for p in flow.parameters() if p.requires_grad]
    optimizer = torch.optim.RAdam(weights, options.lr, (0.9, 0.999))
    loss_of = torch.compile(meanflow_loss)
    spent, step, bar = 0.0, 0, tqdm(total=round(options.seconds), unit="s")
    while spent < options.seconds:
        start = time.perf_counter()
        x, y = data[step * 64 + np.arange(64)]
        t, r = torch.rand(2, 64).sort(0, descending=True)[0]
        r = torch.where(torch.rand(64) < 0.25, t, r)            # a quarter is plain flow matching
        with autocast(model.device, model.dtype):
            loss = loss_of(flow, model.net, x, y, t, r, torch.randn_like(x)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        left = min(1, (1 - spent / options.seconds) / 0.7)      # train.py's learning rate, by time
        rate = options.lr * min(1, (step + 1) / 50) * (0.5 - 0.5 * math.cos(math.pi * left))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.99, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(flow.parameters()), 1 - decay)
        if step >= 2:                                           # the first steps compile
            spent += time.perf_counter() - start
            bar.update(round(time.perf_counter() - start, 3))
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


def meanflow(model, options):
    flow, steps = tune_meanflow(model, options)
    score, cost = Scorer(model, options), dict(train_seconds=options.seconds, train_steps=steps)
    for nfe in (1, 2, 4):
        score("MeanFlow", nfe, partial(sample_meanflow, flow, times=torch.linspace(1, 0, nfe + 1)), **cost)
    for t in (0.3, 0.4, 0.7):
        times = torch.tensor([1.0, t, 0.0])
        score(f"MeanFlow, second call at {t}", 2, partial(sample_meanflow, flow, times=times), **cost)


def main(task, options):
    tasks = {"curves": curves, "meanflow": meanflow}
    if task not in tasks or not options.ckpt:
        raise UserError("expected curves --ckpt RUN or meanflow --ckpt RUN")
    model = open_pipeline(options.ckpt, pick_device("cpu"))
    if model.config.transport != "linear":
        raise UserError(f"the peers are for transport linear; {options.ckpt} has {model.config.transport}")
    tasks[task](model, options)


if __name__ == "__main__":
    task, *flags = sys.argv[1:] or ["-h"]
    if task.startswith("-"):
        task, flags = "", sys.argv[1:] or ["-h"]
    run(lambda: main(task, Options(**read_flags(Options, flags, __doc__))))
