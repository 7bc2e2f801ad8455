"""Run train.py with a slowed disk: `python faulty.py MARKER SECONDS train-flags...`. While MARKER exists a file is being flushed."""
import os
import runpy
import sys
import time
from pathlib import Path

marker, seconds = Path(sys.argv[1]), float(sys.argv[2])
flush = os.fsync


def slow_flush(handle):
    marker.touch()
    time.sleep(seconds)
    flush(handle)
    marker.unlink(missing_ok=True)


os.fsync = slow_flush
root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
sys.argv = ["train.py", *sys.argv[3:]]
runpy.run_path(str(root / "train.py"), run_name="__main__")
