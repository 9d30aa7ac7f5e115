"""The import hook: every device name of megatron-core has a rule, and what is rewritten works."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.parallel import cpu_backend

ROOT = Path(__file__).resolve().parents[2]


def test_every_device_name_of_the_installed_megatron_has_a_rule() -> None:
    unknown = {}
    sources = list(cpu_backend.package_folder().rglob("*.py"))
    assert len(sources) > 300
    for path in sources:
        for line, name in cpu_backend.unknown_device_names(path.read_text()):
            unknown.setdefault(name, f"{path}:{line}")
    assert not unknown, f"megatron-core has device names without a rule in model/parallel/cpu_backend.py: {unknown}"


@pytest.mark.parametrize(
    "source", ["x = torch.cuda.new_thing()", "f(torch.cuda.memory.new_thing)", "kind = 'torch.cuda.new_thing'"]
)
def test_a_new_device_name_is_reported(source: str) -> None:
    assert list(cpu_backend.unknown_device_names(source)) != []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("torch.zeros(1, device='cuda')", "torch.zeros(1, device='cpu')"),
        ("torch.zeros(1, device=torch.cuda.current_device())", "torch.zeros(1, device=torch.get_default_device())"),
        ("f'{torch.cuda.current_device()}'", "f'{torch.get_default_device()}'"),
        ("x.cuda(non_blocking=True)", "x.cpu()"),
        ("x.is_cuda", "x.is_cpu"),
        ("t.type() == 'torch.cuda.FloatTensor'", "t.type() == 'torch.FloatTensor'"),
        ("torch.cuda.HalfTensor", "torch.HalfTensor"),
        ("torch.cuda.synchronize()", "None"),
        ("torch.cuda.current_stream().wait_event(e)", "torch.cpu.current_stream().wait_event(e)"),
        ("torch.cuda.manual_seed(seed)", "torch.manual_seed(seed)"),
        (
            "try:\n    import wandb\nexcept ImportError:\n    wandb = None",
            "try:\n    raise ImportError\nexcept ImportError:\n    wandb = None",
        ),
        ("@torch.compile(dynamic=True)\n@other\ndef f():\n    pass", "@other\ndef f():\n    pass"),
        ("try:\n    import os\nfinally:\n    pass", "try:\n    import os\nfinally:\n    pass"),
        ("a.cuda_graphs = 'cuda graph'", "a.cuda_graphs = 'cuda graph'"),
    ],
)
def test_rewrite(source: str, expected: str) -> None:
    assert ast.unparse(cpu_backend.rewrite(source)) == expected


def test_kernels_of_triton_are_left_out_and_nothing_else() -> None:
    source = """
import triton
import triton.language as tl
import os

@triton.jit
def kernel(pointer, size: tl.constexpr):
    return tl.load(pointer)

@cached
def function():
    import triton
"""
    expected = "import os\nkernel = None\n\n@cached\ndef function():\n    import triton"
    assert ast.unparse(cpu_backend.without_triton(ast.parse(source))) == expected


def test_megatron_is_imported_without_triton() -> None:
    """Other libraries ask whether there is a triton: none may seem to be there that is not."""
    import model.parallel.megatron  # noqa: F401

    is_installed = any((Path(folder) / "triton").is_dir() for folder in sys.path)
    assert is_installed or not [name for name in sys.modules if name.split(".")[0] == "triton"]


def test_importing_megatron_imports_neither_the_compiler_nor_wandb() -> None:
    """They are most of the time that it takes, in every process."""
    program = """
import subprocess
import sys
import model.parallel.megatron
from megatron.core.inference.contexts import dynamic_context
print(*{"wandb", "torch._dynamo", "torch._inductor"} & set(sys.modules))
"""
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == ""


def test_install_twice_keeps_one_hook() -> None:
    cpu_backend.install()
    cpu_backend.install()
    assert sum(type(finder).__name__ == "_CpuFinder" for finder in sys.meta_path) == 1


def test_nothing_is_installed_beside_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.setattr(cpu_backend, "has_accelerator", lambda: True)
    cpu_backend.install()
    assert sys.meta_path == []


@pytest.mark.usefixtures("single_process")
def test_random_streams_are_forked_and_restored() -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from model.parallel import groups

    groups.seed_random_streams(7)
    tracker = get_cuda_rng_tracker()
    outside = torch.get_rng_state()
    with tracker.fork():
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), outside)
    with tracker.fork():
        second = torch.rand(4)
    assert not torch.equal(first, second), "the stream goes on where it was left"
    groups.seed_random_streams(7)
    with tracker.fork():
        assert torch.equal(torch.rand(4), first)
