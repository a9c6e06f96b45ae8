"""The connection pool of a service: requests and their retries, time limits, open files."""
