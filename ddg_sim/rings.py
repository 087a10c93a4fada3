"""How many buffers a message stream needs: the ring slots of a channel."""

from __future__ import annotations

import numpy as np

from ddg_sim.dependencies import Dependency
from ddg_sim.eventgraph import event_graph, existence, unroll
from ddg_sim.schedule import Schedule, steady_iterations


def ring_slots(schedule: Schedule) -> dict[Dependency, int]:
    """Per message stream the most messages that can be produced and not yet used up.

    In steady state the answer is the fewest tokens on a cycle through the stream and its consumer.
    Warm-up and drain need more: where samples do not exist, nobody waits for them, so a fast
    worker runs further ahead. In DDG the first stage runs K forward passes before it waits for
    anything. Therefore the run itself is followed, whatever the durations: every event inherits
    from all it waits for what is known to be used up (a vector clock).

    >>> from ddg_sim.methods import ddg
    >>> [(edge.relation.value, edge.source.worker, slots)
    ...  for edge, slots in ring_slots(ddg(4)).items() if edge.relation.value == "activation"]
    [('activation', 0, 4), ('activation', 1, 3), ('activation', 2, 2)]
    """
    graph = event_graph(schedule)
    events = {event.node: index for index, event in enumerate(graph.events)}
    messages = [event.message for event in graph.events if event.message is not None]
    produces: dict[int, list[int]] = {}
    uses: dict[int, list[int]] = {}
    for stream, edge in enumerate(messages):
        produces.setdefault(events[edge.source], []).append(stream)
        uses.setdefault(events[edge.consumer], []).append(stream)
    iterations = steady_iterations(schedule)
    exists = existence(graph, iterations)
    firsts = np.array([exists[events[edge.source]].start for edge in messages])
    slots = np.zeros(len(messages), dtype=int)
    known: dict[tuple[int, int], np.ndarray] = {}  # event, iteration -> per stream last one used
    for index, tick, waits in unroll(graph, iterations):
        used = np.maximum.reduce([known[before] for before in waits] or [firsts - 1])
        if tick in exists[index]:
            for stream in produces.get(index, ()):
                slots[stream] = max(slots[stream], tick - used[stream])
            if index in uses:
                used = used.copy()
                for stream in uses[index]:
                    used[stream] = tick - messages[stream].tokens
        known[index, tick] = used
    return {edge: int(count) for edge, count in zip(messages, slots, strict=True)}
