"""How a training is spread over processes: DDP, FSDP or DeepSpeed ZeRO, precision and memory, through accelerate.

Whoever starts the processes (nobody, torchrun, accelerate launch, deepspeed) leaves its marks in the environment, and
the script is the same. What cannot work is refused here, with one line, before anything is trained.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dalle_pytorch.errors import UsageError
from dalle_pytorch.nn.transformer import Layer, Transformer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dalle_pytorch.training.options import TrainingOptions

DDP, FSDP, DEEPSPEED = "ddp", "fsdp", "deepspeed"
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
SHARDED_NAME = "sharded.pt"
DEEPSPEED_TAG = "deepspeed"


def make_accelerator(options: TrainingOptions, task: nn.Module) -> Accelerator:
    """The `Accelerator` that `options` ask for, and `task` made ready for it.

    Raises `UsageError`, with one line, for what cannot work: on this machine, or together.
    """
    has_gpu = torch.accelerator.is_available()
    if not has_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where it is installed, warns that there is none
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    backend = _backend(options)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings = _deepspeed_settings(options, processes) if backend == DEEPSPEED else None
    precision = _precision(options, settings)
    sharded = backend == FSDP or (settings is not None and settings["zero_optimization"]["stage"] == 3)
    _refuse(options, task, backend, sharded, processes)
    _check_precision(precision, options)
    if options.activation_checkpointing:
        _checkpoint_activations(task)

    if backend != DDP:
        for parameter in task.parameters():
            # Neither FSDP nor DeepSpeed takes channels_last weights.
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    arguments: dict[str, Any] = {"gradient_accumulation_steps": options.ga_steps}
    if backend == DEEPSPEED:
        plugin = _deepspeed_plugin(settings, precision)
        if not has_gpu:
            arguments["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
        return Accelerator(deepspeed_plugin=plugin, mixed_precision="no", **arguments)
    # Told nothing, accelerate would leave the processes on a machine without a GPU alone, each with its own training.
    arguments.update(mixed_precision=precision, cpu=not has_gpu)
    if backend == FSDP:
        return _fsdp_accelerator(task, precision, arguments)
    unused = getattr(task, "find_unused_parameters", False)
    ddp = DistributedDataParallelKwargs(find_unused_parameters=unused, gradient_as_bucket_view=True)
    return Accelerator(kwargs_handlers=[ddp], **arguments)


# --------------------------------------------------------------------------------------------------
# What was asked for


def _backend(options: TrainingOptions) -> str:
    """What the options name, or else what `accelerate launch` was configured for."""
    name = (options.distributed or "").lower()
    if name == "horovod":
        raise UsageError("horovod is not supported; start the script with torchrun instead (docs/scale.md)")
    if name not in ("", "dummy", DDP, FSDP, DEEPSPEED):
        raise UsageError(f"--distributed_backend {options.distributed} is none of {DDP}, {FSDP}, {DEEPSPEED}")
    wants_deepspeed = name == DEEPSPEED or options.deepspeed_config or options.zero_stage is not None
    if wants_deepspeed and (options.fsdp or name == FSDP):
        raise UsageError("FSDP and DeepSpeed both split the model over processes; ask for one of them")
    if wants_deepspeed or _environment("ACCELERATE_USE_DEEPSPEED"):
        return DEEPSPEED
    return FSDP if options.fsdp or name == FSDP or _environment("ACCELERATE_USE_FSDP") else DDP


def _environment(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def _precision(options: TrainingOptions, settings: dict[str, Any] | None) -> str:
    """What the options say, or else DeepSpeed's file, or else `accelerate launch`."""
    if options.mixed_precision != "no":
        return options.mixed_precision
    for name in DTYPES:
        if settings is not None and settings.get(name, {}).get("enabled") is True:
            return name
    named = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return named if named in DTYPES else "no"


def _refuse(options: TrainingOptions, task: nn.Module, backend: str, sharded: bool, processes: int) -> None:
    transformers = [module for module in task.modules() if isinstance(module, Transformer)]
    reversible = any(transformer.reversible for transformer in transformers)
    shared = any(_shares_layers(transformer) for transformer in transformers)
    if backend == FSDP and processes == 1:
        raise UsageError("--fsdp splits the model over processes, and there is one: start the script with torchrun")
    if sharded and getattr(task, "replicated", False):
        raise UsageError("this network is needed whole in every process; use DDP or ZeRO 1 or 2, not FSDP or ZeRO-3")
    if reversible and sharded:
        raise UsageError(
            "reversible layers want whole parameters, which FSDP and ZeRO-3 split; use ZeRO 1 or 2, or "
            "--activation_checkpointing instead of --reversible"
        )
    if reversible and shared and processes > 1:
        raise UsageError(
            "reversible layers that share weights (--shared_attn_ids, --shared_ff_ids) train in one process only; "
            "leave out --reversible or the sharing"
        )
    if reversible and options.activation_checkpointing:
        raise UsageError("reversible layers keep no activations already; leave out --activation_checkpointing")
    scalar = next((name for name, parameter in task.named_parameters() if parameter.ndim == 0), None)
    if scalar and backend != DDP:
        raise UsageError(f"FSDP and DeepSpeed have no way with single numbers, which {scalar} is; train it with DDP")
    if shared and backend == FSDP:
        raise UsageError("FSDP cannot split layers that share weights (--shared_attn_ids, --shared_ff_ids)")
    if options.muon and backend != DDP:
        raise UsageError("Muon works on whole matrices, which FSDP and DeepSpeed split; leave out --muon")
    if options.sample_every and sharded:
        raise UsageError("pictures cannot be drawn while the parameters are split (FSDP, ZeRO-3): --sample_every 0")


def _shares_layers(transformer: Transformer) -> bool:
    branches = [branch.fn for layer in transformer.layers for branch in (layer.attn, layer.ff)]
    return len({id(fn) for fn in branches}) < len(branches)


def _check_precision(precision: str, options: TrainingOptions) -> None:
    if precision == "fp16" and not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise UsageError("fp16 needs a GPU; on a CPU train in bf16, or without --fp16")
    if precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        notice = getattr(options, "notice", None) or warnings.warn
        notice("this GPU has no bfloat16 of its own, which makes it slow; --fp16 is faster here")


def _checkpoint_activations(task: nn.Module) -> None:
    modules = [module for module in task.modules() if hasattr(module, "activation_checkpointing")]
    if not modules:
        raise UsageError("--activation_checkpointing is for transformer layers, and this network has none")
    for module in modules:
        module.activation_checkpointing = True


# --------------------------------------------------------------------------------------------------
# FSDP


def _fsdp_accelerator(task: nn.Module, precision: str, arguments: dict[str, Any]) -> Accelerator:
    """FSDP2: each transformer layer is gathered when it is needed, the rest at once; frozen networks stay whole."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import MixedPrecisionPolicy

    has_layers = any(isinstance(module, Layer) for module in task.modules())
    frozen = [module for module in task.modules() if _is_frozen(module)]
    policy = None
    if precision != "no":
        # Gathered in 16 bits, reduced in 32; what is computed in which is autocast's to say, as everywhere else.
        dtype = getattr(torch, DTYPES[precision])
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        task.forward = torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype)(task.forward)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap" if has_layers else "no_wrap",
        transformer_cls_names_to_wrap=[Layer.__name__] if has_layers else None,
        cpu_ram_efficient_loading=False,
        mixed_precision_policy=policy,
        ignored_modules=frozen,
    )
    accelerator = Accelerator(fsdp_plugin=plugin, **arguments)
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate takes FSDP for GPUs only; torch's works on CPUs too, where it can be tried.
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    for module in frozen:
        module.to(accelerator.device)
    return accelerator


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


# --------------------------------------------------------------------------------------------------
# DeepSpeed


def _deepspeed_settings(options: TrainingOptions, processes: int) -> dict[str, Any]:
    """DeepSpeed's settings: those of its file, with batch size, accumulation and clipping from the options."""
    path = options.deepspeed_config or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    settings = {} if path == "none" else _read_settings(path)
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise UsageError(f"{path} has a section {section!r}: remove it, the script's options say that")
    zero = settings.setdefault("zero_optimization", {})
    zero.setdefault("stage", int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")))
    if options.zero_stage is not None:
        zero["stage"] = options.zero_stage
    zero["stage3_gather_16bit_weights_on_model_save"] = True  # or whole weights could not be written
    if options.ema_decay:
        # A parameter that is kept whole beside its shard would not see the average come and go.
        zero["stage3_param_persistence_threshold"] = 0
    settings.update(
        train_batch_size=options.batch_size * options.ga_steps * processes,
        train_micro_batch_size_per_gpu=options.batch_size,
        gradient_accumulation_steps=options.ga_steps,
        gradient_clipping=options.clip_grad_norm,
    )
    return settings


def _read_settings(path: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization", {}), dict):
        raise UsageError(f"{path} does not hold DeepSpeed's settings")
    return settings


def _deepspeed_plugin(settings: dict[str, Any], precision: str) -> Any:
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise UsageError("--deepspeed needs the package deepspeed: pip install deepspeed") from None
    from accelerate import DeepSpeedPlugin

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


# --------------------------------------------------------------------------------------------------
# Parameters and state, wherever they are


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether every process holds but a part of each parameter (FSDP, ZeRO-3)."""
    from accelerate.utils import DistributedType

    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def local_tensors(model: nn.Module) -> list[Tensor]:
    """What this process holds of every trained parameter, in order; changes in place change the model."""
    tensors = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            local = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3's shard
            local = local.to_local() if hasattr(local, "to_local") else local  # FSDP's
            tensors.append(local.detach())
    return tensors


def full_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor] | None:
    """The whole weights on the CPU, under the names of the task's `state_dict`, in the main process; None in others.

    All processes must call it.
    """
    state = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return None
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def save_sharded(accelerator: Accelerator, model: nn.Module, optimizers: Sequence[Any], folder: Path) -> None:
    """Writes model and optimizers into `folder`, which all processes see, under FSDP or DeepSpeed. All must call it."""
    from accelerate.utils import DistributedType

    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        model.save_checkpoint(str(folder), tag=DEEPSPEED_TAG, save_latest=False)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, [optimizer.optimizer for optimizer in optimizers], options=whole)
    if accelerator.is_main_process:
        torch.save({"model": weights, "optimizers": moments}, Path(folder) / SHARDED_NAME)
    accelerator.wait_for_everyone()


def load_sharded(accelerator: Accelerator, model: nn.Module, optimizers: Sequence[Any], folder: Path) -> None:
    """Reads what `save_sharded` wrote; DeepSpeed's wants as many processes as wrote it. All processes must call it."""
    from accelerate.utils import DistributedType

    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        with _tensors_only():
            model.load_checkpoint(str(folder), tag=DEEPSPEED_TAG)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    state = torch.load(Path(folder) / SHARDED_NAME, map_location="cpu", weights_only=True, mmap=True)
    set_state_dict(
        model,
        [optimizer.optimizer for optimizer in optimizers],
        model_state_dict=state["model"],
        optim_state_dict=state["optimizers"],
        options=StateDictOptions(full_state_dict=True),
    )


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Within it, DeepSpeed reads tensors and its own few settings from a file, and nothing that could run."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
        before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
        try:
            yield
        finally:
            os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
            if before is not None:
                os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
