"""Weights on disk: model.safetensors for use, state_STEP.CHECKSUM.safetensors to go on training. Nothing read here is ever executed.

A model file holds the averaged weights, and in its header the config and the class names. A state file holds everything that
decides the future of a run: weights, averages, teacher, optimiser, step, config. All randomness and the place in the data are
functions of (seed, step), so there is nothing else. The name of a state file carries the SHA-256 of its bytes.
"""
import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from config import Config
from model import MODELS


def write_safely(path, write):
    """Call write(temporary path), flush to disk, rename: `path` holds what it held before or all of the new, whenever the machine stops."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        for place in (temporary, path.parent):
            handle = os.open(place, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        os.replace(temporary, path)
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
    return MODELS[config.model](input_size=shape[-1], in_channels=shape[0], num_classes=num_classes, data_output=config.data_output)


def save_model(path, tensors, net, config, names):
    """tensors (by parameter name) with what is needed to use them, as one safetensors file."""
    write_safely(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, header(net, config, names)))


def find_model(path):
    """The model file that a path means: itself, or the one in the folder of a run. ValueError if there is none."""
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no model at {path}; expected a model.safetensors or the folder of a run, such as runs/shapes "
                         "(python train.py makes that one)")
    return file


def load_model(path, device="cpu"):
    """(net, config, class names) from a model file or the folder of a run. ValueError if it is not one of ours, or damaged."""
    file = find_model(path)
    try:
        with safetensors.safe_open(file, "pt", device=str(device)) as stored:
            head = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error}); expected a model.safetensors that train.py wrote") from error
    if not head.get("format", "").startswith("nanoUCGM"):
        raise ValueError(f"{file} was not written by train.py: its header has no nanoUCGM config")
    config, names = read_config(head), json.loads(head["names"])
    net = build(config, json.loads(head["shape"]), len(names)).to(device)
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False), config, names


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


def newest_state(out, say=print):
    """The newest state file in a folder whose bytes have their checksum, or None. Damaged ones are said, and renamed."""
    for path in sorted(Path(out).glob("state_*.safetensors"), reverse=True):
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest()[:16] == path.name.split(".")[1]:
                return path
        say(f"{path} is damaged (its bytes do not have its checksum): using the one before, if there is one")
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
        """Put everything back, whole or sharded as the networks now are."""
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
