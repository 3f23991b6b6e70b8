"""The same with plugins; the checkpoint holds their state, and no pickle."""

from peft_plus import LoraConfig, PeftModel, Trainer, attach, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments, set_seed

from examples.coming_from_peft.small import base, reviews

tokenizer = AutoTokenizer.from_pretrained(base("bert"))
data = reviews().map(lambda row: tokenizer(row["text"]), remove_columns="text")
args = TrainingArguments(
    "out", num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=3, report_to="none"
)


def fresh():
    set_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(base("bert"), num_labels=2)


model = get_peft_model(fresh(), LoraConfig(task_type="SEQ_CLS", r=8))
attach(model, ["gradual_unfreeze", "r3f"])
Trainer(model, args, train_dataset=data, processing_class=tokenizer).train()  # imagine that this was cut off …

model = get_peft_model(fresh(), LoraConfig(task_type="SEQ_CLS", r=8))
attach(model, ["gradual_unfreeze", "r3f"])
trainer = Trainer(model, args, train_dataset=data, processing_class=tokenizer)
trainer.train(resume_from_checkpoint="out/checkpoint-3")  # … and is taken up again
model.save_pretrained("adapter")

model = PeftModel.from_pretrained(fresh(), "adapter").merge_and_unload()
model.save_pretrained("merged")
