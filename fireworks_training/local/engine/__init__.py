"""The engine worker process: samples completions from one loaded snapshot."""
