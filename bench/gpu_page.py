"""One page of what gpu_check.py found on a card, in Markdown and JSON."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import provenance
import tables
from compiled import plain_name
from gpu_stages import ROOT, STAGES
from ledger import Ledger

RESULTS = ROOT / "bench" / "results"
BENCHES = ("prefill", "decode", "linears", "experts", "rows", "backward")
Page = dict[str, Any]


def read(folder: Path) -> Page:
    """What the results' folder says."""
    state = json.loads((folder / "state.json").read_text())
    found = {name: Ledger(folder / f"{name}.jsonl").rows() for name in (*STAGES, *BENCHES)}
    items = {name: [row for row in rows if "outcome" in row] for name, rows in found.items()}
    failures = [
        {"stage": name, "item": row["item"], "why": row.get("why", "")}
        for name, rows in items.items()
        for row in rows
        if row["outcome"] == "failed"
    ]
    generate = folder / "generate.json"
    rates = generate.read_text().splitlines()[-1:] if generate.is_file() else []
    return {
        "facts": state["facts"],
        "build": state["build"],
        "stages": state["stages"],
        "items": {name: count(rows) for name, rows in items.items() if rows},
        "failures": failures,
        "check": checked(folder / "check.log"),
        "ops": [row for name in BENCHES for row in found[name]],
        "counters": [row for row in items.get("counters", []) if row.get("kernels")],
        "models": [row for row in items.get("models", []) if "vs_sdpa" in row],
        "generate": [json.loads(line) for line in rates],
    }


def count(rows: list[dict]) -> dict[str, int]:
    """The items of each outcome; a test can end in several ways, of which the last counts."""
    return dict(Counter({row["item"]: row["outcome"] for row in rows}.values()))


def checked(log: Path) -> dict[str, str | None]:
    """What is wrong with each kernel, or None, as `gemma4 check --json` has said last."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    for line in reversed(lines):
        if line.startswith("[{"):
            return json.loads(line)[0]["kernels"]
    return {}


def markdown(page: Page) -> str:
    facts, build = page["facts"], page["build"] or {}
    parts = [
        f"# {facts['card']}\n",
        f"Made by `bench/gpu_check.py`. Driver {facts['driver']}, CUDA {facts['toolkit']}, torch "
        f"{facts['torch']}, Python {facts['python']},\nsources {facts['sources']} of commit "
        f"{facts['commit']}, kernels for {', '.join(build.get('archs', ())) or 'nothing'}.\n",
        "## Stages\n",
        stages_table(page),
    ]
    if page["failures"]:
        lines = [
            (f["stage"], f["item"].replace("|", "/"), f["why"].replace("|", "/"))
            for f in page["failures"]
        ]
        parts += ["## What failed\n", tables.table(("stage", "case", "why"), lines)]
    if page["check"]:
        wrong = {op: why for op, why in page["check"].items() if why}
        told = "".join(f"- {op}: {why}\n" for op, why in wrong.items())
        right = len(page["check"]) - len(wrong)
        parts += [f"`gemma4 check`: {right} of {len(page['check'])} kernels are right.\n" + told]
    if page["ops"]:
        parts += [
            "## Each op beside its floor and its peers\n",
            tables.machines(page["ops"]),
            "A floor is bytes at the copies' rate or useful FLOP at the GEMMs', whichever is more."
            "\nAbove 1 a peer is slower.\n",
            tables.ops_table(page["ops"]),
        ]
        if refusals := tables.refusals_table(page["ops"]):
            parts += ["What peers do not do or do otherwise:\n", refusals]
    if page["counters"]:
        parts += ["## What the profiler counts\n", counters_table(page["counters"])]
    if page["models"]:
        parts += [
            "## Whole models\n",
            "transformers' time with sdpa over ours, and over its own after `enable`.\n",
            tables.model_table(page["models"]),
        ]
    return "\n".join(parts)


def stages_table(page: Page) -> str:
    """Those that were not reached yet too."""
    lines = []
    for name, stage in STAGES.items():
        row = page["stages"].get(name, {"outcome": "not yet run", "seconds": 0, "why": ""})
        items = ", ".join(f"{n} {x}" for x, n in page["items"].get(name, {}).items())
        why = row["why"].replace("|", "/")
        outcome = f"{row['outcome']}: {why}" if why else row["outcome"]
        lines.append((name, stage.proves, outcome, items or "-", round(row["seconds"])))
    seconds = sum(row["seconds"] for row in page["stages"].values())
    lines.append(("all", "", "", "", round(seconds)))
    return tables.table(("stage", "proves", "outcome", "cases", "seconds"), lines)


def counters_table(rows: list[dict]) -> str:
    """The kernels that take a twentieth of a call's time or more."""
    shown = ("sm", "tensor", "dram", "l2", "occupancy")
    lines = []
    for row in rows:
        kernels = [k for k in row["kernels"] if k["ns"]]
        whole = sum(k["ns"] for k in kernels)
        for k in kernels:
            if k["ns"] < whole / 20:
                continue
            shares = (told(k[f"{name}_percent"], "{:.0f}%") for name in shown)
            waves, conflicts = k["shared_wavefronts"], k["bank_conflicts"]
            ratio = None if conflicts is None or not waves else conflicts / waves
            local = [k["local_load_sectors"], k["local_store_sectors"]]
            spilt = None if None in local else sum(local)
            name = f"`{plain_name(k['kernel'])}`"
            time = f"{k['ns'] / 1e3:.1f}"
            ends = told(ratio, "{:.2f}"), told(spilt, "{:.0f}")
            lines.append((row["item"], name, time, *shares, *ends))
    head = ("call", "kernel", "µs", "SM", "tensor", "DRAM", "L2", "occupancy")
    return tables.table((*head, "conflicts a wavefront", "local sectors"), lines)


def told(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def put(page: Page, stem: Path) -> None:
    stem.with_suffix(".json").write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(page), encoding="utf-8")


def write(folder: Path) -> Path:
    """The page of a folder of results, into it."""
    put(read(folder), folder / "page")
    return folder / "page.md"


def commit(out: Path) -> int:
    """Writes the page of the last results in `out` into bench/results."""
    states = sorted(out.glob("*/state.json"), key=lambda file: file.stat().st_mtime)
    if not states:
        print(f"there are no results in {out}", file=sys.stderr)
        return 2
    page = read(states[-1].parent)
    facts = page["facts"]
    # Where the results were made there may have been no history.
    if facts["commit"] is None and facts["sources"] == provenance.sources_digest():
        facts["commit"] = provenance.commit()
    stem = RESULTS / f"gpu_{re.sub('[^a-z0-9]+', '_', facts['card'].lower()).strip('_')}"
    put(page, stem)
    print(stem.with_suffix(".md"))
    return 0
