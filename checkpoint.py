"""Weights on disk: model.safetensors for use, state_STEP.CHECKSUM.safetensors to go on training.

A model file holds averaged weights, config and class names. A state file holds all that decides the future
of a run: weights, averages, teacher, optimiser, step, config; randomness and the place in the data are
functions of (seed, step). Nothing read here is ever executed.
"""
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import socket
import tempfile
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch.distributed.tensor import DTensor, distribute_tensor

import model
import published
from config import Config, nearest, recipe_row
from engine import one_line

KEEP = 2            # newest states that are kept
UMASK = os.umask(0)
os.umask(UMASK)     # the only way to read it is to set it


# ---- safe writing -------------------------------------------------------------------------------------

def flush(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def atomic_write(path, write, name=None):
    """Call write(temporary path), flush, rename: `path` holds the old bytes or all of the new, always.
    name(temporary path): the last part of `path`, where only the bytes decide it. Returns `path`."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with contextlib.suppress(OSError):      # file systems of other systems have no modes
            os.chmod(temporary, 0o666 & ~UMASK)
        flush(temporary)
        if name:
            path = path.with_name(name(temporary))
        os.replace(temporary, path)
        with contextlib.suppress(OSError):      # nor let a folder be flushed
            flush(path.parent)
        return path
    finally:
        temporary.unlink(missing_ok=True)


PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN}


@contextlib.contextmanager
def ignore_disk_errors(what, tell, passing=PASSING):
    """A full or failing disk does not end a run: tell(line), and go on. ValueError for an error that does not
    pass by itself; passing None: all do."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        number = re.search(r"(?:Errno|os error) (\d+)", str(error))     # safetensors has it in its text only
        if passing and not (number and int(number[1]) in passing):
            raise ValueError(f"{what} cannot be written ({error})") from error
        tell(f"{what} could not be written ({error}): the run goes on; free some disk space")


def claim_folder(out):
    """Make a folder and keep other runs out: the file returned holds a lock until it is closed or the process
    dies. ValueError: no right to write there, or another process has it."""
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a+")
    except OSError as error:
        raise ValueError(f"cannot write into {out} ({error}): give another --out") from error
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        raise ValueError(f"{out} is in use by {lock.read()}: stop it, or give another --out") from error
    except (ImportError, OSError):              # Windows, and file systems without locks
        pass
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


# ---- metadata -----------------------------------------------------------------------------------------

# settings in files written before they were called by the paper's letters
OLD_NAMES = {"consistency_ratio": "lam", "enhancement_ratio": "zeta", "enhancement_style": "style",
             "extrapolation": "kappa", "stochasticity": "rho", "cosine": "cosine_loss", "beta": "time_beta",
             "weight": "time_weight", "eps": "dt", "data_output": "x_pred", "shard": "fsdp",
             "decay": "warmdown", "clip": "grad_clip"}


def write_metadata(net, config, names, **more):
    return {"format": "nanoUCGM 1", "config": json.dumps(dataclasses.asdict(config)),
            "names": json.dumps(names),
            "shape": json.dumps([net.in_channels, net.input_size, net.input_size]), **more}


def read_config(metadata):
    """The Config in a file's metadata; settings that no longer exist are left out."""
    stored = {OLD_NAMES.get(name, name): tuple(value) if isinstance(value, list) else value
              for name, value in json.loads(metadata["config"]).items()}
    if stored.get("derivative") == "fd":
        stored["derivative"] = "central"
    known = {f.name for f in dataclasses.fields(Config)} - {"compile"}          # which was "yes" or "no"
    return Config(**{name: stored[name] for name in known & stored.keys()})


# ---- models -------------------------------------------------------------------------------------------

NETWORK = ("num_classes", "in_channels", "input_size", "patch_size", "blocks")      # what a network must have
SAMPLING = {"vae", "sample_steps", "kappa", "rho", "schedule", "gap", "cfg_scale", "cfg_interval"}


def build(config, shape, num_classes):
    """The network that a config describes, for images of `shape` (C, S, S)."""
    models = model.MODELS | published.MODELS
    if config.model not in models:
        raise ValueError(f"unknown model {config.model!r}; nearest: {nearest(config.model, models)}")
    make, switches = models[config.model], {"x_pred": True} if config.x_pred else {}
    if switches and not hasattr(make, "keywords"):
        raise ValueError(f"{config.model} has no x_pred: add --no-x_pred")
    if switches and config.transport != "linear":
        raise ValueError(f"x_pred is for transport linear, found {config.transport}: add --no-x_pred")
    net = make(in_channels=shape[0], input_size=shape[-1], num_classes=num_classes, **switches)
    if missing := [name for name in NETWORK if not hasattr(net, name)]:
        raise ValueError(f"{config.model} lacks the attributes {', '.join(missing)}: see CONTRIBUTING.md")
    if config.grad_checkpoint and not hasattr(net, "grad_checkpoint"):
        raise ValueError(f"{config.model} does not know grad_checkpoint: leave it out")
    net.grad_checkpoint = config.grad_checkpoint
    return net


def save_model(path, tensors, net, config, names):
    """tensors (by parameter name) with what is needed to use them, as one safetensors file."""
    metadata = write_metadata(net, config, names)
    atomic_write(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata))


@contextlib.contextmanager
def as_one_error(what, hint):
    """A ValueError of one line for whatever goes wrong inside: damage has many names (pickle's, zipfile's,
    unicode's, ...), and the hub's library raises other errors in each version."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} ({one_line(error)}): {hint}") from error


def find_model(path):
    """The file that --ckpt or --init_from means: itself, the model of a run's folder, or one from the hub."""
    if str(path).startswith("hf://"):
        user, repo, name = ([*str(path)[5:].split("/", 2), "", ""])[:3]
        from huggingface_hub import hf_hub_download
        with as_one_error(f"the hub does not give {path}", "try again, or give hf://USER/REPO[/FILE]"):
            return Path(hf_hub_download(f"{user}/{repo}", name or "model.safetensors"))
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no model at {path}: give the folder of a run (python train.py makes runs/shapes), "
                         "a file, or hf://USER/REPO")
    return file


def read_tensors(file, device="cpu"):
    """(tensors by name, metadata, extras) of a .safetensors file or a published torch.save one."""
    hint = "give a model.safetensors of train.py, or a published checkpoint"
    with as_one_error(f"{file} is no file of weights that can be read safely", hint):
        with open(file, "rb") as start:
            is_torch = start.read(2) in (b"PK", b"\x80\x02")       # zip, or the older pickle
        if is_torch:
            tensors, extras = published.unwrap(file, device)
            return tensors, {}, extras
        with safetensors.safe_open(file, "pt", device=str(device)) as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
            tensors, extras = published.clean(tensors, {})
            return tensors, stored.metadata() or {}, extras


def load_model(path, device="cpu", recipe="", model_name=""):
    """(net, config, class names) from what find_model finds, ours or published.

    recipe: its network, transport and sampler are used for files that do not say; model_name: the network
    alone. ValueError: damaged, of no known family, or names that are missing or left over.
    """
    file, row = find_model(path), recipe_row(recipe) if recipe else {}
    tensors, metadata, extras = read_tensors(file, device)
    if metadata.get("format", "").startswith("nanoUCGM"):
        with as_one_error(f"{file} has damaged metadata", "take another copy"):
            config = read_config(metadata)
            names, shape = json.loads(metadata["names"]), json.loads(metadata["shape"])
        config = dataclasses.replace(config, **{name: row[name] for name in SAMPLING & row.keys()})
        net = build(config, shape, len(names))
    else:
        wanted, size = row.get("model", ""), row.get("image_size", 256)
        net, found = published.detect_architecture(tensors, extras, wanted or model_name, size, file)
        if wanted not in ("", found["model"]):
            raise ValueError(f"{file} is {found['model']}, and recipe {recipe} is for {wanted}")
        config = Config(**{**found, **row, "recipe": recipe or "shapes"})
        names = [str(k) for k in range(net.num_classes)]
    try:
        net.to(device).load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit {config.model}: {' '.join(str(error).split())}") from error
    return net.eval().requires_grad_(False), config, names


def push(repo, net, config, names, page=None, flags=""):
    """Put a model on the hub as USER/REPO: model.safetensors, config.json, and a card with its command, which
    is returned in a line. ValueError: not logged in, no such user, no network."""
    from huggingface_hub import HfApi
    command = f"python sample.py --ckpt hf://{repo} {flags}".strip()
    settings = ", ".join(f"{name} {value}" for name, value in config.sampler().items())
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    card = (f"---\ntags: [nanoucgm, image-generation]\n---\n# {repo.rpartition('/')[2]}\n\n"
            f"{config.model} on {config.data}, {millions:.1f} M parameters, recipe `{config.recipe}` of "
            f"nanoUCGM (UCGM, arXiv 2505.07447).\n\n{'![samples](samples.png)' if page else ''}\n\n"
            f"    {command}\n\nIts own settings: {settings}.\n")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_model(folder / "model.safetensors", state_tensors({"": net}), net, config, names)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
        (folder / "README.md").write_text(card)
        if page:
            Image.open(page).convert("RGB").save(folder / "samples.png")
        hint = "give USER/REPO of who is logged in (hf auth login)"
        with as_one_error(f"the hub did not take {repo}", hint):
            HfApi().create_repo(repo, exist_ok=True)
            HfApi().upload_folder(repo_id=repo, folder_path=folder,
                                  commit_message=f"{config.model}, recipe {config.recipe}")
    return f"pushed to {repo}. Next: {command}"


# ---- the state of a run -------------------------------------------------------------------------------

def to_full_cpu(value):
    """A tensor on the CPU, collected from all processes if it is sharded (then all must ask)."""
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().cpu().contiguous()


def shard_like(value, other):
    """A whole tensor on the device of `other`, and dealt out as that one is."""
    value = value.to(other.device)
    if isinstance(other, DTensor):
        return distribute_tensor(value, other.device_mesh, other.placements)
    return value


def state_tensors(nets, optimizer=None):
    """All in one flat dict: "net.blocks.0...", "optimizer.blocks.0....exp_avg", whole tensors on the CPU."""
    tensors = {f"{part}.{name}".lstrip("."): to_full_cpu(value)
               for part, net in nets.items() for name, value in net.state_dict().items()}
    if optimizer is not None:
        for name, parameter in nets["net"].named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = to_full_cpu(value)
    return tensors


def save_state(out, tensors, net, config, names, step):
    """Write the models of the averages and the state; forget all states but the newest."""
    out = Path(out)
    for k, decay in enumerate(config.ema):      # before the state: where that is complete, so are these
        prefix = f"ema{decay:g}."
        weights = {name.removeprefix(prefix): value for name, value in tensors.items()
                   if name.startswith(prefix)}
        name = f"model_ema{decay:g}.safetensors" if k else "model.safetensors"
        save_model(out / name, weights, net, config, names)
    metadata = write_metadata(net, config, names, step=str(step))
    write = lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata)
    state_name = lambda temporary: f"state_{step:08d}.{checksum(temporary)}.safetensors"
    written = atomic_write(out / "state", write, state_name)
    for path in find_states(out)[KEEP:]:
        if path != written:
            path.unlink()


def find_states(out):
    """The states that a run wrote into a folder, newest first; a user's copies have other names."""
    pattern = re.compile(r"state_(\d{8,})\.[0-9a-f]{16}\.safetensors")
    found = {path: pattern.fullmatch(path.name) for path in Path(out).glob("state_*")}
    return sorted(filter(found.get, found), key=lambda path: int(found[path][1]), reverse=True)


def checksum(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def newest_state(out):
    """The newest state in a folder whose bytes have their checksum, or None; damaged ones are renamed."""
    for path in find_states(out):
        if checksum(path) == path.name.split(".")[1]:
            return path
        print(f"{path} is damaged (not the bytes of its checksum): using the one before, if any")
        path.rename(path.with_suffix(".damaged"))


def read_state(path):
    """(Config, step, class names) of a state file."""
    with (as_one_error(f"{path} is no state of train.py", "remove it, and the one before is used"),
          safetensors.safe_open(path, "pt") as stored):
        metadata = stored.metadata() or {}
        return read_config(metadata), int(metadata["step"]), json.loads(metadata["names"])


@torch.no_grad()
def restore_state(path, config, nets, optimizer):
    """Put everything back, whole or sharded as the networks now are. config: that of the state."""
    if config.optimizer != (kind := type(optimizer).__name__.lower()):
        raise ValueError(f"the run has the state of {config.optimizer}, not of {kind}: begin another --out "
                         "with --init_from this one")
    with safetensors.safe_open(path, "pt") as stored:      # closed afterwards: pruning frees the disk
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
            elif optimizer.defaults.get("fused"):           # its step count lies beside the weights
                value = value.to(parameter.device)
            optimizer.state[parameter][key] = value


def check_fit(tensors, weights, moments):
    """ValueError lists what a state has otherwise than the networks: names, shapes, dtypes."""
    def described(tensor):
        return "nothing" if tensor is None else f"{str(tensor.dtype)[6:]} {tuple(tensor.shape)}"
    parts = {name.partition(".")[0] for name in weights}    # a teacher that is needed no more is left out
    pairs = [(name, tensors.get(name), weights.get(name)) for name in sorted({*weights, *tensors})
             if name.partition(".")[0] in parts]
    pairs += [(name, tensors[name], weights.get(f"net.{weight}")) for name, (weight, _) in moments.items()
              if tensors[name].ndim]            # a moment is as its weight is, a count of steps a scalar
    wrong = [f"{name}: {described(was)} -> {described(now)}" for name, was, now in pairs
             if described(was) != described(now)]
    if wrong:
        raise ValueError(f"the state is of other networks or averages ({len(wrong)} differ: "
                         f"{'; '.join(wrong[:4])}): begin another --out, or take the settings of before")


def set_aside(out):
    """Rename the folder of an earlier run to the first free OUT.old1, OUT.old2, ..."""
    out, k = Path(out), 1
    while out.with_name(f"{out.name}.old{k}").exists():
        k += 1
    if out.exists():
        claim_folder(out).close()
        out.rename(out.with_name(f"{out.name}.old{k}"))
