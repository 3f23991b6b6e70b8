"""PEFT's own public tests, run with plain PEFT and with peft_plus in its place; `make peft-tests` runs all of them."""
