"""Every setting of a run, the command line, and the recipes.

A field of `Config` is a flag of train.py: `--lr 1e-3`, `--fresh` or `--no-fresh`. A recipe is a row of
overrides; flags that are given win over it. A run's Config travels with its weights.

The scripts read their flags before they load torch, which takes seconds: -h and mistakes answer at once.
"""
import argparse
import difflib
import math
import os
import re
import sys
from dataclasses import dataclass, field, fields

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # for sums in a fixed order (engine.fix_order)


def setting(default, text, group=None, least=-math.inf, most=math.inf):
    """A field with its line of help and its range. group: the title of the flags that start here."""
    return field(default=default, metadata={"help": text, "group": group, "range": (least, most)})


def check_numbers(settings):
    """ValueError for a number that is not finite or out of its range, or too many or few of them."""
    for f in fields(settings):
        value, usual = getattr(settings, f.name), getattr(Config, f.name, None)
        least, most = f.metadata.get("range", (-math.inf, math.inf))
        values = value if isinstance(value, tuple) else (value,)
        numbers = [v for v in values if isinstance(v, (int, float))]
        if not all(least <= v <= most and abs(v) < math.inf for v in numbers):
            raise ValueError(f"{f.name} is {text_of(value)}; it must be finite, from {least} to {most}")
        if isinstance(usual, tuple) and len(usual) > 1 and len(values) != len(usual) and value is not None:
            raise ValueError(f"{f.name} is {text_of(value)}; it wants {len(usual)} numbers: {text_of(usual)}")


@dataclass
class Config:
    recipe: str = setting("shapes", "a row of the recipes below", "the run")
    out: str = setting("", "folder of the run; empty: runs/RECIPE")
    init_from: str = setting("", "first weights, and teacher: a run, a file, hf://USER/REPO[/FILE]")
    seed: int = setting(0, "decides everything random", least=0, most=2**63 - 1)
    fresh: bool = setting(False, "start over; what the folder held is renamed")
    allow_change: bool = setting(False, "resume although settings that change the result differ")
    device: str = setting("auto", "cuda, mps or cpu; auto: the first there is")
    threads: int = setting(0, "of each process on a CPU; 0: one a core", least=0)
    dtype: str = setting("auto", "bfloat16 or float32; auto: bfloat16 where it is faster")
    compile: bool | None = setting(None, "default: on a GPU, and on a CPU with a C++ compiler")
    exact: bool = setting(False, "on a GPU: the same command gives the same bytes, as on a CPU")
    fsdp: bool = setting(False, "FSDP2, for networks that do not fit one GPU")
    grad_checkpoint: bool = setting(False, "less memory, a third more time")

    data: str = setting("shapes", "shapes, mnist[:DIR], fashion[:DIR], cifar10[:DIR] (downloaded to DIR), "
                        "folder:PATH, npz:PATH or latents:DIR", "data")
    image_size: int = setting(0, "side in pixels, for shapes and folders; 0: 32", least=0)
    labels: str = setting("all", "all; none: no classes; or one class, by name or number")
    vae: str = setting("", "autoencoder of latents: one of latents.AUTOENCODERS, or NAME=PATH")

    model: str = setting("TiT-XXS/4", "DiT SiT LightningDiT TiT - XXS XS S B L XL / 1 2 4 8", "network")
    x_pred: bool = setting(False, "the layers estimate the data; for transport linear")

    transport: str = setting("linear", "a row of objective.TRANSPORTS", "loss (objective.py)")
    lam: float = setting(0.0, "lambda, the consistency ratio: 0 many-step, 1 few-step")
    zeta: float = setting(0.0, "enhancement ratio: how much guidance is trained in")
    style: str = setting("none", "ft-vs-fe (from nothing), fc-vs-fe or fc-vs-xz (from --init_from)")
    enhance_range: tuple = setting((0.0, 0.75), "times at which enhancement works in full")
    huber: float = setting(0.0, "c of the pseudo-Huber loss; 0: root of the mean square")
    cosine_loss: bool = setting(False, "add the cosine loss")
    time_weight: str = setting("cosine", "cosine or none")
    time_beta: tuple = setting((1.0, 1.0, 1.0), "t ~ Beta(theta1, theta2) * theta3")
    label_drop: float = setting(0.1, "probability of the null class")
    derivative: str = setting("central", "at lambda = 1: central or backward difference, or jvp (exact)")
    dt: float = setting(0.005, "step of the differences")

    steps: int = setting(2000, "of training", "optimisation", least=1)
    batch_size: int = setting(64, "over all processes; a multiple of 16", least=1)
    micro_batch: int = setting(0, "most images in one pass of one process; 0: its share", least=0)
    optimizer: str = setting("adamw", "adamw, radam, or muon (for the matrices of attention and MLP)")
    lr: float = setting(2e-3, "learning rate after warm-up", least=0)
    betas: tuple = setting((0.9, 0.99), "of the optimiser")
    grad_clip: float = setting(1.0, "largest gradient norm; 0: no limit", least=0)
    warmup: int = setting(200, "steps over which lr rises from 0", least=0)
    warmdown: float = setting(0.7, "last part of the run, over which lr falls to 0", least=0, most=1)
    ema: tuple = setting((0.999,), "decays of averaged weights; the first is the model", least=0, most=1)

    sample_steps: int = setting(20, "steps of the sampler", "sampler, as sample.py will have it", least=1)
    kappa: float | str = setting("auto", "extrapolation: a number, or auto (second order)")
    rho: float | str = setting(0.0, "stochasticity: 0..1, or sde")
    schedule: tuple = setting((1.0, 1.0, 1.0), "warp of the time grid")
    gap: tuple = setting((0.001, 0.001), "distance of the grid from t = 1; time of the last call")
    cfg_scale: float = setting(1.0, "classifier-free guidance; 1: off")
    cfg_interval: tuple = setting((0.0, 1.0), "where it is on, in the network's own time")

    log_every: int = setting(50, "steps between two lines of log.jsonl", "reports and checkpoints", least=1)
    save_every: int = setting(1000, "steps between checkpoints, pages and held-out losses", least=1)
    report_to: str = setting("", "tensorboard or wandb (pip install it first)")

    about: str = ""                     # without help: no flags. What the recipe is
    latent_mean: tuple = ()             # the rest is filled in from the data
    latent_std: tuple = ()
    fingerprint: str = ""               # which images, in which order

    def __post_init__(self):
        check_numbers(self)
        for name, allowed in WORDS.items():
            if getattr(self, name) not in allowed:
                words = ", ".join(filter(None, allowed))
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of: {words}")
        if not self.ema or len(set(self.ema)) < len(self.ema):
            raise ValueError(f"ema is {text_of(self.ema)}; give decays that differ")
        if self.cfg_interval[0] > self.cfg_interval[1]:
            raise ValueError(f"cfg_interval is {text_of(self.cfg_interval)}; it must rise, such as .2,.8")
        if self.optimizer == "muon" and self.fsdp:
            raise ValueError("muon works on whole matrices: leave out --fsdp, or take --optimizer adamw")
        if self.model.startswith("DDT") and (self.x_pred or self.grad_checkpoint):
            raise ValueError("DDT has neither x_pred nor grad_checkpoint: leave them out")

    def objective(self):
        from objective import Objective
        return Objective(**{f.name: getattr(self, f.name) for f in fields(Objective)})

    def sampler(self, **given):
        """Keyword arguments for sampler.sample; what is given (and is not None) wins over the run's own."""
        names = ("transport", "kappa", "rho", "schedule", "gap", "cfg_scale", "cfg_interval")
        own = {name: getattr(self, name) for name in names}
        return own | {"steps": self.sample_steps} | {k: v for k, v in given.items() if v is not None}


WORDS = {"optimizer": ("adamw", "radam", "muon"), "dtype": ("auto", "bfloat16", "float32"),
         "report_to": ("", "tensorboard", "wandb")}

# What may differ between a run and its continuation: where and how fast it runs, and what it tells.
FREE = set("""out steps device compile exact threads micro_batch fsdp grad_checkpoint fresh allow_change
           log_every save_every report_to about""".split())


def differences(before, after):
    """The settings that decide the result and differ, as "name: was -> is"."""
    free = FREE if before.fingerprint else FREE | {"fingerprint"}       # of a run before it was kept
    was, now = vars(before), vars(after)
    names = [name for name in now if now[name] != was[name]]
    return [f"{name}: {was[name]} -> {now[name]}" for name in names if name not in free]


@dataclass
class SamplerFlags:
    """The sampler's settings as flags of sample.py and fid.py; what is not given is the model's own."""
    steps: int | None = setting(None, "steps", "sampler; not given: as the model's recipe has it")
    kappa: float | str | None = setting(None, "extrapolation: a number, or auto (second order)")
    rho: float | str | None = setting(None, "stochasticity: 0..1, or sde")
    order: int | None = setting(None, "1, or 2 (Heun)")
    schedule: tuple | None = setting(None, "warp of the time grid")
    gap: tuple | None = setting(None, "distance of the grid from t = 1; time of the last call")
    cfg_scale: float | None = setting(None, "classifier-free guidance; 1: off")
    cfg_interval: tuple | None = setting(None, "where it is on, in the network's own time")

    def given(self):
        return {f.name: getattr(self, f.name) for f in fields(SamplerFlags)}


# ---- recipes ------------------------------------------------------------------------------------------

X_PRED = dict(x_pred=True, gap=(0.001, 0.05))           # such a network divides by max(t, .05)
SHAPES, SHAPES32 = dict(model="TiT-XXS/8", **X_PRED), dict(model="TiT-XS/8", **X_PRED)
MNIST = dict(data="mnist", model="TiT-XXS/4", **X_PRED)
FASHION = MNIST | dict(data="fashion", model="TiT-XS/4")
CIFAR = dict(data="cifar10", model="TiT-S/2", batch_size=128)
FOLDER = dict(data="folder:images", model="TiT-XS/4", **X_PRED)
MANY = dict(zeta=0.5, style="ft-vs-fe", time_beta=(2.0, 1.0, 1.0), time_weight="none", lr=8e-3)
FEW = dict(lam=1.0, zeta=1.0, style="fc-vs-xz", enhance_range=(0.0, 1.0), huber=1.0, time_weight="none",
           time_beta=(0.8, 1.0, 1.0), derivative="backward", dt=0.05, optimizer="radam", betas=(0.9, 0.999),
           warmup=20, ema=(0.99,), sample_steps=2, kappa=0.0, gap=(0.001, 0.7))
FEW32 = FEW | dict(derivative="central", dt=0.02, lr=1e-3, gap=(0.001, 0.6))
MUON = dict(optimizer="muon")


def recipe(about, *parts, **more):
    """One row: later parts win. about: what it makes, for -h."""
    return {name: value for part in (*parts, more) for name, value in part.items()} | {"about": about}


# Minutes are of two CPU cores. FD @ n: the score at n network calls, by our features (RESULTS.md).
RECIPES = {
    "shapes":       recipe("many-step: 5 min, FD-shapes 3.2 @ 20",
                           SHAPES, MANY, MUON, zeta=0.4, lr=5e-3, kappa=0.7, steps=5000),
    "shapes-few":   recipe("two steps: 35 s, 5.9 @ 2", SHAPES, FEW, steps=600, rho=1.0, gap=(0.001, 0.5)),
    "shapes32":     recipe("many-step: 46 min of one core, 1.6 @ 40",
                           SHAPES32, MANY, MUON, zeta=0.3, lr=5e-3, steps=15000),
    "shapes32-few": recipe("two steps: 2 min, 1.7 @ 2", SHAPES32, FEW32, steps=440),
    "shapes32-one": recipe("one step: 7 min, 2.8 @ 1",
                           SHAPES32, FEW32, MUON, steps=1500, ema=(0.995,), sample_steps=1),
    "mnist":        recipe("many-step: 43 min of one core, FD-mnist 3.6 @ 40",
                           MNIST, MANY, MUON, zeta=0.4, steps=9000),
    "mnist-few":    recipe("two steps: 2 min, 3.6 @ 2",
                           MNIST, FEW, MUON, lr=6e-3, warmup=100, steps=360, gap=(0.001, 0.85)),
    "fashion":      recipe("many-step: 60 to 90 min of one core, FD-fashion 4.1 @ 40",
                           FASHION, MANY, MUON, zeta=0.4, steps=9000),
    "fashion-few":  recipe("two steps: 6 min of one core, 4.2 @ 2", FASHION, FEW, MUON,
                           lr=3e-3, warmup=100, steps=720, ema=(0.995,), dt=0.1, rho=0.5, gap=(0.001, 0.75)),
    "folder":       recipe("many-step, your images: 80 min", FOLDER, MANY, MUON, lr=5e-3, steps=5000),
    "folder-few":   recipe("two steps: 10 min", FOLDER, FEW, steps=600),
    "cifar10":      recipe("many-step; not run", CIFAR, MANY, lr=1e-3, steps=200_000, ema=(0.9999,)),
    "cifar10-few":  recipe("two steps; not run", CIFAR, FEW, lr=1e-4, steps=10_000),
}

# The published recipes (arXiv 2505.07447): ImageNet, 675 M parameters; published FID @ NFE. Not run here.
# They want GPU-days and downloads. Give --data latents:DIR, and to tune --init_from.
LATENTS = dict(image_size=256, ema=(0.9999,), warmdown=0.0, warmup=0, batch_size=1024, grad_clip=0.1)
WARP = (1.17, 0.8, 1.1)
IN_MANY = LATENTS | dict(style="ft-vs-fe", cosine_loss=True, lr=2e-4, betas=(0.9, 0.95), grad_clip=1.0,
                         schedule=WARP, sample_steps=40)
IN_FEW = LATENTS | dict(lam=1.0, style="fc-vs-xz", huber=5.0, time_beta=(0.8, 1.0, 1.0), optimizer="radam",
                        lr=1e-4, betas=(0.9, 0.999), steps=50_000, sample_steps=2, kappa=0.0, rho=1.0)
IN_TUNE = IN_FEW | dict(style="fc-vs-fe", ema=(0.99,), steps=800)
FASTER = LATENTS | dict(schedule=WARP, sample_steps=50)
VAVAE, SD = dict(model="TiT-XL/1", vae="vavae"), dict(model="TiT-XL/2", vae="sd-ema")
E2E, DCAE = dict(model="TiT-XL/1", vae="e2e-vavae"), dict(model="TiT-XL/1", vae="dc-ae", image_size=512)
SD512 = dict(model="TiT-XL/4", vae="sd-ema", image_size=512)
REPAE, REPA = dict(model="SiT-XL/1", vae="e2e-vavae"), dict(model="SiT-XL/2", vae="sd-ema")
LIGHTNING = dict(model="LightningDiT-XL/1", vae="vavae", transport="relinear")
DDT = dict(model="DDT-XL/2", vae="sd-ema", transport="relinear")
DIT = dict(model="DiT-XL/2", vae="sd-ema", transport="ddpm")
MIDDLE = dict(time_beta=(2.4, 2.4, 1.0))

RECIPES |= {
    # train, many-step
    "in256-vavae": recipe("published FID 1.21 @ 30", IN_MANY, VAVAE, zeta=0.47, steps=500_000,
                          sample_steps=30, kappa=0.5, schedule=(1.0, 1.0, 1.0)),
    "in256-e2e":   recipe("published many-step", IN_MANY, E2E, zeta=0.67, steps=300_000, kappa=0.5),
    "in256-sd":    recipe("published many-step", IN_MANY, SD, MIDDLE, zeta=0.44, steps=500_000,
                          sample_steps=60, kappa=0.21),
    "in512-dcae":  recipe("published FID 1.48 @ 40", IN_MANY, DCAE, zeta=0.57, steps=1_000_000, kappa=0.46),
    "in512-sd":    recipe("published many-step", IN_MANY, SD512, MIDDLE, zeta=0.60, steps=400_000, kappa=0.4),
    # train, few-step
    "in256-vavae-few": recipe("published FID 1.42 @ 2", IN_FEW, VAVAE, zeta=2.0, steps=40_000,
                              gap=(0.001, 0.3)),
    "in256-e2e-few":   recipe("published few-step", IN_FEW, E2E, zeta=1.3, huber=9.0, gap=(0.001, 0.5)),
    "in256-sd-few":    recipe("published few-step", IN_FEW, SD, zeta=2.0, gap=(0.001, 0.3)),
    "in512-dcae-few":  recipe("published FID 1.75 @ 2", IN_FEW, DCAE, zeta=1.5, gap=(0.0, 0.6)),
    "in512-sd-few":    recipe("published few-step", IN_FEW, SD512, zeta=1.5, gap=(0.001, 0.5)),
    # tune somebody else's model to two steps: give --init_from
    "tune-repae":        recipe("published FID 1.39 @ 2", IN_TUNE, REPAE, zeta=2.5, steps=500,
                                gap=(0.001, 0.75)),
    "tune-repa":         recipe("published FID 1.95 @ 2", IN_TUNE, REPA, zeta=1.7, gap=(0.001, 0.6)),
    "tune-lightningdit": recipe("published FID 2.06 @ 2", IN_TUNE, LIGHTNING, zeta=3.0, gap=(0.001, 0.6)),
    "tune-ddt":          recipe("published FID 1.90 @ 2", IN_TUNE, DDT, zeta=1.9, batch_size=512,
                                gap=(0.001, 0.5)),
    # no published setting, not run. A SiT's learned sigma is dropped; a DiT's is kept, and not trained
    "tune-sit":          recipe("tunes SiT files; not run", IN_TUNE, REPA, transport="relinear", zeta=1.7,
                                gap=(0.001, 0.6)),
    "tune-dit":          recipe("tunes DiT files; not run", IN_TUNE, DIT, zeta=1.7, gap=(0.001, 0.6)),
    # sample somebody else's model faster: give --ckpt. dit and sit: no published setting
    "repae":        recipe("published FID 1.06 @ 80", FASTER, REPAE, cfg_scale=2.5, cfg_interval=(0.0, 0.76),
                           sample_steps=40, kappa=0.54, schedule=(1.2, 0.72, 1.2), gap=(0.001, 0.002)),
    "lightningdit": recipe("published FID 1.21 @ 100", FASTER, LIGHTNING, cfg_scale=6.7,
                           cfg_interval=(0.125, 1.0), kappa=0.5),
    "ddt":          recipe("published FID 1.27 @ 100", FASTER, DDT, cfg_scale=2.0, cfg_interval=(0.3, 1.0),
                           kappa=0.28),
    # ddt512 came after the paper, whose own has FID 1.24 @ 300:
    # --cfg_scale 3 --cfg_interval .3,1 --kappa .28 --schedule 1.17,.8,1.1
    "ddt512":       recipe("published FID 1.18 @ 300", FASTER, DDT, image_size=512, cfg_scale=2.35,
                           kappa=0.48, cfg_interval=(0.24, 1.0), sample_steps=150, schedule=(1.14, 0.8, 1.1)),
    "sit":          recipe("samples SiT files", FASTER, REPA, transport="relinear", cfg_scale=1.5),
    "dit":          recipe("samples DiT files", LATENTS, DIT, sample_steps=50, cfg_scale=1.5),
}

for name, row in RECIPES.items():  # a few-step run starts from the many-step run of its name
    base, _, kind = name.rpartition("-")
    if kind in ("few", "one"):
        row["init_from"] = f"runs/{base}"


# ---- command line -------------------------------------------------------------------------------------

def nearest(word, words):
    """Those that are most like a word, for a message."""
    lower = {name.lower(): name for name in words}
    return ", ".join(lower[name] for name in difflib.get_close_matches(str(word).lower(), lower, cutoff=0))


def text_of(value):
    return ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


def number_or_word(text):
    try:
        return float(text)
    except ValueError:
        return text


def numbers(text):
    return tuple(map(float, text.split(",")))


def expand_home(text):
    """~ as the shell has it, also behind folder: and NAME=."""
    return re.sub(r"(?<![^:=])~(?=/|$)", lambda _: os.path.expanduser("~"), text)


# A type of field: what reads its flag, and how -h shows the value.
READERS = {str: (expand_home, "TEXT"), int: (int, "N"), float: (float, "X"), tuple: (numbers, "X,X"),
           float | str: (number_or_word, "X")}


def fail(message):
    raise ValueError(message)


def unknown(word, flags):
    """The message for what is no flag."""
    if word.startswith("-"):
        return f"unknown flag {word}; nearest: {nearest(word, flags)}"
    meant = f", such as --recipe {word}" if word in RECIPES else "; yes and no are --FLAG and --no-FLAG"
    return f"{word!r} belongs to no flag: write --FLAG VALUE{meant}"


def read_flags(kind, argv, doc, row=None, epilog=""):
    """The flags that argv gives, as a dict: fields of the dataclass `kind` that have help. -h prints doc,
    every flag with the value it has where it is not given, and epilog. row: from the flags, of the recipe."""
    parser = argparse.ArgumentParser(description=doc, epilog=epilog, usage="%(prog)s [--FLAG VALUE ...]",
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     add_help=False)
    parser.error = lambda message: fail(f"{message}; {parser.prog} -h lists the flags")
    parser.add_argument("-h", "--help", action="store_true", help="print this")
    flags, group, actions = [f for f in fields(kind) if "help" in f.metadata], parser, {}
    for f in flags:
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        base = next((t for t in READERS if f.type in (t, t | None)), bool)
        how = dict(action=argparse.BooleanOptionalAction)
        if base is not bool:
            how = dict(zip(("type", "metavar"), READERS[base]))
        actions[f] = group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **how)
    given, rest = parser.parse_known_args(argv)
    given, helps = vars(given), vars(given).pop("help")
    recipe_row = row(given) if row else {}
    if helps:
        for f, action in actions.items():
            default = text_of(recipe_row.get(f.name, f.default))
            shown = "" if default in ("", "None", "False") else f" [{default}]"
            action.help = f.metadata["help"].replace("%", "%%") + shown
        parser.print_help()
        sys.exit()
    if rest:
        fail(unknown(rest[0].split("=")[0], [f"--{f.name}" for f in flags]))
    check_numbers(kind(**given))
    return given


def recipe_row(name):
    if name not in RECIPES:
        fail(f"unknown recipe {name!r}; nearest: {nearest(name, RECIPES)}")
    return RECIPES[name]


def read_config(argv, doc):
    """Config from the command line: defaults, then the recipe, then the flags that were given."""
    epilog = "in brackets: the value in this recipe, where no flag gives another\n\nrecipes:\n"
    epilog += "\n".join(f"  {name:18}{row['about']}" for name, row in RECIPES.items())
    row = lambda given: recipe_row(given.get("recipe", Config.recipe))
    given = read_flags(Config, argv, doc, row, epilog)
    name = given.get("recipe", Config.recipe)
    return Config(**recipe_row(name) | given | dict(recipe=name, out=given.get("out") or f"runs/{name}"))


def command_line(read, *more):
    """read(flags of this process, *more). A mistake is one line for the user, and status 2."""
    try:
        return read(sys.argv[1:], *more)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
