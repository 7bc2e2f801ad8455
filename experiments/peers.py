"""The same network under other samplers and other few-step methods: what UCGM is compared with in RESULTS.md.

    python experiments/peers.py curves --ckpt runs/shapes32 --out curves.jsonl                  # UCGM-S, Euler, Heun, DPM-Solver++(2M) by NFE
    python experiments/peers.py meanflow --ckpt runs/shapes32 --seconds 60 --out meanflow.jsonl # MeanFlow, tuned from the same model as long

A line of the output is a score as fid.py's: FD-NAME, its floor, accuracy, variety, N, NFE.
"""
import copy
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import fail, read_flags
from data import eight_bit, noise_like_seed, open_dataset
from fid import SmallFeatures, Statistics, compare, stream_pictures
from machine import autocast, pick_device
from model import TimeEmbedder
from objective import TRANSPORTS, predict, resolve
from sample import open_model
from sampler import sample, time_grid


@dataclass
class Options:
    ckpt: str = ""                              # a many-step model
    out: str = "peers.jsonl"                    # lines are added to this file
    data: str = ""                              # real pictures; empty: what the model was trained on
    data_dir: str = "data"                      # where mnist is kept
    num: int = 4000                             # pictures for each score
    seed: int = 0                               # of the pictures and of MeanFlow's training
    nfe: str = "5,10,20,40,80"                  # curves: network calls
    kappas: str = "0,auto,0.2,0.5"              # curves: of UCGM-S
    others: bool = True                         # curves: also Heun and DPM-Solver++(2M)
    seconds: float = 60                         # meanflow: of training, compilation not counted
    lr: float = 1e-3                            # meanflow: learning rate (RAdam, as our few-step recipe)
    batch_size: int = 500                       # pictures at a time


# ---- other samplers -----------------------------------------------------------------------------------------------

@torch.no_grad()
def heun(net, z, y, times):
    """Heun's method on the velocity of the linear path, in t, as flow matching's codes have it: two calls a step, one for the last.

    Not the sampler's order 2, which is EDM's Heun in the noise level alpha / gamma: near t = 1 that level runs away on the linear path.
    """
    x, grid = z.double(), torch.tensor(times, dtype=torch.float64)
    velocity = lambda x, t: net(x.to(z.dtype), t.to(z).expand(len(x)), y).double()
    for t, after in zip(grid[:-1], grid[1:]):
        v = velocity(x, t)
        if after:
            v = (v + velocity(x + (after - t) * v, after)) / 2
        x = x + (after - t) * v
    return x.to(z.dtype)


@torch.no_grad()
def dpm_solver_2m(net, z, y, transport, times):
    """Second-order multistep in log(gamma / alpha) on predictions of the data (arXiv 2211.01095, algorithm 2); times as time_grid's."""
    row = resolve(transport)
    t = torch.tensor(times[:-1], dtype=torch.float64)
    alpha, gamma = row.alpha(t), row.gamma(t)
    lam, x, before = (gamma / alpha).log(), z.double(), None
    for i in range(len(t)):
        x_hat = predict(lambda a, b, c: net(a.to(z.dtype), b.to(z.dtype), c), row, x, t[i].to(x.device).expand(len(x)), y)[1]
        if i == len(t) - 1:
            return x_hat.to(z.dtype)
        h, mean = lam[i + 1] - lam[i], x_hat
        if before is not None:
            mean = x_hat + h / (lam[i] - lam[i - 1]) / 2 * (x_hat - before)
        x, before = alpha[i + 1] / alpha[i] * x - gamma[i + 1] * torch.expm1(-h) * mean, x_hat


# ---- MeanFlow -----------------------------------------------------------------------------------------------------

class MeanFlow(nn.Module):
    """u(x_t, r, t): the mean velocity from t down to r (arXiv 2505.13447), from a velocity network whose time embedding also hears
    t - r; it starts as that network, because the new embedding starts at zero."""

    def __init__(self, net):
        super().__init__()
        self.net, self.num_classes = copy.deepcopy(net).requires_grad_(True), net.num_classes
        self.net.t_embedder = Both(self.net.t_embedder)
        self.data_output, self.net.data_output = self.net.data_output, False           # its division by t stands below: t is two numbers here

    def forward(self, x, r, t, y):
        out = self.net(x, torch.stack([t, t - r], -1), y)
        return (x - out) / t.clamp(min=0.05).view(-1, 1, 1, 1) if self.data_output else out


class Both(nn.Module):
    def __init__(self, first):
        super().__init__()
        width = first.mlp[2].out_features
        self.first, self.second = first, TimeEmbedder(width)
        nn.init.zeros_(self.second.mlp[2].weight)
        nn.init.zeros_(self.second.mlp[2].bias)

    def forward(self, t):
        return self.first(t[:, 0]) + self.second(t[:, 1])


def meanflow_loss(flow, teacher, x, y, t, r, z):
    """The identity u = v - (t - r) du/dt with the frozen teacher's velocity as v (the place that fc-vs-xz gives the teacher with zeta 1),
    the adaptive weight of the paper, p = 1."""
    mix = t.view(-1, 1, 1, 1)
    x_t = mix * z + (1 - mix) * x
    with torch.no_grad():
        v = teacher(x_t, t, y)
        with sdpa_kernel(SDPBackend.MATH):
            _, slope = torch.func.jvp(lambda a, b: flow(a, r, b, y), (x_t, t), (v, torch.ones_like(t)))
        target = v - (t - r).view_as(mix) * slope
    square = (flow(x_t, r, t, y) - target).square().flatten(1).mean(1)
    return square / (square.detach() + 1e-3)


def tune_meanflow(model, options):
    """A MeanFlow tuned for options.seconds from the model, which is also the teacher; its average, and the steps taken."""
    torch.manual_seed(options.seed)
    data = open_dataset(options.data or model.config.data, model.shape[-1], options.seed, root=options.data_dir)
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
        r = torch.where(torch.rand(64) < 0.25, t, r)                   # a quarter plain flow matching
        with autocast(model.device, model.dtype):
            loss = loss_of(flow, model.net, x, y, t, r, torch.randn_like(x)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:                           # the schedule of train.py, by time
            left = (1 - spent / options.seconds) / 0.7
            group["lr"] = options.lr * min(1, (step + 1) / 50) * (1 if left >= 1 else 0.5 - 0.5 * np.cos(np.pi * left))
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.99, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(flow.parameters()), 1 - decay)
        if step >= 2:                                                  # the first steps compile
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


# ---- scores -------------------------------------------------------------------------------------------------------

class Judge:
    """Scores ways to draw pictures, with the same noise, classes and real pictures for all."""

    def __init__(self, model, options):
        self.model, self.options = model, options
        source = options.data or model.config.data
        self.kind = "shapes" if source == "shapes" else "mnist"
        data = open_dataset(source, model.shape[-1] if self.kind == "shapes" else None, 1000, root=options.data_dir)
        self.num = min(options.num, len(data) // 2) if hasattr(data, "__len__") else options.num
        self.features = SmallFeatures(self.kind, data.shape)
        self.real, self.other = Statistics(), Statistics()
        for start, into in ((0, self.real), (self.num, self.other)):
            for first, x, y in stream_pictures(data, start, self.num, options.batch_size):
                into.add(first, self.features(x), y)

    def __call__(self, name, nfe, draw, **more):
        fake, start = Statistics(), time.perf_counter()
        seeds = range(self.options.seed * self.num, (self.options.seed + 1) * self.num)
        for first in range(0, self.num, self.options.batch_size):
            part = seeds[first:first + self.options.batch_size]
            y = torch.tensor(part) % len(self.model.names)
            with torch.no_grad(), autocast(self.model.device, self.model.dtype):
                x = draw(noise_like_seed(part, self.model.shape), y)
            fake.add(first, self.features(eight_bit(x)), y)
        scores = {key: round(value, 4) for key, value in compare(self.kind, [], fake, self.real, self.other).items()}
        line = {"method": name, "NFE": nfe, **scores, "N": self.num, "seed": self.options.seed, "ckpt": self.options.ckpt, "seconds": round(time.perf_counter() - start, 1), **more}
        print(json.dumps(line), flush=True)
        with open(self.options.out, "a") as file:
            print(json.dumps(line), file=file)


def curves(model, options):
    judge, net, gap = Judge(model, options), model.net, model.config.gap
    for nfe in map(int, options.nfe.split(",")):
        for kappa in filter(None, options.kappas.split(",")):
            kappa = kappa if kappa == "auto" else float(kappa)
            judge(f"UCGM-S kappa {kappa}" if kappa else "Euler", nfe, lambda z, y: sample(net, z, y, "linear", steps=nfe, kappa=kappa, gap=gap))
        if not options.others:
            continue
        judge("Heun", nfe - 1 + nfe % 2, lambda z, y: heun(net, z, y, time_grid(nfe, gap=gap, order=2)))
        judge("DPM-Solver++(2M)", nfe, lambda z, y: dpm_solver_2m(net, z, y, "linear", time_grid(nfe, gap=gap)))


def meanflow(model, options):
    assert TRANSPORTS[model.config.transport] is TRANSPORTS["linear"]
    flow, steps = tune_meanflow(model, options)
    judge = Judge(model, options)
    cost = dict(train_seconds=options.seconds, train_steps=steps)
    for nfe in (1, 2, 4):
        judge("MeanFlow", nfe, lambda z, y: sample_meanflow(flow, z, y, torch.linspace(1, 0, nfe + 1)), **cost)
    for t in (0.3, 0.4, 0.7):
        judge(f"MeanFlow, second call at {t}", 2, lambda z, y: sample_meanflow(flow, z, y, torch.tensor([1.0, t, 0.0])), **cost)


if __name__ == "__main__":
    task, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("-h", [])
    try:
        options = Options(**read_flags(Options, rest if task != "-h" else ["-h"], __doc__))
        tasks = {"curves": curves, "meanflow": meanflow}
        if task not in tasks or not options.ckpt:
            raise ValueError("expected curves --ckpt RUN or meanflow --ckpt RUN")
        tasks[task](open_model(options.ckpt, pick_device("cpu")), options)
    except ValueError as error:
        fail(error)
