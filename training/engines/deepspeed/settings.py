"""The configuration that DeepSpeed is given: a dictionary made of ours, nothing of it from a file."""

from __future__ import annotations

from typing import Any

from training.config import TrainConfig

NEVER = 2**62  # steps between two lines that DeepSpeed prints


def zero_settings(config: TrainConfig, *, trained: bool = True) -> dict[str, Any]:
    """A model that is not trained is cut whole: stage 3."""
    options = config.deepspeed
    in_bfloat16 = config.model.dtype == "bfloat16"
    zero: dict[str, Any] = {
        "stage": options.zero_stage if trained else 3,
        "reduce_bucket_size": options.bucket_elements,
        "stage3_max_live_parameters": options.live_elements,
        "stage3_max_reuse_distance": options.live_elements,
        "stage3_param_persistence_threshold": options.persistent_elements,
        # It would replace torch.nn.functional.linear of the whole process.
        "memory_efficient_linear": False,
    }
    if options.offload_optimizer != "none" and trained:
        zero["offload_optimizer"] = {"device": options.offload_optimizer}
    if options.offload_weights != "none":
        zero["offload_param"] = {"device": options.offload_weights}
    settings: dict[str, Any] = {
        # For DeepSpeed's own counters only: the engine says where a step ends.
        "train_micro_batch_size_per_gpu": config.stage.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.stage.optimizer.gradient_clip,
        "steps_per_print": NEVER,
        "zero_allow_untested_optimizer": True,  # torch's AdamW
        "zero_force_ds_cpu_optimizer": False,  # its own one has to be compiled: `compiled_adam` asks for it
        "communication_data_type": "fp32",  # gradients, as in the megatron engine
        "zero_optimization": zero,
    }
    if in_bfloat16:
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return merged(settings, options.extra)


def merged(settings: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    zero = settings["zero_optimization"] | extra.get("zero_optimization", {})
    return settings | extra | {"zero_optimization": zero}
