"""The same with gradual unfreezing, from the top blocks down, and R3F."""

from peft_plus import LoraConfig, attach, get_peft_model, with_plugins
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed

from examples.coming_from_peft.small import base, pairs

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(base("t5"))
data = pairs().map(lambda row: tokenizer(row["source"], text_target=row["target"]), remove_columns=["source", "target"])

model = AutoModelForSeq2SeqLM.from_pretrained(base("t5"))
model = get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", r=8))
attach(model, ["gradual_unfreeze", "r3f"])

args = Seq2SeqTrainingArguments(
    "out",
    num_train_epochs=2,
    per_device_train_batch_size=4,
    learning_rate=1e-2,
    save_strategy="no",
    report_to="none",
)
collator = DataCollatorForSeq2Seq(tokenizer, model)
with_plugins(Seq2SeqTrainer)(model, args, train_dataset=data, data_collator=collator).train()
model.save_pretrained("adapter")
