"""The same loop; `Session` brings the plugins into it."""

import torch
from accelerate import Accelerator
from peft_plus import LoraConfig, Session, attach, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from examples.coming_from_peft.small import base, reviews

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(base("bert"))
data = reviews().map(lambda row: tokenizer(row["text"]), remove_columns="text")
model = AutoModelForSequenceClassification.from_pretrained(base("bert"), num_labels=2)
model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8))
attach(model, ["gradual_unfreeze", "r3f"])

accelerator = Accelerator(gradient_accumulation_steps=2)
session = Session(model, accelerator, epochs=3)
optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
loader = session.loader(data, batch_size=4, collate_fn=DataCollatorWithPadding(tokenizer), shuffle=False)
for batch in session.batches(loader):
    with accelerator.accumulate(session.model):
        loss = session.loss(batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
model.save_pretrained("adapter")
