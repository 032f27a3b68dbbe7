"""A model of one's own with a padding mask of its own name: `route` tells the adapters which positions are real."""

import torch
from torch import Tensor, nn

import moepeft


class Tagger(nn.Module):
    """Two blocks over padded sequences; `lengths` is a mask in another form than transformers' one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Logits (rows, 3) of the mean over real positions."""
        real = torch.arange(x.shape[1]) < lengths[:, None]
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head((x * real[..., None]).sum(1) / lengths[:, None])


torch.manual_seed(0)
model = Tagger()
factory = moepeft.MoRE(num_tasks=2)  # its contrastive loss is a mean over real positions
adapters = moepeft.attach(model, factory, train=["head"])
x, lengths, labels = torch.randn(32, 10, 16), torch.randint(3, 11, (32,)), torch.arange(32) % 3
optimiser = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
for step in range(60):
    with adapters.route(task_ids=torch.arange(32) % 2, mask=torch.arange(10) < lengths[:, None]):
        loss = nn.functional.cross_entropy(model(x, lengths), labels) + adapters.aux_loss()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}")  # noqa: T201
adapters.save("tagger-adapters")
