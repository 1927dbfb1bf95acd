"""How many operations a step takes."""

from torch.utils.flop_counter import FlopCounterMode


def describe_operations(counter: FlopCounterMode, seconds: float, samples: int) -> str:
    """The modules that do most of the floating-point operations of a step, one a line, and then the whole, for a step
    of `samples` samples that took this process `seconds`."""
    total = counter.get_total_flops()
    modules = {name: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items() if name != "Global"}
    largest = sorted(modules.items(), key=lambda item: -item[1])[:20]
    lines = [f"{count / max(1, total):7.1%}  {name}" for name, count in largest]
    return "\n".join(lines) + (
        f"\nforward and backward of {samples} samples: {total / 1e12:.4g} TFLOP in {seconds:.3g} s, "
        f"{total / seconds / 1e12:.3g} TFLOP/s in each process; the training ends here (--flops_profiler)"
    )
