from __future__ import annotations

import gc
import logging
import mmap
import os

import pytest
import torch
import torch.distributed as dist

from seesaw_ds.errors import UserError
from seesaw_ds.parallel import shared_memory
from seesaw_ds.parallel.shared_memory import NodeSharedMapping, registered_part_bytes


@pytest.fixture
def store():
    return dist.HashStore()


def mapped_names() -> list[str]:
    with open("/proc/self/maps") as maps:
        return [line.split("/memfd:seesaw-")[1].split()[0] for line in maps if "/memfd:seesaw-" in line]


def test_attached_mapping_sees_what_the_creator_writes(store):
    creator = NodeSharedMapping.create("pool", 4096, store)
    other = NodeSharedMapping.attach("pool", store)
    assert other.nbytes == creator.nbytes == 4096
    assert not creator.buffer.any()
    creator.tensor(64, (2, 3), torch.float32).copy_(torch.arange(6.0).view(2, 3))
    assert other.tensor(64, (2, 3), torch.float32).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert other.tensor(64, (6,), torch.float32)[5] == 5
    other.tensor(0, (4,), torch.int64).fill_(7)
    assert creator.tensor(0, (4,), torch.int64).tolist() == [7, 7, 7, 7]
    creator.close()
    assert other.tensor(0, (1,), torch.int64).item() == 7
    other.close()


def test_memory_goes_with_its_last_view(store):
    mapping = NodeSharedMapping.create("views", 4096, store)
    view = mapping.tensor(0, (4,), torch.int32)
    mapping.close()
    mapping.close()
    view.fill_(3)
    assert "views" in mapped_names()
    del view
    gc.collect()
    assert "views" not in mapped_names()


def test_tensor_outside_the_mapping_is_our_bug(store):
    mapping = NodeSharedMapping.create("bounds", 100, store)
    with pytest.raises(AssertionError):
        mapping.tensor(0, (26,), torch.float32)
    with pytest.raises(AssertionError):
        mapping.tensor(2, (4,), torch.float32)
    assert mapping.tensor(100, (0, 3), torch.float32).shape == (0, 3)
    mapping.close()


@pytest.mark.parametrize("num_threads", [1, 4])
def test_populate_makes_every_page_resident(store, monkeypatch, num_threads):
    monkeypatch.setattr(shared_memory, "_POPULATE_CHUNK_BYTES", 1 << 20)
    name, nbytes = f"resident-{num_threads}", (8 << 20) + 5
    mapping = NodeSharedMapping.create(name, nbytes, store)
    assert resident_bytes(name) == 0
    mapping.populate(num_threads)
    assert resident_bytes(name) >= nbytes
    assert not mapping.buffer.any()
    mapping.close()


def test_populate_writes_zeros_where_the_kernel_lacks_the_call(store, monkeypatch):
    monkeypatch.setattr(shared_memory, "_MADV_POPULATE_WRITE", 9999)
    mapping = NodeSharedMapping.create("old-kernel", 1 << 20, store)
    mapping.populate()
    assert resident_bytes("old-kernel") >= 1 << 20
    mapping.close()


def resident_bytes(name: str) -> int:
    """Bytes of the mapping that have a page behind them, by /proc/self/smaps."""
    with open("/proc/self/smaps") as smaps:
        lines = iter(smaps)
        for line in lines:
            if f"/memfd:seesaw-{name} " in line:
                return next(int(field.split()[1]) * 1024 for field in lines if field.startswith("Rss:"))
    raise AssertionError(f"{name} is not mapped")


def test_size_beyond_the_kernel_is_refused_with_the_mend(store):
    with pytest.raises(UserError, match=r"mapping=huge: .* GiB .* refused .* lower kv_offloading_size"):
        NodeSharedMapping.create("huge", 1 << 62, store)


def test_size_beyond_the_cgroup_limit_is_refused(store, monkeypatch):
    monkeypatch.setattr(shared_memory, "_cgroup_limit_bytes", lambda: 1 << 20)
    with pytest.raises(UserError, match=r"limit of this cgroup is 0\.0 GiB"):
        NodeSharedMapping.create("limited", 2 << 20, store)


def test_size_beyond_the_available_memory_is_a_warning(store, monkeypatch, caplog):
    monkeypatch.setattr(shared_memory, "_available_bytes", lambda: 1 << 10)
    with caplog.at_level(logging.WARNING):
        NodeSharedMapping.create("large", 1 << 20, store).close()
    assert "larger than the 0.0 GiB of host memory available" in caplog.text


def test_memory_probes_read_this_machine():
    assert shared_memory._available_bytes() > 0
    limit = shared_memory._cgroup_limit_bytes()
    assert limit is None or limit > 0


def test_attach_to_a_process_out_of_sight_says_the_rule(store):
    mapping = NodeSharedMapping.create("away", 4096, store)
    with open("/dev/null") as other_file:
        store.set("seesaw/mapping/away", f"{os.getpid()}:{other_file.fileno()}")
        with pytest.raises(UserError, match="must run as one user in one process namespace"):
            NodeSharedMapping.attach("away", store)
    mapping.close()


@pytest.mark.parametrize("unit_bytes", [1, 5 << 20, 4096 * 3, 327_680, 1000])
def test_no_unit_is_registered_in_two_parts(unit_bytes: int) -> None:
    part_bytes = registered_part_bytes(unit_bytes)
    assert part_bytes % unit_bytes == 0
    assert part_bytes % mmap.PAGESIZE == 0
    assert (64 << 30) - 1000 * mmap.PAGESIZE * unit_bytes < part_bytes <= 64 << 30


def test_a_unit_larger_than_a_part_is_registered_whole() -> None:
    assert registered_part_bytes(70 << 30) == 70 << 30
