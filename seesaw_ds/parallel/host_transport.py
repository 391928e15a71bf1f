"""Transfers through host memory by the copy engines: for what travels beside steps, and devices that cannot reach each
other's memory.

Each ordered pair of ranks has a ring of slots in memory that the node shares. The sender copies pieces into slots and
the receiver copies them out, each on a lane of its own: an ordered queue, on CUDA a stream. Both directions of
the host link are busy then. A piece is as many small tensors as a slot takes, or a part of a large one. Two flags count
the pieces that have been written and read. With four slots, piece n goes

    sender      outgoing lane    wait: read >= n - 3        slot n mod 4 <- piece     written <- n + 1
    receiver    incoming lane    wait: written >= n + 1     piece <- slot n mod 4     read <- n + 1

Streams wait for flags and raise them by themselves (stream memory operations). So `exchange` only queues work and no
thread of the host has to keep up with the copies; and unlike a kernel that spins, a wait takes no multiprocessor.

A device has fewer hardware queues than a process has streams, so a stream that waits may hold up another one, even
its own rank's other lane. That cannot lock ranks up, for every wait is for something that comes earlier in one order
that all ranks keep: exchange by exchange, in an exchange first every peer's first piece, then every second one, and in
such a turn sends before receives. A receive waits for the send of its own turn, a send for a receive of a turn before.
Were every rank to do all its work in that order on one queue, what comes first of all that is left could always go on.

It costs time, though. Both lanes on one queue copy in turn, never both ways at once: two thirds of the rate. A lane on
the queue of the current stream waits for its kernels. `stream_lanes` finds streams that do not hold each other up.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import permutations, zip_longest
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from deepspeed.accelerator import get_accelerator

from seesaw_ds.parallel.device import new_stream, on_stream, record_event, wait_event
from seesaw_ds.parallel.driver import check, copy_call, find_call
from seesaw_ds.parallel.shared_memory import NodeSharedMapping
from seesaw_ds.parallel.transport import Handle, Message, Waitable

if TYPE_CHECKING:
    from seesaw_ds.parallel.device import Stream

logger = logging.getLogger(__name__)

NUM_SLOTS = 4
MAX_SLOT_BYTES = 16 << 20  # half a millisecond at the link's rate, some fifty times what queueing a piece costs
_MAX_RINGS_BYTES = 1 << 30  # of all pairs together
LINE_BYTES = 64  # each flag has a cache line of its own
_LINE_FLAGS = LINE_BYTES // torch.int32.itemsize
_MAX_LANES_TRIED = 16
_PROBE_SECONDS = 0.01  # a thousand times what the probe's work takes
_PROBE_BYTES = 64 << 10  # small copies to the device may be made in the command itself, by no copy engine
_T = TypeVar("_T")
Piece = list[torch.Tensor]  # bytes that a slot takes, one tensor after the other
_WAIT_UNTIL_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ
_WRITE_AFTER_FENCE = 0  # CU_STREAM_WRITE_VALUE_DEFAULT: what the stream did before is visible to all first
_STREAM_OPERATION = (
    "a stream memory operation, by which ranks signal to each other through host memory; 801 means that this driver "
    "has none: a driver for CUDA 12 or later is needed"
)


class Lane(Protocol):
    """Does what it is given in order, beside the current stream. A flag is an int32 tensor of one element."""

    def follow(self) -> None:
        """Start what comes next when the current stream has come this far."""

    def wait(self, flag: torch.Tensor, count: int) -> None:
        """Go on when the flag has reached `count`."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy between the device and the rings."""

    def raise_flag(self, flag: torch.Tensor, count: int) -> None:
        """Set the flag, once all copies before are complete."""

    def end(self) -> Waitable:
        """The end of all that has been given so far."""


class HostStagedTransport:
    """A `Transport` over `ranks` (global numbers) of one node; `rank` is this one's.

    `mapping` has `required_bytes` zeroed bytes, is shared by these ranks and used by nothing else.
    """

    runs_beside_steps = True

    def __init__(
        self, ranks: Sequence[int], rank: int, mapping: NodeSharedMapping, outgoing: Lane, incoming: Lane
    ) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        size = slot_bytes(len(ranks))
        offsets = {pair: index * ring_bytes(size) for index, pair in enumerate(permutations(ranks, 2))}
        rings = {pair: Ring(mapping, offset, size) for pair, offset in offsets.items() if rank in pair}
        self._rings_to = {receiver: ring for (sender, receiver), ring in rings.items() if sender == rank}
        self._rings_from = {sender: ring for (sender, receiver), ring in rings.items() if receiver == rank}

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Handle:
        """See `Transport`."""
        self._outgoing.follow()
        self._incoming.follow()
        # This order is what the module's text relies on.
        turns = zip_longest(_turns(sends, self._rings_to), _turns(receives, self._rings_from), fillvalue=())
        for outgoing, incoming in turns:
            for peer, piece in outgoing:
                self._rings_to[peer].write(self._outgoing, piece)
            for peer, piece in incoming:
                self._rings_from[peer].read(self._incoming, piece)
        return Handle([self._outgoing.end(), self._incoming.end()], [tensor for tensor, _ in (*sends, *receives)])


def _turns(messages: Sequence[Message], rings: Mapping[int, Ring]) -> list[list[tuple[int, Piece]]]:
    """Messages as pieces of a slot or less: (peer, piece) for each peer's first one, its second one, ..."""
    tensors: dict[int, list[torch.Tensor]] = {}
    for tensor, peer in messages:
        tensors.setdefault(peer, []).append(tensor)
    pieces = {peer: rings[peer].pieces(its) for peer, its in tensors.items()}
    turns = zip_longest(*pieces.values())
    return [[(peer, piece) for peer, piece in zip(pieces, turn, strict=True) if piece is not None] for turn in turns]


class Ring:
    """The slots from one rank to another, seen from one of its ends. Both ends count pieces alike.

    It lies in `mapping` from byte `offset` on, and takes `ring_bytes` of it.
    """

    def __init__(self, mapping: NodeSharedMapping, offset: int, slot_bytes: int, num_slots: int = NUM_SLOTS) -> None:
        self._slot_bytes = slot_bytes
        self._slots = mapping.tensor(offset, (num_slots, slot_bytes), torch.uint8)
        flags = mapping.tensor(offset + self._slots.numel(), (2, _LINE_FLAGS), torch.int32)
        self._written = flags[0, :1]
        self._read = flags[1, :1]
        self._num_pieces = 0

    def pieces(self, tensors: Sequence[torch.Tensor]) -> list[Piece]:
        """The bytes of contiguous tensors, cut and put together to what slots hold: alike for tensors of alike sizes.

        A piece costs a wait and a flag beside its copies, so small tensors share one.
        """
        pieces: list[Piece] = []
        room = 0
        for tensor in tensors:
            flat = (tensor if tensor.dim() == 1 else tensor.view(-1)).view(torch.uint8)
            for part in (flat,) if flat.nbytes <= self._slot_bytes else flat.split(self._slot_bytes):
                if not pieces or part.nbytes > room:
                    pieces.append([])
                    room = self._slot_bytes
                _append(pieces[-1], part)
                room -= part.nbytes
        return pieces

    def write(self, lane: Lane, piece: Piece) -> None:
        """Put the next piece into the ring, from the device."""
        num_slots = len(self._slots)
        if self._num_pieces >= num_slots:
            lane.wait(self._read, self._num_pieces + 1 - num_slots)
        for part, place in zip(piece, self._places(piece), strict=True):
            lane.copy(place, part)
        self._num_pieces += 1
        lane.raise_flag(self._written, self._num_pieces)

    def read(self, lane: Lane, piece: Piece) -> None:
        """Take the next piece out of the ring, of as many bytes as the sender gave."""
        lane.wait(self._written, self._num_pieces + 1)
        for part, place in zip(piece, self._places(piece), strict=True):
            lane.copy(part, place)
        self._num_pieces += 1
        lane.raise_flag(self._read, self._num_pieces)

    def _places(self, piece: Piece) -> Iterator[torch.Tensor]:
        """Of the next slot, what each of the piece's tensors takes."""
        slot = self._slots[self._num_pieces % len(self._slots)]
        start = 0
        for part in piece:
            yield slot[start : start + part.nbytes]
            start += part.nbytes


def _append(piece: Piece, part: torch.Tensor) -> None:
    """Add bytes to a piece, as one tensor with those that they follow in memory: one copy takes both."""
    if piece:
        last = piece[-1]
        is_same_memory = last.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
        if is_same_memory and last.data_ptr() + last.nbytes == part.data_ptr():
            piece[-1] = last.as_strided((last.nbytes + part.nbytes,), (1,))
            return
    piece.append(part)


class StreamLane:
    """A CUDA stream of the lowest priority. The rings must be registered with CUDA."""

    def __init__(self, device: torch.device) -> None:
        stream = new_stream(device)
        assert stream is not None, f"{device} has no streams"
        self.device = device
        self._stream = stream
        self._wait_value = _stream_operation("cuStreamWaitValue32_v2")
        self._write_value = _stream_operation("cuStreamWriteValue32_v2")
        self._memcpy = copy_call()

    def follow(self) -> None:
        """See `Lane`."""
        event = record_event(self.device)
        with on_stream(self._stream):
            wait_event(event)

    def wait(self, flag: torch.Tensor, count: int) -> None:
        """See `Lane`."""
        stream = self._stream.cuda_stream
        check(self._wait_value(stream, flag.data_ptr(), count, _WAIT_UNTIL_AT_LEAST), _STREAM_OPERATION)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Lane`."""
        # Not through torch, which takes the host four times as long: pieces may be small and many.
        assert target.is_contiguous() and source.is_contiguous() and target.nbytes == source.nbytes
        stream = self._stream.cuda_stream
        check(self._memcpy(target.data_ptr(), source.data_ptr(), target.nbytes, stream), "a copy to or from the host")

    def raise_flag(self, flag: torch.Tensor, count: int) -> None:
        """See `Lane`."""
        stream = self._stream.cuda_stream
        check(self._write_value(stream, flag.data_ptr(), count, _WRITE_AFTER_FENCE), _STREAM_OPERATION)

    def end(self) -> Waitable:
        """See `Lane`."""
        with on_stream(self._stream):
            event = record_event(self.device)
        assert event is not None
        return event


_lanes_in_use: list[StreamLane] = []


def stream_lanes(device: torch.device) -> tuple[StreamLane, StreamLane]:
    """Two lanes, outgoing and incoming, that hold up neither each other nor the current stream, if there are such.

    Nor do they hold up those that the process was given before: an exchange may go on beside a pipeline's transfers.
    The device must be idle, and becomes idle. Warns when there are none.
    """
    current = get_accelerator().current_stream()

    def holds_up(lane: StreamLane, chosen: Sequence[StreamLane]) -> bool:
        return any(
            _holds_up(lane, stream) for stream in (current, *(other._stream for other in (*_lanes_in_use, *chosen)))
        )

    outgoing, incoming = pick_apart(lambda: StreamLane(device), holds_up, num_wanted=2)
    _lanes_in_use.extend((outgoing, incoming))
    return outgoing, incoming


def pick_apart(make: Callable[[], _T], holds_up: Callable[[_T, Sequence[_T]], bool], num_wanted: int) -> list[_T]:
    """The first `num_wanted` things made for which ``holds_up(thing, those chosen before)`` is false.

    Warns, and fills up with what was made first, when too few of many are.
    """
    chosen: list[_T] = []
    refused: list[_T] = []
    while len(chosen) < num_wanted and len(chosen) + len(refused) < _MAX_LANES_TRIED:
        thing = make()
        (refused if holds_up(thing, chosen) else chosen).append(thing)
    if len(chosen) < num_wanted:
        logger.warning(
            "transfers through host memory will be slow: of %d streams too few have a hardware queue of their own; "
            "set CUDA_DEVICE_MAX_CONNECTIONS=32",
            _MAX_LANES_TRIED,
        )
    elif refused:
        logger.info("transfers through host memory: passed over %d stream(s) that hold up others", len(refused))
    return [*chosen, *refused][:num_wanted]


def _holds_up(lane: StreamLane, stream: Stream) -> bool:
    """Whether `stream` gets nothing done while `lane` waits for a flag."""
    flag = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    on_host = [torch.empty(_PROBE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    on_device = [tensor.to(lane.device) for tensor in on_host]

    def work() -> None:
        with on_stream(stream):
            on_device[0].copy_(on_host[0], non_blocking=True)
            on_device[0].add_(1)
            on_host[0].copy_(on_device[0], non_blocking=True)

    work()  # a stream's first work takes longer
    lane.copy(on_device[1], on_host[1])
    lane.copy(on_host[1], on_device[1])
    get_accelerator().synchronize()
    lane.copy(on_host[1], on_device[1])  # waits stand between copies in a transfer
    lane.wait(flag, 1)
    lane.copy(on_device[1], on_host[1])
    work()
    with on_stream(stream):
        end = record_event(lane.device)
    assert end is not None
    deadline = time.monotonic() + _PROBE_SECONDS
    while not (is_done := end.query()) and time.monotonic() < deadline:
        time.sleep(0)
    flag.fill_(1)
    get_accelerator().synchronize()
    return not is_done


def slot_bytes(num_ranks: int) -> int:
    """The largest piece: less for many ranks, which have many rings."""
    num_slots = NUM_SLOTS * num_ranks * (num_ranks - 1)
    return min(MAX_SLOT_BYTES, _MAX_RINGS_BYTES // num_slots) // LINE_BYTES * LINE_BYTES


def required_bytes(num_ranks: int) -> int:
    """Size of the mapping: a ring for each ordered pair of ranks."""
    return num_ranks * (num_ranks - 1) * ring_bytes(slot_bytes(num_ranks))


def ring_bytes(slot_bytes: int, num_slots: int = NUM_SLOTS) -> int:
    """Size of a ring whose slots are multiples of 64 bytes."""
    return num_slots * slot_bytes + 2 * LINE_BYTES


def _stream_operation(name: str) -> Callable[..., int]:
    """(stream, address, value, flags) -> CUresult."""
    operation = find_call(name, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)
    if operation is None:
        raise RuntimeError(f"{name}: CUDA has not got {_STREAM_OPERATION}")
    return operation
