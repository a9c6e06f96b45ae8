"""The turns of a trajectory: planned, sampled, joined to the tokens before them."""
