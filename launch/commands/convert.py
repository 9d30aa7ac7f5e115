"""`nextstate convert`: checkpoints to and from published layouts, exact to the bit."""

from __future__ import annotations

from typing import Any

from launch.conversion.options import ConvertConfig

HELP = """Convert checkpoints to and from published layouts, bit by bit, without building the model.

actions: init makes a checkpoint of fresh weights; from_hf reads a published layout (emu35, qwen3, emu3, ibq) and
to_hf writes one; reshard rewrites a checkpoint for another tensor/pipeline layout; verify compares a checkpoint with an
export; surgery gives a text model our vocabulary; merge adds a checkpoint's adapters to its weights and to_peft writes them
alone, in the format of peft. A conversion that was killed goes on when the same command runs again.

examples:
  nextstate convert init model=toy seed=11 target=fresh
  nextstate convert to_hf source=runs/demo/sft target=export layout=emu35
  nextstate convert from_hf source=export target=back layout=emu35
  nextstate convert from_hf source=Qwen3-32B target=start model=emu35_34b layout=qwen3
  nextstate convert reshard source=fresh target=resharded tensor=2 pipeline=2
  nextstate convert verify source=fresh target=export layout=emu35
  nextstate convert surgery source=Qwen3-32B target=start model=emu35_34b model.rms_norm_eps=1e-6
  nextstate convert merge source=runs/mine/sft target=merged
  nextstate convert to_peft source=runs/mine/sft target=adapter"""

POSITIONAL = "action"
Config = ConvertConfig


def run(config: ConvertConfig) -> dict[str, Any]:
    """The answer names the action, the target, the bytes and seconds, and what the certificate says."""
    from launch.conversion.conversion import convert

    return convert(config)


def render(answer: dict[str, Any]) -> str:
    lines = []
    for key, value in answer.items():
        if isinstance(value, dict):
            inner = ", ".join(f"{name} {one}" for name, one in value.items() if not isinstance(one, dict | list))
            lines.append(f"{key + ':':<18} {inner}")
        elif isinstance(value, list):
            lines += [f"{key + ':':<18} {one}" for one in value]
        elif value is not None:
            lines.append(f"{key + ':':<18} {value:,}" if isinstance(value, int) else f"{key + ':':<18} {value}")
    return "\n".join(lines)
