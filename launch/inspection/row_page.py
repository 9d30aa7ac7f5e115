"""Rows as a page to look at: what is written, thumbnails of the pictures, and where every piece comes from."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from data_pipeline.documents.reading import MalformedImageError, parse_image_block
from data_pipeline.documents.tokenizers import TextTokenizer
from data_pipeline.storage.atomic import atomic_write_bytes
from data_pipeline.storage.format import read_manifest
from data_pipeline.storage.packed_files import check_listed_shard
from data_pipeline.storage.segments import Flag, Kind
from data_pipeline.storage.token_files import TokenFileReader
from launch.generation.files import png_bytes
from launch.inspection.contents import vocabulary_of
from launch.inspection.provenance import Place, places_of
from model.errors import UserError
from model.vocabulary import Vocabulary

THUMBNAIL_PIXELS = 256  # longest side
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em}
article{border-left:4px solid #99b;padding:.1em 1em;margin:1em 0}h3{font-size:.85em;color:#556;margin:.3em 0}
p{margin:.2em 0;white-space:pre-wrap}.context{color:#888}img{margin:.3em .5em .3em 0;min-width:48px;image-rendering:pixelated}
.grid{display:inline-block;border:1px dashed #99b;padding:.5em;margin:.3em}"""


class ImageDecoder(Protocol):
    """`model.vision_tokenizer.wrapper.VisionTokenizer`."""

    def decode(self, codes: np.ndarray) -> np.ndarray: ...


def write_rows(
    prefixes: list[Path],
    first: int,
    count: int,
    target: Path,
    text_tokenizer: TextTokenizer,
    vision_tokenizer: ImageDecoder | None,
) -> dict[str, Any]:
    """Write rows (or documents) `first` to `first` + `count` of the files as one HTML page without scripts."""
    sections = []
    start = 0
    for prefix in prefixes:
        manifest = read_manifest(prefix)
        check_listed_shard(prefix, manifest)
        reader = TokenFileReader(prefix)
        vocabulary = vocabulary_of(manifest)
        for index in range(max(0, first - start), min(len(reader), first + count - start)):
            shown = [
                document_part(place, vocabulary, text_tokenizer, vision_tokenizer)
                for place in places_of(prefix, manifest, reader, index)
            ]
            sections.append(f"<h2>{prefix.name} no. {index}</h2>{''.join(shown)}")
        start += len(reader)
    if not sections:
        raise UserError("there is no such row", where=f"first={first}", expected=f"below {start:,}")
    page = f'<!doctype html><meta charset="utf-8"><title>{html.escape(str(target.name))}</title><style>{_STYLE}</style>'
    atomic_write_bytes(target, (page + "".join(sections)).encode("utf-8", "replace"))
    return {"kind": "page", "path": str(target), "num_shown": len(sections), "first": first, "num_rows": start}


def document_part(
    place: Place, vocabulary: Vocabulary, text_tokenizer: TextTokenizer, vision_tokenizer: ImageDecoder | None
) -> str:
    shown = []
    for segment in place.segments:
        tokens = place.tokens[int(segment["start"]) - place.start :][: int(segment["length"])]
        style = "context" if segment["flags"] & Flag.NO_LOSS else "learnt"
        if segment["kind"] == Kind.IMAGE:
            shown.append(picture(tokens, vocabulary, text_tokenizer, vision_tokenizer))
        else:
            text = text_tokenizer.decode([token for token in tokens.tolist() if token < text_tokenizer.size])
            shown.append(f'<p class="{style}">{html.escape(text)}</p>' if text.strip() else "")
    cut = ", continued from elsewhere" if place.segments["flags"][0] & Flag.CUT else ""
    origin = f"{place.source}, document {place.document}, {place.num_tokens} tokens from {place.start}{cut}"
    return f"<article><h3>{html.escape(origin)}</h3>{''.join(shown)}</article>"


def picture(
    tokens: np.ndarray, vocabulary: Vocabulary, text_tokenizer: TextTokenizer, vision_tokenizer: ImageDecoder | None
) -> str:
    """A thumbnail; without a vision tokenizer the size in visual tokens."""
    try:
        codes = parse_image_block(tokens, vocabulary, text_tokenizer).codes
    except MalformedImageError as error:
        return f'<span class="grid">damaged image: {html.escape(str(error))}</span>'
    size = f"{codes.shape[0]}*{codes.shape[1]}"
    if vision_tokenizer is None:
        return f'<span class="grid">image {size}</span>'
    image = Image.fromarray(vision_tokenizer.decode(codes[None])[0])
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    data = base64.b64encode(png_bytes(np.asarray(image))).decode("ascii")
    return f'<img alt="{size}" title="{size}" src="data:image/png;base64,{data}">'
