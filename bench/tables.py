"""Tables of results in Markdown."""

from collections.abc import Iterable, Sequence
from statistics import median

import plots

Row = dict


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def machines(rows: list[Row]) -> str:
    """What the floors of the rows are made of, a line a kind of machine."""
    found = {
        f"{row['device']}, torch {row['torch']}, {row['version']} at {row['commit']}: copies move "
        f"{row['copy_gb_s']} GB/s, GEMMs make {row['gemm_tflop_s']} TFLOP/s.\n": None
        for row in rows
        if row.get("kind") == "machine"
    }
    return "".join(found)


def fastest(row: Row) -> tuple[float, str] | None:
    """The fastest peer's time over ours, and its name."""
    times = plots.peer_times(row)
    name = min(times, key=times.__getitem__, default=None)
    return None if name is None else (times[name] / row["us"], name)


def ops_table(rows: list[Row]) -> str:
    """Each row beside its floor and its fastest peer, in its own run."""
    lines = []
    for row in rows:
        if row.get("kind") != "op":
            continue
        peer, share = fastest(row), f"{row['floor_us'] / row['us']:.0%}"
        sdpa = row["peers"].get(f"sdpa {row.get('sdpa_takes')}", {}).get("us")
        lines.append((
            *(row["op"], row["case"], f"{row['us']:.1f}", share),
            f"{peer[0]:.2f} ({peer[1]})" if peer else "-",
            f"{sdpa / row['us']:.2f} ({row['sdpa_takes']})" if sdpa else "-",
        ))  # fmt: skip
    head = ("op", "case", "µs", "floor / time", "fastest peer / ours", "sdpa's own choice / ours")
    return table(head, lines)


def ops_summary(rows: list[Row]) -> str:
    """A line an op: the medians of its cases, and the worst."""
    lines = []
    for op in dict.fromkeys(row["op"] for row in rows if row.get("kind") == "op"):
        mine = [row for row in rows if row.get("kind") == "op" and row["op"] == op]
        shares = [row["floor_us"] / row["us"] for row in mine]
        ratios = [peer[0] for row in mine if (peer := fastest(row))]
        peers = (f"{f(ratios):.2f}" if ratios else "-" for f in (median, min))
        lines.append((op, len(mine), f"{median(shares):.0%}", f"{min(shares):.0%}", *peers))
    head = ("op", "cases", "floor / time", "least", "fastest peer / ours", "least")
    return table(head, lines)


def refusals_table(rows: list[Row]) -> str:
    """What peers said where they gave no time."""
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, peer in row.get("peers", {}).items():
            if "error" in peer:
                key = (name, peer["error"].replace("|", "/"))
                found[key] = found.get(key, 0) + 1
    lines = [(name, error, count) for (name, error), count in sorted(found.items())]
    return table(("peer", "says", "cases"), lines) if lines else ""


def model_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        ratios = (f"{ratio:.2f}" for key in ("vs_sdpa", "enabled_vs_sdpa") for ratio in row[key])
        compiled = row.get("compiled_vs_sdpa")  # is for a CPU
        told = "-" if compiled is None else f"{compiled:.2f}"
        lines.append((row["model"], row["dtype"], *ratios, told))
    ways = ("prefill", "decode", "enabled: prefill", "enabled: decode", "compiled: decode")
    head = ("model", "dtype", *ways)
    return table(head, lines)
