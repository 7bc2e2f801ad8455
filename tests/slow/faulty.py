"""Run train.py on a slow disk: `python faulty.py FLUSH WORKERS flags...`.

FLUSH: seconds that a flush takes; meanwhile the file `marker` exists. WORKERS: processes that
read the data, which train.py itself has only on a GPU.
"""
import os
import runpy
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

flush, loader, marker = os.fsync, torch.utils.data.DataLoader, Path("marker")
seconds, workers = float(sys.argv[1]), int(sys.argv[2])


def slow_flush(handle):
    marker.touch()
    time.sleep(seconds)
    flush(handle)
    marker.unlink(missing_ok=True)


def loader_with_workers(*arguments, **settings):
    return loader(*arguments, **{**settings, "num_workers": workers, "multiprocessing_context": "fork"})


os.fsync = slow_flush
if workers:
    torch.utils.data.DataLoader = loader_with_workers
sys.argv = ["train.py", *sys.argv[3:]]
runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
