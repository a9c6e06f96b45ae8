"""The trainer worker process: owns a job's models, its idempotency table and its steps."""
