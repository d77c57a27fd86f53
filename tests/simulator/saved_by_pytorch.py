#!/usr/bin/env python3
"""What PyTorch keeps of ResNet-50's forward for its backward: bytes an image, fp32.

  tests/simulator/saved_by_pytorch.py

Each storage that torch.autograd.graph.saved_tensors_hooks sees, once; parameters left out.
"""
import torch
from torch import nn

SAMPLES = 2


class Block(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(channels, width, 1, bias=False),
                                           nn.Conv2d(width, width, 3, stride, 1, bias=False),
                                           nn.Conv2d(width, 4 * width, 1, bias=False)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width), nn.BatchNorm2d(4 * width)])
        self.relu = nn.ReLU()
        self.shortcut = None
        if stride != 1 or channels != 4 * width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = x
        for k, (convolution, norm) in enumerate(zip(self.convolutions, self.norms)):
            y = norm(convolution(y))
            y = self.relu(y) if k < 2 else y
        return self.relu(y + (x if self.shortcut is None else self.shortcut(x)))


def main():
    layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for k, (count, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        for b in range(count):
            layers.append(Block(channels, width, 2 if b == 0 and k > 0 else 1))
            channels = 4 * width
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))
    parameters = {p.data_ptr() for p in net.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nn.functional.cross_entropy(net(torch.randn(SAMPLES, 3, 224, 224)), torch.zeros(SAMPLES, dtype=torch.long))
    print(f"PyTorch {torch.__version__}: {sum(kept.values()) / SAMPLES:.0f} B an image")


main()
