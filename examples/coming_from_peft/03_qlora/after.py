"""The same in one call, which also prepares the quantised base; lower blocks learn more slowly."""

from peft_plus import LoraConfig, Trainer, get_model
from transformers import AutoTokenizer, DataCollatorForLanguageModeling
from transformers import TrainingArguments, set_seed

from examples.coming_from_peft.small import base, texts

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(base("llama"))
data = texts().map(lambda row: tokenizer(row["text"]), remove_columns="text")

lora = LoraConfig(r=8, target_modules="all-linear")
model = get_model(base("llama"), [lora, "llrd"], task="CAUSAL_LM", quantization="nf4")

args = TrainingArguments(
    "out", num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no", report_to="none"
)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = Trainer(model, args, train_dataset=data, data_collator=collator)
trainer.train()
model.save_pretrained("adapter")
