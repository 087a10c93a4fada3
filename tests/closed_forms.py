"""Steady-state periods, written down from the cycles of each schedule: the tests' oracles.

All take `Costs` and give seconds per iteration. F, B, U: forward, backward, update of stage k;
a[k], g[k]: transfer of the activation k -> k+1, of the gradient k+1 -> k. Overhead must be 0.
"""


def names(costs):
    return (
        costs.forward,
        costs.backward,
        costs.update,
        costs.activation_transfer,
        costs.gradient_transfer,
    )


def intervals(stages):
    return [(i, j) for i in range(stages) for j in range(i, stages)]


def links(costs):
    """A directed link carries one message per iteration, which bounds the period by itself."""
    return max((*costs.activation_transfer, *costs.gradient_transfer), default=0.0)


def bp(costs):
    """Up from stage i to the last and back, then the update of stage i, before it starts again."""
    F, B, U, a, g = names(costs)
    return max(sum(F[i:]) + sum(B[i:]) + sum(a[i:]) + sum(g[i:]) + U[i] for i in range(len(F)))


def ddg_none(costs):
    """Up from stage i to j and back: an iteration per gradient on the way, and one for stage i."""
    F, B, U, a, g = names(costs)
    return max(
        links(costs),
        *(
            (sum(F[i : j + 1]) + sum(B[i : j + 1]) + sum(a[i:j]) + sum(g[i:j]) + U[i]) / (j - i + 1)
            for i, j in intervals(len(F))
        ),
    )


def ddg_barrier(costs):
    """The forward wave, a backward and an update; or gradients that take longer than that.

    A gradient may travel across barriers: down from stage j to i it crosses j - i iterations.
    """
    F, B, U, a, g = names(costs)
    wave = sum(F) + sum(a)
    return max(
        links(costs),
        *(
            (wave + sum(B[i : j + 1]) + sum(g[i:j]) + U[i]) / (j - i + 1)
            for i, j in intervals(len(F))
        ),
    )


def ddg_mailbox(costs):
    """A stage's own work; or: forward, next stage's forward and backward, back for the next."""
    F, B, U, a, g = names(costs)
    return max(
        max(f + b + u for f, b, u in zip(F, B, U, strict=True)),
        *(F[k] + a[k] + F[k + 1] + B[k + 1] + g[k] for k in range(len(a))),
        0.0,
    )
