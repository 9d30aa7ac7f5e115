"""`nextstate tokenize`: raw webdataset shards to token files."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipeline.documents.tokenizers import load_text_tokenizer
from data_pipeline.executor import EXECUTORS, ShardJob, choose_executor, group_jobs, run_tasks, threads_per_worker
from data_pipeline.filters.base import FilterConfig
from data_pipeline.sources.copies import ShardCopies
from data_pipeline.sources.inputs import find_inputs, num_bytes_of
from data_pipeline.sources.patterns import plain_files
from data_pipeline.sources.remote import RemoteConfig
from data_pipeline.storage.atomic import atomic_write_json
from data_pipeline.storage.file_errors import check_writable, file_errors_are_user_errors
from data_pipeline.storage.folder_claim import claim_folder, clear_claim
from data_pipeline.storage.format import published_names, suffixed
from data_pipeline.storage.manifests import Manifests
from data_pipeline.tokenize import ShardTokenizer, TokenizeConfig
from data_pipeline.workers import MAX_DEATHS
from model.durable import fingerprint_of, read_json
from model.errors import Problems, UserError
from model.vocabulary import Vocabulary, VocabularyConfig

HELP = """Turn raw webdataset shards into token files.

  nextstate tokenize input='runs/demo/corpora/scenes/*.tar' target=runs/demo/tokens/48/scenes \\
      text_tokenizer=runs/demo/text_tokenizer vision_tokenizer=runs/demo/vision_tokenizer \\
      image.max_area=2304

One shard becomes one token file. A shard that is done already, with the same configuration and
tokenizers, is skipped. Samples that cannot be used are counted by reason and listed beside the
token file in NNNNNN.quarantine.jsonl.

  nextstate tokenize status input='runs/demo/corpora/scenes/*.tar' target=runs/demo/tokens/48/scenes

says how much is done, at what rate, and how long the rest takes. Shards behind a URL (input='"s3://bucket/scenes-{000..127}.tar"') are
fetched ahead into TARGET/remote, or remote.cache=FOLDER, and a read that fails is tried again (pip install 'nextstate[remote]'). A shard over which three workers died is left out from then on,
and told; `nextstate tokenize repair`, with the same arguments as before, tries it again.
"""

POSITIONAL = "action"
ACTIONS = ("run", "status", "repair", "report")

# In the target: what servers said of shards, and copies of them.
REMOTE_NOTES, COPIES_FOLDER = "remote.jsonl", "remote"
MAX_MISSING_SHARDS = 3  # of one task; after more the server is taken to be gone
MAX_NOTES_READ, MAX_PARTS_SHOWN = 10_000, 3  # of quarantined samples, for a message
CUT_SHARDS = "these files are cut, or no tar archives at all: copy or make them again"
OTHER_PARTS = "look at the reasons: parts that a kind of sample needs may have other names in these shards"
_TASKS_PER_WORKER = 8  # more tasks than workers, so that unequal ones even out


@dataclass
class Config(TokenizeConfig):
    """`source` defaults to the target folder's name."""

    action: str = "run"  # run | status: what is done | repair: run, given-up shards too | report: what filters took
    input: Any = None  # a pattern of .tar files (folder/*.tar, "x-{000..127}.tar", a URL), or a list of them
    target: str = ""  # folder of token files
    text_tokenizer: str = ""  # folder or file
    vision_tokenizer: str | None = None  # stage folder; null: the shards hold text only
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)  # sizes are taken from
    # the tokenizers; visual_size is read when there is no vision tokenizer
    remote: RemoteConfig = field(default_factory=RemoteConfig)  # of shards behind a URL
    workers: int = 1  # tasks at a time, each a process
    num_tasks: int = 0  # groups of shards; 0: chosen
    task: int = -1  # do the shards of this group only, as one task of a job array; -1: all groups
    filter_tier: str | None = None  # basic | advanced, of conf/filter_tiers, or a file like them; before `filters`
    executor: str = "auto"  # auto | local | datatrove
    max_quarantined_share: float = 0.2  # of the samples, filtered ones apart; above it: exit code 2
    json: bool = False  # answer with one JSON object

    def validate(self) -> None:
        problems = Problems()
        problems.check(
            self.action in ACTIONS, "action", f"unknown action {self.action!r}", f"one of {', '.join(ACTIONS)}"
        )
        for name in ("target",) if self.action in ("status", "report") else ("target", "text_tokenizer"):
            problems.check(bool(getattr(self, name)), name, "is required", f"{name}=<path>")
        problems.check(bool(self.input) or self.action == "report", "input", "is required", "input='<folder>/*.tar'")
        problems.check(self.workers > 0, "workers", "must be positive", "workers=1")
        problems.check(self.num_tasks >= 0, "num_tasks", "must not be negative", "num_tasks=0")
        problems.check(
            -1 <= self.task < max(1, self.num_tasks),
            "task",
            f"there is no group {self.task} of {self.num_tasks}",
            "num_tasks=64 task=0, or task=-1",
        )
        problems.check(
            self.executor in EXECUTORS,
            "executor",
            f"unknown executor {self.executor!r}",
            f"executor={' or '.join(EXECUTORS)}",
        )
        self.vocabulary.validate(problems, "vocabulary")
        unset = {"text_size": "the text tokenizer says how many ids there are"}
        if self.vision_tokenizer:
            unset["visual_size"] = "the vision tokenizer says how many codes there are"
        for name, reason in unset.items():
            self.vocabulary.check_unset(problems, "vocabulary", name, reason)
        problems.check(
            0 <= self.max_quarantined_share <= 1,
            "max_quarantined_share",
            f"must be in [0, 1], got {self.max_quarantined_share}",
            "max_quarantined_share=0.2",
        )
        self.remote.validate(problems, "remote")
        self.validate_tokenize(problems)
        problems.raise_if_any()


@file_errors_are_user_errors("the input or the target")
def run(config: Config) -> dict[str, Any]:
    """Tokenize what is not tokenized yet; the answer counts all of the target."""
    if config.filter_tier is not None:
        config = replace(config, filters=with_tier(config.filter_tier, config.filters))
    config.validate()
    target = Path(config.target)
    if config.action == "report":
        from launch.report.filters_page import write_page

        return write_page(target)
    if config.action == "status":
        return status(target, plan_jobs(config, target))
    if config.action == "repair":
        (target / REMOTE_NOTES).unlink(missing_ok=True)
    config = replace(config, source=config.source or target.name)
    jobs = plan_jobs(config, target)
    shards = [str(job.shard) for job in jobs]
    if config.task >= 0:
        jobs = group_jobs(jobs, config.num_tasks)[config.task]
    check_writable(target)
    tokenizer = load_tokenizer(config)
    if config.action == "repair":
        for job in jobs:
            poison_note(job).unlink(missing_ok=True)
    manifests = manifests_of(target)
    unfinished = not_done(target, jobs, tokenizer, manifests)
    poisonous = [job for job in unfinished if is_poisonous(job)]
    remaining = [job for job in unfinished if job not in poisonous]
    num_tasks = config.num_tasks or max(1, min(len(jobs), config.workers * _TASKS_PER_WORKER))
    executor = choose_executor(config.executor, config.workers)
    if remaining:
        with claim_folder(target, "tokenize", fingerprint_of([tokenizer.fingerprint, shards])):
            given_up = run_tasks(
                TokenizeTask(config, tokenizer),
                group_jobs(remaining, num_tasks),
                workers=config.workers,
                executor=executor,
                log_folder=target / "logs",
            )
            note_poison(given_up)
        manifests = manifests_of(target)
    else:
        clear_claim(target)
    good = [job for job in jobs if job not in poisonous]
    answer = summarize(target, good, len(good) - len(remaining), manifests) | {"poisonous_shards": len(poisonous)}
    refuse_mostly_quarantined(answer, config.max_quarantined_share)
    return answer


def with_tier(tier: str, filters: Sequence[FilterConfig]) -> list[FilterConfig]:
    """The filters of a tier, but for those that `filters` name too, and then these. Raises `UserError` for no such tier."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    import conf

    folder = (
        Path(str(conf.__file__)).parent / "filter_tiers"
    )  # no name of a key: Hydra would take `filters=[...]` for the choice of a file
    path = Path(tier) if tier.endswith(".yaml") else folder / f"{tier}.yaml"
    own = {one.name for one in filters}
    try:
        entries = OmegaConf.to_object(OmegaConf.load(path))
        assert isinstance(entries, dict)
        schema = OmegaConf.structured(FilterConfig)
        found: list[Any] = [OmegaConf.to_object(OmegaConf.merge(schema, entry)) for entry in entries["filters"]]
    except (OSError, OmegaConfBaseException, AssertionError, KeyError, TypeError) as error:
        raise UserError(
            "no such tier of filters",
            where=f"filter_tier={tier}",
            expected=f"one of {', '.join(sorted(one.stem for one in folder.glob('*.yaml')))}, or a file like them",
            got=f"{type(error).__name__}: {error}".splitlines()[0],
        ) from error
    return [*(one for one in found if one.name not in own), *filters]


def manifests_of(target: Path) -> Manifests | None:
    """None where there is no folder yet."""
    return Manifests(target, "tokens") if target.is_dir() else None


def not_done(
    target: Path, jobs: Sequence[ShardJob], tokenizer: ShardTokenizer, manifests: Manifests | None
) -> list[ShardJob]:
    """Those that `ShardTokenizer.is_done` says no of, without opening the manifest of each."""
    if manifests is None:
        return list(jobs)
    by_name = {job.prefix.name: job for job in jobs}
    with os.scandir(target) as entries:
        there = {entry.name for entry in entries if entry.is_file()}
    wanted = [name for name in manifests.names if name in by_name]
    done = {
        name
        for name, manifest in manifests.each(wanted, may_be_gone=True)
        if tokenizer.is_of(manifest, by_name[name].shard) and there.issuperset(manifest["outputs"])
    }
    return [job for job in jobs if job.prefix.name not in done]


def poison_note(job: ShardJob) -> Path:
    return suffixed(job.prefix, ".poison.json")


def is_poisonous(job: ShardJob) -> bool:
    """Was it given up, and is it still the shard that was? A replaced one is tried again."""
    note = poison_note(job)
    return note.is_file() and read_json(note).get("bytes") == num_bytes_of(job.shard)


def note_poison(given_up: Sequence[tuple[ShardJob, str]]) -> None:
    """Remember shards over which every worker died, and raise `UserError` that names them."""
    for job, how in given_up:
        atomic_write_json(
            poison_note(job),
            {"shard": str(job.shard), "bytes": num_bytes_of(job.shard), "workers": MAX_DEATHS, "died_by": how},
        )
    if given_up:
        raise UserError(
            f"{MAX_DEATHS} worker processes died over each of {len(given_up)} shards; all others are done",
            where=", ".join(str(job.shard) for job, _ in given_up[:5]),
            got=given_up[0][1],
            fix="look for the out-of-memory killer in the system's log. The same command again goes on without these shards; "
            "`nextstate tokenize repair` tries them again (with fewer workers, or with mended shards)",
        )


def refuse_mostly_quarantined(answer: dict[str, Any], largest_share: float) -> None:
    """Raises `UserError` where more samples could not be used than is normal. The files stay; what filters took is meant."""
    unusable = Counter({reason: n for reason, n in answer["quarantined"].items() if not reason.startswith("filter_")})
    num_quarantined = unusable.total()
    num_samples = num_quarantined + answer["num_documents"]
    if num_samples and num_quarantined > largest_share * num_samples:
        raise UserError(
            f"{num_quarantined:,} of {num_samples:,} samples could not be used",
            where=f"{answer['target']}/*.quarantine.jsonl",
            expected=f"at most {largest_share:.0%}",
            got=", ".join(f"{reason} {count:,}" for reason, count in unusable.most_common())
            + unknown_parts(answer["target"]),
            fix=(CUT_SHARDS if unusable["truncated_tar"] * 2 > num_quarantined else OTHER_PARTS) + "; or "
            f"max_quarantined_share={min(1.0, -(-100 * num_quarantined // num_samples) / 100)}",
        )


def unknown_parts(target: str) -> str:
    """For the message: the commonest sets of files that make no sample, each with what a kind would need."""
    notes = itertools.islice(lines_of(sorted(Path(target).glob("*.quarantine.jsonl"))), MAX_NOTES_READ)
    details = Counter(note["detail"] for note in map(json.loads, notes) if note["reason"] == "unknown_kind")
    return "".join(f"; {count:,} x {detail}" for detail, count in details.most_common(MAX_PARTS_SHOWN))


def lines_of(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        with path.open(encoding="utf-8") as file:
            yield from file


def plan_jobs(config: Config, target: Path) -> list[ShardJob]:
    """Shards in order of their paths, numbered as token files 000000, 000001...

    Raises `UserError` for a pattern without files, and when the target holds token files of shards
    that are not in the list: they would be packed with the others.
    """
    wanted = [config.input] if isinstance(config.input, str) else [str(pattern) for pattern in config.input]
    shards = find_inputs(wanted, "input", config.remote, target / REMOTE_NOTES)
    local = [str(shard) for shard in shards if isinstance(shard, Path)]
    plain = plain_files(local)
    folders = {os.path.dirname(shard if shard in plain else os.path.realpath(shard)) for shard in local}
    if os.path.realpath(target) in map(os.path.realpath, folders):
        raise UserError(
            "the target is a folder of the shards that are read",
            where=f"target={target}",
            expected="a folder of its own for the token files",
            fix="target=FOLDER elsewhere",
        )
    same_name = Counter(shard.name for shard in shards)
    jobs = [
        ShardJob(shard, target / f"{number:06d}", str(shard) if same_name[shard.name] > 1 else shard.name)
        for number, shard in enumerate(shards)
    ]
    if target.is_dir():
        expected = {job.prefix.name for job in jobs}
        strangers = [name for name in published_names(target) if name not in expected]
        if strangers:
            raise UserError(
                "the target holds token files of other inputs",
                where=str(target),
                expected=f"at most the {len(jobs)} files of this input",
                got=", ".join(strangers[:5]),
                fix="give all inputs in one call, or remove those files, or take another target",
            )
    return jobs


class TokenizeTask:
    """The work of a task. In another process it loads the tokenizers anew: they are not pickled."""

    def __init__(self, config: Config, tokenizer: ShardTokenizer | None):
        self.config = config
        self.tokenizer = tokenizer

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "tokenizer": None}

    def __call__(self, jobs: Sequence[ShardJob]) -> None:
        self.tokenizer = self.tokenizer or load_tokenizer(self.config)
        copies = ShardCopies(Path(self.config.target) / COPIES_FOLDER, self.config.remote)
        missing: list[UserError] = []
        with copies.ahead([job.shard for job in jobs]) as held:
            for job, shard in zip(jobs, held, strict=True):
                if isinstance(shard, UserError):
                    missing.append(shard)  # the others are done first
                    if len(missing) > MAX_MISSING_SHARDS:
                        break
                else:
                    self.tokenizer.tokenize(job.shard, job.prefix, job.name, shard.path)
        if missing:
            raise missing[0]


def load_tokenizer(config: Config) -> ShardTokenizer:
    """The tokenizers, and the vocabulary that their sizes make."""
    text_tokenizer = load_text_tokenizer(config.text_tokenizer)
    vision_tokenizer = None
    if config.vision_tokenizer:
        import torch

        from model.vision_tokenizer import load_vision_tokenizer

        torch.set_num_threads(threads_per_worker(config.workers))
        vision_tokenizer = load_vision_tokenizer(config.vision_tokenizer)
    sizes = {"text_size": text_tokenizer.size, "visual_size": config.vocabulary.visual_size}
    if vision_tokenizer is not None:
        sizes["visual_size"] = vision_tokenizer.codebook_size
    vocabulary = Vocabulary.from_config(
        VocabularyConfig(
            preset=config.vocabulary.preset,
            reserved_size=config.vocabulary.reserved_size,
            pad_multiple=config.vocabulary.pad_multiple,
            **sizes,
        )
    )
    check_sizes(vocabulary, sizes)
    given = {"text_tokenizer": config.text_tokenizer, "vision_tokenizer": config.vision_tokenizer}
    paths = {name: str(Path(path).absolute()) for name, path in given.items() if path}
    return ShardTokenizer(
        config, vocabulary, text_tokenizer, vision_tokenizer, paths, threads_per_worker(config.workers)
    )


def check_sizes(vocabulary: Vocabulary, sizes: dict[str, int]) -> None:
    """A preset with fixed ids may be too small for the tokenizers."""
    for name, size in sizes.items():
        if size > getattr(vocabulary, name):
            raise UserError(
                "a tokenizer does not fit the vocabulary",
                where=f"vocabulary.{name}",
                expected=f"at most {getattr(vocabulary, name):,} ids",
                got=f"{size:,}",
                fix="vocabulary.preset=compact, or the tokenizers of this preset",
            )


_RECENT = 200  # finished shards whose times tell the rate


def status(target: Path, jobs: Sequence[ShardJob]) -> dict[str, Any]:
    """From the manifests alone: shards done, changed since (they will be done again), given up and left, what is done holds.

    The rate is that of the last shards that were finished, all workers together; None before there are two.
    """
    finished: list[float] = []  # when
    done = Totals()
    left = {job.prefix.name: job for job in jobs}
    num_changed = 0
    if (manifests := manifests_of(target)) is not None:
        wanted = [name for name in manifests.names if name in left]
        for name, manifest in manifests.each(wanted, may_be_gone=True):
            recorded, shard = (manifest.get("inputs") or [{}])[0], left[name].shard
            if (recorded.get("name"), recorded.get("bytes")) == (shard.name, num_bytes_of(shard)):
                finished.append(manifests.modified_seconds(name))
                done.add(manifest)
                del left[name]
            else:
                num_changed += 1
    num_poisonous = sum(map(is_poisonous, left.values()))
    recent = sorted(finished)[-_RECENT:]
    seconds = recent[-1] - recent[0] if recent else 0.0
    rate = (len(recent) - 1) / seconds if seconds > 0 else None
    num_left = len(jobs) - len(finished) - num_poisonous
    return done.describe(target) | {
        "num_shards": len(jobs),
        "done_shards": len(finished),
        "changed_shards": num_changed,
        "poisonous_shards": num_poisonous,
        "left_shards": num_left,
        "shards_per_hour": round(rate * 3600, 3) if rate else None,
        "remaining_hours": round(num_left / rate / 3600, 3) if rate else None,
    }


def summarize(target: Path, jobs: Sequence[ShardJob], num_skipped: int, manifests: Manifests | None) -> dict[str, Any]:
    totals = Totals()
    if manifests is not None:
        for _, manifest in manifests.each([job.prefix.name for job in jobs]):
            totals.add(manifest)
    return totals.describe(target) | {"num_shards": len(jobs), "skipped_shards": num_skipped}


class Totals:
    """What token files hold together, added up from their manifests."""

    def __init__(self) -> None:
        self.num_documents = self.num_tokens = 0
        self.counts: Counter[str] = Counter()
        self.quarantined: Counter[str] = Counter()

    def add(self, manifest: dict[str, Any]) -> None:
        self.num_documents += manifest["num_documents"]
        self.num_tokens += manifest["num_tokens"]
        for total, found in ((self.counts, "counts_by_class"), (self.quarantined, "quarantined")):
            for name, count in manifest[found].items():  # of a small dict faster than `update`
                total[name] += count

    def describe(self, target: Path) -> dict[str, Any]:
        return {
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "counts_by_class": dict(self.counts),
            "quarantined": dict(self.quarantined),
            "target": str(target),
        }
