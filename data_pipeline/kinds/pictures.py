"""Pictures: with a caption (`image_text`), and edits (`x2i`)."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from data_pipeline.documents.builder import Document, Text
from data_pipeline.documents.templates import Chat, DocumentLayout, EncodedSample
from data_pipeline.kinds.base import MediaDecoder, Pixels, SampleKind
from data_pipeline.sources.samples import IMAGE_EXTENSIONS, Sample, is_image, source_images


class ImageText(SampleKind):
    """`KEY.jpg` (or `.png`, `.webp`) and `KEY.txt`; caption, picture."""

    name = "image_text"

    def accepts(self, extensions: AbstractSet[str]) -> bool:
        images = {name for name in extensions if is_image(name)}
        return len(images) == 1 and extensions == images | {"txt"}

    def prepare(self, sample: Sample, decoder: MediaDecoder) -> list[Text | Pixels]:
        picture = sample.parts[sample.extension_among(IMAGE_EXTENSIONS)]
        return [Text(sample.text("txt")), decoder.picture(picture)]

    def document(self, sample: EncodedSample, layout: DocumentLayout) -> Document:
        image_first = layout.chance("image_first", sample.key) < layout.config.image_first_probability
        return layout.builder.interleaved(sample.identity, sample.parts[::-1] if image_first else sample.parts)

    def chat(self, sample: EncodedSample, layout: DocumentLayout) -> Chat:
        return Chat("t2i", sample.texts[0], [], sample.pictures)


class AnyToImage(SampleKind):
    """`KEY.instruction.txt`, `KEY.source_0.png`, ..., `KEY.target.png`; sources, instruction, target."""

    name = "x2i"

    def accepts(self, extensions: AbstractSet[str]) -> bool:
        sources = set(source_images(extensions))
        targets = {name for name in extensions if is_image(name, "target")}
        return bool(sources) and len(targets) == 1 and extensions == sources | targets | {"instruction.txt"}

    def prepare(self, sample: Sample, decoder: MediaDecoder) -> list[Text | Pixels]:
        target = next(name for name in sample.parts if is_image(name, "target"))
        sources = [decoder.picture(sample.parts[name]) for name in source_images(sample.parts)]
        return [*sources, Text(sample.text("instruction.txt")), decoder.picture(sample.parts[target])]

    def chat(self, sample: EncodedSample, layout: DocumentLayout) -> Chat:
        return Chat("x2i", sample.texts[0], sample.pictures[:-1], sample.pictures[-1:])
