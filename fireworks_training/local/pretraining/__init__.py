"""The parts of `fireworks_training.local.pretrain`: problems, tokenizer, data, loop, scores.

Knows how the small model that ships is made. Does not know the platform, which serves its
directory.
"""
