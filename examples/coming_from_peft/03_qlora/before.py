"""QLoRA: a base in 4-bit NormalFloat, LoRA on top."""

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DataCollatorForLanguageModeling
from transformers import Trainer, TrainingArguments, set_seed

from examples.coming_from_peft.small import base, texts

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(base("llama"))
data = texts().map(lambda row: tokenizer(row["text"]), remove_columns="text")

bits = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
model = AutoModelForCausalLM.from_pretrained(base("llama"), quantization_config=bits)
model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))

args = TrainingArguments(
    "out", num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no", report_to="none"
)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = Trainer(model, args, train_dataset=data, data_collator=collator)
trainer.train()
model.save_pretrained("adapter")
