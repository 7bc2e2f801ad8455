"""Weights on disk: model.safetensors for use, state_STEP.CHECKSUM.safetensors to go on training. Nothing read here is ever executed.

A model file holds the averaged weights, and in its header the config and the class names. A state file holds everything that
decides the future of a run: weights, averages, teacher, optimiser, step, config. All randomness and the place in the data are
functions of (seed, step), so there is nothing else. The name of a state file carries the SHA-256 of its bytes.
"""
import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import os
import pickle
import re
import tempfile
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch.distributed.tensor import DTensor, distribute_tensor

from config import Config, recipe_row
from model import DDT, ENCODER, FAMILIES, MODELS, SIZES, DiT


def flush(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_safely(path, write):
    """Call write(temporary path), flush to disk, rename: `path` holds what it held before or all of the new, whenever the machine stops."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def survive_full_disk(what, say):
    """Writing reports or checkpoints must not end a run: say what could not be written, and go on."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        say(f"{what} could not be written ({error}): what was there is kept and the run goes on; free some disk space")


def header(net, config, names, **more):
    return {"format": "nanoUCGM 1", "config": json.dumps(dataclasses.asdict(config)), "names": json.dumps(names),
            "shape": json.dumps([net.in_channels, net.input_size, net.input_size]), **more}


def read_config(stored):
    """The Config in a header."""
    known = {f.name for f in dataclasses.fields(Config)}
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(stored["config"]).items() if k in known})


# ---- models -------------------------------------------------------------------------------------------------------

def build(config, shape, num_classes):
    """The network that a config describes, for pictures of `shape` (C, S, S). ValueError names the nearest models."""
    if config.model not in MODELS:
        raise ValueError(f"unknown model {config.model!r}; nearest: {', '.join(difflib.get_close_matches(config.model, MODELS, cutoff=0))}")
    return MODELS[config.model](input_size=shape[-1], in_channels=shape[0], num_classes=num_classes, **({"data_output": True} if config.data_output else {}))


def save_model(path, tensors, net, config, names):
    """tensors (by parameter name) with what is needed to use them, as one safetensors file."""
    write_safely(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, header(net, config, names)))


@contextlib.contextmanager
def hub_errors(what, hint):
    """One line for whatever goes wrong with the hub: its library raises requests' errors or httpx's, by its version, and its own."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{what} ({reason}): {hint}") from error


def find_model(path):
    """The file that --ckpt or --init_from means: itself, the model of a run's folder, or a download from the hub. ValueError if there is none."""
    if str(path).startswith("hf://"):
        user, repo, name = ([*str(path)[5:].split("/", 2), "", ""])[:3]
        from huggingface_hub import hf_hub_download
        with hub_errors(f"the hub does not give {path}", "expected hf://USER/REPO or hf://USER/REPO/FILE; a broken download goes on when the command is run again"):
            return Path(hf_hub_download(f"{user}/{repo}", name or "model.safetensors"))
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no model at {path}; expected a model.safetensors or the folder of a run, such as runs/shapes "
                         "(python train.py makes that one), a published .pt, or hf://USER/REPO[/FILE]")
    return file


def load_model(path, device="cpu", recipe=""):
    """(net, config, class names) from what find_model finds: our files, or those of UCGM, REPA, REPA-E, SiT, DiT, LightningDiT, DDT.

    recipe: a row of config.RECIPES whose network, transport and sampler are used, for files that do not say. ValueError if the file is
    damaged, or of no family that is known; it lists the names that are missing or left over.
    """
    file, row = find_model(path), recipe_row(recipe) if recipe else {}
    tensors, head, more = read_tensors(file, device)
    if head.get("format", "").startswith("nanoUCGM"):
        config, names, shape = read_config(head), json.loads(head["names"]), json.loads(head["shape"])
        config = dataclasses.replace(config, **{k: v for k, v in row.items() if k in SAMPLING})
        net = build(config, shape, len(names)).to(device)
    else:
        net, found = recognise(tensors, more, row.get("model", ""), row.get("image_size", 256), file)
        if row.get("model", found["model"]) != found["model"]:
            raise ValueError(f"{file} is {found['model']}, and recipe {recipe} is for {row['model']}")
        config, names = Config(**{**found, **row, "recipe": recipe or "shapes"}), [str(k) for k in range(net.num_classes)]
        net = net.to(device)
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit {config.model}: {' '.join(str(error).split())}") from error
    return net.eval().requires_grad_(False), config, names


SAMPLING = {"vae", "sample_steps", "extrapolation", "stochasticity", "order", "schedule", "gap", "cfg_scale", "cfg_interval"}


def read_tensors(file, device="cpu"):
    """(tensors by name, header, what else the file holds) of a .safetensors file, or of a torch.save one, of which nothing is executed."""
    try:
        with open(file, "rb") as start:
            is_torch = start.read(2) in (b"PK", b"\x80\x02")       # zip, or the older pickle: read with weights_only
        if not is_torch:
            with safetensors.safe_open(file, "pt", device=str(device)) as stored:
                return {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata() or {}, {}
        with torch.serialization.safe_globals([argparse.Namespace]):                                 # REPA keeps its arguments beside the weights
            stored = torch.load(file, map_location=device, weights_only=True)
        if not isinstance(stored, dict):
            raise RuntimeError(f"it holds a {type(stored).__name__}, not tensors by name")
    except (safetensors.SafetensorError, OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} is not a file of weights that can be read safely ({str(error).strip().splitlines()[0]}); expected a "
                         "model.safetensors that train.py wrote, or a published checkpoint") from error
    more = {name: value for name, value in stored.items() if name not in ("model", "ema", "opt")} if "ema" in stored else {}
    tensors = stored.get("ema") or stored.get("state_dict") or stored
    if average := {name.removeprefix("ema_denoiser."): value for name, value in tensors.items() if name.startswith("ema_denoiser.")}:
        tensors = average       # DDT's, from Lightning
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    if any(name.startswith("projectors.") for name in tensors):
        more["repa"] = True
    return {name: value.float() for name, value in tensors.items() if not name.startswith(("projectors.", "feat_rope."))}, {}, more


def recognise(tensors, more, model, image_size, file):
    """(network, {"model", "transport"}) from names and shapes.

    The family: TiT and LightningDiT have SwiGLU, the latter weights in its norms; REPA's and SiT's files hold a dictionary, or no
    variances; DiT and the raw files of SiT are alike and need `model`. Clock and target: FORMATS of each publisher, see TRANSPORTS.
    """
    wanted = ("x_embedder.proj.weight", "final_layer.linear.weight", "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight", "pos_embed")
    if missing := [name for name in wanted[:4 if "s_embedder.proj.weight" in tensors else 5] if name not in tensors]:
        raise ValueError(f"{file} is not a DiT, SiT, LightningDiT, TiT or DDT: it lacks {', '.join(missing)} and has {', '.join(list(tensors)[:4])}, ...")
    ddt, width = "s_embedder.proj.weight" in tensors, len(tensors["final_layer.linear.weight"][0])
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    size = next((name for name, s in SIZES.items() if (s["depth"], s["hidden_size"]) == (depth, width)), None)
    if not size:
        known = ", ".join(f"{name} {s['depth']} x {s['hidden_size']}" for name, s in SIZES.items())
        raise ValueError(f"{file} has {depth} blocks of width {width}, and the number of heads cannot be told from weights; known sizes: {known}")
    classes = len(tensors["y_embedder.embedding_table.weight"]) - 1
    if ddt:     # neither positions nor patches are in the file: it is a /2 of 4 channels, at the recipe's size; so many blocks are the encoder
        net = DDT(image_size // 8 or 32, 2, tensors["x_embedder.proj.weight"].shape[1] // 4, **SIZES[size], encoder_depth=ENCODER[size], num_classes=classes)
        return net, {"model": f"DDT-{size}/2", "transport": "relinear"}
    _, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    learn_sigma = tensors["final_layer.linear.weight"].shape[0] == 2 * patch**2 * channels
    if "blocks.0.mlp.w12.weight" in tensors:
        family, transport = ("LightningDiT", "relinear") if "blocks.0.norm1.weight" in tensors else ("TiT", "linear")
    elif not learn_sigma or "repa" in more:
        family, transport = "SiT", "linear"
    elif "args" in more or model.startswith("SiT"):
        family, transport = "SiT", "relinear"
    elif model.startswith("DiT"):
        family, transport = "DiT", "ddpm"
    else:
        raise ValueError(f"{file} may be a DiT (epsilon, DDPM) or a SiT (velocity): their files are alike; say which by --recipe dit or --recipe sit")
    side = math.isqrt(tensors["pos_embed"].shape[1]) * patch
    net = DiT(side, patch, channels, **SIZES[size], num_classes=classes,
              **{**FAMILIES[family], "learn_sigma": learn_sigma})
    return net, {"model": f"{family}-{size}/{patch}", "transport": transport}


# ---- the hub ------------------------------------------------------------------------------------------------------

def push(repo, net, config, names, picture=None, flags=""):
    """Put a model on the hub as USER/REPO: model.safetensors, config.json, a card with the picture and the sampling command.

    Returns a line that says how to use it. ValueError: not logged in, no such user, no network.
    """
    from huggingface_hub import HfApi
    command = f"python sample.py --ckpt hf://{repo} {flags}".strip()
    settings = ", ".join(f"{name} {value}" for name, value in config.sampler().items())
    card = (f"---\ntags: [nanoucgm, image-generation]\n---\n# {repo.rpartition('/')[2]}\n\n{config.model} on {config.data}, "
            f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters, trained with recipe `{config.recipe}` of nanoUCGM "
            f"(UCGM, arXiv 2505.07447).\n\n" + ("![samples](samples.png)\n\n" if picture else "") + f"    {command}\n\nIts own settings: {settings}.\n")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_model(folder / "model.safetensors", {name: whole(value) for name, value in net.state_dict().items()}, net, config, names)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
        (folder / "README.md").write_text(card)
        if picture:
            Image.open(picture).convert("RGB").save(folder / "samples.png")
        with hub_errors(f"the hub did not take {repo}", "expected USER/REPO of a user who is logged in (hf auth login)"):
            HfApi().create_repo(repo, exist_ok=True)
            HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message=f"{config.model}, recipe {config.recipe}")
    return f"pushed to {repo}. Next: {command}"


# ---- the state of a run -------------------------------------------------------------------------------------------

def whole(value):
    """A tensor on the CPU, collected from all processes if it is sharded (then all must ask)."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu().contiguous()


def like(value, other):
    """A whole tensor placed, and dealt out, as `other` is."""
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements) if isinstance(other, DTensor) else value.to(other.device)


def state_tensors(nets, optimizer=None):
    """Everything in one flat dict: "net.blocks.0...", "optimizer.blocks.0....exp_avg", whole tensors on the CPU."""
    tensors = {f"{part}.{name}".lstrip("."): whole(value) for part, net in nets.items() for name, value in net.state_dict().items()}
    for name, parameter in nets["net"].named_parameters() if optimizer else ():
        tensors |= {f"optimizer.{name}.{key}": whole(value) for key, value in optimizer.state.get(parameter, {}).items()}
    return tensors


def save_state(out, tensors, net, config, names, step, best):
    """Write the state and the model files; forget the states that config.keep and keep_every do not ask for."""
    out = Path(out)
    temporary = out / "state.tmp"
    try:
        safetensors.torch.save_file(tensors, temporary, header(net, config, names, step=str(step), best=repr(best)))
        with open(temporary, "rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        write_safely(out / f"state_{step:08d}.{checksum}.safetensors", temporary.rename)
    finally:
        temporary.unlink(missing_ok=True)
    for k, decay in enumerate(config.ema):
        prefix = f"ema{decay:g}."
        weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        save_model(out / (f"model_ema{decay:g}.safetensors" if k else "model.safetensors"), weights, net, config, names)
    states = sorted(out.glob("state_*.safetensors"), reverse=True)
    for path in states[max(1, config.keep):]:
        if not config.keep_every or int(path.name[6:14]) % config.keep_every:
            path.unlink()


def newest_state(out):
    """The newest state file in a folder whose bytes have their checksum, or None. Damaged ones are said, and renamed."""
    for path in sorted(Path(out).glob("state_*.safetensors"), reverse=True):
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest()[:16] == path.name.split(".")[1]:
                return path
        print(f"{path} is damaged (its bytes do not have its checksum): using the one before, if there is one")
        path.rename(path.with_suffix(".damaged"))
    return None


class State:
    """A state file, read: .config, .step, .best (the smallest held-out loss so far), and restore()."""

    def __init__(self, path):
        try:
            with safetensors.safe_open(path, "pt") as stored:
                head = stored.metadata() or {}
                self.tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a state file that train.py wrote ({error}): remove it, and the one before will be used") from error
        self.config, self.step, self.best = read_config(head), int(head["step"]), float(head["best"])

    @torch.no_grad()
    def restore(self, nets, optimizer):
        """Put everything back, whole or sharded as the networks now are. ValueError if the run had another optimiser, or no such average."""
        if lacking := [part for part in nets if not any(name.startswith(f"{part}.") for name in self.tensors)]:
            raise ValueError(f"the run that is to go on has no {' or '.join(lacking)}: leave --ema and the enhancement as they were, or begin another --out")
        if self.config.optimizer != (kind := type(optimizer).__name__.lower()):
            raise ValueError(f"the run that is to go on has the state of {self.config.optimizer}, not of {kind}: begin another --out with --init_from this one")
        for part, net in nets.items():
            for name, value in net.state_dict().items():
                value.copy_(like(self.tensors[f"{part}.{name}"], value))
        for name, parameter in nets["net"].named_parameters():
            prefix = f"optimizer.{name}."
            kept = {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}
            for key, value in kept.items():
                on_device = value.shape == parameter.shape or optimizer.defaults.get("fused")
                optimizer.state[parameter][key] = like(value, parameter) if value.shape == parameter.shape else value.to(parameter.device if on_device else "cpu")


def set_aside(out):
    """Rename the folder of an earlier run to the first free OUT.old1, OUT.old2, ..."""
    out = Path(out)
    if out.exists():
        out.rename(next(path for k in range(1, 10**6) if not (path := out.with_name(f"{out.name}.old{k}")).exists()))
