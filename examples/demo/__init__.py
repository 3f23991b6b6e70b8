"""The demo, `make demo`: real fine-tuning with and without plugins, and what came of it."""
