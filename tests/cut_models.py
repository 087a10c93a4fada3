"""Models that are no plain sequences, for tests of cutting."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """As in torchvision: in-place ReLU, used twice, and in-place addition."""

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or width_in != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """The layout of torchvision's ResNet-18, narrow."""

    def __init__(self, width: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
        self.layer2 = nn.Sequential(
            BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width)
        )
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Encoder(nn.Module):
    """A transformer of torch's own layers, with positions that are parameters and a mask."""

    def __init__(self, layers: int = 3, width: int = 8, container: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, width)
        self.positions = nn.Parameter(torch.randn(1, 16, width))
        layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers) if container else None
        self.layers = (
            None
            if container
            else nn.ModuleList(
                nn.TransformerEncoderLayer(width, 2, 16, dropout=0.2, batch_first=True)
                for _ in range(layers)
            )
        )
        self.register_buffer("mask", torch.triu(torch.full((16, 16), -1e9), 1), persistent=False)
        self.head = nn.Linear(width, 11)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.size(1)
        x = self.tokens(ids) + self.positions[:, :length]
        mask = self.mask[:length, :length]
        if self.encoder is not None:
            x = self.encoder(x, mask)
        else:
            for layer in self.layers:
                x = layer(x, mask)
        return self.head(x)


class Attention(nn.Module):
    """Causal attention of the kind that users write, with sizes, views and dropout by mode."""

    def __init__(self, width: int, heads: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads, self.dropout = heads, dropout

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(x).split(width, dim=2)
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in parts)
        y = functional.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        return self.out(y.transpose(1, 2).contiguous().view(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + functional.dropout(self.mlp(self.norm2(x)), 0.1, self.training)


class Gpt(nn.Module):
    """The layout of GPT-2; with ``tied``, the last layer has the embedding's weights."""

    def __init__(self, layers: int = 3, width: int = 8, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, width)
        self.positions = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        assert length <= 16
        x = self.tokens(ids) + self.positions(torch.arange(length, device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).view(batch, length, 11)


class Unet(nn.Module):
    """Skip connections over several places to cut."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Linear(4, width), nn.Linear(width, width)
        self.bottom1, self.bottom2 = nn.Linear(width, width), nn.Linear(width, width)
        self.up2, self.up1 = nn.Linear(2 * width, width), nn.Linear(2 * width, 3)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x).relu()
        second = self.norm(self.down2(first)).relu()
        low = self.bottom2(self.bottom1(second).relu()).relu()
        up = self.up2(torch.cat([low, second], 1)).relu()
        return self.up1(torch.cat([up, first], 1))


class Part(nn.Module):
    """Takes and returns a pair."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        left, right = pair
        return self.left(left) + right, self.right(right).tanh()


class Pairs(nn.Module):
    """Two arguments, and tuples between its parts."""

    def __init__(self, parts: int = 3) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Part() for _ in range(parts))
        self.lstm = nn.LSTM(4, 4, batch_first=True, num_layers=2, dropout=0.3)
        self.head = nn.Linear(8, 2)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        pair = left, right
        for part in self.parts:
            pair = part(pair)
        outputs, (hidden, _) = self.lstm(torch.stack(pair, 1))
        return {
            "logits": scale * self.head(torch.cat([outputs[:, -1], hidden[-1]], 1)),
            "x": pair[0],
        }


class Unseen(nn.Module):
    """fx cannot see into it, for it asks a size of the batch; `torch.export` can."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], 4)
        for layer in self.layers:
            state = self.dropout(layer(x + state)).relu()
        return self.norm(state)
