"""A package with one of everything that the generator of blocking classes accepts."""
