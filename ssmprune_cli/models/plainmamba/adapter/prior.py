"""The spatial prior: what plain convolutions make of the image at four scales. Chen et al., arXiv 2205.08534.

Written from ChenhongyiYang/PlainMamba 0975a1d (downstream/mmdetection). Letters: B batch, d width.
"""

from __future__ import annotations

from torch import Tensor, nn


def _convolved(dim: int, out: int, stride: int) -> list[nn.Module]:
    """A 3 x 3 convolution, a batch norm and a ReLU."""
    return [nn.Conv2d(dim, out, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


class SpatialPrior(nn.Module):
    """`width` channels after the stem, twice and four times as many later; then as many as the tokens have."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        stem = [*_convolved(3, width, 2), *_convolved(width, width, 1), *_convolved(width, width, 1)]
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, stride=2, padding=1))
        self.conv2 = nn.Sequential(*_convolved(width, 2 * width, 2))
        self.conv3 = nn.Sequential(*_convolved(2 * width, 4 * width, 2))
        self.conv4 = nn.Sequential(*_convolved(4 * width, 4 * width, 2))
        self.fc1 = nn.Conv2d(width, dim, 1)
        self.fc2 = nn.Conv2d(2 * width, dim, 1)
        self.fc3 = nn.Conv2d(4 * width, dim, 1)
        self.fc4 = nn.Conv2d(4 * width, dim, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W) to maps (B, d, h, w) with strides of 4, 8, 16 and 32 pixels."""
        first = self.stem(images)
        second = self.conv2(first)
        third = self.conv3(second)
        fourth = self.conv4(third)
        return self.fc1(first), self.fc2(second), self.fc3(third), self.fc4(fourth)
