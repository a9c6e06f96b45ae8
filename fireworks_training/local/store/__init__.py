"""The state folder: the database, sampler snapshots, and the notes of the Tinker API."""
