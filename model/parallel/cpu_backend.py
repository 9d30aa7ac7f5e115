"""megatron-core on hosts without an accelerator.

megatron-core names the device "cuda" literally in some hundred places. `install()` puts an import hook in front of
`megatron.core` that compiles its sources with those names replaced, so that the very engine which trains on GPUs also
runs on a CPU over gloo. The hook works on the syntax tree and does nothing where an accelerator is present.

`model/parallel/megatron.py` calls `install()` before the first import of `megatron.core`; everything else of this
project gets megatron's names from there.

`REWRITTEN` and `HARMLESS` list every device name found in megatron-core 0.16 and 0.19; `unknown_device_names` finds
others and a test runs it over the installed sources, so that a new release cannot bring a device name unnoticed.

megatron-core 0.19 also imports triton for kernels of a feature that is off. The hook leaves those kernels out of the
module that defines them, so that triton is not needed, and nothing takes its place in `sys.modules`.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import re
import sys
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

PACKAGE = "megatron.core"

# Calls `torch.cuda.<name>(...)` and the expression that takes their place.
_CALLS = {
    "current_device": "torch.get_default_device()",
    "current_stream": "torch.cpu.current_stream()",
    "synchronize": "None",
    "get_rng_state": "torch.get_rng_state()",
    "random.get_rng_state": "torch.get_rng_state()",
    "empty_cache": "None",
    "reset_peak_memory_stats": "None",
}
# References `torch.cuda.<name>` that become `torch.<name>`, arguments kept.
_REFERENCES = {"manual_seed", "set_rng_state", "HalfTensor", "FloatTensor", "BFloat16Tensor"}
REWRITTEN = frozenset(_CALLS) | frozenset(_REFERENCES)

# Names that never run on a CPU host: each is behind a feature that is switched off there.
HARMLESS = frozenset(
    {
        "is_available",
        "is_initialized",
        "device_count",
        "get_device_properties",
        "get_device_capability",
        "device_memory_used",
        "memory_snapshot",  # queries
        "amp.custom_fwd",
        "amp.custom_bwd",  # decorators, no effect on CPU tensors
        "Stream",
        "Stream.priority_range",
        "Event",
        "ExternalStream",
        "stream",
        "set_stream",
        "default_stream",  # overlap
        "set_device",
        "device",  # around kernels of triton
        "default_generators",  # CUDA random streams, replaced as a whole below
        "CUDAGraph",
        "graph",
        "graph_pool_handle",
        "is_current_stream_capturing",
        "_sleep",  # CUDA graphs
        "MemPool",
        "use_mem_pool",
        "memory.MemPool",  # NCCL user buffers
        "nvtx",
        "nvtx.range",
        "nvtx.range_push",
        "nvtx.range_pop",
        "cudart",  # profiling, off unless asked for
        "memory_stats",
        "memory_reserved",
        "memory_allocated",
        "memory",
        "OutOfMemoryError",  # reports
        "memory._record_memory_history",
        "memory._snapshot",
        "memory.CUDAPluggableAllocator",
        "memory.change_current_allocator",
        "memory._set_allocator_settings",
        "utilization",
        "temperature",
        "power_draw",
        "clock_rate",  # straggler detection
    }
)

# Modules that define kernels of triton and import it unconditionally, where the others carry on without it.
_TRITON_KERNELS = {PACKAGE + ".transformer.moe.ops.paged_stash"}

# Imports for features that are off, each in a `try` that carries on without.
_LEFT_OUT = {"wandb"}

# What megatron-core says on every host without the GPU libraries; here it is as it should be.
_EXPECTED_WARNINGS = ("Transformer Engine and Apex are not installed", "Apex is not installed", "absl.logging is not")

_TENSOR_TYPE_STRING = re.compile(r"^torch\.cuda\.(\w+Tensor)$")
_QUOTED_NAME = re.compile(r"^torch\.cuda\.([\w.]+)$")


def has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available()


def install() -> None:
    """Install the hook when no accelerator is present. Calling it again does nothing."""
    if any(isinstance(finder, _CpuFinder) for finder in sys.meta_path) or has_accelerator():
        return
    loaded = [name for name in sys.modules if name == PACKAGE or name.startswith(PACKAGE + ".")]
    assert not loaded, f"cpu_backend.install() must come before the first import of {PACKAGE}: {loaded[:3]}"
    sys.meta_path.insert(0, _CpuFinder())
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_keep_random_state_record)
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _keep_random_state_record(record: logging.LogRecord) -> bool:
    """Refuse one warning: that the CPU random state changed inside a fork, which is the purpose here."""
    return not record.getMessage().startswith("CPU RNG state changed")


def _device_name(node: ast.AST) -> str | None:
    """The part after `torch.cuda.` of an attribute chain, or None."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name) and node.id == "torch" and len(parts) > 1 and parts[-1] == "cuda":
        return ".".join(reversed(parts[:-1]))
    return None


def _is_compile(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(called) == "torch.compile"


class _CpuRewriter(ast.NodeTransformer):
    """Replaces the device names of one module."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = _device_name(node.func)
        if name in _CALLS:
            return ast.copy_location(ast.parse(_CALLS[name], mode="eval").body, node)
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            node.func.attr = "cpu"
            node.args, node.keywords = [], []
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        name = _device_name(node)
        if name in _REFERENCES:
            torch_name = ast.copy_location(ast.Name("torch", ast.Load()), node)
            return ast.copy_location(ast.Attribute(torch_name, name, node.ctx), node)
        self.generic_visit(node)
        if node.attr == "is_cuda":
            node.attr = "is_cpu"
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """`@torch.compile` imports torch's compiler, half the time of importing megatron; the function runs without."""
        node.decorator_list = [one for one in node.decorator_list if not _is_compile(one)]
        self.generic_visit(node)
        return node

    def visit_Try(self, node: ast.Try) -> ast.AST:
        """What megatron can do without and nothing here uses is as if it were not installed: importing it takes time."""
        for index, statement in enumerate(node.body):
            if isinstance(statement, ast.Import) and statement.names[0].name in _LEFT_OUT:
                node.body[index] = ast.copy_location(ast.parse("raise ImportError").body[0], statement)
        self.generic_visit(node)
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):
            match = _TENSOR_TYPE_STRING.match(node.value)
            if match:
                return ast.copy_location(ast.Constant(f"torch.{match[1]}"), node)
            if node.value == "cuda":
                return ast.copy_location(ast.Constant("cpu"), node)
        return node


def rewrite(source: str, path: str = "<source>") -> ast.Module:
    """Syntax tree of `source` with device names replaced."""
    tree = _CpuRewriter().visit(ast.parse(source, path))
    result: ast.Module = ast.fix_missing_locations(tree)
    return result


def without_triton(tree: ast.Module) -> ast.Module:
    """The module without its imports of triton; each kernel (a function under `@triton.jit`) is None."""
    body: list[ast.stmt] = []
    for statement in tree.body:
        if isinstance(statement, ast.Import) and all(_is_triton(alias.name) for alias in statement.names):
            continue
        if isinstance(statement, ast.FunctionDef) and any(
            _is_triton(ast.unparse(decorator)) for decorator in statement.decorator_list
        ):
            body += ast.parse(f"{statement.name} = None").body
        else:
            body.append(statement)
    tree.body = body
    return tree


def _is_triton(name: str) -> bool:
    return name.split(".")[0] == "triton"


def unknown_device_names(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of each device name in `source` for which there is no rule."""
    tree = ast.parse(source)
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        name = _device_name(node)
        if name and id(node) not in inner and name not in REWRITTEN and name not in HARMLESS:
            yield getattr(node, "lineno", 0), f"torch.cuda.{name}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            quoted = _QUOTED_NAME.match(node.value)
            if quoted and quoted[1] not in REWRITTEN and quoted[1] not in HARMLESS:
                yield node.lineno, repr(node.value)


class _CpuLoader(importlib.machinery.SourceFileLoader):
    """Compiles a module of megatron-core for the CPU.

    The byte code is cached beside Python's own under a name that holds a checksum of this file, so that neither is
    ever taken for the other and a changed rule takes effect.
    """

    cache_tag = f".nextstate-{zlib.crc32(Path(__file__).read_bytes()):08x}.pyc"

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:  # type: ignore[override]
        tree = rewrite(importlib.util.decode_source(data), path)
        if self.name in _TRITON_KERNELS:
            tree = without_triton(tree)
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)

    def get_data(self, path: str) -> bytes:
        return super().get_data(self._own_cache(path))

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        super().set_data(self._own_cache(path), data, _mode=_mode)

    def _own_cache(self, path: str) -> str:
        return path.removesuffix(".pyc") + self.cache_tag if path.endswith(".pyc") else path

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if module.__name__ == "megatron.core.tensor_parallel.random":
            _use_cpu_generator(module)
        if module.__name__ == "megatron.core.jit":
            # It is torch.compile. What it decorates are fusions, which `model.backbone.transformer` switches off.
            vars(module)["disable_jit_fuser"]()


def _use_cpu_generator(random: ModuleType) -> None:
    """Point megatron's random-state tracker at torch's CPU generator."""
    import torch

    def get_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    vars(random).update(_get_cuda_rng_state=get_state, _set_cuda_rng_state=set_state)


class _CpuFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != PACKAGE and not fullname.startswith(PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            return spec
        loader = _CpuLoader(fullname, spec.origin)
        locations = spec.submodule_search_locations
        return importlib.util.spec_from_file_location(
            fullname, spec.origin, loader=loader, submodule_search_locations=list(locations) if locations else None
        )


def package_folder() -> Path:
    """Where the installed megatron-core lies; nothing is imported."""
    spec = importlib.machinery.PathFinder.find_spec("megatron")
    assert spec is not None, "megatron-core is not installed"
    assert spec.submodule_search_locations, "megatron is not a package"
    return Path(next(iter(spec.submodule_search_locations))) / "core"
