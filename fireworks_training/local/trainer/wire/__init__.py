"""The trainer's dialects: JSON and protobuf bodies to checked operations, and results to bodies."""
