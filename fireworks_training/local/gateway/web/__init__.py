"""What every route of the gateway shares: access, bodies, errors, long polls, running tasks."""
