"""Both transports on gloo ranks: the same bytes whatever the sizes, with late ranks, and with exchanges in flight."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from harness import run_ranks
from seesaw_ds.parallel import host_transport, transport
from seesaw_ds.parallel.host_transport import NUM_SLOTS, HostStagedTransport, required_bytes, slot_bytes
from seesaw_ds.parallel.peers import Reach
from seesaw_ds.parallel.shared_memory import NodeSharedMapping
from seesaw_ds.parallel.transport import (
    BackendTransport,
    Message,
    Transport,
    choose_early_transport,
    choose_transport,
)
from staged import ThreadLane, staged_transport

SLOT_BYTES = 128
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_slots(monkeypatch):
    monkeypatch.setattr(host_transport, "MAX_SLOT_BYTES", SLOT_BYTES)


def make_transport(kind: str) -> Transport:
    if kind == "backend":
        return BackendTransport(dist.group.WORLD, CPU)
    return staged_transport(range(dist.get_world_size()), num_lanes=1 if kind == "staged, one queue" else 2)


def values(sender: int, receiver: int, index: int, numel: int) -> torch.Tensor:
    """What `sender` gives `receiver` in exchange `index`; no two are alike."""
    return torch.arange(numel, dtype=torch.float64) + 1e3 * (sender + 10 * receiver + 100 * index)


def numel_between(sender: int, receiver: int, index: int) -> int:
    """From nothing to more than a ring holds, hardly ever whole slots, different for every pair of ranks."""
    return (37 * sender + 101 * receiver + 53 * index) % 150


def start_exchange(transport: Transport, index: int) -> tuple[object, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Exchange `index` with all peers; returns its handle and (received, expected) tensors."""
    rank = dist.get_rank()
    sends: list[Message] = []
    receives: list[Message] = []
    expected = []
    for peer in range(dist.get_world_size()):
        if peer != rank:
            sends.append((values(rank, peer, index, numel_between(rank, peer, index)), peer))
            expected.append(values(peer, rank, index, numel_between(peer, rank, index)))
            receives.append((torch.full_like(expected[-1], -1), peer))
    return transport.exchange(sends, receives), [
        (tensor, want) for (tensor, _), want in zip(receives, expected, strict=True)
    ]


def exchange_in_flight(kind: str, num_in_flight: int, late_rank: int | None) -> None:
    transport = make_transport(kind)
    under_way = []
    for index in range(12):
        if dist.get_rank() == late_rank and index % 5 == 2:
            time.sleep(0.05)
        under_way.append(start_exchange(transport, index))
        if len(under_way) == num_in_flight:
            check(*under_way.pop(0))
    for handle, pairs in under_way:
        check(handle, pairs)


def check(handle, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    handle.wait()
    for received, expected in pairs:
        assert torch.equal(received, expected)


@pytest.mark.parametrize("late_rank", [None, 1])
@pytest.mark.parametrize("num_in_flight", [1, 3])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("kind", ["backend", "staged", "staged, one queue"])
def test_every_pair_gets_its_bytes(kind, world_size, num_in_flight, late_rank):
    run_ranks(world_size, exchange_in_flight, kind, num_in_flight, late_rank)


def skip_exchanges(kind: str) -> None:
    """Only ranks 0 and 1 have a part in even exchanges, 1 and 2 in odd ones; rank 0 only sends."""
    transport, rank = make_transport(kind), dist.get_rank()
    handles = []
    for index in range(10):
        sender, receiver = (0, 1) if index % 2 == 0 else (1, 2)
        numel = 90 + index
        if rank == sender:
            handles.append((transport.exchange([(values(sender, receiver, index, numel), receiver)], []), []))
        elif rank == receiver:
            landing = torch.empty(numel, dtype=torch.float64)
            handle = transport.exchange([], [(landing, sender)])
            handles.append((handle, [(landing, values(sender, receiver, index, numel))]))
    for handle, pairs in handles:
        check(handle, pairs)
    check(transport.exchange([], []), [])


@pytest.mark.parametrize("kind", ["backend", "staged", "staged, one queue"])
def test_ranks_may_leave_exchanges_out(kind):
    run_ranks(3, skip_exchanges, kind)


def exchange_before_the_peer() -> None:
    """Rank 1 starts only when rank 0 has started exchanges of several rings each."""
    transport, rank = make_transport("staged"), dist.get_rank()
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait(["rank 0 has started"])
    numel = 5 * NUM_SLOTS * SLOT_BYTES // 8 + 3
    landings = [torch.empty(numel, dtype=torch.float64) for _ in range(3)]
    handles = [
        transport.exchange([(values(rank, 1 - rank, index, numel), 1 - rank)], [(landing, 1 - rank)])
        for index, landing in enumerate(landings)
    ]
    store.set("rank 0 has started", "")
    for index, (handle, landing) in enumerate(zip(handles, landings, strict=True)):
        check(handle, [(landing, values(1 - rank, rank, index, numel))])


def test_exchange_returns_before_its_peer_has_begun():
    run_ranks(2, exchange_before_the_peer, timeout=20)


def send_two_tensors_and_dtypes() -> None:
    transport, rank = make_transport("staged"), dist.get_rank()
    grid = torch.arange(60, dtype=torch.bfloat16).view(6, 10)
    words = torch.arange(33, dtype=torch.int32)
    if rank == 0:
        transport.exchange([(grid[1:5], 1), (words, 1)], []).wait()
    else:
        target, other = torch.zeros(6, 10, dtype=torch.bfloat16), torch.zeros(33, dtype=torch.int32)
        transport.exchange([], [(target[2:], 0), (other, 0)]).wait()
        assert torch.equal(target[2:], grid[1:5])
        assert not target[:2].any()
        assert torch.equal(other, words)


def test_tensors_of_any_shape_and_dtype_for_one_peer_keep_their_order():
    run_ranks(2, send_two_tensors_and_dtypes)


class RecordingLane:
    """Notes waits and raised flags, and does nothing."""

    def __init__(self, name: str, notes: list[tuple[str, str, int]]) -> None:
        self._name, self._notes = name, notes
        self.copied: list[int] = []

    def follow(self) -> None:
        pass

    def wait(self, flag: torch.Tensor, count: int) -> None:
        self._notes.append((self._name, "wait", count))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.shape == source.shape
        self.copied.append(target.nbytes)

    def raise_flag(self, flag: torch.Tensor, count: int) -> None:
        self._notes.append((self._name, "raise", count))

    def end(self) -> threading.Event:
        return threading.Event()


def test_a_send_waits_only_for_receives_of_earlier_turns():
    """The order in which work is queued, from which it follows that shared hardware queues cannot lock ranks up."""
    mapping = NodeSharedMapping.create("order", required_bytes(2), dist.HashStore())
    notes: list[tuple[str, str, int]] = []
    transport = HostStagedTransport([4, 7], 4, mapping, RecordingLane("out", notes), RecordingLane("in", notes))
    num_pieces = NUM_SLOTS + 3
    tensor = torch.zeros(num_pieces * SLOT_BYTES, dtype=torch.uint8)
    transport.exchange([(tensor, 7)], [(tensor, 7)])
    expected = []
    for piece in range(num_pieces):
        if piece >= NUM_SLOTS:
            expected.append(("out", "wait", piece - NUM_SLOTS + 1))
        expected += [("out", "raise", piece + 1), ("in", "wait", piece + 1), ("in", "raise", piece + 1)]
    assert notes == expected


def test_small_tensors_share_pieces_and_those_that_follow_each_other_copies():
    mapping = NodeSharedMapping.create("shared pieces", required_bytes(2), dist.HashStore())
    notes: list[tuple[str, str, int]] = []
    outgoing, incoming = RecordingLane("out", notes), RecordingLane("in", notes)
    transport = HostStagedTransport([0, 1], 0, mapping, outgoing, incoming)
    size = SLOT_BYTES // 3
    chunks = torch.zeros(4 * size, dtype=torch.uint8).split(size)
    apart = [torch.zeros(size, dtype=torch.uint8) for _ in range(4)]
    large = torch.zeros(SLOT_BYTES + size, dtype=torch.uint8)
    transport.exchange([(part, 1) for part in (*chunks, large)], [(part, 1) for part in (*apart, large)])
    assert outgoing.copied == [3 * size, size, SLOT_BYTES, size]
    assert incoming.copied == [size, size, size, size, SLOT_BYTES, size]
    assert [note for note in notes if note[1] == "raise"] == [
        (name, "raise", piece) for piece in (1, 2, 3, 4) for name in ("out", "in")
    ]


def exchange_many_small_tensors() -> None:
    transport, rank = make_transport("staged"), dist.get_rank()
    for turn in range(3):
        numels = [1 + (7 * index + turn) % (SLOT_BYTES // 12) for index in range(200)]
        whole = values(rank, 1 - rank, turn, sum(numels))
        landing = torch.empty(2 * sum(numels), dtype=torch.float64)
        # What is sent lies side by side, what comes in with room between.
        starts = [2 * sum(numels[:index]) for index in range(len(numels))]
        targets = [landing[start : start + numel] for start, numel in zip(starts, numels, strict=True)]
        sends, receives = ([(tensor, 1 - rank) for tensor in tensors] for tensors in (whole.split(numels), targets))
        check(transport.exchange(sends, receives), [])
        assert torch.equal(torch.cat(targets), values(1 - rank, rank, turn, sum(numels)))


def test_many_small_tensors_arrive():
    run_ranks(2, exchange_many_small_tensors)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_rings_of_all_pairs_stay_within_a_gibibyte(monkeypatch, num_ranks):
    monkeypatch.setattr(host_transport, "MAX_SLOT_BYTES", 16 << 20)
    num_pairs = num_ranks * (num_ranks - 1)
    assert required_bytes(num_ranks) <= (1 << 30) + num_pairs * 128
    assert slot_bytes(num_ranks) == 16 << 20 if num_ranks <= 4 else 4 << 20 <= slot_bytes(num_ranks) < 16 << 20


def choose_on_cpu() -> tuple[str, bool]:
    group = dist.group.WORLD
    chosen = choose_transport(group, CPU)
    return type(chosen).__name__, choose_early_transport(chosen, group, CPU) is chosen


def test_the_process_group_carries_what_is_on_cpu():
    assert run_ranks(2, choose_on_cpu) == [("BackendTransport", True)] * 2


def choose_beside(between: Reach) -> str | None:
    """What runs beside steps where the transport chosen does not, as NCCL's; its bytes must arrive."""
    transport.reach = lambda group, device: between
    host_transport.stream_lanes = lambda device: (ThreadLane(), ThreadLane())
    group = dist.group.WORLD
    chosen = BackendTransport(group, CPU)
    chosen.runs_beside_steps = False
    early = choose_early_transport(chosen, group, CPU)
    if early is None:
        return None
    under_way = [start_exchange(each, index) for index, each in enumerate((early, early, chosen, early))]
    for handle, pairs in under_way:
        check(handle, pairs)
    return type(early).__name__


@pytest.mark.parametrize("between", [Reach.PEER, Reach.HOST])
def test_host_memory_carries_what_travels_beside_steps(between):
    assert run_ranks(2, choose_beside, between) == ["HostStagedTransport"] * 2


def test_nothing_runs_beside_steps_between_nodes_or_for_a_rank_alone():
    assert run_ranks(2, choose_beside, Reach.OTHER) == [None, None]
    assert run_ranks(1, choose_beside, Reach.PEER) == [None]
