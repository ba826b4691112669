"""ModernBertForMaskedLM in transformers' Trainer with fused AdamW and run_mlm.py's linear schedule: its weights and the
seconds of training at several points.

TASK.json has besides what training.py names: every_steps, the points; and weights, a folder for STEP.pt at each.
"""

import json
import time
from pathlib import Path

import torch
from train_trainer import Collator, Rows, build
from training import Task
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed


class Keep(TrainerCallback):
    def __init__(self, task: Task) -> None:
        self.task, self.points = task, []
        self.left_out = 0.0  # seconds that went into files

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        if state.global_step % self.task.every_steps or self.task.rank:
            return
        now = time.perf_counter()
        self.points.append({"step": state.global_step, "seconds": now - self.started - self.left_out})
        torch.save(model.state_dict(), Path(self.task.weights) / f"{state.global_step}.pt")
        self.left_out += time.perf_counter() - now


def main() -> None:
    task = Task.read()
    set_seed(task.seed)
    model, keep = build(task), Keep(task)
    arguments = TrainingArguments(
        output_dir=task.scratch,
        max_steps=task.steps,
        per_device_train_batch_size=task.micro_rows,
        gradient_accumulation_steps=task.rows // task.micro_rows,
        learning_rate=task.lr,
        lr_scheduler_type="linear",
        warmup_steps=task.warmup_steps,
        weight_decay=0.01,
        seed=task.seed,
        use_cpu=True,
        ddp_backend="gloo",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
    )
    collator = Collator(AutoTokenizer.from_pretrained(task.tokenizer), mlm_probability=task.mask_rate)
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=Rows(task), callbacks=[keep])
    trainer.train()
    assert torch.get_num_threads() == 1 and trainer.state.global_step == task.steps
    if not task.rank:
        print(json.dumps({"points": keep.points}), flush=True)


if __name__ == "__main__":
    main()
