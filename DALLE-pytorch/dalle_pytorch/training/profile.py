"""How many operations a step takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.utils.flop_counter import FlopCounterMode

LISTED = 20  # modules that are named


@dataclass
class Operations:
    """The floating-point operations of one step in this process, and how long they took."""

    counter: FlopCounterMode
    seconds: float = 0.0

    def describe(self, samples: int) -> str:
        """The modules that do most of them, one a line, and then the whole, for a step of `samples` samples."""
        total = self.counter.get_total_flops()
        modules = {name: sum(kinds.values()) for name, kinds in self.counter.get_flop_counts().items()}
        modules.pop("Global", None)
        largest = sorted(modules.items(), key=lambda item: -item[1])[:LISTED]
        lines = [f"{count / max(1, total):7.1%}  {name}" for name, count in largest]
        return "\n".join(lines) + (
            f"\nforward and backward of {samples} samples: {total / 1e12:.4g} TFLOP in {self.seconds:.3g} s, "
            f"{total / self.seconds / 1e12:.3g} TFLOP/s in each process; the training ends here (--flops_profiler)"
        )


@contextmanager
def counting_operations(wanted: bool) -> Iterator[Operations | None]:
    """Counts what is done within it; yields None where that is not `wanted`."""
    if not wanted:
        yield None
        return
    operations = Operations(FlopCounterMode(display=False))
    started = time.monotonic()
    with operations.counter:
        yield operations
    operations.seconds = time.monotonic() - started
