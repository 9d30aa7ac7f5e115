"""A byte-level BPE of Hugging Face run by tiktoken, several times as fast, where both are shown to give the same ids.

They cut a text into words by the same pattern; what they merge within a word is not the same. Hugging Face merges the pairs
that a list names, the first of the list first; tiktoken any neighbours whose bytes together are a token, the lowest rank
first. A token's bytes alone, merged by tiktoken's rule, come to a last pair. Where the list names that pair, for every token,
and tokens have their ranks in the list's order, tiktoken merges no other pair in any word: between the outer ends of two
neighbours the same has happened as to their bytes alone. So at every step both merge the same pair.

What cannot be known for all texts is looked for in each one: characters that the two libraries may take for different kinds,
and names of tokens that count as tokens in a text.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"|\s+(?!\S)|\s+"  # how each of them ends
_TAIL = r"|\s*[\r\n]+" + _BLANKS
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+" + _BLANKS
# How Qwen's tokenizer cuts text before merging; digits stand one by one.
QWEN_PATTERN = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
# Every character is in some word of each of them, and both libraries' engines try the alternatives in the same way.
PATTERNS = {
    "GPT-2": _GPT2_PATTERN,
    "Llama 3": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL,
    "Qwen": QWEN_PATTERN,
    "Qwen 3.5": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _TAIL,
    "GPT-4o": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL,
}
_NUM_CODE_POINTS = 0x110000
# Where characters are: the planes of writing, and the one of tags. Those of other planes are for the slower library.
_SCANNED = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xF0000)]
_NEVER = 1 << 62


class UnsuitedError(Exception):
    """Why tiktoken might give other ids."""


class BytePairs:
    """tiktoken in the place of a `tokenizers.Tokenizer` with this definition. Raises `UnsuitedError`.

    The library is taken as `HuggingFaceTokenizer` sets it up: names of special tokens are mere text, nothing is cut or filled.
    """

    def __init__(self, definition: Mapping[str, Any], library: Any):
        import tiktoken

        pattern = _pattern_of(definition.get("pre_tokenizer"))
        self._normalizer = library.normalizer if _is_normalized(definition.get("normalizer")) else None
        ranks, self._ids = ranked_tokens(definition["model"])
        self._encoding = tiktoken.Encoding(
            "byte pairs", pat_str=grouped(pattern), mergeable_ranks=ranks, special_tokens={}
        )
        self._strange = _strange_characters(pattern, normalized=self._normalizer is not None)
        if self._strange[:128].any():
            raise UnsuitedError("the libraries' patterns see ASCII in two ways")
        self._token_names = _names_that_count(library)

    def ids(self, text: str) -> np.ndarray | None:
        """int32 [n]; None where only the library knows."""
        normal = text
        if not text.isascii():
            if self._is_strange(text):
                return None
            if self._normalizer is not None and not unicodedata.is_normalized("NFC", text):
                normal = self._normalizer.normalize_str(text)
                if self._is_strange(normal):
                    return None
        if self._token_names is not None and (self._token_names.search(text) or self._token_names.search(normal)):
            return None
        ranks = self._encoding.encode_ordinary(normal)
        return self._ids[np.fromiter(ranks, np.int32, len(ranks))]

    def _is_strange(self, text: str) -> bool:
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        return bool(self._strange[code_points].any())


def byte_pairs_of(definition: bytes, library: Any) -> BytePairs | None:
    """Of a `tokenizer.json`; None where tiktoken might give other ids. Says which it is."""
    try:
        found, told = BytePairs(json.loads(definition), library), "tiktoken, which gives the same ids"
    except UnsuitedError as reason:
        found, told = None, f"tokenizers, as tiktoken might give other ids: {reason}"
    print(f"the text tokenizer of Hugging Face is run by {told} [{os.getpid()}]", file=sys.stderr, flush=True)
    return found


def _pattern_of(pre_tokenizer: Any) -> str:
    """How words are cut. Raises `UnsuitedError` for a way that is not in `PATTERNS`."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False} if pre_tokenizer.get("use_regex", True):
            return _GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if pattern in PATTERNS.values():
            return str(pattern)
    raise UnsuitedError("it cuts words in a way of its own")


def grouped(pattern: str) -> str:
    """The same pattern, that tiktoken takes two thirds of the time for: what does not look ahead is one expression to its engine."""
    words = pattern.removesuffix(_BLANKS)
    assert words != pattern, pattern
    return f"(?:{words}){_BLANKS}"


def _is_normalized(normalizer: Any) -> bool:
    match normalizer:
        case None | {"type": "Sequence", "normalizers": []}:
            return False
        case {"type": "NFC"} | {"type": "Sequence", "normalizers": [{"type": "NFC"}]}:
            return True
    raise UnsuitedError("its text is changed in another way than NFC")


def ranked_tokens(model: Mapping[str, Any]) -> tuple[dict[bytes, int], np.ndarray]:
    """For tiktoken, of the `model` in a `tokenizer.json`: the rank of each token, and the id of each rank (int32 [n])."""
    if model.get("type") != "BPE" or model.get("dropout") or model.get("byte_fallback"):
        raise UnsuitedError("it is no plain BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UnsuitedError("its tokens are written with a prefix or a suffix")
    vocabulary = {token: int(index) for token, index in model["vocab"].items()}
    if len(set(vocabulary.values())) < len(vocabulary):
        raise UnsuitedError("two of its tokens have the same id")
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    if not vocabulary.keys() >= byte_of.keys():
        raise UnsuitedError("its vocabulary lacks a byte")
    written = _as_bytes(vocabulary, byte_of)
    pairs = [_pair(merge, written) for merge in model["merges"]]
    whole_words = bool(model.get("ignore_merges"))  # a word that is a token is not merged
    ranks = {bytes([value]): value for value in range(256)}
    merged = dict.fromkeys(left + right for left, right in pairs)
    for token in [*merged, *(written.values() if whole_words else ())]:
        ranks.setdefault(token, len(ranks))
    ids = {written[token]: index for token, index in vocabulary.items() if token in written}
    ids_of_ranks = np.array([ids[token] for token in ranks], np.int32)
    never_made = check_merges(pairs, ranks)
    if not whole_words:  # tiktoken would take a word for its token without merging
        for token in never_made:
            del ranks[token]
    return ranks, ids_of_ranks


def byte_letters() -> dict[int, str]:
    """The visible character that byte-level tokenizers write for each byte."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + number) for number, byte in enumerate(hidden)}


def _as_bytes(vocabulary: Iterable[str], byte_of: Mapping[str, int]) -> dict[str, bytes]:
    """Of each token its bytes; those with a letter that stands for none are left out, as no text has them."""
    found = {}
    for token in vocabulary:
        with suppress(KeyError):
            found[token] = bytes([byte_of[letter] for letter in token])
    return found


def _pair(merge: Any, written: Mapping[str, bytes]) -> tuple[bytes, bytes]:
    """`merge`: "left right", or a list of the two."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    if left not in written or right not in written or left + right not in written:
        raise UnsuitedError("it merges what is no bytes")
    return written[left], written[right]


def check_merges(pairs: list[tuple[bytes, bytes]], ranks: Mapping[bytes, int]) -> list[bytes]:
    """Raises `UnsuitedError` where tiktoken's rule with these ranks might merge something else than the listed pairs, in order.

    Returns the tokens that no merging comes to, listed as they may be.
    """
    places = {pair: place for place, pair in enumerate(pairs)}
    if len(places) < len(pairs):
        raise UnsuitedError("it lists a merge twice")
    before, never_made = -1, []
    for token in ranks:
        if len(token) == 1:
            continue
        pair = last_pair(token, ranks)
        if pair is None:
            never_made.append(token)
            continue
        place = places.get(pair, -1)
        if place <= before:  # not listed, or not in the order of the ranks
            raise UnsuitedError(f"its merges come to the token {token!r} in another way or order")
        before = place
    return never_made


def last_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts of which tiktoken's rule makes this token; None where it is stuck with more of them."""
    parts = [token[at : at + 1] for at in range(len(token))]
    pair_ranks = [ranks.get(token[at : at + 2], _NEVER) for at in range(len(token) - 1)]
    while len(parts) > 2:
        lowest = min(pair_ranks)
        if lowest == _NEVER:
            return None
        at = pair_ranks.index(lowest)
        parts[at] += parts.pop(at + 1)
        del pair_ranks[at]
        if at > 0:
            pair_ranks[at - 1] = ranks.get(parts[at - 1] + parts[at], _NEVER)
        if at < len(pair_ranks):
            pair_ranks[at] = ranks.get(parts[at] + parts[at + 1], _NEVER)
    return parts[0], parts[1]


@functools.cache
def _strange_characters(pattern: str, *, normalized: bool) -> np.ndarray:
    """bool [0x110000]: characters that may not be of the same kind to both libraries, as each has a Unicode of its own."""
    strange = np.ones(_NUM_CODE_POINTS, np.bool_)
    strange[_SCANNED] = False
    text = "".join(map(chr, _SCANNED))
    for kind in sorted(set(re.findall(r"\\p\{\w+\}|\\s", pattern))):
        strange |= _is_one_of(_found_by_tiktoken(kind, text)) != _is_one_of(_found_by_tokenizers(kind, text))
    if "(?i:" in pattern:  # a letter like the long s, which is an s to those who look at no case
        folded = ((one, one.casefold()) for one in text if not one.isascii())
        strange[[ord(one) for one, other in folded if other != one and re.search("[a-z]", other)]] = True
    if normalized:  # to Python and the library nothing is NFC in different ways but what one of them does not know
        strange[[ord(one) for one in text if unicodedata.category(one) == "Cn"]] = True
    return strange


def _is_one_of(characters: str) -> np.ndarray:
    found = np.zeros(_NUM_CODE_POINTS, np.bool_)
    found[np.frombuffer(characters.encode("utf-32-le"), np.uint32)] = True
    return found


def _found_by_tiktoken(kind: str, text: str) -> str:
    """What is of this kind in the text; all else is left out."""
    import tiktoken

    single = {bytes([value]): value for value in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=kind, mergeable_ranks=single, special_tokens={})
    return bytes(encoding.encode_ordinary(text)).decode()


def _found_by_tokenizers(kind: str, text: str) -> str:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(f"{kind}+"), "removed", invert=True)
    return "".join(part for part, _ in split.pre_tokenize_str(text))


def _names_that_count(library: Any) -> re.Pattern[str] | None:
    """Finds the names of added tokens that are no special ones: in a text they are that token."""
    added = [token for token in library.get_added_tokens_decoder().values() if not token.special]
    names = {token.content for token in added}
    if library.normalizer is not None:
        names |= {library.normalizer.normalize_str(token.content) for token in added if token.normalized}
    return re.compile("|".join(map(re.escape, sorted(names)))) if names else None
