"""Videos: with a caption (`video_text`), and with a transcript (`video_interleaved`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

from data_pipeline.documents.builder import Text
from data_pipeline.documents.templates import Chat, DocumentLayout, EncodedSample, split_video
from data_pipeline.kinds.base import MediaDecoder, Pixels, SampleKind
from data_pipeline.sources.samples import TRANSCRIPT_EXTENSIONS, VIDEO_EXTENSIONS, Sample, SampleError
from data_pipeline.storage.segments import Kind
from data_pipeline.video.transcript import Word, interleave, join_words, parse_transcript

END_TOLERANCE_SECONDS = 1.0  # a transcript's times are rounded, and so is a video's length


class VideoText(SampleKind):
    """`KEY.mp4` (or `.avi`, `.webm`, `.mkv`, `.mov`) and `KEY.txt`; caption, frames."""

    name = "video_text"

    def accepts(self, extensions: AbstractSet[str]) -> bool:
        videos = extensions & set(VIDEO_EXTENSIONS)
        return len(videos) == 1 and extensions == videos | {"txt"}

    def prepare(self, sample: Sample, decoder: MediaDecoder) -> list[Text | Pixels]:
        video = sample.parts[sample.extension_among(VIDEO_EXTENSIONS)]
        return [Text(sample.text("txt")), *decoder.frames(video)]

    def chat(self, sample: EncodedSample, layout: DocumentLayout) -> Chat:
        return Chat("story", sample.texts[0], [], sample.pictures)


class InterleavedVideo(SampleKind):
    """A video and `KEY.words.json` (or another of `TRANSCRIPT_EXTENSIONS`); speech and frames by time."""

    name = "video_interleaved"

    def accepts(self, extensions: AbstractSet[str]) -> bool:
        videos = extensions & set(VIDEO_EXTENSIONS)
        transcripts = extensions & set(TRANSCRIPT_EXTENSIONS)
        return len(videos) == 1 and len(transcripts) == 1 and extensions == videos | transcripts

    def prepare(self, sample: Sample, decoder: MediaDecoder) -> list[Text | Pixels]:
        extension = sample.extension_among(TRANSCRIPT_EXTENSIONS)
        words = parse_transcript(extension, sample.text(extension))
        frames, seconds = decoder.film(sample.parts[sample.extension_among(VIDEO_EXTENSIONS)])
        if words[-1].start_seconds > seconds + END_TOLERANCE_SECONDS or words[0].start_seconds < -END_TOLERANCE_SECONDS:
            times = f"{words[0].start_seconds:g} to {words[-1].start_seconds:g}"
            raise SampleError("bad_transcript", f"words at {times} s of a video of {seconds:g} s")
        return _laid_between(words, frames)

    def chat(self, sample: EncodedSample, layout: DocumentLayout) -> Chat:
        question, images, response = split_video(sample.parts, layout.config.context_frames)
        return Chat("explore", question, images, response)

    def texts(self, sample: Sample) -> Iterator[str]:
        extension = sample.extension_among(TRANSCRIPT_EXTENSIONS)
        yield join_words(parse_transcript(extension, sample.text(extension)))


class SpokenVideo(InterleavedVideo):
    """A video alone; what is said in it is recognized (`asr.engine`). Phrases stand whole between the frames."""

    name = "video_spoken"

    def accepts(self, extensions: AbstractSet[str]) -> bool:
        return len(extensions) == 1 and extensions <= set(VIDEO_EXTENSIONS)

    def prepare(self, sample: Sample, decoder: MediaDecoder) -> list[Text | Pixels]:
        video = sample.parts[sample.extension_among(VIDEO_EXTENSIONS)]
        frames, _ = decoder.film(video)
        return _laid_between(decoder.words(video), frames)

    def texts(self, sample: Sample) -> Iterator[str]:
        """None: the text tokenizer is trained on what is written."""
        return iter(())


def _laid_between(words: Sequence[Word], frames: Sequence[Pixels]) -> list[Text | Pixels]:
    parts: list[Text | Pixels] = []
    for item in interleave(words, [frame.time_ms / 1000 for frame in frames]):
        if isinstance(item, int):
            parts.append(frames[item])
        else:
            time_ms = max(0, round(item.time_seconds * 1000))
            parts.append(Text(item.text, Kind.TRANSCRIPT, time_ms))
    return parts
