"""MobileNetV2 (Sandler et al., 2018): inverted residuals with depthwise convolutions."""

from __future__ import annotations

from torch import Tensor, nn

STAGES = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """A wide depthwise convolution between two narrow 1x1 ones, with a shortcut where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, expand: int, stride: int):
        super().__init__()
        hidden = inputs * expand
        layers = [_unit(inputs, hidden, 1)] if expand != 1 else []
        layers += [_unit(hidden, hidden, 3, stride, hidden)]
        self.body = nn.Sequential(*layers, nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class MobileNetV2(nn.Module):
    """Images [N, 3, H, W] -> logits [N, classes]."""

    def __init__(self, classes: int = 1000, stages: list[tuple[int, int, int, int]] = STAGES, last: int = 1280):
        super().__init__()
        layers: list[nn.Module] = [_unit(3, 32, 3, 2)]
        inputs = 32
        for expand, outputs, count, stride in stages:
            for index in range(count):
                layers.append(InvertedResidual(inputs, outputs, expand, 1 if index else stride))
                inputs = outputs
        self.features = nn.Sequential(*layers, _unit(inputs, last, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))
