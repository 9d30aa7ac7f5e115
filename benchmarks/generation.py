"""Tokens per second of generation with the KV cache, against transformers' `generate` on the same weights.

    python -m benchmarks.generation --checkpoint runs/demo/sft --batch 16 --grid 16

Both sides read the same prompts and draw the same number of tokens from the whole distribution with their caches, in
turn, `--repeats` times in one process with `--threads` threads. Ours draws images of `--grid` squared codes under the
grammar, as rollouts do; theirs draws anything. First the logits of both are compared. Prints one JSON object: tokens per
second of each side (best and all), their ratio, CPU seconds a token, and the bytes of our KV cache beside the formula
2 * layers * batch * length * groups * head_dim * bytes of a number.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from model import reference
from model.checkpoint.manifest import CheckpointManifest
from model.checkpoint.reader import CheckpointReader, latest_checkpoint
from model.config import ModelConfig
from model.conversion.hugging_face import model_config
from model.generation.ar import ARGenerator
from model.generation.decoder import CachedDecoder
from model.generation.grammar import GrammarOptions, ImageGrammar
from model.generation.settings import SamplingConfig
from model.vocabulary import Vocabulary
from training.inference.loading import load_decoder

MAX_LOGIT_DIFFERENCE = 1e-3  # float32, behind a prompt; more is another model


def theirs(reader: CheckpointReader, config: ModelConfig, num_ids: int) -> Any:
    """transformers' Qwen3 with the checkpoint's weights."""
    their_config = transformers.Qwen3Config(
        vocab_size=num_ids,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=config.max_sequence_length,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen3ForCausalLM(their_config).eval()
    weight = reference.weights_of_checkpoint(reader, config)
    model.load_state_dict({name: weight(name) for name in model.state_dict()})
    return model


def measured(sides: Mapping[str, Callable[[], int]], repeats: int) -> dict[str, dict[str, Any]]:
    """Of each side tokens per second, all runs and the best; they take turns, so that both see the same machine."""
    found: dict[str, Any] = {name: {"all": [], "cpu_milliseconds_per_token": []} for name in sides}
    for repeat in range(1 + repeats):
        for name, generate in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            num_tokens = generate()
            if repeat:  # the first one warms up
                found[name]["all"].append(round(num_tokens / (time.perf_counter() - wall), 1))
                found[name]["cpu_milliseconds_per_token"].append(1e3 * (time.process_time() - cpu) / num_tokens)
    return {
        name: {
            "tokens_per_second": max(one["all"]),
            "all": one["all"],
            "cpu_milliseconds_per_token": round(min(one["cpu_milliseconds_per_token"]), 3),
        }
        for name, one in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/demo/sft"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--grid", type=int, default=16, help="codes of a side of an image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    folder = latest_checkpoint(options.checkpoint)
    with CheckpointReader(folder) as reader:
        config = model_config(CheckpointManifest.of(reader.manifest, folder).model or {}, str(folder))
        vocabulary = Vocabulary.from_config(config.vocabulary)
        decoder: CachedDecoder = load_decoder(reader, config, None)
        other = theirs(reader, config, vocabulary.size)
    prompts = torch.randint(0, vocabulary.text_size, (options.batch, options.prompt_tokens))
    with torch.inference_mode():
        ours_say = decoder.start(prompts.tolist(), 1)[:, : vocabulary.size]
        theirs_say = other(prompts).logits[:, -1]
        difference = float((ours_say - theirs_say).abs().max())
        assert theirs_say.std() > 0.1, "the logits say nothing"
    assert difference <= MAX_LOGIT_DIFFERENCE, f"the logits differ by {difference}: not the same weights"

    digits = list(range(10))  # any ten text ids: what they say is not looked at
    grammar = ImageGrammar(vocabulary, digits, 10, GrammarOptions(stop_after_images=1, begin_with_image=True))
    generator = ARGenerator(decoder, grammar)
    sampling = SamplingConfig(max_new_tokens=config.max_sequence_length - options.prompt_tokens)
    grids: list[Any] = [(options.grid, options.grid)] * options.batch
    found = generator.sample(prompts.tolist(), sampling, 0, grids)
    num_new = len(found[0].ids)
    assert all(len(one.ids) == num_new for one in found), "images of one size have as many tokens"
    sampling.max_new_tokens = num_new

    def generate_ours() -> int:
        return sum(len(one.ids) for one in generator.sample(prompts.tolist(), sampling, 0, grids))

    def generate_theirs() -> int:
        with torch.inference_mode():
            drawn = other.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                use_cache=True,
                min_new_tokens=num_new,
                max_new_tokens=num_new,
                eos_token_id=None,
                pad_token_id=vocabulary.pad,
            )
        return int(drawn[:, options.prompt_tokens :].numel())

    found_rates = measured({"ours": generate_ours, "theirs": generate_theirs}, options.repeats)
    ours, others = found_rates["ours"], found_rates["theirs"]
    cache = decoder._cache
    assert cache is not None
    length = options.prompt_tokens + num_new
    size = 2 * config.num_layers * options.batch * length * config.num_query_groups * config.head_dim
    report = {
        "batch": options.batch,
        "new_tokens": num_new,
        "threads": options.threads,
        "max_logit_difference": difference,
        "ours": ours,
        f"transformers {transformers.__version__}": others,
        "ratio": round(ours["tokens_per_second"] / others["tokens_per_second"], 2),
        "ratio_of_cpu": round(others["cpu_milliseconds_per_token"] / ours["cpu_milliseconds_per_token"], 2),
        "cache_bytes": cache.keys.nbytes + cache.values.nbytes,
        "cache_bytes_by_formula": size * cache.keys.element_size(),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
