"""The key frames of the demo's real video, to be shown beside their reconstruction in the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_pipeline.kinds.registry import read_shard
from data_pipeline.sources import Sample
from data_pipeline.sources.image import ImageConfig, smart_resize
from data_pipeline.video.keyframes import VideoConfig, extract_key_frames
from training.inference.evaluation import EvaluationPrompt


@dataclass
class RealVideoFrames:
    """Each key frame is one prompt; the score is 1 - mean absolute error over the range of a pixel."""

    name: ClassVar[str] = "real_video_reconstruction"
    corpus: str = "runs/demo/corpora/real_video"  # folder of raw shards
    max_area: int = 48 * 48  # pixels, as the pictures are tokenized
    keyframe_seconds: float = 2.0
    factor: int = 8  # pixels of a visual token's side

    def prompts(self) -> list[EvaluationPrompt]:
        prompts = []
        for shard in sorted(Path(self.corpus).glob("*.tar")):
            for sample in read_shard(shard):
                if isinstance(sample, Sample):
                    prompts += self._sample_prompts(sample)
        return prompts

    def _sample_prompts(self, sample: Sample) -> list[EvaluationPrompt]:
        (video,) = [content for name, content in sample.parts.items() if name == "mp4"]
        frames = extract_key_frames(video, VideoConfig(keyframe_seconds=self.keyframe_seconds))
        prompts = []
        for frame in frames:
            pixels = smart_resize(frame.pixels, ImageConfig(max_area=self.max_area), self.factor)
            text = f"{sample.key} at {frame.time_seconds:.1f} s"
            size = (pixels.shape[0], pixels.shape[1])
            prompts.append(EvaluationPrompt("reconstruction", text, images=[pixels], image_size=size))
        return prompts

    def judge(self, prompt: EvaluationPrompt, images: list[np.ndarray], text: str) -> float:
        if not images:
            return 0.0
        return float(1.0 - mean_error(images[0], prompt.images[0]) / 255.0)

    def reason(self, prompt: EvaluationPrompt, images: list[np.ndarray], text: str) -> str:
        """For the report."""
        return f"off by {mean_error(images[0], prompt.images[0]):.1f} of 255 on average" if images else "no picture"


def mean_error(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.float32) - other.astype(np.float32)).mean())
