"""What `python -m fireworks_training.local.pretrain` is made of: problems, tokenizer, loop.

Knows nothing of the platform: it only writes the model directory that the platform serves.
"""
