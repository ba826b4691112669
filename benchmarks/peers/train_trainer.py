"""transformers' Trainer as its example run_mlm.py sets it up, for BertForMaskedLM and ModernBertForMaskedLM.

Where a default would slow it down to no use, it has the faster setting; the comments say where. Optimizer (fused AdamW
with betas 0.9 and 0.999, no weight decay), clipping at 1.0 and the rest are Trainer's defaults.
"""

import torch
from torch.utils.data import Dataset
from training import Clock, Task
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)


class Rows(Dataset):
    """What run_mlm.py leaves of a text: lists, ready to be collated. In memory, without the time that Arrow takes."""

    def __init__(self, task: Task) -> None:
        rows = task.rows_of_text()
        # the rows after those that the run takes would only cost time before it
        needed = max(task.steps + 2, 8) * task.ranks * task.rows
        rows = rows[:needed]
        special = ((rows == task.cls_id) | (rows == task.sep_id)).astype(int)
        self.items = [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "special_tokens_mask": mask}
            for ids, mask in zip(rows.tolist(), special.tolist(), strict=True)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.items[index]


class Collator(DataCollatorForLanguageModeling):
    """Counts the targets."""

    def torch_call(self, examples: list) -> dict:
        batch = super().torch_call(examples)
        self.seen = getattr(self, "seen", torch.zeros(2)) + torch.tensor(
            [(batch["labels"] != -100).sum(), sum(len(each["input_ids"]) for each in examples)]
        )
        return batch


class Watch(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.clock.tick(state.global_step)


def build(task: Task) -> PreTrainedModel:
    """The model in mlm_dist's shape, on rows as long, with as many rows in the embeddings."""
    shape = {
        "vocab_size": task.vocab_rows,
        "hidden_size": task.width,
        "num_hidden_layers": task.layers,
        "num_attention_heads": task.heads,
        "max_position_embeddings": task.row_tokens,
        "pad_token_id": task.pad_id,
        "attn_implementation": "sdpa",
    }
    if task.model == "bert":
        # two matrices in place of a gated MLP's three: with 1.5 times the width, a layer has as many numbers. Without
        # dropout, as all others: it would take time, keep attention from its fast kernel, and raise the training loss.
        model = BertForMaskedLM(
            BertConfig(
                intermediate_size=task.mlp_width * 3 // 2,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                **shape,
            )
        )
        # it returns the mean of a micro-batch, and by default Trainer would add these up
        model.accepts_loss_kwargs = False
        return model
    ids = {"cls_token_id": task.cls_id, "sep_token_id": task.sep_id, "bos_token_id": None, "eos_token_id": None}
    return ModernBertForMaskedLM(
        ModernBertConfig(
            intermediate_size=task.mlp_width,
            global_attn_every_n_layers=task.global_every,
            local_attention=task.window,
            # an option that run_mlm.py leaves off: the head on targets alone
            sparse_prediction=task.model == "modernbert-sparse",
            **ids,
            **shape,
        )
    )


def main() -> None:
    task = Task.read()
    set_seed(task.seed)
    model, clock = build(task), Clock(task)
    collator = Collator(AutoTokenizer.from_pretrained(task.tokenizer), mlm_probability=task.mask_rate)
    arguments = TrainingArguments(
        output_dir=task.scratch,
        max_steps=task.steps,
        per_device_train_batch_size=task.micro_rows,
        gradient_accumulation_steps=task.rows // task.micro_rows,
        learning_rate=task.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=task.warmup_steps,
        logging_steps=task.steps // 4,
        seed=task.seed,
        use_cpu=True,
        ddp_backend="gloo",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        # Trainer would take out special_tokens_mask, which the collator then makes again, row by row in Python
        remove_unused_columns=False,
        # every parameter is used: without the default's search for others
        ddp_find_unused_parameters=False,
        # BertForMaskedLM returns a mean already, which Trainer would multiply by the number of ranks
        average_tokens_across_devices=False,
    )
    assert arguments.world_size == task.ranks
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=Rows(task), callbacks=[Watch(clock)])
    trainer.train()
    assert torch.get_num_threads() == 1 and trainer.state.global_step == task.steps
    # the last line is the mean over the steps since the one before it, the last quarter, of all ranks
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["step"] == task.steps
    parameters = sum(each.numel() for each in model.parameters() if each.requires_grad)
    targets, positions = collator.seen.tolist()
    task.say(clock.seconds, last["loss"], parameters, targets / positions, ["transformers", "accelerate"])


if __name__ == "__main__":
    main()
