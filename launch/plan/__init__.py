"""What a run needs before it is started: legality, memory, step time, a search over layouts. Nothing imports torch."""
