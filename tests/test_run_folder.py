"""The folder of a run: what is ours in it, who may write there, and what a run says about it."""
import dataclasses
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_same
from runs import refused_nano as refused
from runs import train_nano as train
from toys import run, states

import engine
import features
from checkpoint import check_fit, find_states, load_model
from config import read_config
from data import open_dataset
from engine import claim_folder
from log import next_commands


pytestmark = pytest.mark.usefixtures("home")


# ---- what is ours -------------------------------------------------------------------------------------

def test_rotation_leaves_the_copies_of_a_user_alone(home, capsys):
    """Copies with names of their own sort last; they are neither deleted, nor renamed, nor resumed from."""
    train("--steps", 10, "--out", "straight", capsys=capsys)
    train("--steps", 5, "--out", "run", capsys=capsys)
    names = ("state_A.safetensors", "state_B.safetensors", "state_99.safetensors", "images_mine.npy",
             "state_best.0123456789abcdef.safetensors", f"{states('run')[0].name}.copy")
    copies = [Path("run") / name for name in names]
    for copy in copies:
        shutil.copy(states("run")[0], copy)
    before = [copy.read_bytes() for copy in copies]
    train("--steps", 10, "--out", "run", "--save_every", 1, capsys=capsys)
    assert [copy.read_bytes() for copy in copies] == before
    ours = find_states("run")
    assert [int(path.name[6:14]) for path in ours] == [10, 9]
    for copy in copies:
        copy.unlink()
    assert_same("straight", "run")


def test_damaged_states_of_later_steps_are_put_aside(home, capsys):
    train("--steps", 3, "--out", "run", capsys=capsys)
    for step in (50, 60, 70):
        shutil.copy(find_states("run")[0], f"run/state_{step:08d}.{'0' * 16}.safetensors")
    out = train("--steps", 4, "--out", "run", capsys=capsys)
    assert out.count("damaged") == 3            # their checksums are wrong
    assert [int(path.name[6:14]) for path in find_states("run")] == [4, 3]


@pytest.mark.parametrize("flags", ["--labels none --zeta 0 --style none", "--model TiT-XXS/2", "--ema 0.9",
                                   "--image_size 16", "--optimizer muon"])
def test_a_state_of_another_network_is_refused_before_anything_is_read(home, capsys, flags):
    """Names, shapes and dtypes are compared first; one line lists what differs."""
    train("--steps", 2, "--out", "run", capsys=capsys)
    err = refused("--steps", 4, "--out", "run", "--allow_change", *flags.split(), capsys=capsys)
    assert err.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert "->" in err or "has the state of adamw" in err


def test_one_tensor_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"1 differ: net.a: float32 \(2,\) -> float32 \(3,\)"):
        check_fit({"net.a": torch.zeros(2)}, {"net.a": torch.zeros(3)}, {})


# ---- which data ---------------------------------------------------------------------------------------

def save_images(*names):
    for k, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 5 * k % 250, np.uint8)).save(name)


def test_other_class_names_or_images_are_a_change(home, capsys):
    """A class folder renamed, an image added: said, and refused without --allow_change."""
    flags = ["--data", "folder:f", "--batch_size", 16, "--model", "TiT-XXS/8"]
    save_images(*[f"f/{name}/{k}.png" for name in ("bird", "cat") for k in range(10)])
    train("--steps", 2, "--out", "run", *flags, capsys=capsys)
    shutil.move("f/bird", "f/dog")
    err = refused("--steps", 4, "--out", "run", *flags, capsys=capsys)
    assert "['bird', 'cat'] -> ['cat', 'dog']" in err and "fingerprint" in err
    err = refused("--steps", 4, "--out", "next", "--init_from", "run", *flags, capsys=capsys)
    assert "['bird', 'cat']" in err and "--allow_change" in err
    shutil.move("f/dog", "f/bird")
    assert "resumed" in train("--steps", 4, "--out", "run", *flags, capsys=capsys)
    save_images("f/cat/11.png")
    assert "20 images" in refused("--steps", 6, "--out", "run", *flags, capsys=capsys)
    assert "resumed" in train("--steps", 6, "--out", "run", "--allow_change", *flags, capsys=capsys)


def test_other_images_under_the_same_names_are_a_change(home):
    """A folder's images are known by their names and sizes."""
    save_images(*[f"f/{name}/{k}.png" for name in "ab" for k in range(4)])
    before = open_dataset("folder:f", 8).fingerprint
    assert open_dataset("folder:f", 8).fingerprint == before
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save("f/b/2.png")
    assert open_dataset("folder:f", 8).fingerprint != before


def test_a_fingerprint_is_of_order_and_content(home):
    x, y = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    prints = set()
    for name, x_, y_ in (("a", x, y), ("b", x + 1, y), ("c", x, y[::-1]), ("d", x[:3], y[:3])):
        np.savez(f"{name}.npz", x=x_, y=y_)
        prints.add(open_dataset(f"npz:{name}.npz").fingerprint)
    assert len(prints) == 4 and open_dataset("npz:a.npz").fingerprint in prints


# ---- who may write ------------------------------------------------------------------------------------

def test_two_runs_in_one_folder(home, capsys):
    """The second is refused with the first one's process; a lock is gone with its process."""
    ours, theirs = multiprocessing.Pipe()

    def hold():
        lock = claim_folder("run")
        theirs.send(lock.is_locked)
        time.sleep(60)
    other = multiprocessing.get_context("fork").Process(target=hold, daemon=True)
    other.start()
    assert ours.recv()
    err = refused("--steps", 2, "--out", "run", capsys=capsys)
    assert f"in use by process {other.pid} on {socket.gethostname()}" in err and not states("run")
    assert "in use" in refused("--steps", 2, "--out", "run", "--fresh", capsys=capsys)
    other.kill()
    other.join()
    train("--steps", 2, "--out", "run", capsys=capsys)


def test_claiming_makes_the_folder(home):
    lock = claim_folder("a/b")
    with pytest.raises(ValueError, match=f"process {os.getpid()}"):
        claim_folder("a/b")
    lock.release()
    claim_folder("a/b").release()


# ---- what it says -------------------------------------------------------------------------------------


def test_the_hints_work_when_pasted(home, capsys):
    """Away from the default run: another folder, data set, size."""
    np.savez("d.npz", x=np.zeros((80, 8, 8, 3), np.uint8), y=np.arange(80) % 4)
    for flags in (["--out", "some run"], ["--data", "npz:d.npz", "--out", "b", "--image_size", 0],
                  ["--labels", "star", "--zeta", 0, "--style", "none"]):
        line = train("--steps", 1, *flags, capsys=capsys).strip().splitlines()[-1]
        commands = line.split("Next: ")[1].split(", or fine-tune it to two steps: ")
        assert len(commands) == 2
        script, *words = shlex.split(commands[0])[1:]
        drawn = ["--num", 2, "--steps", 1, "--device", "cpu", "--out", "two.npz"]
        assert run(script, *words, *drawn, capsys=capsys)[0] == 0
        assert np.load("two.npz")["arr_0"].shape == (2, 8, 8, 3)
        script, *words = shlex.split(commands[1])[1:]
        cheap = ["--steps", 1, "--no-compile", "--device", "cpu", "--dtype", "float32"]
        status, out, err = run(script, *words, *cheap, capsys=capsys)
        assert status == 0, err
        few = load_model(words[words.index("--out") + 1] if "--out" in words else "runs/shapes-few")[1]
        many = load_model(few.init_from)[1]
        assert (few.lam, few.data, few.labels) == (1, many.data, many.labels)


def test_two_steps_lead_to_one_where_a_recipe_has_it():
    """The command, read as train.py reads it, starts from this run with its data; one step is the end."""
    few = read_config(["--recipe", "fashion-few"], "")
    assert next_commands(few).endswith(" to one step: python train.py --recipe fashion-one")
    for config in (few, dataclasses.replace(few, out="a b", data="fashion:d", model="TiT-XXS/4")):
        one = read_config(shlex.split(next_commands(config).split("train.py ")[1]), "")
        assert (one.init_from, one.data, one.model) == (config.out, config.data, config.model) and one.distil
        assert one.out == ("runs/fashion-one" if config is few else "a b-one")
        assert " or " not in next_commands(one)
    for recipe in ("shapes-few", "shapes32-few"):       # shapes32-one starts from the many-step run
        assert " or " not in next_commands(read_config(["--recipe", recipe], ""))


def test_the_command_for_lambda_1_from_scratch_works(home, capsys):
    """`train.py --lam 1` alone names it: a whole command, to type as it is."""
    status, _, err = run("train.py", "--lam", 1, capsys=capsys)
    script, *words = err.split(" type python ")[1].split()
    assert status == 2 and script == "train.py" and words[:2] == ["--lam", "1"]
    cheap = "--steps 1 --image_size 8 --model TiT-nano/4 --batch_size 16 --no-compile --device cpu".split()
    status, out, err = run(script, *words, *cheap, capsys=capsys)
    assert status == 0 and "warning" not in out, err


@pytest.mark.parametrize("flags, word", [
    ("--no-x_pred --transport ddpm --lam 1 --zeta 0 --style none", "ddpm with lam 1 trains to nothing"),
    ("--no-x_pred --transport ddpm --zeta 0 --style none", ""),
    ("--no-x_pred --transport edm --lam 0.5 --zeta 0 --style none", ""),
    ("--style ft-vs-fe --label_drop 0", "null class is never trained"), ("--style ft-vs-fe", ""),
    ("--zeta 0 --style none --label_drop 0", "")])
def test_settings_that_train_to_nothing_are_said(home, capsys, flags, word):
    out = train("--steps", 1, "--model", "TiT-nano/4", "--gap", ".01,.001", "--kappa", 0, *flags.split(),
                capsys=capsys)
    assert "warning: " in out and word in out if word else "warning" not in out


def test_commit_is_of_this_repository(monkeypatch, tmp_path):
    """No git, or a copy inside another repository: no commit rather than a wrong one."""
    import log
    known = log.commit()
    monkeypatch.setenv("PATH", "")
    assert log.commit() == ""
    monkeypatch.undo()
    inner = tmp_path / "copy"
    inner.mkdir()
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(log, "__file__", str(inner / "log.py"))
    assert log.commit() == "" and (known == "" or len(known) >= 7)


def test_scores_of_ones_own_images_need_no_download(home, capsys, monkeypatch):
    """One command: features of the data are learned once and kept in the run's folder; FD has its name."""
    monkeypatch.setattr(features, "train_features", partial(features.train_features, steps=20))
    flags = ["--data", "folder:pets", "--batch_size", 16, "--model", "TiT-XXS/8"]
    save_images(*[f"pets/{name}/{k}.png" for name in ("cat", "dog") for k in range(20)])
    train("--steps", 1, "--out", "run", *flags, capsys=capsys)
    kept = []
    for _ in range(2):
        words = ["--ckpt", "run", "--num", 12, "--steps", 1, "--device", "cpu"]
        status, out, err = run("fid.py", *words, capsys=capsys)
        assert status == 0, err
        line = json.loads(out.strip().splitlines()[-1])
        assert line["FD-pets"] > 0 and line["N"] == 12 and line["features"].startswith("pets ")
        kept.append([(path.name, path.stat().st_mtime_ns) for path in Path("run").glob("features-pets8-*")])
    assert kept[0] == kept[1] and len(kept[0]) == 1
    assert "of 2 held-out images" in out or "once" not in err


@pytest.mark.parametrize("later, exits", [((0.1,), []), ((6.0,), [1]), ((4.0, 8.0), [1])])
def test_a_second_request_to_stop(monkeypatch, capfd, later, exits):
    """Five seconds after the first one it leaves without saving. Sooner it is the same one, that SLURM and
    torchrun both send. The previous handlers are restored at the end."""
    now, left, before = [100.0], [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(engine.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(engine.os, "_exit", left.append)
    with engine.Signals(None) as signals:
        assert signals.agree() == [0, 0]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.agree() == [0, signal.SIGUSR1] and signals.agree() == [0, 0]
        os.kill(os.getpid(), signal.SIGHUP)
        for seconds in later:
            now[0] = 100 + seconds
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.agree()[0] == signal.SIGTERM
    assert left == exits and signal.getsignal(signal.SIGTERM) == before != signals.hear
    assert ("stopped without saving" in capfd.readouterr().err) == bool(exits)
