"""What a run may ask of the deepspeed engine: each silent trap of DeepSpeed is refused before anything starts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.command_line import cli
from launch.composition.compose import compose_config
from launch.plan.places import host, place_of
from launch.plan.preflight import judge
from model.errors import UserError
from training.config import DatasetEntry, TrainConfig, from_dict
from training.contracts.zero import EXTRA_KEYS, DeepSpeedConfig, can_compile, host_bytes
from training.engines.replicated import Alone
from training.reliability.initial import resolve_initial
from training.stage import validate

REPOSITORY = Path(__file__).resolve().parents[2]


def config_with(**changes: Any) -> TrainConfig:
    values = {"engine": "deepspeed", "stage": {"data": {"datasets": {"one": {"path": "somewhere"}}}}}
    return from_dict(values | changes)


def message_of(config: TrainConfig) -> str:
    with pytest.raises(UserError) as caught:
        validate(config)
    return str(caught.value)


def test_a_good_one_passes() -> None:
    extra = {"wall_clock_breakdown": True, "zero_optimization": {"overlap_comm": False}}
    validate(config_with(deepspeed={"zero_stage": 2, "offload_optimizer": "cpu", "extra": extra}))


@pytest.mark.parametrize(
    ("options", "key", "reason"),
    [
        ({"zero_stage": 0}, "deepspeed.zero_stage", "bias correction"),
        ({"zero_stage": 4}, "deepspeed.zero_stage", "1, 2, 3"),
        ({"offload_optimizer": "nvme"}, "deepspeed.offload_optimizer", "libaio"),
        ({"offload_optimizer": "disk"}, "deepspeed.offload_optimizer", "choices"),
        ({"zero_stage": 2, "offload_weights": "cpu"}, "deepspeed.offload_weights", "stage 3"),
        ({"compiled_adam": True}, "deepspeed.compiled_adam", "not there"),
        ({"bucket_elements": 0}, "deepspeed.bucket_elements", "positive"),
        ({"live_elements": -1}, "deepspeed.live_elements", "negative"),
        ({"extra": {"optimizer": {"type": "Muon"}}}, "deepspeed.extra.optimizer", "clips the orthogonalised update"),
        ({"extra": {"sequence_parallel_size": 2}}, "deepspeed.extra.sequence_parallel_size", "multiplies the gradient"),
        ({"extra": {"scheduler": {"type": "WarmupCosineLR"}}}, "deepspeed.extra.scheduler", "rate 0"),
        ({"extra": {"data_types": {"grad_accum_dtype": "bf16"}}}, "deepspeed.extra.data_types", "float32"),
        (
            {"extra": {"zero_optimization": {"stage": 0}}},
            "deepspeed.extra.zero_optimization.stage",
            "the engine sets it",
        ),
    ],
)
def test_refused_with_its_reason(options: dict[str, Any], key: str, reason: str) -> None:
    message = message_of(config_with(deepspeed=options))
    assert f" {key}: " in message
    assert reason in message


def test_an_adam_that_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = {"compiled_adam": True, "offload_optimizer": "cpu"}
    if can_compile():
        validate(config_with(deepspeed=options))
    monkeypatch.setenv("PATH", str(tmp_path))
    message = message_of(config_with(deepspeed=options))
    assert "c++ and ninja" in message
    assert "pip install 'nextstate[deepspeed-compiled]'" in message


def test_a_pipeline_is_refused() -> None:
    assert "the deepspeed engine has no pipeline" in message_of(config_with(parallel={"pipeline": 2}))


def test_its_keys_have_no_effect_with_another_engine() -> None:
    message = message_of(config_with(engine=None, deepspeed={"zero_stage": 2}))
    assert "deepspeed.zero_stage: has no effect with engine=megatron" in message


def test_a_missing_installation_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" else found(name, *rest)
    )
    assert "pip install 'nextstate[deepspeed]'" in message_of(config_with())


def test_every_key_passed_on_is_one_of_deepspeeds() -> None:
    """Read from its sources: a key that it does not know would be ignored in silence."""
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None
    assert spec.origin is not None
    sources = "".join(path.read_text() for path in (Path(spec.origin).parent / "runtime").rglob("c*.py"))
    sources += "".join(path.read_text() for path in (Path(spec.origin).parent / "runtime/zero").glob("*.py"))
    sources += (Path(spec.origin).parent / "comm/config.py").read_text()
    sources += "".join(path.read_text() for path in (Path(spec.origin).parent / "profiling").rglob("*.py"))
    for key in EXTRA_KEYS:
        assert key.rpartition(".")[2] in sources, key


def test_host_memory_is_asked_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    from training.engines.deepspeed.host_memory import check_host_memory

    config = config_with(deepspeed={"offload_optimizer": "cpu", "offload_weights": "cpu"})
    assert host_bytes(config.deepspeed, 1000, 1000, 2) == 1000 * (16 + 2)
    assert host_bytes(config.deepspeed, 1000, 10, 2) == 10 * 16 + 1000 * 2  # with adapters
    check_host_memory(config, 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": 10}))
    with pytest.raises(UserError, match="more than this host's memory"):
        check_host_memory(config, 1)
    config.deepspeed = DeepSpeedConfig()
    check_host_memory(config, 1)


@pytest.mark.parametrize(
    ("file", "title"),
    [
        ("global_step5/mp_rank_00_model_states.pt", "DeepSpeed"),
        ("iter_0000005/__0_0.distcp", ""),
        ("__0_0.distcp", "torch"),
        ("latest_checkpointed_iteration.txt", "Megatron"),
        ("model-00001-of-00002.safetensors", "published"),
    ],
)
def test_another_programs_checkpoint_is_named(tmp_path: Path, file: str, title: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(UserError) as caught:
        resolve_initial(tmp_path, Alone())
    message = str(caught.value)
    assert title in message
    assert ("nextstate convert" in message) == bool(title)


def test_the_plan_names_memory_host_and_engine(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    def planned(num_accelerators: int) -> dict[str, Any]:
        asked = ["plan", "engine=deepspeed", "stage=sft_1", f"cluster.num_accelerators={num_accelerators}", "json=true"]
        assert cli.main(asked) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    few = planned(8)
    assert few["recommendation"]["engine"] == "deepspeed"
    assert "offload_optimizer=cpu" in few["recommendation"]["overrides"]
    offloaded = next(one for one in few["zero"] if one["zero_stage"] == 3 and one["offload_optimizer"])
    # 34.1 billion parameters: 16 bytes each on the one host.
    assert offloaded["host_bytes_per_node"] == pytest.approx(34.1e9 * 16, rel=1e-2)
    many = planned(64)
    assert many["recommendation"]["engine"] == "megatron"
    assert many["recommendation"]["overrides"].startswith("engine=megatron ")
    by_stage = {one["zero_stage"]: one for one in many["zero"] if not one["offload_optimizer"]}
    for stage, one in by_stage.items():
        cut = one["data"] if stage == 3 else 1
        assert one["memory"]["weights"] == pytest.approx(34.1e9 / one["tensor"] * 2 / cut, rel=1e-2)
        assert one["memory"]["optimizer"] == pytest.approx(34.1e9 / one["tensor"] * 12 / one["data"], rel=1e-2)


@pytest.mark.parametrize("preset", ["sft_one_node", "rl_one_node", "lora_one_node"])
def test_presets_for_one_node_fit_there(preset: str) -> None:
    config = compose_config("train", ["model=emu35_34b", f"stage={preset}"])
    assert config.engine == "deepspeed"
    assert config.parallel.world_size == 8
    if preset != "rl_one_node":
        config.stage.data.datasets = {"one": DatasetEntry(path="somewhere")}
    validate(config)
    node = compose_config("submit", ["cluster=h100", "cluster.num_accelerators=8"]).cluster
    verdict = judge(config, place_of(node))
    assert verdict.problems == []
    config.deepspeed.offload_optimizer, config.parallel.distributed_optimizer = "none", True
    assert bool(judge(config, place_of(node)).problems) == (preset != "lora_one_node"), "the state fits on no device"


def test_offload_to_a_host_without_the_memory_is_refused_before_the_start() -> None:
    config = compose_config("train", ["model=emu35_34b", "stage=sft_one_node"])
    small = compose_config(
        "submit", ["cluster=h100", "cluster.num_accelerators=8", "cluster.host_memory_gigabytes=256"]
    )
    (problem,) = judge(config, place_of(small.cluster)).problems
    assert problem == "what is offloaded takes 545.8 GB of a host, 256.0 GB are there"
    (together, *_) = judge(config, host(64e9, 8)).problems
    assert together.startswith("all 8 ranks together would need ")


def test_memory_that_deepspeed_holds_is_not_given_away_for_rollouts() -> None:
    from training.engines.deepspeed.engine import DeepSpeedEngine

    with pytest.raises(UserError, match=r"deepspeed\.offload_optimizer=cpu"):
        object.__new__(DeepSpeedEngine).offloaded()
