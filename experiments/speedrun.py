"""The speedrun: minutes from nothing to a model of the shapes that is good in two network calls.

    python experiments/speedrun.py                  # the time to beat: trains it, times it, checks it
    python experiments/speedrun.py --seed 1 --commands "train.py --steps 9000; train.py --recipe shapes-few"

The rules:
1. At two calls per image, FD-shapes is at most 4 and at least 96 % are recognised, over 10,000 images.
2. The clock runs from the first command to the end of the last, compilation included, in an empty folder.
3. Everything may change but shapes.py, features.py, fid.py and assets/; no weights from elsewhere.

A record is the mean time of seeds 0, 1 and 2, each of which keeps rule 1. RESULTS.md lists them. The time
to beat is that of the quick start with twice the steps, and with its second call at t = .6 and rho .5.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import UserError, read_flags, setting
from engine import run
from log import commit

ROOT = Path(__file__).resolve().parent.parent
RECORD = "train.py --steps 10000; train.py --recipe shapes-few --rho .5 --gap .001,.6"
LIMITS = {"FD-shapes": 4.0, "accuracy": 0.96}


@dataclass
class Options:
    commands: str = setting(RECORD, "what to run, separated by ;")
    seed: int = setting(0, "of every command", least=0)
    num: int = setting(10_000, "images to score", least=2)
    out: str = setting("speedrun.jsonl", "the line is added to this file")


def call(command, folder, **how):
    """Run a script of this repository in a folder, where nothing is compiled yet. Returns its output."""
    script, *flags = command.split()
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    done = subprocess.run([sys.executable, ROOT / script, *flags], cwd=folder, env=environment, **how)
    if done.returncode:
        raise UserError(f"{command} failed")
    return done.stdout


def main(options):
    commands = [text.strip() for text in options.commands.split(";")]
    with tempfile.TemporaryDirectory() as folder:
        folder, start = Path(folder), time.monotonic()
        for command in commands:
            call(f"{command} --seed {options.seed}", folder)
        minutes = (time.monotonic() - start) / 60
        last = max(folder.glob("runs/*/model.safetensors"), key=lambda path: path.stat().st_mtime)
        shown = call(f"fid.py --ckpt {last} --steps 2 --num {options.num}", folder, stdout=subprocess.PIPE)
    score = json.loads(shown.splitlines()[-1])
    kept = score["FD-shapes"] <= LIMITS["FD-shapes"] and score["accuracy"] >= LIMITS["accuracy"]
    line = {"minutes": round(minutes, 2), "kept": kept, "FD-shapes": score["FD-shapes"],
            "accuracy": score["accuracy"], "seed": options.seed, "cores": os.cpu_count(),
            "commit": commit(), "commands": commands}
    with open(options.out, "a") as file:
        print(json.dumps(line), file=file)
    print(f"{minutes:.1f} min, FD-shapes {score['FD-shapes']:.2f}, {score['accuracy']:.1%} recognised at two "
          f"calls: {'within' if kept else 'not within'} the limits; the line is in {options.out}")


if __name__ == "__main__":
    run(lambda: main(Options(**read_flags(Options, sys.argv[1:], __doc__))))
