"""One method imported into a project of one's own: no transformers, no Trainer, a loop of plain PyTorch."""

import argparse

import torch
from torch import nn

import moepeft
from moepeft.methods.tucka import TuckA


def main() -> None:
    """Adapt a small network to another function."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="state_dict file of the network; random weights if not given")
    args = parser.parse_args()
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    if args.model:
        model.load_state_dict(torch.load(args.model, weights_only=True))
    adapters = moepeft.attach(model, TuckA(rank=4, groups=2, experts=2, routing="row"))
    x = torch.randn(256, 16)
    optimiser = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    for step in range(100):
        loss = nn.functional.mse_loss(model(x), x.abs()) + adapters.aux_loss()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")  # noqa: T201
    adapters.save("plain-adapters")


if __name__ == "__main__":
    main()
