"""Damaged files, whatever the damage: a good read, or one line that names the file."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from checkpoint import load_model, newest_state, read_state, read_weights
from data import open_dataset
from fid import is_statistics, read_statistics, stored_images
from images import read_rgb
from extras.latents import map_shard
from extras.published import unwrap
from log import read_log

OLD = Path(__file__).parent / "old_run/many"


def npz(path):
    np.savez_compressed(path, x=np.arange(4 * 8 * 8, dtype=np.uint8).reshape(4, 8, 8), y=np.arange(4))


def reference(path):
    np.savez_compressed(path, mu=np.zeros(4), sigma=np.eye(4), made=json.dumps({"n": 5}))


def model(path):
    shutil.copy(OLD / "model.safetensors", path)


def published(path, **how):
    torch.save({"ema": {"x_embedder.proj.weight": torch.zeros(4, 3, 2, 2)}, "steps": 3}, path, **how)


def legacy(path):
    published(path, _use_new_zipfile_serialization=False)


def shard(path):
    tensors = {"latents": torch.zeros(2, 4, 2, 2), "labels": torch.zeros(2, dtype=torch.int64)}
    safetensors.torch.save_file(tensors, path, {"notes": json.dumps({"settings": {}})})


def png(path):
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(path)


def read_ref(path):
    return read_statistics(str(path)) if is_statistics(str(path)) else list(stored_images(str(path), 4))


KINDS = {"data.npz": (npz, lambda path: open_dataset(f"npz:{path}")), "reference.npz": (reference, read_ref),
         "model.safetensors": (model, read_weights), "state.safetensors": (model, read_state),
         "published.pt": (published, unwrap), "legacy.pt": (legacy, unwrap),
         "shard.safetensors": (shard, map_shard), "image.png": (png, read_rgb)}


@pytest.mark.parametrize("name", KINDS)
def test_any_mutation_gives_one_line_or_a_good_read(tmp_path, name):
    """150 mutations of each format, 1,200 in all: bytes changed, cut out, put in, and the end cut off."""
    make, read = KINDS[name]
    make(tmp_path / name)
    whole, draw, refused = (tmp_path / name).read_bytes(), np.random.default_rng(0), 0
    for k in range(150):
        content = bytearray(whole)
        for _ in range(int(draw.integers(1, 6))):
            place = int(draw.integers(min(len(content), 600) if k % 2 else len(content)))
            content[place:place + int(draw.integers(0, 3))] = draw.bytes(int(draw.integers(0, 4)))
        (tmp_path / name).write_bytes(content[:int(draw.integers(len(content)))] if k % 5 == 0 else content)
        try:
            read(tmp_path / name)
        except ValueError as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error)
    assert refused > 30


def test_a_damaged_model_or_log_blocks_nothing_else(tmp_path):
    """A log with a cut line, glued lines, a byte that is no UTF-8 and NaN; a state that is damaged."""
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "loss": NaN}\n{"step": 2}{"step": 3}\n\xff\n[1]\n'
                                         b'{"step": "x"}\n{"step": 4, "loss": 0.5}\n{"step": 5, "lo')
    assert read_log(tmp_path) == [{"step": 1, "loss": None}, {"step": 4, "loss": 0.5}]
    (tmp_path / f"state_00000007.{'0' * 16}.safetensors").write_bytes(b"no state")
    assert newest_state(tmp_path) is None
    with pytest.raises(ValueError, match="no model at"):
        load_model(tmp_path)
