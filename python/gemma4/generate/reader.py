"""The tokens' way to the host, for which no step waits."""

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Reader:
    """Reads the ids of each step when `lag` more have been begun, so that a GPU has work while the
    host waits for them."""

    def __init__(self, lag: int):
        self.lag = lag
        self.waiting: deque[Callable[[], list[int]]] = deque()

    def put(self, ids_B: Tensor) -> None:
        """Takes the ids of a step, which the next one may write over."""
        self.waiting.append(_on_its_way(ids_B))

    def read(self, to_the_last: bool = False) -> Iterator[list[int]]:
        """The ids that are due, or all, the oldest first."""
        while len(self.waiting) > (0 if to_the_last else self.lag):
            yield self.waiting.popleft()()


def _on_its_way(ids_B: Tensor) -> Callable[[], list[int]]:
    if not ids_B.is_cuda:
        here = ids_B.tolist()
        return lambda: here
    # Of torch's pool of pinned memory, which takes it back when the copy has been made.
    copy = torch.empty(ids_B.shape, dtype=ids_B.dtype, pin_memory=True)
    copy.copy_(ids_B, non_blocking=True)
    made = torch.cuda.Event()
    made.record()

    def arrived() -> list[int]:
        made.synchronize()
        return copy.tolist()

    return arrived
