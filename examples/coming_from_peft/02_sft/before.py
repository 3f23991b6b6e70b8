"""LoRA on a causal language model, with TRL's SFTTrainer."""

import peft
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from examples.coming_from_peft.small import base, texts

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(base("llama"))
model = AutoModelForCausalLM.from_pretrained(base("llama"))
model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=8))

args = trl.SFTConfig(
    "out",
    num_train_epochs=2,
    per_device_train_batch_size=4,
    learning_rate=1e-2,
    max_length=32,
    bf16=False,
    save_strategy="no",
    report_to="none",
)
trainer = trl.SFTTrainer(model, args, train_dataset=texts(), processing_class=tokenizer)
trainer.train()
model.save_pretrained("adapter")
