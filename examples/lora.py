"""Low-rank fine-tuning of a Hugging Face model: the sharpness of the factors A and B, and the rate that each bears."""

import torch
from _digits import quick
from transformers import GPT2Config, GPT2LMHeadModel

import sharpkit as sk

small = quick()


class LoRA(torch.nn.Module):
    """x W + x A B, with W frozen."""

    def __init__(self, base, rank=4):
        super().__init__()
        rows, columns = base.weight.shape  # GPT-2's Conv1D has (in, out)
        self.base = base
        self.A = torch.nn.Parameter(torch.randn(rows, rank) / rows**0.5)
        self.B = torch.nn.Parameter(torch.zeros(rank, columns))

    def forward(self, x):
        return self.base(x) + x @ self.A @ self.B


torch.manual_seed(0)
size = 32 if small else 128
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=64, bos_token_id=0, eos_token_id=0, n_positions=32, n_embd=size, n_layer=2, n_head=2)
).requires_grad_(False)
for block in model.transformer.h:
    block.attn.c_attn = LoRA(block.attn.c_attn)
tokens = torch.randint(64, (16, 32), generator=torch.Generator().manual_seed(1))
batch = {"input_ids": tokens, "labels": tokens}
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(3 if small else 30):  # at the start B is 0, and the loss does not depend on A
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()
for factor in ("A", "B"):
    objective = sk.Objective(model, batch, params=f"*.{factor}")
    top = sk.eigenpairs(sk.HessianOperator(objective), k=1)
    print(f"{factor}: lambda_max {top.values[0]:.3g}, gradient descent is stable up to a rate of {sk.stable_learning_rate(top)}")
