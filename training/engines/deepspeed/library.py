"""The only door to deepspeed: what has to be so before it is imported and before it joins the ranks.

Nothing is compiled unasked. DeepSpeed compiles an extension for shared memory whenever it joins ranks on a CPU, and its
own Adam whenever it makes an optimizer; the first is declared impossible, the second is made for `deepspeed.compiled_adam`
only.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch

from model.durable import lock
from model.parallel import cpu_backend, groups

if not cpu_backend.has_accelerator():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # left alone it looks for devices and warns

import deepspeed
from deepspeed.comm import comm as _comm
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine as ZeroEngine
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors
from deepspeed.runtime.zero import parameter_offload as _parameter_offload
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups as _groups
from deepspeed.utils.logging import logger as _logger

from training.engines.deepspeed.parallel_unit import ParallelUnit

# There is no public switch. DeepSpeed finds out which of its extensions could be built by trying a compiler when this
# table is first read, and builds the one named here, which serves its own inference only, whenever it can.
EXTENSIONS = {"deepspeed_shm_comm": False}
log = logging.getLogger(__name__)
COMPILE_SECONDS = 900.0  # it took 150 s on a core that others used
# What DeepSpeed keeps of process groups in the module `deepspeed.utils.groups`.
_KEPT_GROUPS = ("_WORLD_GROUP", "_ZERO_PARAM_INTRA_PARALLEL_GROUP", "mpu", "mesh_device")

_ALIVE: weakref.WeakSet[ZeroEngine] = weakref.WeakSet()  # engines that nobody has ended yet


def join() -> None:
    """Give DeepSpeed the process group and the layout that torch and megatron-core have already made.

    Of several models in one layout the first one joins for all.
    """
    if _comm.cdb is not None:
        return
    groups.when_destroyed(forget_layout)
    _logger.setLevel(logging.WARNING)  # it tells every step of its construction
    # torch renamed two collectives and says so at every call of DeepSpeed's.
    warnings.filterwarnings("ignore", message=r".*_tensor` is deprecated", category=FutureWarning)
    deepspeed.ops.__compatible_ops__ = EXTENSIONS  # set, not read
    os.environ.setdefault("LOCAL_RANK", "0")  # one process without a launcher
    deepspeed.init_distributed(dist_backend=groups.backend_name(), auto_mpi_discovery=False, verbose=False)


def forget_layout() -> None:
    """DeepSpeed keeps process groups and models in its modules; they are of no use once the ranks have parted."""
    for engine in list(_ALIVE):
        end(engine)
    _comm.cdb = None
    for name in _KEPT_GROUPS:
        setattr(_groups, name, None)
    _parameter_offload.FWD_MODULE_STACK.clear()  # every model of stage 3 is put there, none is taken off
    # Modules and parameters are numbered through the whole process, and ranks compare the numbers: a process that
    # made more models than another one, in layouts of the past, would disagree with it.
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    deepspeed.zero.Init.param_id = 0


def initialize(model: Any, settings: dict[str, Any], optimizer: Any = None) -> ZeroEngine:
    """DeepSpeed's engine around `model`; `optimizer` makes torch's optimizer of the parameters, None: nothing learns."""
    # Without the unit it would average the shards of different tensor ranks as if they were replicas, without an error.
    with contextlib.redirect_stdout(io.StringIO()):  # it prints figures of memory where `json=true` has its one object
        engine, *_ = deepspeed.initialize(
            model=model, config=settings, optimizer=optimizer, mpu=ParallelUnit(), dist_init_required=False
        )
    _ALIVE.add(engine)
    return engine


def end(engine: ZeroEngine) -> None:
    """An ended engine and its model are of no more use, and nothing of them stays in memory.

    Hooks of parameters and modules hold each other, the model and its process groups in circles, some of which the
    garbage collector does not see; they are cut here.
    """
    _ALIVE.discard(engine)
    engine.destroy()
    for parameter in engine.module.parameters():
        parameter._backward_hooks = None
        vars(parameter).clear()
    for part in (*list(engine.module.modules()), engine.optimizer, engine):
        vars(part).clear()


def compiled_adam(groups_of_parameters: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW for parameters in host memory; the first call on a machine compiles it and says so.

    torch keeps what was compiled (TORCH_EXTENSIONS_DIR), and of several ranks one compiles while the others wait.
    """
    if torch.distributed.get_rank() == 0:
        log.warning("deepspeed.compiled_adam: the first time on a machine it is compiled, which takes a minute or two")
    load_compiled_adam()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    with contextlib.redirect_stdout(io.StringIO()):
        made: torch.optim.Optimizer = DeepSpeedCPUAdam(groups_of_parameters, **options)
    return made


def load_compiled_adam() -> None:
    """Compiled where torch does not hold it of an earlier time."""
    # Ninja may be installed beside this Python and not be on the path.
    beside = str(Path(sys.executable).parent)
    if beside not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", ""), beside))
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    waited_for = "another process compiles DeepSpeed's Adam"
    fix = "wait for it, or deepspeed.compiled_adam=false"
    with lock(root / "nextstate.lock", waited_for, fix=fix, waiting_seconds=COMPILE_SECONDS):
        # torch waits for ever for the lock of a process that was killed while it compiled. Whoever is here is alone.
        for left in root.glob("**/cpu_adam/lock"):
            left.unlink()
        CPUAdamBuilder().load(verbose=False)


def partitioned(settings: dict[str, Any]) -> Any:
    """Context in which every module that is made keeps only this data-parallel rank's part of its parameters."""
    # Given `mpu` in place of the group it would cut over all ranks, without an error.
    return deepspeed.zero.Init(
        data_parallel_group=ParallelUnit().get_data_parallel_group(), config_dict_or_path=settings
    )


def remove_hooks(offload: DeepSpeedZeRoOffload) -> None:
    """Of stage 3, that gather a module's parameters before its use and free them after it."""
    for parameter in offload.module.parameters():
        parameter.ds_active_sub_modules.clear()
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []


def add_hooks(offload: DeepSpeedZeRoOffload) -> None:
    offload._register_deepspeed_module(offload.module)


__all__ = [
    "BF16_Optimizer",
    "DeepSpeedZeRoOffload",
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "ZeroEngine",
    "add_hooks",
    "combine_grad_norm_groups",
    "deepspeed",
    "end",
    "get_global_norm_of_tensors",
    "initialize",
    "join",
    "partitioned",
    "remove_hooks",
]
