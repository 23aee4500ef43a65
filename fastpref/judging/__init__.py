"""Judging: judges, preference and reward models, the pairs of K completions, and the log of what was judged."""
