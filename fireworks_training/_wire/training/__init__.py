"""Requests and answers of the trainer API: JSON bodies, and passes in JSON or protobuf."""
