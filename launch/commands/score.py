"""`nextstate score`: log-probabilities of given tokens or text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.storage.file_errors import check_writable
from training.inference.choice import check_choice
from training.inference.scoring import ScoreConfig, save_config

HELP = """Log-probability of each token of given documents under a checkpoint, in any layout of ranks.

tokens=FILE.npy holds integers [batch, length], one document a row; out=FILE.npy gets float32 [batch, length - 1], the
log-probability (in nats, over the real ids of the vocabulary) of tokens 1 .. length - 1 given those before. A folder of
token files, text=... and text_file=... are read too; there shorter documents end in NaN.

examples:
  nextstate score checkpoint=runs/demo/sft tokens=tokens.npy out=scores.npy
  nextstate score checkpoint=runs/demo/sft text="a red circle at top left"
  nextstate score checkpoint=runs/demo/sft tokens=tokens.npy out=scores.npy parallel.tensor=2 parallel.data=2 json=true"""

Config = ScoreConfig


def run(config: ScoreConfig) -> dict[str, Any]:
    """The figures; the values themselves go to `out`."""
    config.validate()
    check_choice(config.checkpoint, **({"text_tokenizer": config.text_tokenizer} if config.text_tokenizer else {}))
    if config.out:
        check_writable(Path(config.out).parent)
    from training.inference.scoring import open_inputs

    inputs = open_inputs(config)  # what is wrong is told before torch is imported or any rank starts
    if config.parallel.world_size == 1:
        from training.inference.scorer import score

        answer = score(config, inputs)
        assert answer is not None, "rank 0 answers"
        return answer
    from launch.local.ranks import meeting_folder, run_ranks

    with meeting_folder() as folder:
        save_config(config, folder / "config.json")
        return run_ranks("score", folder / "config.json", folder, folder, config.parallel.world_size)


def render(answer: dict[str, Any]) -> str:
    lines = [
        f"{answer['num_tokens']} tokens of {answer['num_documents']} documents: "
        f"mean log-probability {answer['mean_log_probability']:.4f}, perplexity {answer['perplexity']:.4f}"
    ]
    for name, one in answer["by_class"].items():
        lines.append(f"  {name}: {one['num_tokens']} tokens, perplexity {one['perplexity']:.4f}")
    return "\n".join(lines + ([f"written to {answer['out']}"] if answer["out"] else []))
