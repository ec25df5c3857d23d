"""What can be said of the kernels without a GPU: the compiler's report, the SASS, counted work.

    python bench/static_report.py [--out bench/results/static.json] [--library FILE]

Four tables, the same from run to run. `compiled`: each kernel on each architecture, from ptxas and
cuobjdump, with the threads and the shared memory that its launcher gives it in the emulator.
`counted`: bytes, sectors, bank wavefronts and matrix products that the emulator counts on small
shapes, beside what would do. `estimates`: times on an H100, from the first table and estimates.py.
`tokens`: what a token costs on four cards, from counted launches (token_cost.py). The last two are
never measured. test_static_report.py lets no kernel become worse than the committed tables, of
which report.py makes static.md and the README's. --library reads a build for all GPUs and compiles
nothing; --estimates makes that table alone anew.
"""

import argparse
import json
import tempfile
from pathlib import Path

import compiled
import estimates
import limits
import paths  # noqa: F401
import tile_work
import token_cost
import torch
from support import backward_cases, cases, emulated
from support.backends import CARDS, Backend, function
from support.small_calls import CASES, SMALL, Call, case_of, decode, launch_cases, prefill

RESULT = Path(__file__).parent / "results" / "static.json"


def run(op: str, arguments: dict) -> object:
    """One call under one schedule; what the emulator counted."""
    control = emulated.control()
    control.settings.profile, control.settings.seed = True, 1
    control.reset_counts()
    try:
        with emulated.one_schedule():
            emulated.ops()
            function(op)(**arguments)
        return control.counts()
    finally:
        control.settings.profile = False


def launches() -> dict[str, tuple[int, int]]:
    """Threads and bytes of shared memory of each kernel's largest launch."""
    torch.manual_seed(0)
    settings, names = emulated.control().settings, emulated.kernel_names()
    found: dict[str, tuple[int, int]] = {}
    before = settings.max_smem_bytes
    for card in ("99 KB", "227 KB", "Hopper"):
        kb, settings.has_wgmma = CARDS[card]
        settings.max_smem_bytes = kb * 1024
        for op, arguments in launch_cases(Backend("emulated", "cpu", emulated.ops())):
            if card != "Hopper" and not op.startswith("attention"):
                continue  # the others' launches do not depend on it
            for launch in run(op, arguments).launched:
                name = compiled.plain_name(names[launch.kernel])
                size = (launch.threads, launch.smem_bytes)
                found[name] = max(size, found.get(name, size))
    settings.max_smem_bytes, settings.has_wgmma = before, False
    return found


def compiled_rows(kernels: list[compiled.Kernel], sizes: dict[str, tuple[int, int]]) -> list[dict]:
    """Raises RuntimeError naming the kernels that no case of `launch_cases` launches."""
    missing = sorted({k.name for k in kernels} - set(sizes))
    if missing:
        raise RuntimeError(f"launch_cases in tests/support launch no {', '.join(missing)}")
    return [
        {
            "kernel": k.name,
            "arch": k.arch,
            "registers": k.registers,
            "stack_bytes": k.stack,
            "threads": sizes[k.name][0],
            "static_smem": k.static_smem,
            "smem": sizes[k.name][1],
            "blocks": k.blocks(*sizes[k.name]),
            "load_bits": k.widths("LDG|LDGSTS"),
            "store_bits": k.widths("STG"),
            "tensor": k.tensor,
            "loop": [compiled.tensor_count(k.loop), sum(k.loop.values())],
            "inner_loop": [compiled.tensor_count(k.inner_loop), sum(k.inner_loop.values())],
        }
        for k in kernels
    ]


def counted_case(label: str, call: Call, needed: set[str], floor: int, useful_mma: float) -> dict:
    """One call's work; of the buffers `needed`, the bytes asked for beside the fewest that do."""
    counts = run(*call)

    def ratio(name: str) -> float | None:
        ideal = sum(getattr(site, f"ideal_{name}") for site in counts.sites)
        return (
            round(sum(getattr(site, name) for site in counts.sites) / ideal, 3) if ideal else None
        )

    asked = sum(b.read_bytes + b.written_bytes for b in counts.buffers if b.name in needed)
    global_sites = [site for site in counts.sites if site.ideal_sectors]
    sectors, requests = (sum(getattr(s, n) for s in global_sites) for n in ("sectors", "requests"))
    return {
        "case": label,
        "op": call[0],
        "launches": counts.launches,
        "bytes": asked,
        "bytes_over_floor": round(asked / floor, 3),
        "sectors_a_request": round(sectors / requests, 2),
        "sectors_over_ideal": ratio("sectors"),
        "wavefronts_over_ideal": ratio("wavefronts"),
        "mma": counts.mma,
        "mma_over_useful": round(counts.mma / useful_mma, 3) if useful_mma else None,
    }


def counted_rows() -> list[dict]:
    torch.manual_seed(0)
    b, dtype = Backend("emulated", "cpu", emulated.ops()), torch.bfloat16
    rows = []
    for label in CASES:
        op, arguments = case_of(b, label, dtype)
        # What is written beside the op's own shape of inputs; caches are as large as they are.
        made = {"y", "q_out", "k_out", "v_out", "new_residual"}
        needed = {n for n, x in arguments.items() if isinstance(x, torch.Tensor)}
        needed = needed - SMALL - {"ple", "k_cache", "v_cache"} | made
        counts = run(op, arguments)
        floor = sum(
            x.bytes
            for x in counts.buffers[: len(counts.buffers) // counts.launches]
            if x.name in needed
        )
        rows.append(counted_case(label, (op, arguments), needed, floor, 0))
    for head_dim, tokens, keys, window in ((256, 64, 256, 128), (512, 64, 256, 0)):
        arguments = prefill(b, tokens, keys, 4, head_dim) | {"window": window}
        useful = limits.visible_pairs(tokens, keys, window) * 4 * head_dim * 4 / MMA_FLOP
        first = max(0, keys - tokens - window + 1) if window else 0
        floor = 2 * (2 * tokens * 4 + 2 * (keys - first)) * head_dim
        label = f"attention_prefill {head_dim}, {tokens} tokens, {keys} keys, window {window}"
        call = ("attention_prefill", arguments)
        rows.append(counted_case(label, call, {"q", "out", "k", "v"}, floor, useful))
    for head_dim, tokens, keys in ((256, 64, 128), (512, 64, 128)):
        forward = prefill(b, tokens, keys, 4, head_dim)
        arguments = backward_cases.attention_prefill_backward(b, forward)
        useful = limits.visible_pairs(tokens, keys, 0) * 4 * head_dim * 14 / MMA_FLOP
        floor = 2 * 4 * (tokens * 4 + keys) * head_dim
        label = f"attention_prefill_backward {head_dim}, {tokens} tokens, {keys} keys"
        call = ("attention_prefill_backward", arguments)
        needed = {"q", "out", "grad_out", "grad_q", "k", "v", "grad_k", "grad_v"}
        rows.append(counted_case(label, call, needed, floor, useful))
    for head_dim in (256, 512):
        call = ("attention_decode", decode(b, 600, 8, head_dim))
        label, floor = f"attention_decode {head_dim}, 600 keys", 2 * 600 * head_dim * 2
        useful = 600 * 8 * head_dim * 4 / MMA_FLOP
        rows.append(counted_case(label, call, {"k", "v"}, floor, useful))
    for tokens in (1, 8, 256):
        torch.manual_seed(0)  # the choice of experts does not hang on what was drawn before
        arguments = cases.moe_experts(b, tokens, 16, 4, 512, 192, dtype=dtype)
        floor = arguments["experts"].unique().numel() * 3 * 512 * 192 * 2
        useful = tokens * 4 * 3 * 512 * 192 * 2 / MMA_FLOP
        label, call = f"moe_experts, {tokens} tokens, 4 of 16", ("moe_experts", arguments)
        rows.append(counted_case(label, call, {"gate_up", "down"}, floor, useful))
    return rows


MMA_FLOP = tile_work.flop_of("HMMA.16816")


def hopper_kernels(rows: list[dict], call: Call) -> list[dict]:
    """The rows of the kernels with tensor instructions that a call launches on an H100."""
    settings, names = emulated.control().settings, emulated.kernel_names()
    settings.has_wgmma = True
    launched = [compiled.plain_name(names[launch.kernel]) for launch in run(*call).launched]
    settings.has_wgmma = False
    of = {r["kernel"]: r for r in rows if r["arch"] == "sm_90a" and r["tensor"]}
    return [of[name] for name in launched if name in of]


def decode_rows() -> list[dict]:
    """With the iterations of the plan that an H100 is given."""
    settings, card = emulated.control().settings, token_cost.CARDS[0]
    before = settings.sm_count, settings.max_smem_bytes
    rows = [
        estimates.decode_estimate(*case, token_cost.turns(*case, card), coded)
        for coded in (False, True)
        for case in estimates.DECODES
    ]
    settings.sm_count, settings.max_smem_bytes = before
    return rows


def estimate_rows(rows: list[dict]) -> list[dict]:
    b = Backend("emulated", "cpu", emulated.ops())
    forward, backward = {}, {}
    for head_dim in (256, 512):
        call = ("attention_prefill", prefill(b, 65, 65, 1, head_dim))
        tile = emulated.control().attention_tile(head_dim, 10**6, 227 * 1024, True)
        forward[head_dim] = hopper_kernels(rows, call)[0], tile
        arguments = backward_cases.attention_prefill_backward(b, prefill(b, 17, 17, 1, head_dim))
        backward[head_dim] = hopper_kernels(rows, ("attention_prefill_backward", arguments))
    arguments = cases.moe_experts(b, 160, 2, 1, 64, 64, dtype=torch.bfloat16)
    moe = hopper_kernels(rows, ("moe_experts", arguments))[0]
    return [
        *estimates.row_estimates(),
        *estimates.attention_estimates(forward),
        *decode_rows(),
        *estimates.backward_estimates(backward),
        *estimates.moe_estimates(moe),
    ]


def worse(fresh: dict, committed: dict) -> list[str]:
    """What is worse in one report than in another, each with the kernel's or case's name."""
    found = []
    before = {(r["kernel"], r["arch"]): r for r in committed.get("compiled", ())}
    for row in fresh.get("compiled", ()):
        name = f"{row['kernel']} on {row['arch']}"
        old = before.pop((row["kernel"], row["arch"]), None)
        if row["stack_bytes"]:
            found.append(f"{name}: spills, or keeps {row['stack_bytes']} bytes of stack otherwise")
        if old is None:
            found.append(f"{name}: not in the committed report")
            continue
        if row["blocks"] < old["blocks"]:
            found.append(f"{name}: {row['blocks']} resident blocks, {old['blocks']} before")
        for bits in ("load_bits", "store_bits"):
            if max(row[bits], default=0) < max(old[bits], default=0):
                found.append(f"{name}: {bits} {row[bits]}, {old[bits]} before")
        if tensor_share(row) < 0.97 * tensor_share(old):
            found.append(f"{name}: {tensor_share(row):.1%} tensor, {tensor_share(old):.1%} before")
    found += [f"{kernel} on {arch}: gone, yet in the committed report" for kernel, arch in before]
    before = {r["case"]: r for r in committed.get("counted", ())}
    for row in fresh.get("counted", ()):
        old = before.pop(row["case"], None)
        if old is None:
            found.append(f"{row['case']}: not in the committed report")
            continue
        for name in (n for n, x in row.items() if "_over_" in n and x is not None):
            if row[name] > 1.001 * (old[name] or 0):
                found.append(f"{row['case']}: {name} {row[name]}, {old[name]} before")
    found += [f"{case}: gone, yet in the committed report" for case in before]
    told = {(r["model"], r["keys"], r["card"]): r for r in committed.get("tokens", ())}
    for row in fresh.get("tokens", ()):
        old = told[row["model"], row["keys"], row["card"]]
        if (row["launches"], *row["turns"]) > (old["launches"], *old["turns"]):
            name = f"{row['model']} over {row['keys']} keys on {row['card']}"
            kept = ("launches", "turns")
            now, then = ([r[key] for key in kept] for r in (row, old))
            found.append(f"{name}: launches, turns {now}, {then} before")
    return found


def tensor_share(row: dict) -> float:
    """Tensor instructions among all that stand in the main loop."""
    tensor, instructions = row["loop"]
    return tensor / instructions if instructions else 0.0


def report(library: Path | None) -> dict[str, list[dict]]:
    if compiled.toolkit() is None or compiled.cuobjdump() is None:
        raise SystemExit(
            "static_report needs a CUDA toolkit with nvcc, and cuobjdump with nvdisasm"
        )
    with tempfile.TemporaryDirectory() as folder:
        files = [library] if library else compiled.compile_kernels(Path(folder))
        kernels = compiled.read_kernels(files)
        rows = compiled_rows(kernels, launches())
    tables = {"compiled": rows, "counted": counted_rows(), "estimates": estimate_rows(rows)}
    return tables | {"tokens": token_cost.rows()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--estimates", action="store_true", help="make the estimates alone anew")
    parser.add_argument("--library", type=Path, help="read this build for all GPUs")
    given = parser.parse_args()
    out = given.out
    if given.estimates:
        emulated.ops()
        tables = json.loads(out.read_text())
        tables["estimates"] = estimate_rows(tables["compiled"])
    else:
        tables = report(given.library)
    lines = [
        f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in table) + "\n]"
        for name, table in tables.items()
    ]
    out.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
