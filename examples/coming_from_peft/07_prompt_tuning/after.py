"""The same with R3F: the prompt must hold when the embeddings are disturbed a little."""

import peft_plus as peft
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling
from transformers import TrainingArguments, set_seed

from examples.coming_from_peft.small import base, texts

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(base("llama"))
data = texts().map(lambda row: tokenizer(row["text"]), remove_columns="text")

model = AutoModelForCausalLM.from_pretrained(base("llama"))
model = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20))
peft.attach(model, ["r3f"])

args = TrainingArguments(
    "out", num_train_epochs=3, per_device_train_batch_size=4, learning_rate=3e-2, save_strategy="no", report_to="none"
)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
peft.Trainer(model, args, train_dataset=data, data_collator=collator).train()
model.save_pretrained("adapter")
