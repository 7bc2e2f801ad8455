"""Every setting of a run, and the command line.

A field of `Config` is a flag of train.py: `--lr 1e-3`, `--fresh` or `--no-fresh`. A recipe (recipes.py) is a
row of overrides; flags given on the command line override it. A run's Config is saved with its weights.

The scripts read their flags before they load torch, which takes seconds: -h and typos are answered at once.
"""
import argparse
import contextlib
import difflib
import math
import os
import re
import sys
from dataclasses import dataclass, field, fields, make_dataclass

from recipes import RECIPES

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"       # for sums in a fixed order (engine.fix_order)


class UserError(ValueError):
    """A user's mistake, or a damaged file: scripts print it in one line and exit with status 2."""


@contextlib.contextmanager
def user_errors():
    """A ValueError raised inside becomes a UserError: the method's files know nothing of the command line."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def setting(default, text, group=None, least=-math.inf, most=math.inf, choices=()):
    """A field with its line of help, its range or choices. group: a heading in -h, from this flag on."""
    metadata = {"help": text, "group": group, "range": (least, most), "choices": choices}
    return field(default=default, metadata=metadata)


def check_settings(settings):
    """UserError for a word that is not one of the choices, for a number that is not finite or out of range,
    and for too many or too few numbers."""
    for f in fields(settings):
        value, usual = getattr(settings, f.name), getattr(Config, f.name, None)
        choices = f.metadata.get("choices", ())
        if choices and value not in choices:
            raise UserError(f"{f.name} is {value!r}; use one of: {', '.join(filter(None, choices))}")
        least, most = f.metadata.get("range", (-math.inf, math.inf))
        values = value if isinstance(value, tuple) else (value,)
        numbers = [v for v in values if isinstance(v, (int, float))]
        if not all(least <= v <= most and abs(v) < math.inf for v in numbers):
            raise UserError(f"{f.name} is {text_of(value)}; it must be finite and from {least} to {most}")
        if isinstance(usual, tuple) and len(usual) > 1 and len(values) != len(usual) and value is not None:
            raise UserError(f"{f.name} is {text_of(value)}; it takes {len(usual)} numbers: {text_of(usual)}")


@dataclass
class Config:
    recipe: str = setting("shapes", "one of the recipes below", "the run")
    out: str = setting("", "the run's folder; empty: runs/RECIPE")
    init_from: str = setting("", "initial weights, and the teacher: a run, a file, hf://USER/REPO[/FILE]")
    seed: int = setting(0, "determines all randomness", least=0, most=2**63 - 1)
    fresh: bool = setting(False, "start over; the old folder is renamed")
    allow_change: bool = setting(False, "resume although settings that affect the result have changed")
    device: str = setting("auto", "cuda, mps or cpu; auto: the first available")
    threads: int = setting(0, "CPU threads per process; 0: one per idle core", least=0)
    dtype: str = setting("auto", "bfloat16 or float32; auto: bfloat16 where it is faster",
                         choices=("auto", "bfloat16", "float32"))
    compile: bool | None = setting(None, "torch.compile; default: on a GPU, and on a CPU with a C++ compiler")
    exact: bool = setting(False, "on a GPU: the same command gives the same bytes, as it does on a CPU")
    fsdp: bool = setting(False, "shard with FSDP2, for networks that do not fit on one GPU")
    grad_checkpoint: bool = setting(False, "recompute activations: less memory, a third more time")

    data: str = setting("shapes", "shapes, mnist[:DIR], fashion[:DIR], cifar10[:DIR] (downloaded to DIR), "
                        "folder:PATH, hf:NAME[:SPLIT] (hub or a path), npz:PATH or latents:DIR", "data")
    image_size: int = setting(0, "side in pixels, for shapes, folder: and hf:; 0: 32", least=0)
    labels: str = setting("all", "all; none: all images, without classes; or one class, by name or number")
    vae: str = setting("", "autoencoder of the latents: sd-ema sd-mse e2e-vavae vavae dc-ae, or NAME=PATH")

    model: str = setting("TiT-XXS/4", "DiT, SiT, LightningDiT or TiT, then -XXS, -XS, -S, -B, -L or -XL, "
                         "then /1, /2, /4 or /8", "network")
    x_pred: bool = setting(False, "the network predicts the data; needs transport linear")

    transport: str = setting("linear", "a row of objective.TRANSPORTS", "loss (objective.py)")
    lam: float | str = setting(0.0, "lambda, the consistency ratio: 0 many-step, 1 few-step; A:B: it moves")
    zeta: float = setting(0.0, "enhancement ratio: how much guidance is trained in")
    style: str = setting("none", "ft-vs-fe (to train from scratch), fc-vs-fe or fc-vs-xz (to fine-tune)")
    huber: float = setting(0.0, "c of the pseudo-Huber loss; 0: root mean square")
    loss: str = setting("root", "root: pseudo-Huber; log: log(mean square / c^2 + 1)")
    time_weight: str = setting("cosine", "weight of the loss over time: cosine or none")
    time_beta: tuple = setting((1.0, 1.0, 1.0), "t ~ Beta(theta1, theta2) * theta3")
    label_drop: float = setting(0.1, "probability of replacing a label with the null class")
    derivative: str = setting("central", "at lambda 1: central or backward difference, or jvp (exact)")
    dt: float = setting(0.005, "step size of these differences")
    clip: float = setting(1.0, "largest rate at which data may change along a path; 0: no limit")

    steps: int = setting(2000, "training steps", "optimisation", least=1)
    batch_size: int = setting(64, "images per step, over all processes; a multiple of 16", least=1)
    micro_batch: int = setting(0, "most images per process and pass; 0: its whole share", least=0)
    optimizer: str = setting("adamw", "adamw, radam, or muon (for the matrices of attention and MLP)",
                             choices=("adamw", "radam", "muon"))
    lr: float = setting(2e-3, "learning rate after warm-up", least=0)
    grad_clip: float = setting(1.0, "largest gradient norm; 0: no limit", least=0)
    warmup: int = setting(200, "steps over which lr rises from 0", least=0)
    warmdown: float = setting(0.7, "last fraction of the run, over which lr falls to 0", least=0, most=1)
    ema: tuple = setting((0.999,), "EMA decay rates; the first is the one saved and sampled", least=0, most=1)

    sample_steps: int = setting(20, "steps of the sampler", "sampler, as sample.py will use it", least=1)
    kappa: float | str = setting("auto", "extrapolation: a number, or auto (third order)")
    rho: float | str = setting(0.0, "stochasticity: 0..1, or sde")
    schedule: tuple = setting((1.0, 1.0, 1.0), "warp of the time grid")
    gap: tuple = setting((0.001, 0.001), "distance of the first call from t = 1, then time of the last call")
    cfg_scale: float = setting(1.0, "classifier-free guidance; 1: off")
    cfg_interval: tuple = setting((0.0, 1.0), "times at which guidance is on, in the network's own time")

    log_every: int = setting(50, "steps between lines of log.jsonl", "reports and checkpoints", least=1)
    save_every: int = setting(1000, "steps between checkpoints, image pages and held-out losses", least=1)
    report_to: str = setting("", "tensorboard or wandb (pip install it first)",
                             choices=("", "tensorboard", "wandb"))

    # Fields without help are not flags: settings of a recipe, and what is filled in from the data.
    enhance_range: tuple = (0.0, 0.75)  # times at which the enhancement is at full strength
    cosine_loss: bool = False           # add the cosine loss
    distil: bool = False                # at lambda t the teacher answers: one call learns its two
    betas: tuple = (0.9, 0.99)          # of the optimiser
    about: str = ""                     # what the recipe is
    latent_mean: tuple = ()
    latent_std: tuple = ()
    fingerprint: str = ""               # which images, in which order

    def __post_init__(self):
        check_settings(self)
        if not self.ema or len({f"{decay:g}" for decay in self.ema}) < len(self.ema):
            raise UserError(f"ema is {text_of(self.ema)}; give one or more distinct decay rates")
        if self.cfg_interval[0] > self.cfg_interval[1]:
            raise UserError(f"cfg_interval is {text_of(self.cfg_interval)}; it must rise, such as .2,.8")
        number = r"(\d+\.?\d*|\.\d+)(e-?\d+)?"
        if not re.fullmatch(f"{number}(:{number})?", str(self.lam)):
            raise UserError(f"lam is {self.lam}; give a number from 0 to 1, or two such as 0:1")
        if self.optimizer == "muon" and self.fsdp:
            raise UserError("muon needs whole matrices: leave --fsdp out, or use --optimizer adamw")

    def objective(self):
        from objective import Objective
        own = {f.name: getattr(self, f.name) for f in fields(Objective)}
        with user_errors():         # where lam moves, the objective has its largest value
            return Objective(**own | {"lam": max(self.lam_at(0), self.lam_at(self.steps))})

    def lam_at(self, step):
        """The consistency ratio of a step: lam "A:B" goes from A at the first step to B at the last."""
        first, last = map(float, (str(self.lam).split(":") * 2)[:2])
        return first + (last - first) * min(1, step / max(1, self.steps - 1))

    def sampler(self, **given):
        """Keyword arguments for sampler.sample; what is given (and is not None) wins over the run's own."""
        own = {name: getattr(self, name) for name in ("transport", *SAMPLER)}
        return own | {"steps": self.sample_steps} | {k: v for k, v in given.items() if v is not None}


# Settings that may differ when a run resumes: where and how fast it runs, and what it reports.
MAY_DIFFER = set("""out steps device compile exact threads micro_batch fsdp grad_checkpoint fresh allow_change
                 log_every save_every report_to about""".split())


def differences(before, after):
    """The settings that change the result and differ, as "name: was -> is"."""
    was, now = vars(before), vars(after)
    return [f"{name}: {was[name]} -> {now[name]}" for name in now
            if now[name] != was[name] and name not in MAY_DIFFER]


SAMPLER = ("kappa", "rho", "schedule", "gap", "cfg_scale", "cfg_interval")     # fields that sample() takes

# Flags of sample.py and fid.py: the sampler's settings, declared above. Those not given are the model's own.
SamplerFlags = make_dataclass("SamplerFlags", [
    ("steps", int | None, setting(None, "number of steps", "sampler (default: the model's own settings)")),
    ("order", int | None, setting(None, "1, or 2 (Heun)")),
    *((f.name, f.type | None, setting(None, f.metadata["help"]))
      for f in fields(Config) if f.name in SAMPLER)],
    namespace={"given": lambda self: {f.name: getattr(self, f.name) for f in fields(SamplerFlags)}})


# ---- command line -------------------------------------------------------------------------------------

def nearest(word, words):
    """The closest matches of a word, for an error message."""
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
    """Expand ~ as a shell does, also after folder: and NAME=."""
    return re.sub(r"(?<![^:=])~(?=/|$)", lambda _: os.path.expanduser("~"), text)


# The type of a field: what parses its flag, and how -h shows the value.
READERS = {str: (expand_home, "TEXT"), int: (int, "N"), float: (float, "X"), tuple: (numbers, "X,X"),
           float | str: (number_or_word, "X")}


# What to type in place of other programs' flags, which stand to the right.
FOREIGN = {"use --steps": "epochs max_steps num_steps nfe", "use --num": "num_images num_samples",
           "use --cfg_scale": "guidance guidance_scale cfg", "use --out": "output output_dir",
           "use --data": "dataset data_dir", "use --image_size": "resolution", "use --lr": "learning_rate",
           "use --model": "model_name", "use --ckpt": "checkpoint", "use --dtype bfloat16": "bf16",
           "use --report_to wandb": "wandb", "use --report_to tensorboard": "tensorboard",
           "the same command resumes by itself": "resume",
           "on a GPU four workers read the images": "workers num_workers"}


def unknown(word, flags):
    """The message for a word that no flag takes."""
    if not word.startswith("-"):
        flag = "--recipe" if word in RECIPES else "--ckpt" if os.path.exists(word) else ""
        meant = f"such as {flag} {word}" if flag in flags else "and --FLAG or --no-FLAG for yes and no"
        return f"unexpected argument {word!r}: write --FLAG VALUE, {meant}"
    name = word.lstrip("-").replace("-", "_")
    spellings = {flag.replace("-", "_"): flag for f in flags for flag in (f, f"--no-{f[2:]}")}
    if flag := spellings.get(f"__{name}"):
        return f"unknown flag {word}: write {flag}"
    for hint, names in FOREIGN.items():
        if name in names.split() and set(re.findall(r"--\w+", hint)) <= set(flags):
            return f"unknown flag {word}: {hint}"
    return f"unknown flag {word}; nearest: {nearest(word, flags)}"


class Parser(argparse.ArgumentParser):
    """argparse's, but a mistake is a UserError."""

    def error(self, message):
        message = message.replace("ignored explicit argument", "takes no value:")
        raise UserError(f"{message}; {self.prog} -h lists the flags")


def read_flags(options, argv, doc, epilog="", **row):
    """The flags given in argv, as a dict. Flags are the fields of the dataclass `options` that have help. -h
    prints doc, each flag with its value in row, or else its default, and epilog."""
    parser = Parser(description=doc, epilog=epilog, usage="%(prog)s [--FLAG VALUE ...]", allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    flags, group = [f for f in fields(options) if "help" in f.metadata], parser
    for f in flags:
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        base = next((t for t in READERS if f.type in (t, t | None)), bool)
        how = dict(action=argparse.BooleanOptionalAction)
        if base is not bool:
            how = dict(zip(("type", "metavar"), READERS[base]))
        usual = getattr(Config, f.name, f.default)      # of sample.py's flags the default is None
        if base is tuple and len(usual) > 1:
            how["metavar"] = ",".join("X" * len(usual))
        value = text_of(row.get(f.name, f.default))
        shown = "" if value in ("", "None", "False") else f" [{value}]"
        group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=f.metadata["help"] + shown, **how)
    given, rest = parser.parse_known_args(argv)
    if rest:
        parser.error(unknown(rest[0].split("=")[0], [f"--{f.name}" for f in flags]))
    check_settings(options(**vars(given)))
    return vars(given)


def recipe_row(name):
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}; nearest: {nearest(name, RECIPES)}")
    return RECIPES[name]


def read_config(argv, doc):
    """The Config of a command line: defaults, then the recipe, then the flags given."""
    first = Parser(add_help=False, allow_abbrev=False)      # -h shows the values of the recipe
    first.add_argument("--recipe", default=Config.recipe)
    name = first.parse_known_args(argv)[0].recipe
    row = recipe_row(name)
    epilog = "in brackets: the recipe's value, used unless the flag is given\n\nrecipes:\n"
    epilog += "\n".join(f"  {other:18}{settings['about']}" for other, settings in RECIPES.items())
    given = read_flags(Config, argv, doc, epilog, **row)
    return Config(**row | given | dict(recipe=name, out=given.get("out") or f"runs/{name}"))


def command_line(read, *more):
    """read(the flags of this process, *more). A mistake is printed in one line, with exit status 2."""
    try:
        return read(sys.argv[1:], *more)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
