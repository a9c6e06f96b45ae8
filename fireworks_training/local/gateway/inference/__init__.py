"""Inference: completions, the engines that sample them, and the models' tokenizers."""
