"""Your own loop on any number of ranks: four lines more, each marked `# accelx`.

    python -m accelx.spawn -n 2 examples/four_lines.py    any number that divides 36
    python examples/four_lines.py                         one process, the same numbers

Take the four lines away and it is a plain PyTorch program, which prints the same.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax  # accelx

torch.manual_seed(0)
x, y = load_digits(return_X_y=True)
x, y = torch.tensor(x).float() / 16, torch.tensor(y)
order = torch.randperm(len(x))
train, test = order[:1440], order[1440:]

env = ax.connect()  # accelx
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
model = ax.shard_model(env)(model)  # accelx
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=36)
loader = ax.shard_loader(env)(loader)  # accelx

for _ in range(5):
    for images, labels in loader:
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

# Every rank has the whole model, so each of them prints the same.
with torch.no_grad():
    logits = model(x[test])
right = (logits.argmax(1) == y[test]).float().mean()
print(f"test loss {F.cross_entropy(logits, y[test]):.4f}, accuracy {right:.4f}")
