"""UCGM-S on somebody else's model, without training: in sampler.sample, and as a scheduler of diffusers.

    python experiments/accelerate.py                        # DiT-XL/2 of diffusers, both ways: a page
    python experiments/accelerate.py --ckpt runs/shapes     # a table: the schedulers of diffusers and ours

sampler.sample asks any callable net(x, t, y) -> like x for what its transport says:

| the model predicts | transport          | called with                                                 |
|--------------------|--------------------|-------------------------------------------------------------|
| epsilon (DDPM)     | ddpm               | t = 0..999, as DDPM counts                                  |
| velocity z - x     | linear             | t in [0, 1], noise at 1 (data at 1: relinear)               |
| x0                 | x-prediction       | t in [0, 1]                                                 |
| D(x; sigma) of EDM | edm                | CONTRIBUTING.md has the wrapper                             |
| anything else      | your own Transport | its net_time: see the table of transports in objective.py   |

The table asks one network, ours on the linear path, on two paths, as its velocity and as DDPM's epsilon, and
says how far each sampler's images are from those of 200 steps of Heun's method from the same point.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import load_model
from config import UserError, read_flags, setting
from data import image_grid, noise_like_seed
from engine import pick_device, run
from experiments.peers import heun
from objective import TRANSPORTS
from sampler import sample


@dataclass
class Options:
    model: str = setting("facebook/DiT-XL-2-256", "a DiT pipeline of diffusers: on the hub or a folder")
    steps: int = setting(20, "steps of the sampler, for the page")
    cfg_scale: float = setting(4.0, "classifier-free guidance, for the page")
    out: str = setting("accelerated.png", "page to write")
    ckpt: str = setting("", "a model of train.py on transport linear: the table in place of the page")
    num: int = setting(64, "images of the table", least=1)
    columns: tuple = setting((5.0, 10.0, 20.0, 40.0), "steps of the table")
    device: str = setting("auto", "cuda, mps or cpu")


def dit(transformer):
    """diffusers' DiTTransformer2DModel as net(x, t, y) for transport ddpm: epsilon, without the variances."""
    channels = transformer.config.in_channels
    net = lambda x, t, y: transformer(x, timestep=t, class_labels=y).sample[:, :channels]
    net.num_classes = 1000
    return net


def draw_page(options):
    """Rows: sampler.sample at kappa 0, 0.3 and auto from one noise, then the pipeline with UCGMScheduler."""
    from diffusers import DiTPipeline

    from extras.scheduler import UCGMScheduler
    device, labels = pick_device(options.device), [207, 360, 387, 974]
    pipe = DiTPipeline.from_pretrained(options.model).to(device)
    net, side = dit(pipe.transformer), pipe.transformer.config.sample_size
    z, y = noise_like_seed(range(4), (4, side, side)).to(device), torch.tensor(labels, device=device)
    rows = []
    for kappa in (0.0, 0.3, "auto"):
        x = sample(net, z, y, "ddpm", options.steps, kappa, cfg_scale=options.cfg_scale)
        with torch.no_grad():
            rows.append(pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample.cpu())
    pipe.scheduler = UCGMScheduler.from_config(pipe.scheduler.config, kappa="auto")
    images = pipe(labels, options.cfg_scale, num_inference_steps=options.steps, output_type="np").images
    rows.append(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1)
    image_grid(torch.cat(rows), columns=4, side=rows[0].shape[-1]).save(options.out)
    print(f"{options.out}: kappa 0, 0.3 and auto from above, then a pipeline with UCGMScheduler, auto")


# ---- the table ----------------------------------------------------------------------------------------

def as_epsilon(net):
    """A network of DDPM's epsilon from one of the velocity: the paths differ in clock and scale of x."""
    def epsilon(x, k, y):
        alpha, gamma, _, _ = TRANSPORTS["ddpm"].at((k + 1) / 1000, x)
        x, t = x / (alpha + gamma), alpha / (alpha + gamma)             # x_t of the linear path, and its t
        return x + (1 - t) * net(x, t.flatten(), y)
    return epsilon


def samplers():
    """(row of the table, scheduler, transport) of each. All start at the noisiest time that they know."""
    import diffusers

    from extras.scheduler import UCGMScheduler
    ddpm = dict(timestep_spacing="trailing")
    flow = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
    for path, how, plain in (("ddpm", ddpm, diffusers.DDIMScheduler(clip_sample=False, **ddpm)),
                             ("linear", flow, diffusers.FlowMatchEulerDiscreteScheduler())):
        yield "DDIM" if path == "ddpm" else "FlowMatchEuler", plain, path
        yield "DPM-Solver++(2M)", diffusers.DPMSolverMultistepScheduler(**how), path
        yield "UniPC", diffusers.UniPCMultistepScheduler(**how), path
        for kappa in ("auto", 0.3):
            ours = UCGMScheduler.from_config(plain.config, kappa=kappa, gap=(0.0, 0.001))
            yield f"UCGMScheduler, kappa {kappa}", ours, path


def exact_images(net, z, y, alpha, gamma):
    """The end of the path through alpha z + gamma x = z, by 200 steps of Heun's method on the linear one."""
    times = torch.linspace(alpha / (alpha + gamma), 0, 201).tolist()
    return heun(net, z / (alpha + gamma), y, [*times[:-1], 1e-3, 0.0])


@torch.no_grad()
def print_table(options):
    """Distances in percent: the root mean square over images and pixels, over that of the exact images."""
    device = pick_device(options.device)
    net, config, names = load_model(options.ckpt, device)
    if config.transport != "linear":
        raise UserError(f"{options.ckpt} is on transport {config.transport}: give a model on linear")
    y = torch.arange(options.num, device=device) % max(1, len(names))
    z = noise_like_seed(range(options.num), (net.in_channels, net.input_size, net.input_size)).to(device)
    exact, columns = {}, [int(n) for n in options.columns]
    print(f"| path | sampler | {' | '.join(map(str, columns))} |\n|---|---|{'---|' * len(columns)}")
    for name, scheduler, path in samplers():
        cells, model = [], as_epsilon(net) if path == "ddpm" else net
        for n in columns:
            scheduler.set_timesteps(n)
            told = scheduler.timesteps.double() / (1 if path == "ddpm" else 1000)
            x, start = z, (told[0] + 1) / 1000 if path == "ddpm" else told[0]
            for k, t in zip(scheduler.timesteps, told.float().to(device)):
                x = scheduler.step(model(x, t.expand(len(z)), y), k, x).prev_sample
            ends = TRANSPORTS[path].alpha(start).item(), TRANSPORTS[path].gamma(start).item()
            exact[ends] = images = exact[ends] if ends in exact else exact_images(net, z, y, *ends)
            off = (x - images).square().mean().sqrt() / images.square().mean().sqrt()
            cells.append(f"{100 * off.item():.3g} %")
        print(f"| {path} | {name} | {' | '.join(cells)} |", flush=True)


def main(options):
    if options.ckpt:
        return print_table(options)
    draw_page(options)


if __name__ == "__main__":
    run(lambda: main(Options(**read_flags(Options, sys.argv[1:], __doc__))))
