"""Theory: tabular preference games and ΨPO, the ground truth of every algorithm."""
