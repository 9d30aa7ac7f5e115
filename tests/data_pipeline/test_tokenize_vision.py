"""From raw shards through a real (untrained) IBQ tokenizer and packing to rows."""

from __future__ import annotations

import io
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import webdataset
from PIL import Image

from data_pipeline.documents.builder import parse_image_block
from data_pipeline.documents.tokenizers import train_sentencepiece
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.sources.image import ImageConfig, decode_image, smart_resize
from data_pipeline.storage.segments import Kind
from data_pipeline.storage.token_files import TokenFileReader
from data_pipeline.tokenize import TokenizeConfig, tokenize_shard
from model.vision_tokenizer import VisionTokenizer
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.ibq import IBQ
from model.vision_tokenizer.initialization import initialize_weights
from model.vision_tokenizer.wrapper import fingerprint_of
from model.vocabulary import Vocabulary, VocabularyConfig


def small_vision_tokenizer() -> VisionTokenizer:
    config = VisionTokenizerConfig(
        ch=8,
        ch_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        attn_resolutions=[],
        resolution=48,
        z_channels=8,
        embed_dim=8,
        n_embed=64,
        norm_groups=4,
        mid_attention=False,
    )
    model = IBQ(config)
    initialize_weights(model, 0)
    model.channels_last()
    return VisionTokenizer(model, fingerprint_of(model))


def test_codes_in_packed_rows_are_the_tokenizers(tmp_path: Path) -> None:
    vision = small_vision_tokenizer()
    assert vision.factor == 8
    text = train_sentencepiece([topics["comparisons"]], tmp_path / "text_tokenizer", 400)
    vocabulary = Vocabulary.from_config(VocabularyConfig(text_size=text.size, visual_size=vision.codebook_size))
    rng = np.random.default_rng(0)
    pictures = {}
    shard = tmp_path / "000000.tar"
    with webdataset.TarWriter(str(shard)) as writer:
        for number in range(12):
            stream = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(stream, "png")
            pictures[number] = stream.getvalue()
            writer.write({"__key__": f"{number}", "png": stream.getvalue(), "txt": f"picture {number}"})
    config = TokenizeConfig(source="pictures", image=ImageConfig(max_area=2304))
    prefix = tmp_path / "tokens/000000"
    tokenize_shard(shard, prefix, config, vocabulary, text, vision)
    summary = pack({"pictures": tmp_path / "tokens"}, tmp_path / "packed", PackConfig(sequence_length=256))
    assert summary.num_rows > 0
    reader = TokenFileReader(tmp_path / "packed/000000")
    found = set()
    for row in range(len(reader)):
        tokens, segments = reader.tokens(row), reader.segments(row)
        for image in segments[segments["kind"] == Kind.IMAGE]:
            block = parse_image_block(tokens[image["start"] :], vocabulary, text)
            assert block.num_tokens == image["length"]
            found.add(block.codes.tobytes())
    resized = np.stack([smart_resize(decode_image(data), config.image, vision.factor) for data in pictures.values()])
    assert found == {codes.tobytes() for codes in vision.encode(resized)}
