"""The same; each adapter has plugins of its own."""

from peft_plus import LoraConfig, PeftModel, Trainer, attach, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments, set_seed

from examples.coming_from_peft.small import base, reviews

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(base("bert"))
good = reviews().map(lambda row: tokenizer(row["text"]), remove_columns="text")
long = good.map(lambda row: {"label": int(len(row["input_ids"]) > 5)})
args = TrainingArguments(
    "out", num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no", report_to="none"
)

model = AutoModelForSequenceClassification.from_pretrained(base("bert"), num_labels=2)
model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8), adapter_name="good")
attach(model, ["gradual_unfreeze"])
Trainer(model, args, train_dataset=good, processing_class=tokenizer).train()
model.add_adapter("long", LoraConfig(task_type="SEQ_CLS", r=4))
model.set_adapter("long")
attach(model, ["r3f"])
Trainer(model, args, train_dataset=long, processing_class=tokenizer).train()
model.save_pretrained("adapters")

model = AutoModelForSequenceClassification.from_pretrained(base("bert"), num_labels=2)
model = PeftModel.from_pretrained(model, "adapters/good", adapter_name="good")
model.load_adapter("adapters/long", adapter_name="long")
model.set_adapter("long")
