"""Texts encoded in threads before a document asks for them: many at a time, as tokenizers are written outside of Python's lock."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np

from data_pipeline.documents.tokenizers import TextTokenizer
from data_pipeline.storage.read_ahead import Readers

CHARACTERS_AT_ONCE = 1 << 18  # of one call: some hundredths of a second
TEXTS_AT_ONCE = 256


class EncodingAhead(TextTokenizer):
    """A text tokenizer that knows the ids of some texts already; any other text it encodes when it is asked."""

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        self.size, self.fingerprint = tokenizer.size, tokenizer.fingerprint
        self._known: dict[int, tuple[str, np.ndarray]] = {}  # by the text's `id`: hashing it would cost more

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(ids)

    def encode_array(self, text: str) -> np.ndarray:
        known = self._known.get(id(text))
        return known[1] if known is not None and known[0] is text else self._tokenizer.encode_array(text)

    def ahead(self, groups: Iterable[Sequence[str]], threads: Readers | None) -> Generator[None, None, None]:
        """Group by group, know its texts until the next one is asked for. Threads are given all groups at once; without
        them each group is encoded when it is asked for.
        """
        if threads is None:
            return self._encoding_each(groups)
        pending = [(texts, threads.submit(self._encode_all, texts)) for texts in groups]
        return self._knowing(pending)

    def _encoding_each(self, groups: Iterable[Sequence[str]]) -> Generator[None, None, None]:
        try:
            for texts in groups:
                self._know(texts, self._encode_all(texts))
                yield
        finally:
            self._known = {}

    def _know(self, texts: Sequence[str], found: Sequence[np.ndarray | None]) -> None:
        pairs = zip(texts, found, strict=True)
        self._known = {id(text): (text, ids) for text, ids in pairs if ids is not None}

    def _knowing(
        self, pending: list[tuple[Sequence[str], Future[list[np.ndarray | None]]]]
    ) -> Generator[None, None, None]:
        pending.reverse()  # what was used is given back
        try:
            while pending:
                texts, future = pending.pop()
                self._know(texts, future.result())
                yield
        finally:
            self._known = {}
            for _, future in pending:
                future.cancel()

    def _encode_all(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        """None for a text that the tokenizer refuses: it will do so again, where it is known whose text it is."""
        try:
            return list(self._tokenizer.encode_arrays(texts))
        except Exception:
            return [self._encoded_or_none(text) for text in texts]

    def _encoded_or_none(self, text: str) -> np.ndarray | None:
        try:
            return self._tokenizer.encode_array(text)
        except Exception:
            return None


def grouped(texts: Iterable[Sequence[str]]) -> Iterator[int]:
    """How many samples to take at a time so that their texts make up one call. `texts`: of each sample."""
    count = num_texts = num_characters = 0
    for one in texts:
        count += 1
        num_texts += len(one)
        num_characters += sum(map(len, one))
        if num_texts >= TEXTS_AT_ONCE or num_characters >= CHARACTERS_AT_ONCE:
            yield count
            count = num_texts = num_characters = 0
    if count:
        yield count
