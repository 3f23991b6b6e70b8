"""LoRA on a classifier, with transformers' Trainer."""

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

from examples.coming_from_peft.small import base, reviews

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(base("bert"))
data = reviews().map(lambda row: tokenizer(row["text"]), remove_columns="text")

model = AutoModelForSequenceClassification.from_pretrained(base("bert"), num_labels=2)
model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8))

args = TrainingArguments(
    "out", num_train_epochs=3, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no", report_to="none"
)
Trainer(model, args, train_dataset=data, processing_class=tokenizer).train()
model.save_pretrained("adapter")
