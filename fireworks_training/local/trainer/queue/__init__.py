"""The queue of a model's operations: places, roles, results and leases. No I/O, no tensors."""
