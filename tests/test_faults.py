"""What may go wrong with files, disks and numbers: a good read, a run that goes on, or one line to act on."""
import errno
import hashlib
import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from runs import NANO, assert_same, log_of, reached
from runs import refused_nano as refused
from runs import train_nano as train
from safetensors.torch import load_file
from torch.testing import assert_close
from toys import run, states

import checkpoint
import data
import engine
import optim
from checkpoint import load_model, newest_state, read_state, read_weights
from config import UserError
from data import open_dataset
from engine import atomic_write, ignore_disk_errors
from extras.latents import map_shard
from extras.published import unwrap
from fid import read_statistics, stored_images
from images import read_rgb
from log import read_log

OLD = Path(__file__).parent / "old_run/many"


pytestmark = pytest.mark.usefixtures("home")


# ---- files --------------------------------------------------------------------------------------------

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
    return read_statistics(str(path), 4)[0] or list(stored_images(str(path), 4))


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


def test_damaged_metadata_is_named(tmp_path):
    metadata = {"format": "nanoUCGM 1", "config": "{"}
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(ValueError, match="x.safetensors has damaged metadata"):
        load_model(tmp_path / "x.safetensors")


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_used(capsys):
    """Cut, one bit flipped, emptied: the run goes on from the state before, to the same weights."""
    train("--steps", 6, "--save_every", 2, "--out", "straight", capsys=capsys)
    train("--steps", 4, "--save_every", 2, "--out", "sound", capsys=capsys)
    flipped = bytearray(states("sound")[-1].read_bytes())
    flipped[len(flipped) // 2] ^= 1
    for out, content in (("cut", flipped[:-1000]), ("flipped", flipped), ("emptied", b"")):
        shutil.copytree("sound", out)
        newest = states(out)[-1]
        newest.write_bytes(content)
        printed = train("--steps", 6, "--save_every", 2, "--out", out, capsys=capsys)
        assert f"{newest} is damaged" in printed and f"resumed from {out}/state_00000002" in printed
        assert newest.with_suffix(".damaged").read_bytes() == content
        assert_same("straight", out)


def test_a_malicious_pickle_is_never_executed(home, capsys):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(home / "executed"),)
    bomb = pickle.dumps(Bomb())
    train("--steps", 1, "--out", "run", capsys=capsys)
    right = hashlib.sha256(bomb).hexdigest()[:16]                # even with a right checksum
    Path(f"run/state_00000099.{right}.safetensors").write_bytes(bomb)
    assert "state_00000099" in refused("--steps", 20, "--out", "run", capsys=capsys)
    Path("bomb.safetensors").write_bytes(bomb)
    torch.save({"model": Bomb()}, "bomb.pt")
    torch.save({"ema": load_file(OLD / "model.safetensors"), "args": Bomb()}, "beside.pt")
    for file in ("bomb.safetensors", "bomb.pt", "beside.pt"):
        status, _, err = run("sample.py", "--ckpt", file, capsys=capsys)
        assert status == 2 and file in err and err.count("\n") == 1
        assert file in refused("--out", "other", "--init_from", file, capsys=capsys)
    assert not Path("executed").exists()
    pickle.loads(bomb)
    assert Path("executed").exists()                            # it would have been seen


# ---- disks -------------------------------------------------------------------------------------------

def test_a_folder_that_cannot_be_written_to_is_refused_at_the_start(capsys):
    """For root it is one that the kernel keeps; Linux has it."""
    out = "run" if os.geteuid() else "/sys/run"
    Path("run").mkdir(mode=0o555)
    assert f"cannot write into {out}" in refused("--steps", 2, "--out", out, capsys=capsys)


def test_out_below_a_file_is_refused_at_the_start(capsys):
    Path("file").write_text("")
    assert "cannot write into file/run" in refused("--steps", 2, "--out", "file/run", capsys=capsys)


def test_modes_and_folder_flushes_are_best_effort(monkeypatch):
    """File systems that refuse chmod or fsync of a folder; the umask is respected where modes exist. A write
    that fails leaves nothing behind."""
    monkeypatch.setattr(engine, "UMASK", 0o027)
    atomic_write("a", lambda path: path.write_text("x"))
    assert Path("a").stat().st_mode & 0o777 == 0o640

    def refuse(*arguments):
        raise PermissionError(1, "not permitted")
    monkeypatch.setattr(os, "chmod", refuse)
    flush = engine.flush
    monkeypatch.setattr(engine, "flush", lambda path: refuse() if Path(path).is_dir() else flush(path))
    atomic_write("a", lambda path: path.write_text("y"))
    assert Path("a").read_text() == "y" and not Path("a.tmp").exists()
    with pytest.raises(ZeroDivisionError):
        atomic_write("a", lambda path: path.write_text("z") / 0)
    assert Path("a").read_text() == "y" and not Path("a.tmp").exists()


def test_only_what_passes_is_survived():
    """A full disk, a quota, a failing disk; and a permission, which does not pass."""
    told = []
    for error in (OSError(28, "No space left"), OSError(122, "quota"), OSError(5, "I/O"),
                  safetensors.SafetensorError("IoError (os error 28)")):
        with ignore_disk_errors("it", told.append):
            raise error
    assert len(told) == 4
    for error in (PermissionError(13, "denied"), OSError(30, "read-only"),
                  safetensors.SafetensorError("denied (os error 13)")):
        with pytest.raises(ValueError, match="it cannot be written"), ignore_disk_errors("it", told.append):
            raise error


@pytest.mark.parametrize("number, passes", [
    ("ENOSPC", True), ("EDQUOT", True), ("EIO", True), ("ESTALE", True), ("ETIMEDOUT", True),
    ("EAGAIN", True), ("EACCES", False), ("EROFS", False), ("EBADF", False), ("ENOENT", False)])
def test_each_kind_of_disk_error(number, passes):
    told, error = [], OSError(getattr(errno, number), "it failed")
    if passes:
        with ignore_disk_errors("it", told.append):
            raise error
    else:
        with pytest.raises(UserError, match="it cannot be written"), ignore_disk_errors("it", told.append):
            raise error
    assert len(told) == passes
    with ignore_disk_errors("it", told.append, transient=None):     # the log and the curves: never fatal
        raise error
    assert len(told) == passes + 1


def test_skipped_steps_count_in_a_row():
    """Sixty skipped, one good and sixty skipped go on; a hundred in a row do not, whenever it is reported."""
    skipped, told = optim.Skipped(torch.device("cpu")), []
    good, bad = torch.tensor(True), torch.tensor(False)
    for finite in [bad] * 60 + [good] + [bad] * 60:
        skipped.add(finite)
    assert skipped.report(121, None, told.append) == 120
    for _ in range(39):
        skipped.add(bad)
    assert skipped.report(160, None, told.append) == 39     # 99 in a row
    skipped.note(torch.tensor([1.0, float("nan"), 2.0]), torch.tensor([0.9, 0.4, 0.1]))
    skipped.add(bad)
    with pytest.raises(UserError, match="100 steps up to step 161"):
        skipped.report(161, None, told.append)
    assert "1 steps skipped" in told[-1] and "t = 0.400 on process 0" in told[-1]
    skipped.add(good)
    assert skipped.report(162, None, told.append) == 0 and len(told) == 3


def test_a_run_whose_end_is_not_on_disk_says_so(capsys, monkeypatch):
    """Status 2 and the truth in the last line; the checkpoint before is kept; the same command ends it."""
    train("--steps", 4, "--out", "run", capsys=capsys)

    def full(*arguments):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.safetensors.torch, "save_file", full)
        err = refused("--steps", 8, "--out", "run", capsys=capsys)
    assert "step 8 is not in run" in err and "Next" not in err and len(states("run")) == 1
    train("--steps", 8, "--out", "run", capsys=capsys)
    train("--steps", 8, "--out", "straight", capsys=capsys)
    assert_same("straight", "run")


def test_what_a_kill_inside_a_save_leaves_the_next_save_takes(capsys, monkeypatch):
    """Also with other bytes: they have other --steps."""
    def killed(path):
        if Path(path).name.startswith("state"):
            raise SystemExit(1)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "flush", killed)
        patch.setattr(Path, "unlink", lambda *arguments, **more: None)
        assert run("train.py", *NANO, "--steps", 2, capsys=capsys)[0] == 1
    assert list(Path("runs/shapes").glob("*.tmp")) and not states("runs/shapes")
    train("--steps", 4, capsys=capsys)
    assert not list(Path("runs/shapes").glob("*.tmp"))


# ---- numbers that are not finite ---------------------------------------------------------------------

def plant(monkeypatch, bad):
    """NaN in the first image of every step for which bad(step)."""
    original = data.Shapes.__getitem__

    def getitem(self, positions):
        x, y = original(self, positions)
        firsts = [k for k, p in enumerate(map(int, positions)) if p < 2**60 and p % 64 == 0 and bad(p // 64)]
        x[firsts] = float("nan")
        return x, y
    monkeypatch.setattr(data.Shapes, "__getitem__", getitem)


@pytest.mark.parametrize("optimizer", ["adamw", "radam", "muon"])
def test_one_nan_is_skipped_and_counted(capsys, monkeypatch, optimizer):
    """The step leaves weights and optimiser alone, the log counts it, and the run goes on."""
    train("--steps", 3, "--out", "before", "--optimizer", optimizer, capsys=capsys)
    plant(monkeypatch, lambda step: step == 3)
    train("--steps", 4, "--out", "skipped", "--optimizer", optimizer, capsys=capsys)
    before, after = (load_file(states(out)[-1]) for out in ("before", "skipped"))
    for name in before:
        if name.startswith(("net.", "optimizer.")):
            assert_close(before[name], after[name], rtol=0, atol=0, msg=name)
    train("--steps", 10, "--out", "skipped", "--optimizer", optimizer, capsys=capsys)
    lines = [line for line in log_of("skipped") if "loss" in line]
    assert [line["skipped"] for line in lines] == [1, 0, 0]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert not torch.equal(load_file(states("skipped")[-1])["net.final_layer.linear.weight"],
                           after["net.final_layer.linear.weight"])


@pytest.mark.parametrize("make", [partial(torch.optim.SGD, momentum=0.9), torch.optim.NAdam,
                                  partial(torch.optim.SGD, momentum=0.9, fused=True)])
def test_somebody_elses_optimiser_skips_it_too(make):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, seen = make([weight], lr=0.1), []
    for value in (1.0, float("nan"), 1.0):
        weight.grad = torch.full((3,), value)
        optim.optimizer_step(optimizer, weight.grad.norm().isfinite())
        seen.append(weight.detach().clone())
    assert seen[0][0] < 1 and torch.equal(seen[0], seen[1]) and (seen[2] < seen[1]).all()


def test_nan_from_then_on_stops_the_run_with_a_usable_checkpoint(capsys, monkeypatch):
    """One line that names a time t; the last checkpoint is finite, and goes on once the data are good."""
    with monkeypatch.context() as patch:
        patch.setattr(optim, "MAX_SKIPPED", 5)
        plant(patch, lambda step: step >= 7)
        status, out, err = run("train.py", *NANO, "--save_every", 5, "--steps", 100, capsys=capsys)
    assert status == 2 and "t = 0." in out + err
    assert "step 15" in err.partition("error: ")[2].splitlines()[0]
    assert reached("runs/shapes") == 10
    assert all(value.isfinite().all() for value in load_file(states("runs/shapes")[-1]).values())
    train("--steps", 18, "--allow_change", "--save_every", 5, capsys=capsys)
    assert reached("runs/shapes") == 18 and np.isfinite(log_of("runs/shapes")[-1]["held_out_loss"])


@pytest.mark.parametrize("lr", ["100", "1e15"])
def test_divergence_is_not_loss_0(capsys, lr):
    """NaN, and an infinite loss whose gradient is 0: skipped and counted; a mean over nothing is null."""
    train("--steps", 12, "--out", "run", "--lr", lr, "--log_every", 1, "--x_pred", capsys=capsys)
    text = Path("run/log.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    lines = [line for line in log_of("run") if "loss" in line]
    skipped = [line for line in lines if line["skipped"]]
    assert skipped and all(line["loss"] is None or line["loss"] > 0 for line in lines)
    assert all(line["grad_norm"] is None for line in skipped)


def test_a_diverged_model_is_not_drawn(capsys):
    """NaN weights: one line in place of black images, for a page and for a score."""
    train("--steps", 1, "--out", "run", capsys=capsys)
    with safetensors.safe_open("run/model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file("run/model.safetensors")
    tensors = {name: value * torch.nan for name, value in tensors.items()}
    safetensors.torch.save_file(tensors, "run/model.safetensors", metadata)
    status, _, err = run("sample.py", "--ckpt", "run", "--num", 4, "--steps", 2, capsys=capsys)
    assert status == 2 and "not finite" in err and not Path("samples.png").exists()
    assert json.loads(metadata["config"])["lam"] == 0
