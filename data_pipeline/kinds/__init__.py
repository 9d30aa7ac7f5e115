"""Kinds of samples: one class each says which files make one and which document it becomes (`base.SampleKind`)."""
