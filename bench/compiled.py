"""What nvcc makes of every kernel on every architecture: its resources and its SASS, read."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

ROOT = Path(__file__).parents[1]
ARCHS = ("sm_80", "sm_90a", "sm_100", "sm_120")


def _load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gemma4_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


setup_py = _load_setup()


@dataclass
class Kernel:
    """One kernel on one architecture, as cuobjdump lists it."""

    name: str
    arch: str
    registers: int = 0
    stack: int = 0  # bytes a thread, of what was spilled too
    static_smem: int = 0
    instructions: set[str] = field(default_factory=set)
    # Of the smallest loop that holds most tensor instructions, and of the one inside it, if any.
    loop: Counter[str] = field(default_factory=Counter)
    inner_loop: Counter[str] = field(default_factory=Counter)
    # Instructions of that loop between a barrier and the first wgmma behind it; None without one.
    before_wgmma: int | None = None
    # Accesses of global memory before it waits for the kernel before it; None if it never does.
    before_wait: Counter[str] | None = None

    def __str__(self) -> str:
        return f"{self.arch:8}{self.registers:5} registers{self.static_smem:7} B  {self.name}"

    def has(self, pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in self.instructions)

    @property
    def tensor(self) -> dict[str, int]:
        """The tensor instructions that stand in its main loop, without their types."""
        found: Counter[str] = Counter()
        for name, count in sorted(self.loop.items()):
            if match := re.match(r"HG?MMA\.\w+", name):
                found[match[0]] += count
        return dict(found)

    def blocks(self, threads: int, smem_bytes: int) -> int:
        """Blocks of this size that one multiprocessor holds; 0 if it is too small for one."""
        on = MULTIPROCESSORS[self.arch]
        warps = threads // 32
        # A warp's registers come in units of 256 from one of four equal parts.
        register_warps = 4 * (16384 // (-(-self.registers * 32 // 256) * 256))
        smem = -(-(smem_bytes + self.static_smem + RESERVED_SMEM) // 128) * 128
        fits = (register_warps // warps, on.smem_kb * 1024 // smem, on.threads // threads)
        return min(*fits, on.blocks)

    def widths(self, kinds: str) -> list[int]:
        """The bits of its global accesses of these kinds, widest first."""
        names = [n for n in self.instructions if re.match(rf"({kinds})\b", n)]
        found = {int(m[1]) if (m := re.search(r"\.(8|16|64|128)\b", n)) else 32 for n in names}
        found |= {8 for n in names if re.search(r"\.[US]8\b", n)}
        found |= {16 for n in names if re.search(r"\.[US]16\b", n)}
        return sorted(found, reverse=True)


def plain_name(signature: str) -> str:
    """A kernel's name with its template arguments, the same from nvcc and from the emulator."""
    name = re.sub(r"\b(void |gemma4::|emulation::)", "", signature).rpartition("(")[0]
    return name.replace("__nv_bfloat16", "bf16").replace("__half", "fp16").replace("> >", ">>")


@dataclass(frozen=True)
class Multiprocessor:
    smem_kb: int
    threads: int
    blocks: int


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(164, 2048, 32),
    "sm_90a": Multiprocessor(228, 2048, 32),
    "sm_100": Multiprocessor(228, 2048, 32),
    "sm_120": Multiprocessor(100, 1536, 24),
}


# What the system takes of each block's; from sm_90a on cuobjdump counts it, though not always.
RESERVED_SMEM = 1024
TENSOR = re.compile(r"HG?MMA\b")


@functools.cache
def toolkit() -> Path | None:
    try:
        return setup_py.find_toolkit(os.environ)[0]
    except setup_py.UnavailableError:
        return None


@functools.cache
def cuobjdump() -> Path | None:
    """The toolkit's, or the one in a wheel beside torch; nvdisasm lies beside it."""
    folders = [toolkit() / "bin"]
    for package, inside in (("nvidia", "*/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for location in spec.submodule_search_locations if spec else ():
            folders += Path(location).glob(inside)
    found = (folder / "cuobjdump" for folder in folders if (folder / "nvdisasm").is_file())
    return next(filter(Path.is_file, found), None)


SASS = re.compile(
    r"code for (?P<arch>\w+)|Function : (?P<kernel>\w+)|/\*(?P<address>[0-9a-f]{4,})\*/\s+"
    r"(?:@!?U?P\w+ )?\s*(?P<name>[A-Z][.\w]*)(?P<operands>[^;]*);"
)
USAGE = re.compile(r"Function (\w+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)")
MEMORY = re.compile(r"(LDG|STG|LDL|STL|LDGSTS|LDSM|LDS|STS)\b")
GLOBAL = re.compile(r"(LDG|STG|LDGSTS|ATOMG?|REDG?)\b")
Instruction = tuple[int, str, str]  # address, name, operands


def _functions(listing: str) -> Iterator[tuple[str, str, list[Instruction]]]:
    """(kernel, arch, its instructions) of each in cuobjdump's listing."""
    arch = kernel = None
    body: list[Instruction] = []
    for match in SASS.finditer(listing):
        if match["address"]:
            body.append((int(match["address"], 16), match["name"], match["operands"]))
            continue
        if body:
            yield kernel, arch, body
            body = []
        arch, kernel = match["arch"] or arch, match["kernel"] or kernel
    if body:
        yield kernel, arch, body


def tensor_count(loop: Counter[str]) -> int:
    return sum(count for name, count in loop.items() if TENSOR.match(name))


def _tensor_loops(body: list[Instruction]) -> tuple[list[str], list[str]]:
    """The instructions of `Kernel.loop` and `Kernel.inner_loop`, in their order."""
    loops = set()
    for address, name, operands in body:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name.startswith("BRA") and target and int(target[1], 16) < address:
            loops.add((int(target[1], 16), address))
    inside = {loop: [n for a, n, _ in body if loop[0] <= a <= loop[1]] for loop in loops}
    tensor = {loop: n for loop, names in inside.items() if (n := tensor_count(Counter(names)))}

    def largest(of: set[tuple[int, int]]) -> tuple[int, int] | None:
        return max(of, key=lambda x: (tensor[x], x[0] - x[1]), default=None)

    outer = largest(set(tensor))
    if outer is None:
        return [], []
    fewer = {x for x in tensor if tensor[x] < tensor[outer]}
    inner = largest({x for x in fewer if outer[0] <= x[0] and x[1] <= outer[1]})
    return inside[outer], inside[inner] if inner else []


def _before_wgmma(loop: list[str]) -> int | None:
    first = next((i for i, name in enumerate(loop) if name.startswith("HGMMA")), None)
    barriers = [i for i, name in enumerate(loop[:first]) if name.startswith("BAR.SYNC")]
    return None if first is None or not barriers else first - barriers[-1] - 1


def _before_wait(body: list[Instruction]) -> Counter[str] | None:
    names = [name for _, name, _ in body]
    if "ACQBULK" not in names:
        return None
    return Counter(n for n in names[: names.index("ACQBULK")] if GLOBAL.match(n))


def _read_cubin(cubin: Path) -> list[Kernel]:
    command = [cuobjdump(), "-res-usage", "-sass", cubin]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: map(int, numbers) for name, *numbers in USAGE.findall(listing)}
    kernels = []
    for name, arch, body in _functions(listing):
        registers, stack, smem = usage[name]
        if arch != "sm_80":
            smem = max(smem - RESERVED_SMEM, 0)
        instructions = {n for _, n, _ in body if MEMORY.match(n) or TENSOR.match(n)}
        if not instructions:
            continue  # it is for another architecture, and traps
        loop, inner = _tensor_loops(body)
        kernels.append(
            Kernel(
                *(name, arch, registers, stack, smem, instructions, Counter(loop), Counter(inner)),
                *(_before_wgmma(loop), _before_wait(body)),
            )
        )
    return kernels


def compile_kernels(folder: Path) -> list[Path]:
    """Object files of all kernels on all architectures, made with setup.py's flags.

    Raises RuntimeError with nvcc's words if one does not compile.
    """

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        flags = setup_py.nvcc_flags(ARCHS)
        command = [toolkit() / "bin" / "nvcc", *flags, "-c", source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sorted(ROOT.glob("csrc/*/*.cu"))))


def read_kernels(files: Iterable[Path]) -> list[Kernel]:
    """The kernels in object files or a library, each on every architecture it was compiled for."""
    with TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for file in files:
            command = [cuobjdump(), "-xelf", "all", file.resolve()]
            subprocess.run(command, cwd=folder, capture_output=True, check=True)
        parts = list(pool.map(_read_cubin, sorted(Path(folder).iterdir())))
    made = [kernel for part in parts for kernel in part]
    names = "\n".join(kernel.name for kernel in made)
    plain = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True)
    for kernel, name in zip(made, plain.stdout.splitlines(), strict=True):
        kernel.name = plain_name(name)
    return sorted(made, key=lambda kernel: (kernel.name, ARCHS.index(kernel.arch)))
