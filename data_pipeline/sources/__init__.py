"""Raw samples from webdataset shards, checked."""

from data_pipeline.sources.samples import BadSample, Sample, SampleError

__all__ = ["BadSample", "Sample", "SampleError"]
