"""A loop of one's own, with Accelerate."""

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from examples.coming_from_peft.small import base, reviews

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(base("bert"))
data = reviews().map(lambda row: tokenizer(row["text"]), remove_columns="text")
model = AutoModelForSequenceClassification.from_pretrained(base("bert"), num_labels=2)
model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8))

accelerator = Accelerator(gradient_accumulation_steps=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
generator = torch.Generator().manual_seed(0)  # of its own: dropout draws from the other
loader = DataLoader(data, batch_size=4, collate_fn=DataCollatorWithPadding(tokenizer), generator=generator)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
model.train()
for epoch in range(3):
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
model.save_pretrained("adapter")
