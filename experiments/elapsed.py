"""The time of a run, also of one that was cut and resumed."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback


class Elapsed(Callback):
    """Keeps the seconds since it was made in the checkpoint; a resumed run adds those up to the checkpoint it goes on
    from (what the cut part did after that is done again, and counted once)."""

    def __init__(self) -> None:
        self._before = 0.0
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["seconds"]
