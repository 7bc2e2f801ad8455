"""The promise: extras/ may be deleted. The core then trains, fine-tunes, samples and scores."""
import os
import shutil
import subprocess
import sys

from PIL import Image
from toys import ROOT

COMMON = ("--image_size 32 --model TiT-XXS/8 --batch_size 16 --steps 2 --save_every 1000 --sample_steps 1 "
          "--no-compile --device cpu")
COMMANDS = [f"train.py {COMMON} --out many",
            f"train.py --recipe shapes-few --init_from many {COMMON} --out few",
            "sample.py --ckpt few --steps 2 --num 8 --device cpu",
            "fid.py --ckpt few --steps 2 --num 64 --device cpu"]
JOB = """
import importlib, pathlib, runpy, sys
sys.path.insert(0, "")
for name in ("train", "sample", "fid"):
    importlib.import_module(name)
assert "torch.distributed.tensor" not in sys.modules
for path in pathlib.Path().glob("*.py"):
    importlib.import_module(path.stem)
importlib.import_module("minimal").main(3, 2, "minimal.png")
for command in sys.argv[1:]:
    sys.argv = command.split()
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_core_does_the_whole_job_without_extras(tmp_path):
    """A copy of the repository without extras/: every module is imported, and the commands of the README run,
    shortened. No script loads torch.distributed.tensor,
    which is slow, before it is needed."""
    here = tmp_path / "repository"
    left_out = shutil.ignore_patterns("extras", "tests", "experiments", "docs", "runs", ".*", "__pycache__")
    shutil.copytree(ROOT, here, ignore=left_out)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", JOB, *COMMANDS], cwd=here, capture_output=True, text=True,
                          env={**environment, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (here / "extras").exists() and '"FD-shapes"' in done.stdout.splitlines()[-1]
    sizes = [Image.open(here / f"{name}.png").size for name in ("minimal", "samples")]
    assert sizes == [(3 * 16 * 24, 3 * 3 * 24), (8 * 68 - 4, 18 + 68 - 4)]
