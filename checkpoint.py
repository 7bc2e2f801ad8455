"""Weights on disk: model.safetensors to draw from, state_STEP.CHECKSUM.safetensors to resume from.

A model file holds the averaged weights, the config and the class names. A state file holds everything that
determines the rest of a run: weights, averages, teacher, optimiser, step, config. Randomness and the position
in the data are functions of (seed, step). Nothing read here is ever executed.
"""
import dataclasses
import inspect
import json
import re
from pathlib import Path

import safetensors
import safetensors.torch
import torch

import model
from config import SAMPLER, Config, UserError, nearest, recipe_row, user_errors
from engine import as_one_error, atomic_write, checksum, claim_folder

KEEP = 2            # how many of the newest states are kept


# ---- metadata -----------------------------------------------------------------------------------------

# Names of settings in older files, from before they had the paper's letters.
OLD_NAMES = {"consistency_ratio": "lam", "enhancement_ratio": "zeta", "enhancement_style": "style",
             "extrapolation": "kappa", "stochasticity": "rho", "cosine": "cosine_loss", "beta": "time_beta",
             "weight": "time_weight", "eps": "dt", "data_output": "x_pred", "shard": "fsdp",
             "decay": "warmdown", "clip": "grad_clip"}


def make_metadata(net, config, names, **more):
    return {"format": "nanoUCGM 1", "config": json.dumps(dataclasses.asdict(config)),
            "names": json.dumps(names),
            "shape": json.dumps([net.in_channels, net.input_size, net.input_size]), **more}


def config_from(metadata):
    """The Config in a file's metadata, without settings that no longer exist."""
    stored = json.loads(metadata["config"])
    now = lambda name: name if (new := OLD_NAMES.get(name)) in stored else new or name     # clip is also new
    stored = {now(name): tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    if stored.get("derivative") == "fd":
        stored["derivative"] = "central"
    known = {f.name for f in dataclasses.fields(Config)} - {"compile"}          # which was "yes" or "no"
    return Config(**{name: stored[name] for name in known & stored.keys()})


# ---- models -------------------------------------------------------------------------------------------

NO_WEIGHTS = "give a model.safetensors of train.py, or a published checkpoint"


def build(config, shape, num_classes):
    """The network that a config describes, for images of `shape` (C, S, S)."""
    models = model.MODELS
    if config.model.startswith("DDT"):
        from extras.published import MODELS as models
    if config.model not in models:
        raise UserError(f"unknown model {config.model!r}; nearest: {nearest(config.model, models)}")
    make, switches = models[config.model], {"x_pred": True} if config.x_pred else {}
    if config.x_pred and (config.transport != "linear" or "x_pred" not in inspect.signature(make).parameters):
        raise UserError("x_pred needs transport linear and a network with that argument, found "
                        f"{config.transport} and {config.model}: add --no-x_pred")
    with user_errors():
        net = make(in_channels=shape[0], input_size=shape[-1], num_classes=num_classes, **switches)
    if config.grad_checkpoint and not hasattr(net, "grad_checkpoint"):
        raise UserError(f"{config.model} has no grad_checkpoint: leave it out")
    net.grad_checkpoint = config.grad_checkpoint
    return net


def save_model(path, tensors, net, config, names):
    """Write tensors (by parameter name) and what is needed to use them into one safetensors file."""
    metadata = make_metadata(net, config, names)
    atomic_write(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata))


def find_model(path):
    """The file that --ckpt or --init_from means: itself, the model of a run's folder, or one from the hub."""
    if str(path).startswith("hf://"):
        user, repo, name = ([*str(path)[5:].split("/", 2), "", ""])[:3]
        from huggingface_hub import hf_hub_download
        with as_one_error(f"cannot get {path} from the hub", "try again, or give hf://USER/REPO[/FILE]"):
            return Path(hf_hub_download(f"{user}/{repo}", name or "model.safetensors"))
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no model at {path}: give the folder of a run (python train.py makes runs/shapes), "
                        "a file, or hf://USER/REPO")
    return file


def load_model(path, device="cpu", recipe="", model_name=""):
    """(net, config, class names) of what find_model finds: a model of train.py, or a published checkpoint.

    recipe: its sampler settings and vae win over those of the file; a published file, which has none, also
    takes its network and transport from there. model_name: distinguishes published files that look alike.
    UserError: damaged, not recognised, or names missing or left over.
    """
    file, row = find_model(path), recipe_row(recipe) if recipe else {}
    metadata, tensors = read_weights(file, device)
    if not metadata.get("format", "").startswith("nanoUCGM"):
        from extras.published import load
        net, found, names = load(file, row.get("model", model_name), row.get("image_size", 256), device)
        if row and row["model"] != found["model"]:
            raise UserError(f"{file} is {found['model']}, but recipe {recipe} is for {row['model']}")
        return net, Config(**{**found, **row, "recipe": recipe or "shapes"}), names
    with as_one_error(f"{file} has damaged metadata", "use another copy"):
        config = config_from(metadata)
        names, shape = json.loads(metadata["names"]), json.loads(metadata["shape"])
    if row:
        own = Config(**row)
        sampler = {name: getattr(own, name) for name in ("sample_steps", *SAMPLER)}
        config = dataclasses.replace(config, vae=own.vae or config.vae, **sampler)
    net = build(config, shape, len(names)).to(device)
    fill(net, tensors, file)
    return net.eval().requires_grad_(False), config, names


def read_weights(file, device="cpu"):
    """(metadata, tensors by name) of a safetensors file; both empty for a file of torch.save."""
    with as_one_error(f"cannot read weights from {file}", NO_WEIGHTS):
        with open(file, "rb") as start:
            if start.read(2) in (b"PK", b"\x80\x02"):           # a zip archive, or the older bare pickle
                return {}, {}
        with safetensors.safe_open(file, "pt", device=str(device)) as stored:
            return stored.metadata() or {}, {name: stored.get_tensor(name) for name in stored.keys()}


def fill(net, tensors, file):
    """Load tensors by name into a network. UserError lists what is missing, left over or of another shape."""
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{file} does not fit the network: {' '.join(str(error).split())}") from error


# ---- the state of a run -------------------------------------------------------------------------------

def to_full_cpu(value):
    """A tensor on the CPU. A sharded one is gathered from all processes, so all of them must call this."""
    value = value.full_tensor() if hasattr(value, "full_tensor") else value
    return value.detach().cpu().contiguous()


def shard_like(value, other):
    """A whole tensor, moved to the device of `other` and sharded as that one is."""
    value = value.to(other.device)
    if hasattr(other, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(value, other.device_mesh, other.placements)
    return value


def state_tensors(nets, optimizer):
    """One flat dict of whole tensors on the CPU: "net.blocks.0...", "optimizer.blocks.0....exp_avg", ..."""
    tensors = {f"{part}.{name}": to_full_cpu(value)
               for part, net in nets.items() for name, value in net.state_dict().items()}
    for name, parameter in nets["net"].named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = to_full_cpu(value)
    return tensors


def save_state(out, tensors, net, config, names, step):
    """Write the averages as models, then the state; delete all but the newest states."""
    out = Path(out)
    for k, decay in enumerate(config.ema):      # models first: once the state is complete, so are they
        prefix = f"ema{decay:g}."
        weights = {name.removeprefix(prefix): value for name, value in tensors.items()
                   if name.startswith(prefix)}
        name = f"model_ema{decay:g}.safetensors" if k else "model.safetensors"
        save_model(out / name, weights, net, config, names)
    metadata = make_metadata(net, config, names, step=str(step))
    write = lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata)
    state_name = lambda temporary: f"state_{step:08d}.{checksum(temporary)}.safetensors"
    written = atomic_write(out / "state", write, state_name)
    for path in find_states(out)[KEEP:]:
        if path != written:
            path.unlink()


def find_states(out):
    """The states that a run has written into a folder, newest first. Copies with other names are ignored."""
    pattern = re.compile(r"state_(\d{8,})\.[0-9a-f]{16}\.safetensors")
    found = {path: pattern.fullmatch(path.name) for path in Path(out).glob("state_*")}
    return sorted(filter(found.get, found), key=lambda path: int(found[path][1]), reverse=True)


def newest_state(out):
    """The newest state in a folder whose bytes match its checksum, or None. Damaged ones are renamed."""
    for path in find_states(out):
        if checksum(path) == path.name.split(".")[1]:
            return path
        print(f"{path} is damaged (its bytes do not match its checksum): using the previous one, if any")
        path.rename(path.with_suffix(".damaged"))


def read_state(path):
    """(Config, step, class names) of a state file."""
    with (as_one_error(f"{path} is not a state of train.py", "remove it, and the previous one is used"),
          safetensors.safe_open(path, "pt") as stored):
        metadata = stored.metadata() or {}
        return config_from(metadata), int(metadata["step"]), json.loads(metadata["names"])


@torch.no_grad()
def restore_state(path, config, nets, optimizer):
    """Put everything back, whole or sharded as the networks now are. config: the state's own."""
    if config.optimizer != (optimizer_name := type(optimizer).__name__.lower()):
        raise UserError(f"the run has the state of {config.optimizer}, not of {optimizer_name}: start "
                        "another --out with --init_from this run")
    with safetensors.safe_open(path, "pt") as stored:      # closed, so that deleting it frees the disk
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        weights = {f"{part}.{name}": value for part, net in nets.items()
                   for name, value in net.state_dict().items()}
        moments = {name: name.removeprefix("optimizer.").rsplit(".", 1) for name in tensors
                   if name.startswith("optimizer.")}        # "optimizer.NAME.exp_avg": [NAME, "exp_avg"]
        check_fit(tensors, weights, moments)
        for name, value in weights.items():
            value.copy_(shard_like(tensors[name], value))
        parameters = dict(nets["net"].named_parameters())
        for name, (weight, key) in moments.items():
            value, parameter = tensors[name].clone(), parameters[weight]
            if value.shape == parameter.shape:
                value = shard_like(value, parameter)
            elif optimizer.defaults.get("fused"):           # which keeps its step count on the device
                value = value.to(parameter.device)
            optimizer.state[parameter][key] = value


def check_fit(tensors, weights, moments):
    """UserError lists how a state differs from the networks: names, shapes, dtypes."""
    def described(tensor):
        return "nothing" if tensor is None else f"{str(tensor.dtype)[6:]} {tuple(tensor.shape)}"
    parts = {name.partition(".")[0] for name in weights}    # a teacher that is no longer needed is ignored
    pairs = [(name, tensors.get(name), weights.get(name)) for name in sorted({*weights, *tensors})
             if name.partition(".")[0] in parts]
    pairs += [(name, tensors[name], weights.get(f"net.{weight}")) for name, (weight, _) in moments.items()
              if tensors[name].ndim]            # a moment is like its weight; a step count is a scalar
    wrong = [f"{name}: {described(was)} -> {described(now)}" for name, was, now in pairs
             if described(was) != described(now)]
    if wrong:
        raise UserError(f"the state belongs to other networks or averages ({len(wrong)} differ: "
                        f"{'; '.join(wrong[:4])}): use another --out, or the previous settings")


def set_aside(out):
    """Rename the folder of an earlier run to the first free name among OUT.old1, OUT.old2, ..."""
    out, k = Path(out), 1
    while out.with_name(f"{out.name}.old{k}").exists():
        k += 1
    if out.exists():
        claim_folder(out).release()
        out.rename(out.with_name(f"{out.name}.old{k}"))
