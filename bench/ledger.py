"""What of a long run is done: a file of JSON lines from which a later process goes on.

An item is noted when it starts and again when it is done, so that after a process that died or was
killed the file says what it was at.
"""

import json
from pathlib import Path
from typing import Any

import torch

LOST = 75  # exit status: the items after this one need another process


class Ledger:
    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        # A process that was killed may have left half a line.
        if file.is_file() and file.read_bytes()[-1:] not in (b"", b"\n"):
            self._write("\n")

    def _write(self, text: str) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(text)

    def note(self, **row: Any) -> None:
        self._write(json.dumps(row) + "\n")

    def start(self, item: str) -> None:
        self.note(item=item, outcome="started")

    def end(self, item: str, outcome: str, **row: Any) -> None:
        self.note(item=item, outcome=outcome, **row)

    def rows(self) -> list[dict[str, Any]]:
        """All whole lines but those of starts."""
        return [row for row in self._lines() if row.get("outcome") != "started"]

    def done(self) -> set[str]:
        return {row["item"] for row in self.rows() if "item" in row}

    def started(self) -> list[str]:
        """The items that were begun and are not done."""
        begun = dict.fromkeys(r["item"] for r in self._lines() if r.get("outcome") == "started")
        done = self.done()
        return [item for item in begun if item not in done]

    def _lines(self) -> list[dict[str, Any]]:
        if not self.file.is_file():
            return []
        found = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # half a line
        return found


def gpu_is_lost() -> bool:
    """Whether a kernel's fault has taken this process's GPU with it: every later call fails too."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
