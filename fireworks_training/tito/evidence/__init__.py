"""What a trajectory leaves on disk: the journal, the debug log, traces of failures."""
