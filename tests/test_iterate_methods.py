"""Every method of the catalogue against a recursion over samples, written from its formulas.

The oracles know no operations: V_k[u] are stage k's weights after u updates, and a method is which
V_k a sample's forward and backward pass meet. Stages are 2x2 matrices and tanh, one path at a time.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from ddg_sim.methods import METHODS, data_parallel, ddg, method
from ddg_sim.rule import Activations, Jacobian, Rule, Transform, TransformKind
from ddg_sim.schedule import Schedule, backward, forward, update
from theory.iterate import iterate
from theory.problems import make

STAGES = 3
CHAINS = ["rotation-chain", "reversible-chain"]


class Layers:
    """The two chains' stages once more, in plain scalars."""

    def __init__(self, chain):
        self.turns = chain.name == "rotation-chain"
        self.a = len(chain.start) ** -0.5

    def forward(self, w, h):
        if self.turns:
            return np.tanh(np.array([[np.cos(w), -np.sin(w)], [np.sin(w), np.cos(w)]]) @ h)
        return np.array([h[1], h[0] + self.a * np.sin(w) * np.tanh(h[1])])

    def inverse(self, w, h):
        if self.turns:
            return np.array([[np.cos(w), np.sin(w)], [-np.sin(w), np.cos(w)]]) @ np.arctanh(h)
        return np.array([h[1] - self.a * np.sin(w) * np.tanh(h[0]), h[0]])

    def backward(self, w, h, out, delta):
        """(d loss/d w, d loss/d h), by Jacobians."""
        if self.turns:
            outer = np.diag(1 - out**2)
            by_w = outer @ np.array([[-np.sin(w), -np.cos(w)], [np.cos(w), -np.sin(w)]]) @ h
            by_h = outer @ np.array([[np.cos(w), -np.sin(w)], [np.sin(w), np.cos(w)]])
        else:
            by_w = np.array([0.0, self.a * np.cos(w) * np.tanh(h[1])])
            by_h = np.array([[0.0, 1.0], [1.0, self.a * np.sin(w) / np.cosh(h[1]) ** 2]])
        return delta @ by_w, by_h.T @ delta


@dataclass
class Recursion:
    """Updates u = 0, 1, ... of all stages, with what each method does to a sample n.

    ``reads(k, n)`` is the version that F_k(n) reads. B_k(n) differentiates at those weights
    ("stash") or at V_k[n // m], the weights of now.
    """

    chain: object
    path: np.ndarray
    m: int
    gamma: object  # (k, u) -> step size
    reads: object
    jacobian: str = "stash"  # stash, current, replay, reconstruct, newest, local
    ahead_forward: tuple = (0, 0, 0)
    ahead_backward: tuple = (0, 0, 0)
    momentum: float = 0.0
    shrink: float = 1.0
    spike: tuple = (0, 0, 0)
    decay: float = 0.0
    tau: tuple = (1.0, 1.0, 1.0)
    delay: tuple = (0, 0, 0)  # how many samples newer the newest one is

    def run(self):
        layers, chain, gamma_0 = Layers(self.chain), self.chain, self.gamma(0, 0)
        stages = range(STAGES)
        V = [[chain.start[k]] for k in stages]
        v = [[0.0] for _ in stages]
        drift = [[0.0] for _ in stages]
        ends = {}

        def predicted(k, u, ahead):
            return V[k][u] - ahead * gamma_0 * v[k][u]

        def pass_forward(n, upto):
            h = chain.h_0[self.path[n]]
            for k in range(upto + 1):
                w = predicted(k, self.reads(k, n), self.ahead_forward[k])
                out = layers.forward(w, h)
                ends[k, n] = w, h, out
                h = out

        for u in range((len(self.path) - max(self.delay)) // self.m):
            sums = [0.0] * STAGES
            for n in range(self.m * u, self.m * (u + 1)):
                pass_forward(n, STAGES - 1)
                delta, rebuilt = None, None
                for k in reversed(stages):
                    w, h, out = ends[k, n]
                    if self.jacobian != "stash":
                        w = predicted(k, u, self.ahead_backward[k]) - self.tau[k] * drift[k][u] * (
                            self.decay > 0
                        )
                    if self.jacobian == "replay":
                        out = layers.forward(w, h)
                    if self.jacobian == "reconstruct":
                        out = out if k == STAGES - 1 else rebuilt
                        h = rebuilt = layers.inverse(w, out)
                    if self.jacobian == "newest":
                        pass_forward(n + self.delay[k], k)
                        _, h, out = ends[k, n + self.delay[k]]
                    if k == STAGES - 1 or self.jacobian == "local":
                        delta = out - chain.targets[self.path[n]]
                    else:
                        delta = self.shrink * delta
                    slope, delta = layers.backward(w, h, out, delta)
                    sums[k] += slope
            for k in stages:
                g = sums[k] / self.m
                v[k].append(self.momentum * v[k][u] + g)
                a = self.momentum ** self.spike[k]
                b = (1 - a) / (1 - self.momentum)
                change = -self.gamma(k, u) * (a * v[k][-1] + b * g)
                V[k].append(V[k][u] + change)
                if self.decay:
                    rate = self.decay ** (1 / self.tau[k])
                    drift[k].append(rate * drift[k][u] + (1 - rate) * change)
                else:
                    drift[k].append(0.0)
        return V


D = (4, 2, 0)  # 2 (K - 1 - k): samples between forward and backward pass, a tick per hop
d = (2, 1, 0)  # K - 1 - k: the same where a sample runs forward at once


def hop(k, n, m=1):
    return max(0, (n - D[k]) // m)


def wave(k, n, m=1):
    return max(0, (n - d[k]) // m)


#: method, options, samples per update, order, Recursion's further arguments.
CASES = {
    "bp": ("bp", {}, 1, "now", {}),
    "ddg": ("ddg", {}, 1, "wave", {}),
    "fr": ("fr", {}, 1, "wave", {"jacobian": "replay"}),
    # A stage's backward pass comes before its forward pass, but for the last.
    "fdg": ("fdg", {"shrink": 0.7}, 1, "hop", {"shrink": 0.7, "reads": lambda k, n: max(
        0, n - (3, 1, 0)[k])}),
    "adl-2": ("adl", {"accumulate": 2}, 2, "hop", {}),
    "adl-4": ("adl", {"accumulate": 4}, 4, "hop", {}),
    "dsp": ("dsp", {}, 1, "hop", {"jacobian": "replay"}),
    "dgl": ("dgl", {}, 1, "now", {"jacobian": "local"}),
    "gpipe": ("gpipe", {"micro_batches": 2}, 2, "now", {}),
    "gpipe-replay": ("gpipe", {"micro_batches": 2, "replay": True}, 2, "now", {}),
    "1f1b": ("1f1b", {"micro_batches": 3}, 3, "now", {}),
    "interleaved": ("interleaved", {"micro_batches": 2, "chunks": 3}, 2, "now", {}),
    "zb-h1": ("zb-h1", {"micro_batches": 3}, 3, "now", {}),
    "pipedream": ("pipedream", {}, 1, "wave", {}),
    "vertical": ("pipedream", {"vertical_sync": True}, 1, "wave", {
        "reads": lambda k, n: max(0, n - 2)}),
    "2bw": ("pipedream-2bw", {"micro_batches": 3}, 3, "wave", {
        "reads": lambda k, n: max(0, n // 3 - 1)}),
    "stale": ("stale", {}, 1, "hop", {"jacobian": "current"}),
    "pb": ("pb", {"spike": True, "predict": True}, 1, "hop", {
        "jacobian": "current", "spike": D, "ahead_forward": D, "momentum": 0.6}),
    "spectrain": ("spectrain", {}, 1, "wave", {
        "jacobian": "current", "ahead_forward": (2, 1, 1), "ahead_backward": (0, 0, 1),
        "momentum": 0.6}),
    "spectrain-plain": ("spectrain", {}, 1, "wave", {
        "jacobian": "current", "ahead_forward": (2, 1, 1), "ahead_backward": (0, 0, 1)}),
    "xpipe": ("xpipe", {"micro_batches": 2}, 2, "wave", {
        "jacobian": "current", "ahead_forward": (1, 1, 0), "momentum": 0.6,
        "reads": lambda k, n: max(0, n // 2 - (1, 1, 0)[k])}),
    "pipemare": ("pipemare", {"micro_batches": 2, "decay": 0.3}, 2, "hop", {
        "jacobian": "current", "decay": 0.3, "tau": (2.5, 1.5, 0.5)}),
    "sideways": ("sideways", {}, 1, "hop", {"jacobian": "newest", "delay": D}),
    "petra": ("petra", {}, 1, "hop", {"jacobian": "reconstruct"}),
    "petra-2": ("petra", {"accumulate": 2}, 2, "hop", {"jacobian": "reconstruct"}),
}  # fmt: skip
LAGS = {"now": (0, 0, 0), "wave": d, "hop": D}


def updates_by(order, m, k, tick):
    """Updates that stage k has had at the start of a tick: of all samples it has run backward."""
    late = {"now": 0, "wave": d[k], "hop": 2 * (STAGES - 1) - k}[order]
    return max(0, (m * tick - late) // m)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("case", CASES)
def test_a_method_is_its_recursion(case, name):
    key, options, m, order, more = CASES[case]
    chain, ticks = make(name, STAGES, num_samples=3), 12
    rng = np.random.default_rng(5)
    paths = rng.integers(0, 3, (2, ticks * m))
    gammas = np.full(ticks, 0.3)
    if not any("ahead" in word for word in more):
        gammas = rng.uniform(0.2, 0.5, ticks)

    def gamma(k, u):
        tick = next(t for t in range(10**3) if updates_by(order, m, k, t + 1) > u)
        return gammas[min(tick, ticks - 1)]

    reads = {"now": lambda k, n: n // m, "wave": lambda k, n: wave(k, n, m),
             "hop": lambda k, n: hop(k, n, m)}[order]  # fmt: skip
    run = iterate(
        method(key, STAGES, **options), chain, paths, gammas, momentum=more.get("momentum", 0.0)
    )
    for p, path in enumerate(paths):
        # The last samples' errors meet newer samples than the run has; they are not compared.
        longer = np.pad(path, (0, max(more.get("delay", [0]))))
        V = Recursion(chain, longer, m, gamma, **{"reads": reads} | more).run()
        for k in range(STAGES):
            expected = [V[k][updates_by(order, m, k, t)] for t in range(ticks + 1)]
            np.testing.assert_allclose(run.w[:, p, k], expected, atol=1e-12, rtol=0)
        assert np.abs(run.w[-1, p] - chain.start).min() > 1e-3  # and something happened


def test_every_method_has_its_oracle():
    elsewhere = {"pd-asgd", "ouroboros", "dp"}  # below
    assert {case[0] for case in CASES.values()} | elsewhere == set(METHODS)


def test_the_cases_are_told_apart():
    # An oracle that two different methods both meet would show nothing.
    chain, ends = make("rotation-chain", STAGES, num_samples=3), {}
    for case in ("bp", "ddg", "fr", "dsp", "dgl", "vertical", "stale", "pb", "spectrain",
                 "sideways", "petra", "fdg"):  # fmt: skip
        key, options, m, _, more = CASES[case]
        paths = np.random.default_rng(5).integers(0, 3, (1, 12 * m))
        run = iterate(method(key, STAGES, **options), chain, paths, np.full(12, 0.3),
                      momentum=more.get("momentum", 0.0))  # fmt: skip
        ends[case] = run.w[-1, 0]
    names = list(ends)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert np.abs(ends[one] - ends[other]).max() > 1e-6, (one, other)


@pytest.mark.parametrize("name", CHAINS)
def test_pipemare_anneals_the_step_size(name):
    chain, ticks, tau, T = make(name, STAGES), 9, (2.5, 1.5, 0.5), 4
    path = np.random.default_rng(2).integers(0, 2, (1, 2 * ticks))
    V = Recursion(
        chain, path[0], 2, lambda k, u: 0.3 / tau[k] ** (1 - min(u / T, 1)),
        reads=lambda k, n: hop(k, n, 2), jacobian="current",
    ).run()  # fmt: skip
    schedule = method("pipemare", STAGES, micro_batches=2, anneal=T)
    run = iterate(schedule, chain, path, np.full(ticks, 0.3))
    for k in range(STAGES):
        last = V[k][updates_by("hop", 2, k, ticks)]
        assert run.w[-1, 0, k] == pytest.approx(last, abs=1e-12)


@pytest.mark.parametrize("name", CHAINS)
def test_pd_asgd_reads_the_ticks_weights_and_differentiates_at_the_newest(name):
    chain, ticks = make(name, STAGES), 10
    path, layers = np.random.default_rng(3).integers(0, 2, ticks), Layers(chain)
    w, kept, expected = chain.start.copy(), None, [chain.start.copy()]
    for t in range(ticks):
        ends, h = [], chain.h_0[path[t]]
        for k in range(STAGES):
            ends.append((h, layers.forward(w[k], h)))
            h = ends[k][1]
        if kept:
            delta = kept[-1][1] - chain.targets[path[t - 1]]
            for k in reversed(range(STAGES)):
                slope, delta = layers.backward(w[k], *kept[k], delta)
                w[k] -= 0.3 * slope
        kept = ends
        expected.append(w.copy())
    run = iterate(method("pd-asgd", STAGES), chain, path[None], np.full(ticks, 0.3))
    np.testing.assert_allclose(run.w[:, 0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("name", CHAINS)
def test_ouroboros_applies_both_updates_to_the_tied_weights(name, momentum):
    chain, ticks = make(name, STAGES), 10
    path, layers = np.random.default_rng(4).integers(0, 2, ticks), Layers(chain)
    tied, middle, v = chain.start[0], chain.start[1], np.zeros(3)
    ends, deltas, expected = {}, {}, [(tied, middle, tied)]

    def step(k, n):
        w, h, out = ends[k, n]
        slope, deltas[k - 1, n] = layers.backward(w, h, out, deltas.pop((k, n)))
        v[k] = momentum * v[k] + slope
        return 0.3 * v[k]

    for t in range(ticks):
        h = chain.h_0[path[t]]
        ends[0, t] = tied, h, layers.forward(tied, h)
        ends[1, t] = middle, ends[0, t][2], layers.forward(middle, ends[0, t][2])
        if t >= 2:
            tied = tied - step(0, t - 2)
        before = middle
        if t >= 1:
            middle = middle - step(1, t - 1)
        assert before is ends[1, t][0]
        ends[2, t] = tied, ends[1, t][2], layers.forward(tied, ends[1, t][2])
        deltas[2, t] = ends[2, t][2] - chain.targets[path[t]]
        tied = tied - step(2, t)
        expected.append((tied, middle, tied))
    schedule = method("ouroboros", STAGES)
    run = iterate(schedule, chain, path[None], np.full(ticks, 0.3), momentum=momentum)
    np.testing.assert_allclose(run.w[:, 0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [*CHAINS, "welsch"])
def test_replicas_meet_in_the_mean(name):
    problem, ticks, replicas = make(name, STAGES, num_samples=3), 5, 2
    paths = np.random.default_rng(1).integers(0, 3, (4, ticks * replicas))
    w, expected = np.tile(problem.start, (4, 1)), []
    for t in range(ticks):
        expected.append(w)
        both = [problem.gradients(w, paths[:, replicas * t + r]) for r in range(replicas)]
        w = w - 0.3 * (both[0] + both[1]) / 2
    run = iterate(method("dp", STAGES), problem, paths, np.full(ticks, 0.3))
    np.testing.assert_allclose(run.w, [*expected, w], atol=1e-12, rtol=0)
    # Replicas of a delayed method that all see the same samples are one.
    alike = np.repeat(paths[:, :ticks], 2, axis=1)
    two = iterate(data_parallel(ddg(STAGES), 2), problem, alike, np.full(ticks, 0.3))
    one = iterate(ddg(STAGES), problem, paths[:, :ticks], np.full(ticks, 0.3))
    np.testing.assert_allclose(two.w, one.w, atol=1e-15, rtol=0)


@pytest.mark.parametrize("case", ["ddg", "fdg", "adl-2", "1f1b", "zb-h1", "vertical", "2bw"])
def test_stashed_methods_need_no_stages(case):
    # Whole gradients of a chain that hides its stages give what propagation gives.
    class Whole:
        def __init__(self, chain):
            self.chain = chain

        def __getattr__(self, name):
            if name in ("inputs", "forward", "backward"):
                raise AttributeError(name)
            return getattr(self.chain, name)

    key, options, m, _, _ = CASES[case]
    chain = make("rotation-chain", STAGES, num_samples=3)
    paths = np.random.default_rng(5).integers(0, 3, (3, 8 * m))
    runs = [
        iterate(method(key, STAGES, **options), problem, paths, np.full(8, 0.3))
        for problem in (chain, Whole(chain))
    ]
    np.testing.assert_allclose(runs[0].w, runs[1].w, atol=1e-13, rtol=0)


def test_what_is_refused():
    paths, steps = np.zeros((1, 8), dtype=int), np.full(8, 0.1)

    def run(schedule, problem="reversible-chain", columns=8, **more):
        problem = make(problem, schedule.num_stages) if isinstance(problem, str) else problem
        return iterate(schedule, problem, paths[:, :columns], steps, **more)

    with pytest.raises(ValueError, match=r"local losses need stage outputs; .* 'welsch' has none"):
        run(method("dgl", 2), "welsch")
    with pytest.raises(ValueError, match="B0.* reads other activations than F0.*'welsch'"):
        run(method("sideways", 2), "welsch")
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1.0"):
        run(ddg(2), momentum=1.0)
    with pytest.raises(ValueError, match=r"paths must have shape \(P >= 1, 16\), got \(1, 8\)"):
        run(method("dp", 2))
    with pytest.raises(ValueError, match="tied stages .0, 1. need blocks of one size, problem has"):
        run(method("ouroboros", 2), "kuramoto")

    class OneWay:
        def __getattr__(self, name):
            if name == "inverse":
                raise AttributeError(name)
            return getattr(make("rotation-chain", 2), name)

    with pytest.raises(ValueError, match="activations=reconstruct needs the stages' inverse"):
        run(method("petra", 2), OneWay())

    def with_rule(rule, workers=None):
        body = [forward(0), backward(0), update(0)], [forward(1), backward(1), update(1)]
        return Schedule("x", 2, tuple(map(tuple, workers or body)), rule=rule)

    kind = TransformKind
    for rule, match in (
        (Rule(transforms=(Transform(kind.TIED, (0, 1)),)), "stages 0 and 1 must share a worker"),
        (Rule(transforms=(Transform(kind.SPIKE, (1,)),)), "spike=1 must have 2 numbers"),
        (
            Rule(transforms=(Transform(kind.PREDICT_BACKWARD, (1, 0)),)),
            "predict-backward=1,0 needs jacobian=predicted, not stashed",
        ),
        (
            Rule(Activations.GRAPH, Jacobian.PREDICTED, transforms=(
                Transform(kind.DISCREPANCY, (0.5, 1, 1)),)),
            "discrepancy=0.5,1,1 needs jacobian=current, not predicted",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            run(with_rule(rule))
