"""Pictures of op results, drawn from the lines of JSON alone by `python bench/report.py --plots`.

Of each op the time over its floor and the ratio to its best peer; of what multiplies matrices a
roofline; of decoding the time against the context. Needs matplotlib (the extra `bench`).
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict
Series = dict[str, list[tuple[float, float]]]


def peer_times(row: Row) -> dict[str, float]:
    return {name: peer["us"] for name, peer in row["peers"].items() if "us" in peer}


def over_floor(rows: list[Row]) -> dict[str, list[tuple[float, str]]]:
    """(time over floor, case) of ours and of each peer."""
    found = defaultdict(list)
    for row in rows:
        for name, us in {"gemma4_kernels": row["us"], **peer_times(row)}.items():
            found[name].append((us / row["floor_us"], row["case"]))
    return found


def best_peer_ratios(rows: list[Row]) -> list[tuple[float, str]]:
    """(the fastest peer's time over ours, case and peer)."""
    found = []
    for row in rows:
        if times := peer_times(row):
            name = min(times, key=times.get)
            found.append((times[name] / row["us"], f"{row['case']} ({name})"))
    return found


def roofline(rows: list[Row]) -> list[tuple[float, float, str]]:
    """(useful FLOP a byte, TFLOP/s, case) of the cases that have both."""
    return [
        (1e3 * row["tflop_s"] / row["gb_s"], row["tflop_s"], row["case"])
        for row in rows
        if row["tflop_s"] and row["gb_s"]
    ]


def against_context(rows: list[Row]) -> Series:
    """(keys, µs) by model and batch."""
    found = defaultdict(list)
    for row in rows:
        if match := re.fullmatch(r"(.*), batch (\d+), (\d+) keys", row["case"]):
            found[f"{match[1]}, batch {match[2]}"].append((int(match[3]), row["us"]))
    return {name: sorted(points) for name, points in found.items() if len(points) > 1}


def draw(rows: list[Row], folder: Path) -> None:
    """Of the lines of one run of bench_ops.py."""
    from matplotlib import pyplot

    @contextmanager
    def picture(name: str, height: float) -> Iterator[Any]:
        figure, axes = pyplot.subplots(figsize=(8, height))
        yield axes
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
        figure.savefig(folder / f"{name}.png", bbox_inches="tight")
        pyplot.close(figure)

    machine = next(row for row in rows if row["kind"] == "machine")
    by_op = defaultdict(list)
    for row in rows:
        if row["kind"] == "op":
            by_op[row["op"]].append(row)
    for op, mine in sorted(by_op.items()):
        tall, title = 1 + 0.3 * len(mine), f"{op}, {machine['device']}"
        with picture(op, tall) as axes:
            for name, points in over_floor(mine).items():
                mark = "o" if name == "gemma4_kernels" else "x"
                axes.plot(*zip(*points, strict=True), mark, label=name)
            axes.set(xscale="log", xlabel="time over floor", title=title)
        if ratios := best_peer_ratios(mine):
            with picture(f"{op}-best-peer", tall) as axes:
                values, names = zip(*ratios, strict=True)
                axes.barh(names, values)
                axes.axvline(1.0, color="black")
                axes.set(xlabel="best peer's time over ours", title=title)
        if points := roofline(mine):
            with picture(f"{op}-roofline", 5) as axes:
                for intensity, rate, case in points:
                    axes.plot(intensity, rate, "o", label=case)
                copy, gemm = machine["copy_gb_s"], machine["gemm_tflop_s"]
                ridge = 1e3 * gemm / copy
                low, high = (f(x for x, _, _ in points) for f in (min, max))
                ends = [min(low, ridge) / 2, ridge, max(high, ridge) * 2]
                axes.plot(ends, [min(gemm, x * copy / 1e3) for x in ends], "k-")
                axes.set(xscale="log", yscale="log", title=title)
                axes.set(xlabel="useful FLOP a byte", ylabel="TFLOP/s")
        if series := against_context(mine):
            with picture(f"{op}-context", 5) as axes:
                for name, points in series.items():
                    axes.plot(*zip(*points, strict=True), "o-", label=name)
                axes.set(xscale="log", yscale="log", xlabel="keys", ylabel="µs", title=title)
