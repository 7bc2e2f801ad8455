"""Every setting of a run, its command line, and the recipes.

A field of `Config` is a flag of train.py: `--lr 1e-3` or `--lr=1e-3`; its trailing comment is its help. A recipe is a row of
overrides: `--recipe mnist`; flags that are given win over the recipe. The recipe in force travels with the weights.
"""
import argparse
import dataclasses
import difflib
import inspect
import re
import sys
from dataclasses import dataclass

from objective import Objective


@dataclass
class Config:
    # -- the run
    recipe: str = "shapes"              # a row of config.RECIPES, listed below
    out: str = ""                       # folder of the run; empty: runs/RECIPE
    init_from: str = ""                 # start from, and be taught by, this model: a run, a model file, a published checkpoint, hf://USER/REPO[/FILE]
    seed: int = 0                       # decides everything random
    fresh: bool = False                 # yes: start over; what the folder held is renamed, not lost
    allow_change: bool = False          # yes: resume although settings that change the result are other ones
    device: str = "auto"                # cuda, mps or cpu; auto: the first of these that is there
    dtype: str = "auto"                 # of the matrix products: bfloat16 or float32; auto: bfloat16 where it is faster
    compile: str = "auto"               # torch.compile, yes or no; auto: yes on a GPU, and on a CPU with a C++ compiler
    shard: bool = False                 # FSDP2 over the processes, for networks that do not fit one GPU
    grad_checkpoint: bool = False       # recompute activations in the backward pass: less memory, a third more time
    # -- data
    data: str = "shapes"                # shapes, mnist, cifar10, folder:PATH, npz:PATH or latents:DIR
    data_dir: str = "data"              # where mnist and cifar10 are kept, and downloaded to
    image_size: int = 0                 # side in pixels, for shapes and folders; 0: 32, or the data's own
    labels: str = "all"                 # all; none: no classes; or one class, by name or number
    workers: int = -1                   # processes that read data; -1: 4 beside a GPU, else 0
    vae: str = ""                       # latents: the autoencoder, a name of latents.AUTOENCODERS or NAME=PATH; empty: what the folder says
    latent_mean: tuple = ()             # the network sees (latent - mean) / std, per channel; empty: the folder's statistics
    latent_std: tuple = ()              # the same
    # -- network
    model: str = "TiT-XXS/4"            # family-size/patch: DiT SiT LightningDiT TiT, XXS XS S B L XL, 1 2 4 8; DDT, B L XL, 2
    data_output: bool = False           # the layers estimate data and F follows (see model.py); for transport linear
    # -- loss (objective.py)
    transport: str = "linear"           # linear relinear trigflow triglinear edm random x-prediction epsilon-prediction ddpm
    consistency_ratio: float = 0.0      # lambda: 0 many-step, 1 few-step
    enhancement_ratio: float = 0.0      # zeta: how much guidance is trained in
    enhancement_style: str = "none"     # ft-vs-fe (from nothing), fc-vs-fe or fc-vs-xz (from --init_from)
    enhance_range: tuple = (0.0, 0.75)  # times at which enhancement works in full
    huber: float = 0.0                  # c of the pseudo-Huber loss; 0: root mean square
    cosine: bool = False                # add the cosine loss
    weight: str = "cosine"              # time weight: cosine or none
    beta: tuple = (1.0, 1.0, 1.0)       # t ~ Beta(theta1, theta2) * theta3
    label_drop: float = 0.1             # probability of the null class
    derivative: str = "fd"              # at lambda = 1: fd (central difference), backward (cheaper, steadier) or jvp (exact)
    eps: float = 0.005                  # e of the differences
    # -- optimisation
    steps: int = 2000                   # of training
    batch_size: int = 64                # global: over all processes and accumulation steps; a multiple of 16
    micro_batch: int = 0                # most pictures in one pass of one process; 0: its whole share at once
    optimizer: str = "adamw"            # adamw, radam, or muon (adamw but for the matrices of attention and MLP)
    lr: float = 2e-3                    # learning rate after warm-up
    betas: tuple = (0.9, 0.99)          # of the optimiser
    weight_decay: float = 0.0           # of the optimiser
    clip: float = 1.0                   # largest gradient norm; 0: no limit
    warmup: int = 200                   # steps over which lr rises from 0
    decay: float = 0.7                  # last part of the run over which lr falls to 0 (half a cosine); 0: constant
    ema: tuple = (0.999,)               # decays of averaged weights; the first is saved as the model, others beside it
    teacher_ema: float = 0.999          # the same for the teacher of ft-vs-fe
    # -- sampler (sampler.py), for the pictures of the run and as sample.py's defaults
    sample_steps: int = 20              # steps
    extrapolation: float | str = "auto" # kappa: a number, or auto (second order)
    stochasticity: float | str = 0.0    # rho: 0..1, or sde
    order: int = 1                      # 1, or 2 (Heun)
    schedule: tuple = (1.0, 1.0, 1.0)   # warp of the time grid
    gap: tuple = (0.001, 0.001)         # distance of the grid from t = 1 and t = 0
    cfg_scale: float = 1.0              # classifier-free guidance; 1: off
    cfg_interval: tuple = (0.0, 1.0)    # where it is on, in the network's own time
    # -- reports and checkpoints
    log_every: int = 50                 # steps between two lines of log.jsonl
    sample_every: int = 1000            # steps between two grids of pictures
    held_out_every: int = 1000          # steps between two losses on held-out pictures
    held_out: int = 256                 # how many those are (of a finite set at most a twentieth)
    save_every: int = 1000              # steps between two checkpoints
    keep: int = 2                       # newest checkpoints that are kept
    keep_every: int = 0                 # also keep those at multiples of this many steps; 0: none
    grace: int = 120                    # seconds from SIGTERM or SIGINT to giving up on a clean end
    max_skipped: int = 100              # steps in a row with a loss or gradient that is not finite, after which the run ends
    tensorboard: bool = False           # also write for TensorBoard (pip install tensorboard)
    wandb: str = ""                     # also log to this Weights & Biases project (pip install wandb)
    push: str = ""                      # when done, put the model on the hub as USER/REPO (hf auth login first)

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "sample_every", "held_out_every", "save_every", "sample_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if min(self.seed, self.held_out) < 0:
            raise ValueError(f"seed {self.seed} and held_out {self.held_out} must be at least 0")
        for name, value in (*(("ema", value) for value in self.ema), ("teacher_ema", self.teacher_ema), ("decay", self.decay)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it must lie in 0..1")
        if self.data_output and self.transport != "linear":
            raise ValueError(f"data_output is for transport linear, found {self.transport}; for other paths add --data_output no")
        if self.optimizer == "muon" and self.shard:
            raise ValueError("muon works on whole matrices: leave out --shard yes, or take --optimizer adamw")
        if self.model.startswith("DDT") and (self.data_output or self.grad_checkpoint):
            raise ValueError("DDT has neither data_output nor grad_checkpoint: leave them out")
        for name, allowed in (("compile", ("auto", "yes", "no")), ("optimizer", ("adamw", "radam", "muon")), ("dtype", ("auto", "bfloat16", "float32"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use {', '.join(allowed[:-1])} or {allowed[-1]}")
        for f in dataclasses.fields(self):
            if f.type is tuple and f.default and f.name != "ema" and len(getattr(self, f.name)) != len(f.default):
                raise ValueError(f"{f.name} is {','.join(map(str, getattr(self, f.name)))}; it wants {len(f.default)} numbers, such as {','.join(map(str, f.default))}")

    def objective(self):
        """The loss that these settings mean: the long words of the command line, mapped to the letters of the method."""
        return Objective(self.transport, lam=self.consistency_ratio, zeta=self.enhancement_ratio, style=self.enhancement_style,
                         huber=self.huber, cosine=self.cosine, weight=self.weight, beta=self.beta, enhance_range=self.enhance_range,
                         label_drop=self.label_drop, derivative=self.derivative, eps=self.eps)

    def sampler(self, **given):
        """Keyword arguments for sampler.sample; those given (long words, None: not given) win over the recipe's."""
        word = dataclasses.replace(self, **{"sample_steps" if k == "steps" else k: v for k, v in given.items() if v is not None})
        return dict(transport=word.transport, steps=word.sample_steps, kappa=word.extrapolation, rho=word.stochasticity, order=word.order,
                    schedule=word.schedule, gap=word.gap, cfg_scale=word.cfg_scale, cfg_interval=word.cfg_interval)


# What may differ between a run and its continuation: where and how fast it runs, and what it tells. The rest decides the result.
FREE = set("""out steps device compile workers micro_batch shard grad_checkpoint data_dir fresh allow_change grace max_skipped log_every
           sample_every held_out_every save_every keep keep_every tensorboard wandb push""".split())


def differences(before, after):
    """The settings that decide the result and differ, as "name: was -> is"."""
    return [f"{f.name}: {getattr(before, f.name)} -> {getattr(after, f.name)}" for f in dataclasses.fields(Config)
            if f.name not in FREE and getattr(before, f.name) != getattr(after, f.name)]


@dataclass
class SamplerFlags:
    """The sampler's settings as flags of sample.py and fid.py; what is not given is the recipe's."""
    steps: int | None = None                    # sampler steps; this and what follows: the recipe's setting if not given
    extrapolation: float | str | None = None    # kappa: a number, or auto (second order)
    stochasticity: float | str | None = None    # rho: 0..1, or sde
    order: int | None = None                    # 1, or 2 (Heun)
    schedule: tuple | None = None               # warp of the time grid
    gap: tuple | None = None                    # distance of the grid from t = 1 and t = 0
    cfg_scale: float | None = None              # classifier-free guidance; 1: off
    cfg_interval: tuple | None = None           # where it is on, in the network's own time

    def given(self):
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(SamplerFlags)}


# ---- recipes ------------------------------------------------------------------------------------------------------
# The few-step rows start from the run of the many-step row above them. The comments: score @ network calls (RESULTS.md).

ESTIMATE = dict(data_output=True, gap=(0.001, 0.05))          # such a network divides by max(t, .05): calls below would leave a grain
SHAPES = dict(data="shapes", model="TiT-XXS/8", **ESTIMATE)
SHAPES32 = dict(data="shapes", model="TiT-XS/8", **ESTIMATE)
SHAPES64 = dict(SHAPES, image_size=64)
MNIST = dict(data="mnist", model="TiT-XXS/4", **ESTIMATE)
CIFAR = dict(data="cifar10", model="TiT-S/2", batch_size=128)
FOLDER = dict(data="folder:pictures", model="TiT-XS/4", **ESTIMATE)
MANY = dict(enhancement_ratio=0.5, enhancement_style="ft-vs-fe", beta=(2.0, 1.0, 1.0), weight="none", lr=8e-3)
FEW = dict(consistency_ratio=1.0, enhancement_ratio=1.0, enhancement_style="fc-vs-xz", enhance_range=(0.0, 1.0), huber=1.0, weight="none", beta=(0.8, 1.0, 1.0),
           derivative="backward", eps=0.05, optimizer="radam", betas=(0.9, 0.999), lr=2e-3, warmup=20, ema=(0.99,), sample_steps=2, extrapolation=0.0,
           stochasticity=0.0, gap=(0.001, 0.7))
FEW32 = {**FEW, **dict(derivative="fd", eps=0.02, lr=1e-3, gap=(0.001, 0.6))}                 # as its three seeds were measured
FEW_MUON = {**FEW, **dict(optimizer="muon", lr=6e-3, warmup=100)}
RECIPES = {
    "shapes":       {**SHAPES, **MANY, "steps": 5000},                                                          # FD-shapes 6.51 @20, N 4,000
    "shapes-few":   {**SHAPES, **FEW, "steps": 600, "init_from": "runs/shapes", "stochasticity": 1.0, "gap": (0.001, 0.5)},    # 9.87 @2; with rho 0 12.1
    "shapes32":     {**SHAPES32, **MANY, "enhancement_ratio": 0.3, "optimizer": "muon", "lr": 5e-3, "steps": 15000},   # FD-shapes 1.59 @40, N 10,000; with --steps 30000 1.15
    "shapes32-few": {**SHAPES32, **FEW32, "steps": 440, "init_from": "runs/shapes32"},                          # 1.67 @2
    "shapes32-one": {**SHAPES32, **FEW32, "steps": 1500, "optimizer": "muon", "ema": (0.995,), "init_from": "runs/shapes32", "sample_steps": 1},      # 2.8 @1
    "shapes32-mid": {**SHAPES32, **FEW32, "steps": 528, "consistency_ratio": 0.9, "init_from": "runs/shapes32", "sample_steps": 4, "gap": (0.001, 0.1)},  # 2.31 @4, seed 0
    "shapes64":     {**SHAPES64, **MANY, "enhancement_ratio": 0.3, "optimizer": "muon", "steps": 20_000},          # FD-shapes 3.03 @40, N 10,000, one seed
    "shapes64-few": {**SHAPES64, **FEW_MUON, "steps": 800, "init_from": "runs/shapes64"},                      # not near it yet: 15.9 @2
    "mnist":        {**MNIST, **MANY, "enhancement_ratio": 0.4, "optimizer": "muon", "steps": 9000},            # FD-mnist 3.56 @40, N 5,000; --steps 18000: 3.55
    "mnist-few":    {**MNIST, **FEW_MUON, "steps": 360, "init_from": "runs/mnist", "gap": (0.001, 0.85)},   # 3.63 @2, tuned again 3.97
    "folder":       {**FOLDER, **MANY, "optimizer": "muon", "lr": 5e-3, "steps": 5000},
    "folder-few":   {**FOLDER, **FEW, "steps": 600, "init_from": "runs/folder"},
    "cifar10":      {**CIFAR, **MANY, "lr": 1e-3, "steps": 200_000, "ema": (0.9999,)},                          # not run
    "cifar10-few":  {**CIFAR, **FEW, "lr": 1e-4, "steps": 10_000, "init_from": "runs/cifar10"},
}

# The published recipes (arXiv 2505.07447), ImageNet, XL networks of 675 M parameters; FID of 50,000 pictures @ NFE, as published.
# Not run here: they want GPU-days, ImageNet and downloads. Data: --data latents:DIR; weights: --init_from and --ckpt.
LATENTS = dict(workers=4, vae="vavae", image_size=256, ema=(0.9999,), decay=0.0, warmup=0, batch_size=1024, clip=0.1)
IN_MANY = {**LATENTS, **dict(enhancement_style="ft-vs-fe", cosine=True, optimizer="adamw", lr=2e-4, betas=(0.9, 0.95), clip=1.0, schedule=(1.17, 0.8, 1.1))}
IN_FEW = {**LATENTS, **dict(consistency_ratio=1.0, enhancement_style="fc-vs-xz", huber=5.0, beta=(0.8, 1.0, 1.0), optimizer="radam", lr=1e-4,
                            betas=(0.9, 0.999), steps=50_000, sample_steps=2, extrapolation=0.0, stochasticity=1.0)}
IN_TUNE = {**IN_FEW, **dict(enhancement_style="fc-vs-fe", ema=(0.99,))}
ANY = {**LATENTS, **dict(schedule=(1.17, 0.8, 1.1))}


def row(base, model, vae, size, **more):
    return {**base, "model": model, "vae": vae, "image_size": size, **more}


RECIPES |= {
    # train, many-step
    "in256-vavae": row(IN_MANY, "TiT-XL/1", "vavae", 256, enhancement_ratio=0.47, steps=500_000, sample_steps=30, extrapolation=0.5, schedule=(1.0, 1.0, 1.0)),  # 1.21 @30
    "in256-e2e":   row(IN_MANY, "TiT-XL/1", "e2e-vavae", 256, enhancement_ratio=0.67, steps=300_000, sample_steps=40, extrapolation=0.5),
    "in256-sd":    row(IN_MANY, "TiT-XL/2", "sd-ema", 256, enhancement_ratio=0.44, beta=(2.4, 2.4, 1.0), steps=500_000, sample_steps=60, extrapolation=0.21),
    "in512-dcae":  row(IN_MANY, "TiT-XL/1", "dc-ae", 512, enhancement_ratio=0.57, steps=1_000_000, sample_steps=40, extrapolation=0.46),        # 1.48 @40
    "in512-sd":    row(IN_MANY, "TiT-XL/4", "sd-ema", 512, enhancement_ratio=0.60, beta=(2.4, 2.4, 1.0), steps=400_000, sample_steps=40, extrapolation=0.4),
    # train, few-step, from the many-step average of the same name
    "in256-vavae-few": row(IN_FEW, "TiT-XL/1", "vavae", 256, init_from="runs/in256-vavae", enhancement_ratio=2.0, steps=40_000, gap=(0.001, 0.3)),   # 1.42 @2
    "in256-e2e-few":   row(IN_FEW, "TiT-XL/1", "e2e-vavae", 256, init_from="runs/in256-e2e", enhancement_ratio=1.3, huber=9.0, gap=(0.001, 0.5)),
    "in256-sd-few":    row(IN_FEW, "TiT-XL/2", "sd-ema", 256, init_from="runs/in256-sd", enhancement_ratio=2.0, gap=(0.001, 0.3)),
    "in512-dcae-few":  row(IN_FEW, "TiT-XL/1", "dc-ae", 512, init_from="runs/in512-dcae", enhancement_ratio=1.5, gap=(0.0, 0.6)),                    # 1.75 @2
    "in512-sd-few":    row(IN_FEW, "TiT-XL/4", "sd-ema", 512, init_from="runs/in512-sd", enhancement_ratio=1.5, gap=(0.001, 0.5)),
    # tune somebody else's model to two steps: give --init_from
    "tune-repae":        row(IN_TUNE, "SiT-XL/1", "e2e-vavae", 256, enhancement_ratio=2.5, steps=500, gap=(0.001, 0.75)),                            # 1.39 @2
    "tune-repa":         row(IN_TUNE, "SiT-XL/2", "sd-ema", 256, enhancement_ratio=1.7, steps=800, gap=(0.001, 0.6)),                                # 1.95 @2
    "tune-lightningdit": row(IN_TUNE, "LightningDiT-XL/1", "vavae", 256, transport="relinear", enhancement_ratio=3.0, steps=800, gap=(0.001, 0.6)),  # 2.06 @2
    "tune-ddt":          row(IN_TUNE, "DDT-XL/2", "sd-ema", 256, transport="relinear", batch_size=512, enhancement_ratio=1.9, steps=800, gap=(0.001, 0.5)),  # 1.90 @2
    # sample somebody else's model faster: give --ckpt
    "repae":        row(ANY, "SiT-XL/1", "e2e-vavae", 256, cfg_scale=2.5, cfg_interval=(0.0, 0.76), sample_steps=40, extrapolation=0.54,
                        schedule=(1.2, 0.72, 1.2), gap=(0.001, 0.002)),                                                                              # 1.06 @80
    "lightningdit": row(ANY, "LightningDiT-XL/1", "vavae", 256, transport="relinear", cfg_scale=6.7, cfg_interval=(0.125, 1.0), sample_steps=50,
                        extrapolation=0.5),                                                                                                          # 1.21 @100
    "ddt":          row(ANY, "DDT-XL/2", "sd-ema", 256, transport="relinear", cfg_scale=2.0, cfg_interval=(0.3, 1.0), sample_steps=50, extrapolation=0.28),   # 1.27 @100
    "ddt512":       row(ANY, "DDT-XL/2", "sd-ema", 512, transport="relinear", cfg_scale=3.0, cfg_interval=(0.3, 1.0), sample_steps=150, extrapolation=0.28),  # 1.24 @300
    "sit":          row(ANY, "SiT-XL/2", "sd-ema", 256, transport="relinear", cfg_scale=1.5, sample_steps=50),            # no published UCGM-S setting
    "dit":          row(ANY, "DiT-XL/2", "sd-ema", 256, transport="ddpm", cfg_scale=1.5, sample_steps=50, schedule=(1.0, 1.0, 1.0), gap=(0.001, 0.001)),   # as sit
}

# Where the hub has weights for a recipe: (repository, patterns of file names); None: they are trained, not fetched.
UCGM = "sp12138sp/UCGM"
PUBLISHED = {**{name: (UCGM, ("outputs/*/*/checkpoints/*.pt",)) for name in RECIPES if name.startswith("in")},
             "repae": ("REPA-E/sit-ldm-e2e-vavae", ("*.pt", "*.safetensors")), "tune-repae": ("REPA-E/sit-ldm-e2e-vavae", ("*.pt", "*.safetensors")),
             "lightningdit": ("hustvl/lightningdit-xl-imagenet256-800ep", ("*.pt",)), "tune-lightningdit": ("hustvl/lightningdit-xl-imagenet256-800ep", ("*.pt",)),
             "sit": ("nyu-visionx/SiT-collections", ("*XL*256*.pt",)), "tune-repa": None, "dit": None, "ddt": ("MCG-NJU/DDT-XL-22en6de-R256", ("*.ckpt", "*.pt")),
             "ddt512": ("MCG-NJU/DDT-XL-22en6de-R512", ("*.ckpt", "*.pt")), "tune-ddt": ("MCG-NJU/DDT-XL-22en6de-R256", ("*.ckpt", "*.pt"))}


# ---- command line -------------------------------------------------------------------------------------------------

def fail(message):
    """End with one line and status 2: bad input is not a bug, and needs no traceback."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def number_or_word(text):
    try:
        return float(text)
    except ValueError:
        return text


def numbers(text):
    return tuple(float(part) for part in text.split(","))


def yes_or_no(text):
    if text.lower() not in ("yes", "no", "true", "false", "1", "0"):
        raise ValueError(text)
    return text.lower() in ("yes", "true", "1")


METAVARS = {"str": "TEXT", "int": "N", "bool": "yes|no", "tuple": "X,X"}
READERS = {"str": str, "int": int, "float": float, "bool": yes_or_no, "tuple": numbers, "float | str": number_or_word}


def read_flags(kind, argv, doc, epilog=""):
    """The flags of argv as a dict, for a dataclass `kind` whose fields are the flags; only those that were given.

    -h prints doc and every field with its trailing comment. A wrong flag or value ends with one line that names the nearest.
    """
    parser = argparse.ArgumentParser(description=doc, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     usage="%(prog)s [-h] [--FLAG VALUE ...]")
    parser.error = lambda message: fail(f"{message}; {parser.prog} -h lists the flags")
    fields, group = {f.name: f for f in dataclasses.fields(kind)}, parser
    for line in "".join(inspect.getsource(k) for k in kind.__mro__[:-1]).splitlines():
        if title := re.match(r"    # -- (.*)", line):
            group = parser.add_argument_group(title[1])
        if not (found := re.match(r"    (\w+): [^#]*# (.*)", line)):
            continue
        field, note = fields[found[1]], found[2].replace("%", "%%")
        base = re.sub(r" \| None$", "", field.type.__name__ if isinstance(field.type, type) else str(field.type))
        default = ",".join(f"{v:g}" for v in field.default) if isinstance(field.default, tuple) else field.default
        group.add_argument(f"--{field.name}", type=READERS[base], default=argparse.SUPPRESS, metavar=METAVARS.get(base, "X"),
                           help=note + ("" if default is None or default is False or default == "" else f" [{default}]"))
    given, rest = parser.parse_known_args(argv)
    if rest:
        flag = rest[0].split("=")[0]
        near = difflib.get_close_matches(flag.lstrip("-"), [f.name for f in dataclasses.fields(kind)], cutoff=0)
        fail(f"unknown flag {flag}; nearest: {', '.join('--' + name for name in near)}")
    return vars(given)


def recipe_row(name):
    if name not in RECIPES:
        fail(f"unknown recipe {name!r}; nearest: {', '.join(difflib.get_close_matches(name, RECIPES, cutoff=0))}")
    return RECIPES[name]


def read_config(argv, doc):
    """Config from the command line: defaults, then the recipe, then the flags that were given."""
    given = read_flags(Config, argv, doc, "in brackets: the value where neither the recipe nor a flag gives another\n\nrecipes:\n  " + "\n  ".join(RECIPES))
    name = given.get("recipe", Config.recipe)
    return Config(**{**recipe_row(name), **given, "recipe": name, "out": given.get("out") or f"runs/{name}"})
