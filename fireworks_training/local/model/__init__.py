"""The causal language model of trainer and engine: weights, adapters, losses, optimizer, memory.

Knows tensors and Hugging Face directories. Does not know requests, queues or HTTP.
"""
