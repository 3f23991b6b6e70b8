"""Names in sentences: LoRA on a token classifier."""

import peft
from transformers import AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification
from transformers import Trainer, TrainingArguments, set_seed

from examples.coming_from_peft.small import base, names

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(base("bert"))


def encode(row):
    encoded = tokenizer(row["words"], is_split_into_words=True)
    return encoded | {"labels": [row["tags"][i] for i in encoded.word_ids()]}


data = names().map(encode, remove_columns=["words", "tags"])
model = AutoModelForTokenClassification.from_pretrained(base("bert"), num_labels=3)
model = peft.get_peft_model(model, peft.LoraConfig(task_type="TOKEN_CLS", r=8))

args = TrainingArguments(
    "out", num_train_epochs=3, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no", report_to="none"
)
collator = DataCollatorForTokenClassification(tokenizer)
Trainer(model, args, train_dataset=data, data_collator=collator).train()
model.save_pretrained("adapter")
