"""Prompt tuning: twenty virtual tokens learn, the language model does not."""

import peft
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling
from transformers import Trainer, TrainingArguments, set_seed

from examples.coming_from_peft.small import base, texts

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(base("llama"))
data = texts().map(lambda row: tokenizer(row["text"]), remove_columns="text")

model = AutoModelForCausalLM.from_pretrained(base("llama"))
model = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20))

args = TrainingArguments(
    "out", num_train_epochs=3, per_device_train_batch_size=4, learning_rate=3e-2, save_strategy="no", report_to="none"
)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
Trainer(model, args, train_dataset=data, data_collator=collator).train()
model.save_pretrained("adapter")
