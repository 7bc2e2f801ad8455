"""Models on disk: model.safetensors holds the averaged weights, and in its header everything needed to use them."""
import dataclasses
import json
import os
from pathlib import Path

import safetensors
import safetensors.torch

from config import Config
from model import MODELS


def write_safely(path, data):
    """Write bytes so that `path` holds either what it held before or all of `data`, whenever the machine stops."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_model(path, net, config, names):
    """net's weights, the run's config and the class names, as one safetensors file."""
    header = {"format": "nanoUCGM 1", "config": json.dumps(dataclasses.asdict(config)), "names": json.dumps(names),
              "shape": json.dumps([net.in_channels, net.input_size, net.input_size])}
    tensors = {name: value.contiguous().cpu() for name, value in net.state_dict().items()}
    write_safely(path, safetensors.torch.save(tensors, header))


def find_model(path):
    """The model file that a path means: itself, or the one in the folder of a run. ValueError if there is none."""
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no model at {path}; expected a model.safetensors or the folder of a run, such as runs/shapes "
                         "(python train.py makes that one)")
    return file


def build(config, shape, num_classes):
    """The network that a config describes, for pictures of `shape` (C, S, S)."""
    if config.model not in MODELS:
        import difflib
        raise ValueError(f"unknown model {config.model!r}; nearest: {', '.join(difflib.get_close_matches(config.model, MODELS, cutoff=0))}")
    return MODELS[config.model](input_size=shape[-1], in_channels=shape[0], num_classes=num_classes)


def load_model(path, device="cpu"):
    """(net, config, class names) from a model file or the folder of a run. ValueError if it is not one of ours, or damaged."""
    file = find_model(path)
    try:
        with safetensors.safe_open(file, "pt", device=str(device)) as stored:
            header = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error}); expected a model.safetensors that train.py wrote") from error
    if not header.get("format", "").startswith("nanoUCGM"):
        raise ValueError(f"{file} was not written by train.py: its header has no nanoUCGM config")
    saved = json.loads(header["config"])
    known = {f.name for f in dataclasses.fields(Config)}
    config = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in known})
    names = json.loads(header["names"])
    net = build(config, json.loads(header["shape"]), len(names)).to(device)
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False), config, names
