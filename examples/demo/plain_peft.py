"""Reload an adapter with PEFT alone and print its logits as JSON. Run by `reload.py` as a script of its own."""

from __future__ import annotations

import json
import logging
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

if __name__ == "__main__":
    base, adapter, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model = PeftModel.from_pretrained(model, adapter).eval()
    batch = AutoTokenizer.from_pretrained(base)(json.load(sys.stdin), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    if "peft_plus" in sys.modules:
        sys.exit("peft_plus was imported, so this proves nothing about plain PEFT.")
    json.dump(logits.tolist(), sys.stdout)
