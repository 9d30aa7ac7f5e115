"""Video: decoding, scenes, key frames, transcripts."""
