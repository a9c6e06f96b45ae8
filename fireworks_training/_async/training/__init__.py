"""Training clients: the operations on a model, their queue, and the trainer over HTTP."""
