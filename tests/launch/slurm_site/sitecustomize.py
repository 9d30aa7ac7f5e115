"""On the path of a test's jobs: the stage `vision_tokenizer` runs the fake objective."""

from training import stage

stage.LOOPED_OBJECTIVES["vision_tokenizer"] = "slurm_objective"
