"""The tables and curves of RESULTS.md from the lines that fid.py and peers.py wrote.

    python experiments/report.py experiments/results/*.jsonl            # markdown tables to the terminal, assets/nfe-DATA.png
"""
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def read(paths):
    """Lines with .method, NFE, score, data."""
    lines = []
    for path in paths:
        for text in Path(path).read_text().splitlines():
            line = json.loads(text)
            name = next(key for key in line if key.startswith("FD-"))
            lines.append({**line, "data": name[3:], "score": line[name], "method": line.get("method", re.sub(r"-\d+$", "", Path(line["ckpt"]).name))})
    return lines


def mean_and_range(values):
    text = f"{sum(values) / len(values):.2f}"
    return text if len(values) == 1 else f"{text} ({min(values):.2f} to {max(values):.2f})"


def table(lines):
    """Rows by method, columns by NFE: mean and range over the seeds."""
    cells = defaultdict(list)
    for line in lines:
        cells[line["method"], line["NFE"]].append(line["score"])
    calls, methods = sorted({nfe for _, nfe in cells}), list(dict.fromkeys(method for method, _ in cells))
    rows = ["| method | " + " | ".join(f"NFE {nfe}" for nfe in calls) + " |", "|---|" + "---|" * len(calls)]
    rows += [f"| {m} | " + " | ".join(mean_and_range(cells[m, nfe]) if (m, nfe) in cells else "" for nfe in calls) + " |" for m in methods]
    return "\n".join(rows)


def plot(lines, path):
    """Score against NFE: a line a method, its range over the seeds shaded; only scores below 20, the others would flatten the rest."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    cells = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line["score"] < 20:
            cells[line["method"]][line["NFE"]].append(line["score"])
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for method, points in cells.items():
        calls = sorted(points)
        if len(calls) > 1:
            drawn = axes.plot(calls, [sum(points[n]) / len(points[n]) for n in calls], marker="o", markersize=3, label=method)[0]
            axes.fill_between(calls, [min(points[n]) for n in calls], [max(points[n]) for n in calls], alpha=0.15, color=drawn.get_color())
    axes.set(xscale="log", xlabel="network evaluations a picture", ylabel=f"FD-{lines[0]['data']} (not FID), lower is better")
    axes.set_xticks((4, 8, 10, 20, 40, 80), ("4", "8", "10", "20", "40", "80"))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.axhline(lines[0]["floor"], color="grey", linewidth=1, linestyle=":", label="real against real")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(paths):
    lines = read(paths)
    for data in dict.fromkeys(line["data"] for line in lines):
        for num in sorted({line["N"] for line in lines if line["data"] == data}):
            some = [line for line in lines if line["data"] == data and line["N"] == num]
            print(f"\nFD-{data}, N = {num}, floor {mean_and_range([line['floor'] for line in some])}\n\n{table(some)}")
        curves = [line for line in lines if line["data"] == data and "seconds" in line and "train_seconds" not in line]
        if curves:
            plot(curves, ASSETS / f"nfe-{data}.png")
            print(f"\n{ASSETS / f'nfe-{data}.png'}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
