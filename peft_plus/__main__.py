"""`python -m peft_plus` is `peft-plus`."""

from .cli import main

main()
