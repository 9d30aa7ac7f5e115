"""Plain text: `KEY.txt`."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from data_pipeline.documents.builder import Document, Text
from data_pipeline.documents.templates import DocumentLayout, EncodedSample
from data_pipeline.kinds.base import MediaDecoder, Pixels, SampleKind
from data_pipeline.sources.samples import Sample


class PlainText(SampleKind):
    """Metadata `{"split_ok": false}` keeps the packer from cutting this text."""

    name = "text"

    def accepts(self, extensions: AbstractSet[str]) -> bool:
        return extensions == {"txt"}

    def prepare(self, sample: Sample, decoder: MediaDecoder) -> list[Text | Pixels]:
        return [Text(sample.text("txt"))]

    def document(self, sample: EncodedSample, layout: DocumentLayout) -> Document:
        text = sample.parts[0]
        assert isinstance(text, Text)
        splittable = bool(sample.metadata.get("split_ok", layout.config.splittable_text))
        return layout.builder.text(sample.identity, text.text, splittable=splittable)
