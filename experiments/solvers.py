"""How near to the exact end of the path each sampler comes, by the number of network calls.

    python experiments/solvers.py mixture --out experiments/results/solvers.jsonl
    python experiments/solvers.py runs/shapes --cfg 1,1.5,4,7.5         # a model, with guidance

Rescaled, every transport is the linear one, so one network v(u, tau) serves all samplers, and a path is a
grid of tau. The schedulers of diffusers get exactly these sigmas, and the network exactly these times. Each
runs on several grids, and its best one counts: even in the path's own t with several ends, even in log-SNR,
Karras' with rho 7, and the grid of kappa "auto", which itself has no other. A line is the median over seeds
of the distance to a converged solution, in percent of its norm.
"""
import functools
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import load_model
from config import UserError, read_flags, setting
from data import noise_like_seed
from engine import run
from objective import TRANSPORTS, predict, resolve
from sampler import integral, sample, tau_at, time_grid

DOUBLE = torch.float64


@dataclass
class Options:
    cfg: str = setting("1", "scales of guidance, for a model", "after the problem: mixture, or a model")
    paths: str = setting("linear,ddpm", "transports")
    calls: str = setting("3,4,5,6,8,10,15,20,40", "numbers of network calls")
    dtype: str = setting("float32", "of the model", choices=("float32", "bfloat16", "float16"))
    seeds: int = setting(64, "images", least=1)
    out: str = setting("solvers.jsonl", "lines are added to this file")


# ---- networks: v(u, tau), and where their path ends ----------------------------------------------------

def mixture(seeds):
    """(v, noise, end) of six round Gaussians in 16 dimensions, exactly."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 16, generator=g, dtype=DOUBLE)
    widths = 0.1 + 0.3 * torch.rand(6, generator=g).double()

    def v(u, tau):
        gamma, variance = 1 - tau, tau**2 + (1 - tau) ** 2 * widths**2
        off = u[:, None] - gamma * centres                                              # (B, 6, 16)
        share = torch.softmax(-off.square().sum(-1) / (2 * variance) - 8 * variance.log(), 1)[..., None]
        x_hat = (share * (centres + (gamma * widths**2 / variance)[:, None] * off)).sum(1)
        return (share * (tau / variance)[:, None] * off).sum(1) - x_hat                 # (B, 16)
    return v, torch.randn(seeds, 16, generator=g, dtype=DOUBLE), 1e-3


def trained(path, seeds, scale, dtype):
    """The same of a model; scale: of guidance. A model with x_pred is a velocity only above tau = .05."""
    net, config, names = load_model(path)
    transport, clock = resolve(config.transport), torch.linspace(0, 1, 100_001, dtype=DOUBLE)
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)
    z = noise_like_seed(range(seeds), (net.in_channels, net.input_size, net.input_size)).double()
    y = torch.arange(seeds) % len(names)

    def guided(x, t, y):
        x, t = x.float(), t.float()
        with torch.autocast("cpu", half, enabled=half is not None):
            if scale == 1:
                return net(x, t, y).double()
            both = torch.cat([y, torch.full_like(y, net.num_classes)])
            F_y, F_null = net(torch.cat([x, x]), torch.cat([t, t]), both).double().chunk(2)
        return F_null + scale * (F_y - F_null)

    @torch.no_grad()
    def v(u, tau):
        t = torch.full((len(u),), np.interp(tau, tau_at(transport, clock), clock), dtype=DOUBLE)
        s = (transport.alpha(t) + transport.gamma(t))[0].item()
        _, x_hat, z_hat = predict(guided, transport, s * u, t, y)
        return z_hat - x_hat
    return v, z, 0.05 if config.x_pred else 1e-3


# ---- samplers: from v, u and falling taus to the data ---------------------------------------------------

def ours(v, u, taus, kappa="auto"):
    net = lambda u, t, y: v(u, t[0].item())
    return sample(net, u, torch.zeros(len(u)).long(), "linear", times=taus, kappa=kappa)


def old_auto(v, u, taus):
    """What kappa "auto" was: the extrapolation with memory, of second order."""
    previous = 0
    for i, (now, after) in enumerate(zip(taus, [*taus[1:], 0.0])):
        r = (after - now) / (now - taus[i - 1]) if i else 0
        kappa, v_i = 0 if after == 0 else r / 2 if i == 1 else r * r / (1 + 2 * r), v(u, now)
        u, previous = u + (after - now) * (v_i + kappa * (v_i - previous)), v_i
    return u


def predictor(v, u, taus):
    """kappa "auto" with two v throughout and without its corrector, on the same grid: second order."""
    calls = []
    for now, after in zip(taus, [*taus[1:], 0.0]):
        calls = [*calls[-1:], (now, u, v(u, now))]
        u = u + integral(calls if after else calls[-1:], now, after)
    return u


def heun(v, u, taus):
    for now, after in zip(taus, [*taus[1:], 0.0]):
        v_i = v(u, now)
        if after:
            v_i = (v_i + v(u + (after - now) * v_i, after)) / 2
        u = u + (after - now) * v_i
    return u


def ipndm(v, u, taus):
    """diffusers' IPNDMScheduler, whose step this is, has one grid of its own; here it is free."""
    rows = [1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]
    noises = []
    for now, after in zip(taus, [*taus[1:], 0.0]):
        noises.insert(0, u + (1 - now) * v(u, now))
        z_hat = sum(w * noise for w, noise in zip(rows[min(len(noises), 4) - 1], noises))
        u = after * z_hat + (1 - after) * (u - now * z_hat) / (1 - now)
    return u


def of_diffusers(name, order, v, u, taus):
    scheduler = getattr(diffusers, name)(solver_order=order, use_flow_sigmas=True,
                                         prediction_type="flow_prediction")
    scheduler.set_timesteps(len(taus))
    scheduler.set_begin_index(0)
    scheduler.sigmas = torch.tensor([*taus, 0.0], dtype=DOUBLE)
    for i, tau in enumerate(taus):
        v_i = v(u, tau)
        if tau == taus[-1]:                 # DEIS cannot step to 0; the others do the same
            return u - tau * v_i
        u = scheduler.step(v_i, scheduler.timesteps[i], u).prev_sample.double()


PEERS = {"Euler, DDIM": functools.partial(ours, kappa=0.0), "Heun": heun, "iPNDM": ipndm,
         "old auto": old_auto}
OURS = {"predictor alone": predictor, "auto": ours}             # on the grid of kappa "auto" only
for name, orders in (("DPMSolverMultistep", (2,)), ("UniPCMultistep", (2, 3)), ("DEISMultistep", (2, 3))):
    PEERS |= {f"{name.removesuffix('Multistep')}-{n}": functools.partial(of_diffusers, f"{name}Scheduler", n)
              for n in orders}


def grids(path, n, end):
    """{name: n falling taus} on a path. end: the lowest."""
    row = TRANSPORTS[path]
    of = lambda times: tau_at(row, torch.tensor(times[:-1], dtype=DOUBLE)).tolist()
    out = {f"even t to {gap or 'one step'}": of(time_grid(n, gap=(1e-3, gap)))
           for gap in (1e-3, 0.02, 0.05, 0.0)}
    start = out["even t to one step"][0]
    high = np.log(start / (1 - start))
    for low in (0.01, 0.03, 0.05):
        noise = [np.exp(np.linspace(high, np.log(low / (1 - low)), n)),
                 np.linspace(np.exp(high / 7), (low / (1 - low)) ** (1 / 7), n) ** 7]
        out |= {f"{kind} to {low}": (s / (1 + s)).tolist() for kind, s in zip(("log-SNR", "Karras"), noise)}
    out["kappa auto"] = of(time_grid(n, gap=(1e-3, end), kappa="auto", transport=path))
    return {name: taus for name, taus in out.items() if taus[-1] >= end - 1e-9}


# ---- the table -----------------------------------------------------------------------------------------

def measure(problem, path, v, z, end, converged, columns):
    cache, lines = {}, []

    def distance(method, taus, n):
        start = taus[0]
        if start not in cache:
            even = (end + (start - end) * np.linspace(1, 0, converged) ** 1.5).tolist()
            cache[start] = ours(v, z, even)
        off = (method(v, z, taus) - cache[start]).flatten(1).norm(dim=1)
        return (100 * (off / cache[start].flatten(1).norm(dim=1)).median()).item()
    for n in columns:
        for name, method in (PEERS | OURS).items():
            several = grids(path, (n + 1) // 2 if name == "Heun" else n, end)
            if name in OURS:
                several = {"kappa auto": several["kappa auto"]}
            found = {grid: distance(method, taus, n) for grid, taus in several.items()}
            best = min((value, grid) for grid, value in found.items() if value == value)
            lines.append({"problem": problem, "path": path, "calls": n, "sampler": name,
                          "distance": round(best[0], 4), "grid": best[1]})
    return lines


def table(lines, columns):
    """Rows: samplers; columns: calls; the last row: the nearest other by ours."""
    for problem, path in dict.fromkeys((line["problem"], line["path"]) for line in lines):
        cells = {(line["sampler"], line["calls"]): line["distance"] for line in lines
                 if (line["problem"], line["path"]) == (problem, path)}
        print(f"\n{problem}, {path}\n| sampler | {' | '.join(map(str, columns))} |")
        print(f"|---|{'---|' * len(columns)}")
        for name in PEERS | OURS:
            print(f"| {name} | {' | '.join(f'{cells[name, n]:.3g}' for n in columns)} |")
        gains = [min(cells[name, n] for name in PEERS) / cells["auto", n] for n in columns]
        print(f"| nearest other / auto | {' | '.join(f'{gain:.2f}' for gain in gains)} |", flush=True)


def main(problem, options):
    if not problem:
        raise UserError("which problem? give mixture, or a model such as runs/shapes")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    columns, model = [int(n) for n in options.calls.split(",")], problem
    for scale in map(float, options.cfg.split(",")):
        if model == "mixture":
            problem, converged, (v, z, end) = model, 800, mixture(options.seeds)
        else:
            problem, converged = f"{Path(model).name}, guidance {scale:g}, {options.dtype}", 400
            v, z, end = trained(model, options.seeds, scale, options.dtype)
        for path in options.paths.split(","):
            lines = measure(problem, path, v, z, end, converged, columns)
            with open(options.out, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            table(lines, columns)


if __name__ == "__main__":
    problem, *flags = sys.argv[1:] or [""]
    if problem.startswith("-"):
        problem, flags = "", sys.argv[1:]
    run(lambda: main(problem, Options(**read_flags(Options, flags, __doc__))))
