"""mlm-pytorch around an x-transformers encoder, in torch's own DistributedDataParallel over gloo.

Its users write the loop themselves: this one has nothing that costs time. AdamW is torch's fused one, with its default
betas and weight decay.
"""

import math
from contextlib import nullcontext

import torch
import torch.distributed as dist
from mlm_pytorch import MLM
from mlm_pytorch.mlm_pytorch import get_mask_subset_with_prob
from torch.nn.parallel import DistributedDataParallel
from training import Clock, Task
from x_transformers import Encoder, TransformerWrapper


def build(task: Task) -> MLM:
    """The model in mlm_dist's shape, but that every layer attends to the whole row."""
    transformer = TransformerWrapper(
        num_tokens=task.vocab_rows,
        max_seq_len=task.row_tokens,
        use_abs_pos_emb=False,
        tie_embedding=True,
        tie_embedding_scale=1.0,  # by default logits are so small that the loss hardly falls at this learning rate
        attn_layers=Encoder(
            dim=task.width,
            depth=task.layers,
            heads=task.heads,
            attn_dim_head=task.width // task.heads,
            attn_flash=True,  # torch's scaled_dot_product_attention; its own is several calls
            rotary_pos_emb=True,
            ff_glu=True,
            ff_mult=task.mlp_width / task.width,
            ff_no_bias=True,
        ),
    )
    # Of the targets 80 % become [MASK], 10 % another token and 10 % stay: random replacement comes first, replace_prob
    # is of what it leaves. The package puts random tokens at 10 % of the other positions as well, as it does for all
    # its users: some of its loss is due to that, none of its time.
    return MLM(
        transformer,
        mask_token_id=task.mask_id,
        pad_token_id=task.pad_id,
        mask_prob=task.mask_rate,
        random_token_prob=0.1,
        replace_prob=8 / 9,
        num_tokens=task.vocab_size,
        mask_ignore_token_ids=[task.cls_id, task.sep_id],
    )


def share_of_targets(task: Task, ids: torch.Tensor) -> float:
    """By the package's own draw."""
    maskable = (ids != task.cls_id) & (ids != task.sep_id)
    return get_mask_subset_with_prob(maskable, task.mask_rate).float().mean().item()


def main() -> None:
    task = Task.read()
    dist.init_process_group("gloo")
    torch.manual_seed(task.seed)
    mlm = DistributedDataParallel(build(task))
    torch.manual_seed(task.seed + task.rank)  # each rank has masks of its own
    optimizer = torch.optim.AdamW(mlm.parameters(), lr=task.lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (task.warmup_steps + 1)))
    rows = torch.from_numpy(task.rows_of_text())
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(task.seed))
    together = task.ranks * task.rows
    clock, loss_sum = Clock(task), torch.zeros(())
    for step in range(task.steps):
        first = step % (len(rows) // together) * together + task.rank * task.rows
        micro_batches = rows[order[first : first + task.rows]].split(task.micro_rows)
        loss = torch.zeros(())
        for i, micro_batch in enumerate(micro_batches):
            with nullcontext() if i + 1 == len(micro_batches) else mlm.no_sync():
                part = mlm(micro_batch) / len(micro_batches)
                part.backward()
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(mlm.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step >= task.steps - task.steps // 4:
            loss_sum += loss
        clock.tick(step + 1)
    assert torch.get_num_threads() == 1
    dist.all_reduce(loss_sum)
    loss = loss_sum.item() / (task.steps // 4) / task.ranks
    assert math.isfinite(loss)
    parameters = sum(each.numel() for each in mlm.parameters() if each.requires_grad)
    rate = share_of_targets(task, rows[order[: 4 * task.rows]])
    task.say(clock.seconds, loss, parameters, rate, ["mlm-pytorch", "x-transformers"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
