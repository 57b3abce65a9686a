"""What a model scores: statistics of samples, held-out prompts of a run, saved evaluations."""
