"""State of a stream that outlives a process: commits, step artifacts, metrics, identity, compatibility."""
