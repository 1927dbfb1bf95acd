"""Runs a script with FSDP on CPUs, for tests: accelerate takes FSDP for GPUs only, torch's works on CPUs too.

python tests/integration/fsdp_on_cpu.py SCRIPT ARGUMENT…
"""

import runpy
import sys

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

from dalle_pytorch.training import launch


def accelerator_on_cpu(*args, fsdp_plugin=None, **kwargs):
    accelerator = Accelerator(*args, fsdp_plugin=fsdp_plugin, **kwargs)
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = fsdp_plugin
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    return accelerator


if __name__ == "__main__":
    launch.Accelerator = accelerator_on_cpu
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
