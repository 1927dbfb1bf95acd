"""How a training is spread over processes: DDP, FSDP or DeepSpeed ZeRO, precision and memory, through accelerate.

The launcher of the processes (none, torchrun, accelerate launch, deepspeed) is known by the environment that it sets;
the command is the same. What cannot work is refused here, with one line, before anything is trained.
"""

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, LoggerType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.text import read_text
from dalle_pytorch.nn.checkpointing import Checkpointed
from dalle_pytorch.nn.transformer import Layer, Transformer
from dalle_pytorch.training.settings import TrainingSettings
from dalle_pytorch.training.tasks.base import TrainingTask

DDP, FSDP, DEEPSPEED = "ddp", "fsdp", "deepspeed"
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
SHARDED_NAME = "sharded.pt"
DEEPSPEED_TAG = "deepspeed"

logger = logging.getLogger(__name__)


def make_accelerator(settings: TrainingSettings, task: TrainingTask) -> Accelerator:
    """The `Accelerator` that `settings` ask for, and `task` made ready for it.

    Raises `UsageError`, with one line, for what cannot work: on this machine, or together.
    """
    has_gpu = torch.accelerator.is_available()
    if not has_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where it is installed, warns that there is none
    backend = _backend(settings)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    deepspeed = _deepspeed_settings(settings, processes) if backend == DEEPSPEED else None
    precision = _precision(settings, deepspeed)
    sharded = backend == FSDP or (deepspeed is not None and deepspeed["zero_optimization"]["stage"] == 3)
    _refuse(settings, task, backend, sharded, processes)
    _check_precision(precision)
    if settings.activation_checkpointing:
        _checkpoint_activations(task)
    if settings.compile:
        _compile(task)

    if backend != DDP:
        for parameter in task.parameters():
            # Neither FSDP nor DeepSpeed takes channels_last weights.
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    arguments: dict[str, Any] = {"gradient_accumulation_steps": settings.ga_steps, "log_with": settings.tracker,
                                 "project_dir": settings.output_dir}  # fmt: skip
    if deepspeed is not None:
        plugin = _deepspeed_plugin(deepspeed, precision)
        if not has_gpu:
            arguments["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
        return Accelerator(deepspeed_plugin=plugin, mixed_precision="no", **arguments)
    # Told nothing, accelerate would leave the processes on a machine without a GPU alone, each with its own training.
    arguments.update(mixed_precision=precision, cpu=not has_gpu)
    if backend == FSDP:
        return _fsdp_accelerator(task, precision, arguments)
    ddp = DistributedDataParallelKwargs(find_unused_parameters=task.find_unused_parameters,
                                        gradient_as_bucket_view=True)  # fmt: skip
    return Accelerator(kwargs_handlers=[ddp], **arguments)


def _backend(settings: TrainingSettings) -> str:
    """What the settings name, or else what `accelerate launch` was configured for."""
    name = (settings.distributed_backend or "").lower()
    if name == "horovod":
        raise UsageError("horovod is not supported; start the command with torchrun instead (docs/scale.md)")
    if name not in ("", "dummy", DDP, FSDP, DEEPSPEED):
        raise UsageError(f"--distributed_backend: expected {DDP}, {FSDP} or {DEEPSPEED}, got {name!r}")
    wants_deepspeed = name == DEEPSPEED or settings.deepspeed_config or settings.zero_stage is not None
    if wants_deepspeed and (settings.fsdp or name == FSDP):
        raise UsageError("FSDP and DeepSpeed both shard the model over processes; choose one of them")
    if wants_deepspeed or _environment("ACCELERATE_USE_DEEPSPEED"):
        return DEEPSPEED
    return FSDP if settings.fsdp or name == FSDP or _environment("ACCELERATE_USE_FSDP") else DDP


def _environment(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def _precision(settings: TrainingSettings, deepspeed: dict[str, Any] | None) -> str:
    """What the settings say, or else DeepSpeed's file, or else `accelerate launch`."""
    if settings.mixed_precision != "no":
        return settings.mixed_precision
    for name in DTYPES:
        if deepspeed is not None and deepspeed.get(name, {}).get("enabled") is True:
            return name
    named = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return named if named in DTYPES else "no"


def _refuse(settings: TrainingSettings, task: TrainingTask, backend: str, sharded: bool, processes: int) -> None:
    transformers = [module for module in task.modules() if isinstance(module, Transformer)]
    reversible = any(transformer.reversible for transformer in transformers)
    branches = [[branch.fn for layer in each.layers for branch in (layer.attn, layer.ff)] for each in transformers]
    shared = any(len({id(fn) for fn in fns}) < len(fns) for fns in branches)
    if backend == FSDP and processes == 1:
        raise UsageError("--fsdp shards the model over processes, and there is one: start the command with torchrun")
    if settings.tracker and LoggerType(settings.tracker) not in get_available_trackers():
        raise UsageError(f"--report_to {settings.tracker} needs a package: pip install {settings.tracker}")
    if sharded and task.replicated:
        raise UsageError("this network is needed whole in every process; use DDP or ZeRO 1 or 2, not FSDP or ZeRO-3")
    if reversible and sharded:
        raise UsageError("reversible layers need whole parameters, which FSDP and ZeRO-3 shard; use ZeRO 1 or 2, or "
                         "--activation_checkpointing instead of --reversible")  # fmt: skip
    if reversible and shared and processes > 1:
        raise UsageError("reversible layers that share weights (--shared_attn_ids, --shared_ff_ids) train in one "
                         "process only; leave out --reversible or the sharing")  # fmt: skip
    if reversible and settings.activation_checkpointing:
        raise UsageError("reversible layers keep no activations already; leave out --activation_checkpointing")
    scalar = next((name for name, parameter in task.named_parameters() if parameter.ndim == 0), None)
    if scalar and backend != DDP:
        raise UsageError(f"FSDP and DeepSpeed do not support scalar parameters such as {scalar}; train with DDP")
    if shared and backend == FSDP:
        raise UsageError("FSDP cannot shard layers that share weights (--shared_attn_ids, --shared_ff_ids)")
    if settings.muon and backend != DDP:
        raise UsageError("Muon needs whole matrices, which FSDP and DeepSpeed shard; leave out --muon")
    if backend != DDP and task.shared_rows():
        raise UsageError("rows that learn together must be whole, and FSDP and DeepSpeed shard them; leave out "
                         "--share_codes")  # fmt: skip
    if settings.sample_every and sharded:
        raise UsageError("previews need whole parameters, which FSDP and ZeRO-3 shard: --sample_every 0")


def _check_precision(precision: str) -> None:
    if precision == "fp16" and not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise UsageError("fp16 needs a GPU; on a CPU train in bf16, or without --fp16")
    if precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        logger.warning("this GPU has no native bfloat16, which makes it slow; --fp16 is faster here")


def _checkpoint_activations(task: TrainingTask) -> None:
    modules = [module for module in task.modules() if isinstance(module, Checkpointed)]
    if not modules:
        raise UsageError("--activation_checkpointing is for transformer layers, and this network has none")
    for module in modules:
        module.activation_checkpointing = True


def _compile(task: TrainingTask) -> None:
    parts = task.compiled_parts()
    if not parts:
        raise UsageError("--compile does nothing for this training")
    for part in parts:
        part.compile()


def _fsdp_accelerator(task: TrainingTask, precision: str, arguments: dict[str, Any]) -> Accelerator:
    """FSDP2: each transformer layer is gathered when it is needed, the rest at once; frozen networks stay whole."""
    has_layers = any(isinstance(module, Layer) for module in task.modules())
    frozen = [module for module in task.modules() if _is_frozen(module)]
    policy = None
    if precision != "no":
        # Gathered in 16 bits, reduced in 32; what is computed in which is autocast's to say, as everywhere else.
        dtype = getattr(torch, DTYPES[precision])
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        task.forward = torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype)(task.forward)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=True, cpu_ram_efficient_loading=False, mixed_precision_policy=policy,
        auto_wrap_policy="transformer_based_wrap" if has_layers else "no_wrap",
        transformer_cls_names_to_wrap=[Layer.__name__] if has_layers else None, ignored_modules=frozen,
    )  # fmt: skip
    accelerator = Accelerator(fsdp_plugin=plugin, **arguments)
    if accelerator.distributed_type != DistributedType.FSDP:
        raise UsageError("FSDP needs GPUs: accelerate does not run it on CPUs")
    for module in frozen:
        module.to(accelerator.device)
    return accelerator


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _deepspeed_settings(settings: TrainingSettings, processes: int) -> dict[str, Any]:
    """DeepSpeed's settings: those of its file, with batch size, accumulation and clipping from the settings."""
    path = settings.deepspeed_config or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    deepspeed = {} if path == "none" else _read_settings(path)
    for section in ("optimizer", "scheduler"):
        if section in deepspeed:
            raise UsageError(f"{path} has a section {section!r}: remove it, the options of the command replace it")
    zero = deepspeed.setdefault("zero_optimization", {})
    zero.setdefault("stage", int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")))
    if settings.zero_stage is not None:
        zero["stage"] = settings.zero_stage
    zero["stage3_gather_16bit_weights_on_model_save"] = True  # or whole weights could not be written
    if settings.ema_decay:
        # A parameter that is kept whole beside its shard would not see the average come and go.
        zero["stage3_param_persistence_threshold"] = 0
    deepspeed.update(
        train_batch_size=settings.batch_size * settings.ga_steps * processes, gradient_clipping=settings.clip_grad_norm,
        train_micro_batch_size_per_gpu=settings.batch_size, gradient_accumulation_steps=settings.ga_steps,
    )  # fmt: skip
    return deepspeed


def _read_settings(path: str) -> dict[str, Any]:
    try:
        settings = json.loads(read_text(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization", {}), dict):
        raise UsageError(f"{path} does not hold DeepSpeed's settings")
    return settings


def _deepspeed_plugin(settings: dict[str, Any], precision: str) -> Any:
    try:
        import deepspeed  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError("--deepspeed needs the package deepspeed: pip install deepspeed") from None
    if "RANK" not in os.environ:
        # One process that nobody started: DeepSpeed wants to be told that it is alone.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # Its own 16-bit modes cast the whole module, the table of rotary positions and the frozen VAE included. Under
    # autocast the weights stay as exact as in every other kind of training.
    settings["fp16"] = settings["bf16"] = {"enabled": False}
    settings["torch_autocast"] = {"enabled": precision != "no", "dtype": DTYPES.get(precision, "bfloat16")}
    return DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)


def is_apart(accelerator: Accelerator) -> bool:
    """Whether FSDP or DeepSpeed keeps weights and optimizers, and writes and reads them."""
    return accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether every process holds only a shard of each parameter (FSDP, ZeRO-3)."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3  # pyright: ignore[reportOptionalMemberAccess]
    return accelerator.distributed_type == DistributedType.FSDP


def local_tensors(model: nn.Module) -> list[Tensor]:
    """What this process holds of every trained parameter, in order; changes in place change the model."""
    tensors = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            local = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3's shard
            local = local.to_local() if isinstance(local, DTensor) else local  # FSDP's
            tensors.append(local.detach())
    return tensors


def full_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor] | None:
    """The whole weights on the CPU, under the names of the task's `state_dict`, in the main process; None in others.

    All processes must call it.
    """
    state: Any = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return None
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def save_sharded(accelerator: Accelerator, model: Any, optimizers: Sequence[Any], folder: Path) -> None:
    """Writes model and optimizers into `folder`, which all processes see, under FSDP or DeepSpeed. All must call it."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        model.save_checkpoint(str(folder), tag=DEEPSPEED_TAG, save_latest=False)
        return
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, [optimizer.optimizer for optimizer in optimizers], options=whole)
    if accelerator.is_main_process:
        save_file({"model": weights, "optimizers": moments}, Path(folder) / SHARDED_NAME)
    accelerator.wait_for_everyone()


def save_file(content: dict[str, Any], path: Path) -> None:
    """`torch.save`, which raises what the system does where a disk is full."""
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's own, at the end of a file that could not be written
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def load_sharded(accelerator: Accelerator, model: Any, optimizers: Sequence[Any], folder: Path) -> None:
    """Reads what `save_sharded` wrote; DeepSpeed's wants as many processes as wrote it. All processes must call it."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        with _tensors_only():
            model.load_checkpoint(str(folder), tag=DEEPSPEED_TAG)
        return
    state = torch.load(Path(folder) / SHARDED_NAME, map_location="cpu", weights_only=True, mmap=True)
    set_state_dict(model, [optimizer.optimizer for optimizer in optimizers], model_state_dict=state["model"],
                   optim_state_dict=state["optimizers"], options=StateDictOptions(full_state_dict=True))  # fmt: skip


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Within it, DeepSpeed reads tensors and its own few settings from a file, and nothing that could run."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler  # pyright: ignore[reportMissingImports]
    from deepspeed.runtime.zero.config import ZeroStageEnum  # pyright: ignore[reportMissingImports]
    from deepspeed.utils.tensor_fragment import fragment_address  # pyright: ignore[reportMissingImports]

    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
        before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
        try:
            yield
        finally:
            os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
            if before is not None:
                os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
