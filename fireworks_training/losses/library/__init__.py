"""The losses as callables for `forward_backward_custom`: settings, checks, inputs, metrics."""
