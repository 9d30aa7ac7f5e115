"""On the path of a test's jobs: `vision_tokenizer` runs the fake objective, `next_token` the real one with pauses."""

from training import stage

stage.LOOPED_OBJECTIVES["vision_tokenizer"] = "slurm_objective"
stage.LOOPED_OBJECTIVES["next_token"] = "slow_stage"
