"""The commands of experiments/ run, each at a size that shows that it fits the code."""
import json
import math
import os
import subprocess
import sys

import pytest
from PIL import Image
from toys import ROOT

MODEL = "assets/shapes-few.safetensors"
SCRIPTS = sorted(path.name for path in (ROOT / "experiments").glob("*.py"))
pytestmark = pytest.mark.slow


def run(command, **environment):
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_how_a_script_is_called_and_its_flags(script):
    usage, flags = run(f"experiments/{script} -h").split("options:")
    assert f"python experiments/{script}" in usage and "  --" in flags


@pytest.mark.parametrize("command, methods", [
    (f"peers.py curves --ckpt {MODEL} --num 64 --nfe 4 --kappas 0,auto --out OUT",
     ["Euler", "UCGM-S kappa auto", "Heun", "DPM-Solver++(2M)", "UniPC", "UniPC on the grid of kappa auto"]),
    (f"peers.py meanflow --ckpt {MODEL} --num 64 --seconds 0.1 --out OUT",
     ["MeanFlow"] * 3 + [f"MeanFlow, second call at {t}" for t in (0.3, 0.4, 0.7)]),
], ids=["curves", "meanflow"])
def test_peers_write_a_finite_score_for_each_method(command, methods, tmp_path):
    if "curves" in command:
        pytest.importorskip("diffusers")
    out = tmp_path / "scores.jsonl"
    run(f"experiments/{command}".replace("OUT", str(out)), TORCHDYNAMO_DISABLE="1")     # compiling takes long
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["method"] for line in lines] == methods
    assert all(math.isfinite(line["FD-shapes"]) for line in lines)


@pytest.mark.parametrize("command, rows", [
    ("pose.py --price --num 64", 7),
    (f"pose.py --ckpt {MODEL} --num 64 --train_steps 2 --steps 4 --starts 0.5", 3),
    ("overlap.py", 8),
    ("memory.py --models TiT-XXS/1", 3),
    ("loader.py --images 600 --workers 1 --model TiT-XXS/8 --batch 16 --seconds 0.1 --no-compile", 4),
    ("bench.py --compiles no --batches 16 --seconds 0.01 --modes sample", 11),
    (f"accelerate.py --ckpt {MODEL} --num 2 --columns 2,4 --device cpu", 12),
], ids=["price", "pose", "overlap", "memory", "loader", "bench", "accelerate"])
def test_a_table_has_its_rows(command, rows):
    if command.startswith("accelerate"):
        pytest.importorskip("diffusers")
    assert len(run(f"experiments/{command}").strip().splitlines()) == rows


def test_a_speedrun_scores_the_last_model_and_keeps_its_rules(tmp_path):
    """Two steps keep no limit. The line says what was run."""
    out = tmp_path / "speedrun.jsonl"
    command = "train.py --model TiT-XXS/8 --x_pred --steps 2 --batch_size 16 --no-compile"
    flags = ["--num", "64", "--seed", "3", "--out", out, "--commands", f"{command}; {command} --out runs/b"]
    shown = subprocess.run([sys.executable, "experiments/speedrun.py", *flags], cwd=ROOT, text=True,
                           capture_output=True).stdout
    line = json.loads(out.read_text())
    assert "not within the limits" in shown and not line["kept"] and line["FD-shapes"] > 100
    assert line["commands"] == [command, f"{command} --out runs/b"] and line["seed"] == 3
    assert 0 < line["minutes"] < 5


def test_report_makes_the_cells_of_results_md():
    """Two and four calls after 15,000 steps, mean and range over three seeds."""
    table = run("experiments/report.py experiments/results/few.jsonl").splitlines()
    cells = [cell.strip() for cell in table[-1].strip("|").split("|")]
    row, = (line for line in (ROOT / "RESULTS.md").read_text().replace("*", "").splitlines()
            if line.startswith("| shapes, 15,000 steps, ours | UCGM-T |"))
    assert cells[0] == "few" and [cell.strip() for cell in row.split("|")][4:6] == cells[1:]


@pytest.mark.parametrize("command, size", [
    (f"grids.py --few {MODEL} --many {MODEL} --columns 2 --rows 1 --out OUT/page.png", (288, 188)),
    ("plot.py --train_steps 2 --out OUT/page.png", (1430, 357)),
    ("plot.py straight --out OUT/page.png", (1540, 374)),
    ("report.py experiments/results/curves-0.jsonl --out OUT", (910, 546)),
], ids=["grids", "plot", "straight", "report"])
def test_a_figure_is_drawn(command, size, tmp_path):
    """Of its size, and in more colours than axes and words have."""
    if "grids" not in command:
        pytest.importorskip("matplotlib")
    run(f"experiments/{command}".replace("OUT", str(tmp_path)))
    page = Image.open(next(tmp_path.glob("*.png"))).convert("RGB")
    assert page.size == size and len(page.getcolors(2**20)) > 500


def test_overlap_measures_on_two_processes():
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2"
    shown = run(f"{torchrun} experiments/overlap.py --model TiT-XXS/4", OMP_NUM_THREADS="1")
    assert "of it while the backward pass computes" in shown
