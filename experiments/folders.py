"""What does a folder of very many files cost at the start, in seconds and in memory?

    python experiments/folders.py                       # 10,000, 100,000 and 1,000,000 files, 5 GiB of disk
    python experiments/folders.py --files 10000

The files are one PNG of 8x8 pixels under many names, in ten classes. Cold: the images are decoded into the
cache. Warm: the same again. CPU: seconds of the process itself, without those that decode for it. Memory is
what a process has more than after its imports, once it holds images out and has drawn a batch, as train.py
does, while the others still hold theirs. rss: resident, with the pages of the cache that it touched; pss: the
same, with each shared page divided among its processes; peak: the highest rss so far. Linux only.
"""
import multiprocessing
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import read_flags, setting
from data import open_dataset
from engine import pick_device, run

CONTEXT = multiprocessing.get_context("spawn")


@dataclass
class Options:
    files: str = setting("10000,100000,1000000", "files in a folder")
    processes: str = setting("1,2", "processes that start together")


def write_files(root, count):
    for label in range(10):
        (root / str(label)).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "0/image_0000000.png")
    content = (root / "0/image_0000000.png").read_bytes()
    for k in np.random.default_rng(0).permutation(count).tolist():      # nobody's files lie in order
        (root / str(k % 10) / f"image_{k:07d}.png").write_bytes(content)


def memory():
    """MiB of this process, as in the table."""
    text = "".join(Path("/proc/self", name).read_text() for name in ("smaps_rollup", "status"))
    return np.array([int(re.search(rf"{key}:\s+(\d+) kB", text)[1]) / 2**10
                     for key in ("Rss", "Pss", "VmHWM")])


def start(root, cache, barrier, queue):
    """Put both seconds and memory() of one process into the queue."""
    pick_device("cpu")
    barrier.wait()
    before = memory()
    barrier.wait()
    clock = np.array([time.perf_counter(), time.process_time()])
    data = open_dataset(f"folder:{root}", 8, cache=cache)
    seconds = [time.perf_counter(), time.process_time()] - clock
    data.hold_out(256)
    data[np.arange(64)]
    barrier.wait()
    queue.put([*seconds, *memory() - before])
    barrier.wait()


def main(options):
    names = "files | processes | cache | seconds | CPU, s | rss, MiB | pss, MiB | peak, MiB"
    print(f"| {names} |\n" + "|---" * 8 + "|")
    for count in map(int, options.files.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "images"
            write_files(root, count)
            for world in map(int, options.processes.split(",")):
                for cache in ("cold", "warm"):
                    barrier, queue = CONTEXT.Barrier(world), CONTEXT.SimpleQueue()
                    args = (root, f"{folder}/cache{world}", barrier, queue)
                    processes = [CONTEXT.Process(target=start, args=args) for _ in range(world)]
                    for process in processes:
                        process.start()
                    rows = [queue.get() for _ in processes]
                    for process in processes:
                        process.join()
                    times, sizes = np.split(np.max(rows, 0), [2])
                    cells = [f"{count:,}", world, cache, *(f"{x:.2f}" for x in times),
                             *(f"{x:.0f}" for x in sizes)]
                    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    run(lambda: main(Options(**read_flags(Options, sys.argv[1:], __doc__))))
