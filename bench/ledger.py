"""What of a long run is done: a file of JSON lines from which a later process goes on.

An item is noted when it starts and again when it is done, so that after a process that died or was
killed the file says what it was at.
"""

import json
import sys
from pathlib import Path
from typing import Any

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

    def begin(self) -> None:
        """Before a new process: what an earlier one was at is not what this one dies of."""
        self.note(outcome="begun")

    def start(self, item: str) -> None:
        self.note(item=item, outcome="started")

    def end(self, item: str, outcome: str, **row: Any) -> None:
        self.note(item=item, outcome=outcome, **row)

    def rows(self) -> list[dict[str, Any]]:
        """All whole lines but those of beginnings."""
        return [row for row in self._lines() if row.get("outcome") not in ("begun", "started")]

    def done(self) -> set[str]:
        return {row["item"] for row in self.rows() if "item" in row}

    def started(self) -> list[str]:
        """The items that the last process has begun and not done."""
        found: dict[str, None] = {}
        for row in self._lines():
            if row.get("outcome") == "begun":
                found.clear()
            elif row.get("outcome") == "started":
                found[row["item"]] = None
            else:
                found.pop(row.get("item", ""), None)
        return list(found)

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
    torch = sys.modules.get("torch")  # which the tests of a process may not need
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
