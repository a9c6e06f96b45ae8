"""The tensor functions of the losses: pure, without a datum or a setting that is not an argument.

Legend: T counted tokens of all rows, laid end to end (prompt, padding and masked tokens are left
out before); S rows; B pairs (rows 2i and 2i + 1: chosen, rejected). For token t: l = logprob under
the weights that are trained, q = logprob that it was sampled with, old = the trainer's logprob when
the batch began (q where none is given), r = exp(l - old), A = advantage, ref = logprob under a
reference, sg = no gradient flows through.

One rule for all: what a loss rejects takes no part in its gradient. A ratio that overflows is
replaced *before* `exp` where a clip or a zero advantage discards it: 0 times infinity is not 0.
"""
