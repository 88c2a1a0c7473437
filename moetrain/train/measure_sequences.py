"""Measures what sequences cost in a run: passes of its model on its ranks, and messages of its rings.

All ranks compute at once, as they do in a step, so that dispatch and gathering of parameters are part of what is timed.
Shapes: T tokens of a rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moetrain.config.sequence import MEASURED
from moetrain.cost.fit import TimedItem, fit_pass
from moetrain.cost.measure import Peers, message_s, now, rounded
from moetrain.cost.sequence_costs import PassCosts, SequenceCosts
from moetrain.models.fsdp import set_gradient_sync
from moetrain.sequence.batch import PackedBatch, Piece
from moetrain.train.engine import Engine
from moetrain.train.sequence_profile import KEY, SequenceProfile, profiled

HALVINGS = 3  # of the capacity: the shortest item is an eighth of the longest
DOCUMENTS = 8  # of an item that is of several
REPEATS = 3  # of which the fastest counts, after one that nobody counts
MOST_S = 5.0  # of a pass both ways: twice as long a sequence is not tried


def measure_sequences(engine: Engine) -> SequenceProfile:
    """Measure, and leave the engine as it was between two steps. Collective over all ranks; equal on all."""
    group = engine.groups.group("world")
    forward, backward = _passes(engine)
    fitted = [fit_pass(items) for items in (forward, backward)]
    hop_s, byte_s = _messages(engine)
    numbers = [
        *(rounded(x) for costs, _ in fitted for x in (costs.square_ms, costs.token_ms, costs.item_ms)),
        rounded(hop_s),
        rounded(byte_s),
        rounded(max(worst for _, worst in fitted)),
    ]
    found_9 = torch.tensor(numbers, dtype=torch.float64, device=engine.device)
    if group.size() > 1:
        dist.broadcast(found_9, group=group, group_src=0)
    *costs, hop_s, byte_s, worst = found_9.tolist()
    return SequenceProfile(profiled(engine.run, engine.groups.mesh), _costs(engine, costs, hop_s, byte_s), worst)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A profile to plan by; ``is_new`` where it was measured just now."""

    profile: SequenceProfile
    is_new: bool


def choose_profile(
    engine: Engine,
    extra: Mapping[str, Any],
    in_folder: SequenceProfile | None,
    given: SequenceProfile | None,
    group: dist.ProcessGroup,
) -> Chosen:
    """What to plan by where ``sequence.costs`` asks for more than a model. Collective; equal on all ranks.

    A run keeps the costs that it began with, so that its plans stay the same, unless the configuration asks for others
    by now, or the mesh has changed, so that they are of another model.

    Args:
        engine: of the run.
        extra: of the checkpoint that the run goes on from; empty where there is none.
        in_folder: what a run had measured that ended before its first checkpoint; read on the first rank.
        given: what ``sequence.costs`` names, if it names a file.
        group: all ranks, on the host.
    """
    costs, mesh = engine.run.sequence.costs, engine.groups.mesh
    kept = in_folder if costs == MEASURED else None
    if KEY in extra:
        same = extra.get("config", {}).get("sequence", {}).get("costs") == costs
        kept = SequenceProfile.from_json(extra[KEY]) if same else None
    if kept is not None and not kept.is_of(engine.run, mesh):
        kept = None
    told = [None if (found := kept or given) is None else found.to_json()]
    dist.broadcast_object_list(told, group=group, group_src=0)
    if told[0] is not None:
        return Chosen(SequenceProfile.from_json(told[0]), is_new=False)
    return Chosen(measure_sequences(engine), is_new=True)


def in_words(profile: SequenceProfile) -> str:
    """For whoever watches a run."""
    forward, backward = profile.costs.forward, profile.costs.backward
    return (
        f"1,024 tokens {profile.costs.ms(1024):.3g} ms ({forward.of_item((1024,)):.3g} forward), of which attention "
        f"{(forward.square_ms + backward.square_ms) * 1024**2:.2g}; a message of a ring {forward.hop_ms:.2g} ms and "
        f"{forward.hop_token_ms * 1024:.2g} for 1,024 tokens (fitted within {profile.worst_error:.0%})"
    )


def lengths_to_time(capacity: int) -> list[tuple[int, ...]]:
    """Items of one sequence and of several, the shortest first.

    >>> lengths_to_time(16)[:2], lengths_to_time(1)
    ([(2,), (1, 1)], [(1,), (1,), (1,)])
    """
    sizes = sorted({max(1, capacity >> halvings) for halvings in range(HALVINGS + 1)})
    items: list[tuple[int, ...]] = []
    for n in sizes:
        items.append((n,))
        if n > 1:
            short = max(1, n // DOCUMENTS)
            items.append((short,) * (n // short))
    return items * (3 if len(items) < 3 else 1)  # costs have three parts


def peers_of_ring(lanes: int, lanes_per_node: int) -> Peers:
    """The lanes of a ring that the first one sends to: the next one, and the first one of another node.

    >>> peers_of_ring(16, 8), peers_of_ring(1, 8)
    (Peers(near=1, far=8), Peers(near=None, far=None))
    """
    return Peers(
        near=1 if min(lanes_per_node, lanes) > 1 else None, far=lanes_per_node if lanes_per_node < lanes else None
    )


def _costs(engine: Engine, fitted: list[float], hop_s: float, byte_s: float) -> SequenceCosts:
    """Of the whole model; forward, each layer sends keys and values, and backward their gradients too."""
    model, mesh = engine.run.model, engine.groups.mesh
    elements = 2 * max(1, model.num_kv_heads // mesh.tp) * model.head_dim
    narrow = engine.compute_dtype.itemsize
    wide = torch.promote_types(engine.compute_dtype, torch.float32).itemsize
    layers_ms = 1e3 * model.num_layers

    def of_pass(parts: list[float], messages: int, num_bytes: int) -> PassCosts:
        square_ms, token_ms, item_ms = parts
        return PassCosts(
            square_ms=square_ms,
            token_ms=token_ms,
            item_ms=item_ms,
            hop_ms=rounded(layers_ms * messages * hop_s),
            hop_token_ms=rounded(layers_ms * num_bytes * byte_s),
        )

    return SequenceCosts(of_pass(fitted[:3], 1, elements * narrow), of_pass(fitted[3:], 2, elements * (narrow + wide)))


def _passes(engine: Engine) -> tuple[list[TimedItem], list[TimedItem]]:
    """Items and what they took on this rank, forward and backward."""
    run, group = engine.run, engine.groups.group("world")
    drawn = torch.Generator().manual_seed(0)  # of its own: a run draws what it would have drawn
    forward: list[TimedItem] = []
    backward: list[TimedItem] = []
    engine.placing.begin_step()
    engine.zero_grad()
    batch = _batch((1,), run.model.vocab_size, drawn)
    _pass(engine, batch, is_last=False)  # opens connections, allocates
    for lengths in lengths_to_time(run.capacity):
        batch = _batch(lengths, run.model.vocab_size, drawn)
        times = [_pass(engine, batch, is_last=False) for _ in range(REPEATS + 1)][1:]
        forward.append(TimedItem(lengths, 1e3 * min(time[0] for time in times)))
        backward.append(TimedItem(lengths, 1e3 * min(time[1] for time in times)))
        took_s = torch.tensor([sum(min(times))], dtype=torch.float64, device=engine.device)
        if group.size() > 1:
            dist.broadcast(took_s, group=group, group_src=0)
        if float(took_s) > MOST_S and len(forward) >= 4:
            break
    _pass(engine, _batch((1,), run.model.vocab_size, drawn), is_last=True)
    engine.store.reduce_gradients()
    engine.zero_grad()
    engine.balance.forget_step()
    engine.placing.begin_step()
    engine.traffic.reset()
    return forward, backward


def _batch(lengths: tuple[int, ...], vocab_size: int, drawn: torch.Generator) -> PackedBatch:
    """Documents of random tokens."""
    token_id_T, target_T = torch.randint(vocab_size, (2, sum(lengths)), generator=drawn)
    return PackedBatch(token_id_T, target_T, tuple(Piece(id, 0, n, 0) for id, n in enumerate(lengths)))


def _pass(engine: Engine, batch: PackedBatch, *, is_last: bool) -> tuple[float, float]:
    """Seconds forward and backward of a round; ``is_last`` sends gradients home, as the last one of a step does."""
    set_gradient_sync(engine.model, is_last, engine.run.train.reshard_after_forward)
    engine.store.reduces = is_last
    engine.model.train()
    num_step_tokens = batch.num_tokens * engine.groups.size("data")
    begun = now(engine.device)
    output = engine.model(batch.to(engine.device), num_step_tokens=num_step_tokens, random_key=0, ring=None)
    between = now(engine.device)
    (output.ce_sum / num_step_tokens + output.aux).backward()
    return between - begun, now(engine.device) - between


def _messages(engine: Engine) -> tuple[float, float]:
    """Seconds of a message of a ring, and of each byte of it, over the slowest kind of link; 0 without other lanes."""
    groups, mesh = engine.groups, engine.groups.mesh
    lanes = groups.size("data")
    if lanes == 1:
        return 0.0, 0.0
    ring, found = groups.group("ring"), [(0.0, 0.0)]
    peers = peers_of_ring(lanes, max(1, mesh.ranks_per_node // mesh.tp))
    elements = 2 * engine.run.model.num_kv_heads * engine.run.model.head_dim
    small, large = (tokens * elements * engine.compute_dtype.itemsize for tokens in (1, max(64, engine.run.capacity)))
    for peer in (peers.near, peers.far):
        if peer is not None and ring.rank() in (0, peer):
            small_s, large_s = (message_s(size, peer, ring, engine.device) for size in (small, large))
            byte_s = max(0.0, large_s - small_s) / (large - small)
            found.append((max(0.0, small_s - small * byte_s), byte_s))
    return max(found, key=lambda pair: pair[0] + large * pair[1])
