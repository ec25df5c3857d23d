"""The kernels' division by numbers that the host knows."""

import subprocess
from pathlib import Path

from support import emulated
from support.marks import needs_compiler

SOURCE = Path(__file__).parent / "divisor_checks.cpp"


@needs_compiler
def test_every_quotient_and_remainder(tmp_path):
    program = tmp_path / "divisor_checks"
    command = ["c++", "-std=c++20", "-O2", "-Wno-unknown-pragmas", f"-I{emulated.CSRC}"]
    subprocess.run([*command, SOURCE, "-o", program], check=True)
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert said.startswith("0 wrong of ") and int(said.split()[-1]) > 10_000_000
