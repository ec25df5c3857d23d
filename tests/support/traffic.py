"""What the emulator counted of a kernel, and where."""

from pathlib import Path

from support import emulated


def check_sites(counts, exempt=(), exempt_lines=()):
    for site in counts.sites:
        if site.where in exempt_lines:
            continue
        assert site.wavefronts == site.ideal_wavefronts, f"bank conflicts at {site.where}"
        if site.buffer not in exempt:
            assert site.sectors == site.ideal_sectors, f"part of a sector at {site.where}"


def lines_with(path, text):
    """Where the emulator's reports place the lines of a kernel that hold this text."""
    lines = (emulated.CSRC / path).read_text().splitlines()
    return [f"{Path(path).name}:{n}" for n, line in enumerate(lines, 1) if text in line]
