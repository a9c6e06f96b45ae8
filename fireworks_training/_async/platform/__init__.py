"""The platform that a service talks to: its URL and key, the embedded one, its tokenizers."""
