"""The wire dialects: encode requests, decode answers. No I/O, no policy."""
