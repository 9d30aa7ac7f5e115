"""Raw samples from webdataset shards, checked."""

from data_pipeline.sources.samples import BadSample, Sample, SampleError
from data_pipeline.sources.shards import read_shard

__all__ = ["BadSample", "Sample", "SampleError", "read_shard"]
