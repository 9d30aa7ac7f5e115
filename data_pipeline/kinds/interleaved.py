"""Web pages and manuals: texts and pictures in the order of the page, as OBELICS and MMC4 write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from data_pipeline.documents.builder import Text
from data_pipeline.kinds.base import MediaDecoder, Pixels, SampleKind
from data_pipeline.sources.samples import Sample, SampleError, numbered_images

Item = str | int  # a text, or the number of a picture


class Interleaved(SampleKind):
    """`KEY.picture_0.jpg`, `KEY.picture_1.png`, ... and `KEY.json`, which says the order.

    Either OBELICS's `{"texts": [...], "images": [...]}`, two lists of one length with null where the other has an entry, the
    pictures numbered in their order; or MMC4's `{"text_list": [...], "image_info": [{"matched_text_index": ...}, ...]}`, where
    picture n is `image_info[n]` and stands before its text. Every picture must be there, and every one that is there be named.
    """

    name = "interleaved"

    def accepts(self, extensions: AbstractSet[str]) -> bool:
        return bool(extensions) and extensions == set(numbered_images(extensions, "picture"))

    def check(self, sample: Sample) -> None:
        names = numbered_images(sample.parts, "picture")
        numbers = [int(name.split(".")[0].removeprefix("picture_")) for name in names]
        wanted = sorted(item for item in _items(sample.metadata) if isinstance(item, int))
        if numbers != wanted:
            raise SampleError("missing_image", f"pictures {numbers}, but the text has {wanted}")

    def prepare(self, sample: Sample, decoder: MediaDecoder) -> list[Text | Pixels]:
        names = numbered_images(sample.parts, "picture")
        return [
            decoder.picture(sample.parts[names[item]]) if isinstance(item, int) else Text(item)
            for item in _items(sample.metadata)
        ]

    def texts(self, sample: Sample) -> Iterator[str]:
        yield from (item for item in _items(sample.metadata) if isinstance(item, str))


def _items(metadata: dict[str, Any]) -> list[Item]:
    """Texts and numbers of pictures in order; texts that follow one another are one. Raises `SampleError`."""
    if "texts" in metadata:
        found = _as_obelics(_listed(metadata, "texts"), _listed(metadata, "images"))
    elif "text_list" in metadata:
        found = _as_mmc4(_listed(metadata, "text_list"), _listed(metadata, "image_info"))
    else:
        raise SampleError("bad_metadata", "neither texts and images nor text_list and image_info")
    items: list[Item] = []
    for item in found:
        if isinstance(item, int):
            items.append(item)
        elif item.strip():
            text = item.strip().replace("\r\n", "\n")
            if items and isinstance(items[-1], str):
                items[-1] = f"{items[-1]} {text}"
            else:
                items.append(text)
    if not any(isinstance(item, str) for item in items):
        raise SampleError("empty_text", "no text in the whole document")
    return items


def _as_obelics(texts: Sequence[Any], images: Sequence[Any]) -> Iterator[Item]:
    if len(texts) != len(images):
        raise SampleError("bad_metadata", f"{len(texts)} texts beside {len(images)} images")
    number = 0
    for text, image in zip(texts, images, strict=True):
        if (text is None) == (image is None):
            raise SampleError("bad_metadata", "a text and an image in one place, or neither")
        if image is not None:
            yield number
            number += 1
        else:
            yield _text(text)


def _as_mmc4(texts: Sequence[Any], infos: Sequence[Any]) -> Iterator[Item]:
    before: dict[int, list[int]] = {}
    for number, info in enumerate(infos):
        place = info.get("matched_text_index") if isinstance(info, dict) else None
        if not isinstance(place, int) or not 0 <= place < len(texts):
            raise SampleError("bad_metadata", f"image_info[{number}] has no matched_text_index of a text")
        before.setdefault(place, []).append(number)
    for place, text in enumerate(texts):
        yield from before.get(place, [])
        yield _text(text)


def _listed(metadata: dict[str, Any], key: str) -> list[Any]:
    value = metadata.get(key)
    if not isinstance(value, list):
        raise SampleError("bad_metadata", f"{key} is no list")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise SampleError("bad_metadata", f"a text is {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SampleError("corrupt_text", str(error)) from error
    return value
