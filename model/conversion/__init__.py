"""Checkpoints to and from other layouts, and the proof that nothing changed."""
