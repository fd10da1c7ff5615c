"""Learning the start: MAML, Reptile, the paper's baselines, and how starts are compared."""
