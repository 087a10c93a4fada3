"""Training by the papers' formulas, on the whole model: independent of schedules and executors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ddg_gpu.stage import seeded

Weights = list[dict[str, Tensor]]  # per stage
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Toy:
    """Random images with labels: sample s is a mini-batch that depends on s alone."""

    def __init__(self, size: int = 6, shape: tuple[int, ...] = (2, 6, 6), classes: int = 3) -> None:
        self.size, self.shape, self.classes = size, shape, classes

    def inputs(self, sample: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + sample)
        return torch.randn(self.size, *self.shape, generator=generator)

    def targets(self, sample: int) -> Tensor:
        generator = torch.Generator().manual_seed(2000 + sample)
        return torch.randint(self.classes, (self.size,), generator=generator)


def toy_layers(seed: int = 0) -> list[nn.Module]:
    """Convolutions, batch norm, dropout, linear: whatever could go wrong when it is delayed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [
            nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.3)),
            nn.Sequential(nn.Conv2d(4, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU()),
            nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(72, 3)),
        ]


def toy_stages(num_stages: int, seed: int = 0) -> list[nn.Module]:
    layers = toy_layers(seed)
    bounds = [round(len(layers) * k / num_stages) for k in range(num_stages + 1)]
    return [
        nn.Sequential(*layers[left:right])
        for left, right in zip(bounds[:-1], bounds[1:], strict=True)
    ]


class ToyHead(nn.Module):
    """A head with weights of its own: means over channels and pixels, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            self.linear = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = nn.functional.adaptive_avg_pool1d(inputs.flatten(1)[:, None], 4)
        result: Tensor = self.linear(flat[:, 0])
        return result


def snapshot(stages: Sequence[nn.Module]) -> Weights:
    return [
        {name: p.detach().clone().requires_grad_() for name, p in stage.named_parameters()}
        for stage in stages
    ]


def whole_model_loss(
    stages: Sequence[nn.Module], weights: Weights, data: Toy, sample: int, seed: int
) -> Tensor:
    """Loss of a sample at these weights; buffers (batch norm) of the stages move once."""
    value = data.inputs(sample)
    for k, stage in enumerate(stages):
        with seeded(seed, k, sample):
            value = functional_call(stage, weights[k], (value,))
    return nn.functional.cross_entropy(value, data.targets(sample))


def delayed_training(
    stages: Sequence[nn.Module],
    optimizers: MakeOptimizer,
    data: Toy,
    iterations: int,
    delays: Sequence[int],
    seed: int = 0,
) -> list[float]:
    """w_k^{t+1} = step(w_k^t, ∇_k f_{t-d_k}(w^{t-d_k})), whole-model autograd at w^{t-d_k}.

    Nothing is applied while t < d_k; the run ends when every stage has used every sample.
    """
    steps = [optimizers(list(stage.parameters())) for stage in stages]
    gradients: dict[int, Weights] = {}
    losses = []
    for t in range(iterations + max(delays)):
        if t < iterations:
            weights = snapshot(stages)
            loss = whole_model_loss(stages, weights, data, t, seed)
            losses.append(loss.item())
            flat = [tensor for stage in weights for tensor in stage.values()]
            found = iter(torch.autograd.grad(loss, flat))
            gradients[t] = [{name: next(found) for name in stage} for stage in weights]
        for k, stage in enumerate(stages):
            sample = t - delays[k]
            if 0 <= sample < iterations:
                for name, parameter in stage.named_parameters():
                    parameter.grad = gradients[sample][k][name]
                steps[k].step()
    return losses


def current_weights_chain(
    layers: Sequence[Tensor],
    data: Toy,
    iterations: int,
    delays: Sequence[int],
    rate: float,
    replay: bool,
) -> list[Tensor]:
    """Linear-tanh stages h_k = tanh(h_{k-1} W_k), loss ½‖h_K‖²/B, differentiated by hand.

    ``replay`` False is the reading "current": activations of the old forward pass, weights of
    now. ``replay`` True recomputes the activations of the stage from its old input, with the
    weights of now.
    """
    weights = [layer.clone() for layer in layers]
    count = len(weights)
    stored: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (stage, sample) -> (input, output)
    errors: dict[tuple[int, int], Tensor] = {}
    for t in range(iterations + max(delays)):
        if t < iterations:
            value = data.inputs(t).flatten(1)
            for k in range(count):
                output = torch.tanh(value @ weights[k])
                stored[k, t] = (value, output)
                value = output
        updates = []
        for k in range(count):
            sample = t - delays[k]
            if 0 <= sample < iterations:
                inputs, output = stored.pop((k, sample))
                if replay:
                    output = torch.tanh(inputs @ weights[k])
                error = output / len(output) if k == count - 1 else errors.pop((k, sample))
                inner = error * (1 - output**2)
                updates.append((k, sample, inputs.T @ inner, inner @ weights[k].T))
        for k, sample, gradient, error in updates:
            weights[k] = weights[k] - rate * gradient
            errors[k - 1, sample] = error
    return weights


def recursive_training(
    reads: dict[tuple[int, int], int],
    groups: dict[tuple[int, int], list[int]],
    weights: Sequence[Tensor],
    data: Toy,
    rate: float,
) -> list[Tensor]:
    """Final weights of tanh stages under plain SGD, from what each sample reads, by recursion.

    w_k after update v is w_k before it, less the mean over the group of ∇_k f_s at the weights
    that sample s read; no order of execution is followed.

    Args:
        reads: (stage, sample) -> version of the stage's weights that the sample's pass read.
        groups: (stage, version) -> samples whose mean gradient produced that version.
        weights: initial weights per stage, square.
        data: the samples.
        rate: step size.
    """
    versions = {(stage, 0): weight for stage, weight in enumerate(weights)}
    gradients: dict[int, tuple[Tensor, ...]] = {}

    def weight(stage: int, version: int) -> Tensor:
        if (stage, version) not in versions:
            group = groups[stage, version]
            mean = sum(gradient(sample)[stage] for sample in group) / len(group)
            versions[stage, version] = weight(stage, version - 1) - rate * mean
        return versions[stage, version]

    def gradient(sample: int) -> tuple[Tensor, ...]:
        if sample not in gradients:
            read = [
                weight(stage, reads[stage, sample]).detach().requires_grad_()
                for stage in range(len(weights))
            ]
            value = data.inputs(sample).double()
            for own in read:
                value = torch.tanh(value @ own)
            gradients[sample] = torch.autograd.grad((value**2).sum(), read)
        return gradients[sample]

    last = {stage: max(v for k, v in groups if k == stage) for stage in range(len(weights))}
    return [weight(stage, last[stage]).detach() for stage in range(len(weights))]
