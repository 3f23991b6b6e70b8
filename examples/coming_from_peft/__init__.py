"""Ten common PEFT scripts, each before and after peft_plus; `docs/coming_from_peft.md` shows them."""
