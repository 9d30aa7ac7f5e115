"""Rewards: what an answer of the model is worth, by rules, by scorers in this process, and by scorers behind a service."""
