"""Memory that the processes of one node share, without a name that could outlive them.

The creator makes an anonymous file in memory (memfd) and tells the others its process id and descriptor through a
torch.distributed store; they open it under /proc. The kernel frees it with the last process that maps it, however
that process ends.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import Store

from seesaw_ds.errors import UserError
from seesaw_ds.parallel.device import is_cuda

logger = logging.getLogger(__name__)

_MADV_POPULATE_WRITE = 23
_POPULATE_CHUNK_BYTES = 64 << 20
_REGISTER_CHUNK_BYTES = 64 << 30  # at most: drivers refuse one registration of 512 GiB
_REGISTER_FLAGS = 1 | 2  # portable (every context of the process) and mapped (kernels may read it)
_GIB = 1 << 30


class NodeSharedMapping:
    """`nbytes` of zeroed memory, mapped into every process of the node that created or attached it.

    Views made by `tensor` keep the memory mapped until they are gone, also after `close`.
    """

    def __init__(self, name: str, fd: int, nbytes: int) -> None:
        self.name = name
        self.nbytes = nbytes
        self._fd = fd
        self._registered: list[int] = []
        try:
            memory = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            os.close(fd)
            raise _not_enough(name, nbytes, error) from error
        self.buffer = torch.frombuffer(memory, dtype=torch.uint8)

    @classmethod
    def create(cls, name: str, nbytes: int, store: Store) -> NodeSharedMapping:
        """Make the mapping and publish its address in `store` under `name`, which is used once per node.

        Raises UserError when the kernel or a memory limit refuses `nbytes`; warns when less is free at the moment.
        """
        assert nbytes > 0, (name, nbytes)
        _check_memory(name, nbytes)
        fd = os.memfd_create(_file_name(name))
        try:
            os.ftruncate(fd, nbytes)
        except OSError as error:
            os.close(fd)
            raise _not_enough(name, nbytes, error) from error
        mapping = cls(name, fd, nbytes)
        store.set(_store_key(name), f"{os.getpid()}:{fd}")
        return mapping

    @classmethod
    def attach(cls, name: str, store: Store) -> NodeSharedMapping:
        """Map what another process of this node created; waits for it as long as the store's timeout.

        Raises UserError when this process may not see the creator's.
        """
        pid, creator_fd = store.get(_store_key(name)).decode().split(":")
        path = f"/proc/{pid}/fd/{creator_fd}"
        try:
            if not os.readlink(path).startswith(f"/memfd:{_file_name(name)} "):
                raise FileNotFoundError(errno.ENOENT, "is another file")
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(
                f"mapping={name}: {path} cannot be opened ({error.strerror}); the processes of a node share memory "
                f"through /proc and must run as one user in one process namespace; start them in the same container"
            ) from error
        return cls(name, fd, os.fstat(fd).st_size)

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous CPU tensor of `shape` over the bytes from `offset` on (a multiple of the item size)."""
        stop = offset + math.prod(shape) * dtype.itemsize
        assert 0 <= offset <= stop <= self.nbytes, (self.name, offset, stop, self.nbytes)
        assert offset % dtype.itemsize == 0, (self.name, offset, dtype)
        return self.buffer[offset:stop].view(dtype).view(*shape)

    def populate(self, num_threads: int | None = None) -> None:
        """Have the kernel provide every page now, on many threads: one thread alone takes 3 s for 8 GiB.

        One process does it, before anything is written: where the kernel lacks the call, zeros are written.
        Raises UserError when there is not enough memory.
        """
        with ThreadPoolExecutor(num_threads or min(32, os.cpu_count() or 1)) as threads:
            # list() so that an error in a thread is raised here
            list(threads.map(self._populate_chunk, self._chunks(_POPULATE_CHUNK_BYTES)))

    def register_for_dma(self, unit_bytes: int) -> None:
        """Lock the pages and make them known to CUDA, so that this process's copies run at the link's full rate.

        Large mappings are registered in several parts, and CUDA refuses a copy that lies in two: parts end at
        multiples of `unit_bytes`. Takes about 0.1 s per GB. Raises UserError when the driver refuses.
        """
        assert not self._registered, f"mapping {self.name} is registered already"
        cudart = torch.cuda.cudart()
        for start, size in self._chunks(registered_part_bytes(unit_bytes)):
            result = cudart.cudaHostRegister(self.buffer.data_ptr() + start, size, _REGISTER_FLAGS)
            if result != cudart.cudaError.success:
                self._unregister()
                raise UserError(
                    f"mapping={self.name}: CUDA cannot lock {self.nbytes / _GIB:.1f} GiB of host memory "
                    f"(cudaHostRegister: {result}); the memory must be free and within the limit on locked memory; "
                    f"lower kv_offloading_size, or raise the limit (ulimit -l unlimited)"
                )
            self._registered.append(start)

    def close(self) -> None:
        """Undo the registration and let go of the memory. Copies to and from it must have ended."""
        self._unregister()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def _unregister(self) -> None:
        for start in self._registered:
            torch.cuda.cudart().cudaHostUnregister(self.buffer.data_ptr() + start)
        self._registered.clear()

    def _chunks(self, size: int) -> Iterator[tuple[int, int]]:
        for start in range(0, self.nbytes, size):
            yield start, min(size, self.nbytes - start)

    def _populate_chunk(self, chunk: tuple[int, int]) -> None:
        start, size = chunk
        address = self.buffer.data_ptr() + start
        code = errno.EAGAIN
        while code in (errno.EAGAIN, errno.EINTR):
            code = _madvise(address, size, _MADV_POPULATE_WRITE)
        if code == errno.EINVAL:
            ctypes.memset(address, 0, size)
        elif code:
            raise _not_enough(self.name, self.nbytes, OSError(code, os.strerror(code)))


def registered_part_bytes(unit_bytes: int) -> int:
    """The size in which a mapping is registered: whole pages and whole units."""
    step = math.lcm(unit_bytes, mmap.PAGESIZE)
    return max(1, _REGISTER_CHUNK_BYTES // step) * step


def share_mapping(
    name: str, nbytes: int, group: ProcessGroup, device: torch.device, unit_bytes: int = 1
) -> NodeSharedMapping:
    """One mapping for all ranks of `group`, which are of one node and all call this; on CUDA it is locked for DMA.

    What is copied at once lies within one of the units of `unit_bytes` that follow each other from the start, or
    within the first 64 GiB. A group whose first rank is the same uses `name` once. Raises UserError when the memory
    is refused.
    """
    return begin_mapping(name, nbytes, group, device, unit_bytes).end()


def begin_mapping(
    name: str, nbytes: int, group: ProcessGroup, device: torch.device, unit_bytes: int = 1
) -> BegunMapping:
    """Begin `share_mapping`: on CUDA the memory is populated beside what this process does until `end`."""
    first = dist.get_process_group_ranks(group)[0]
    name = f"{name}-{first}"
    store = dist.distributed_c10d._get_default_store()
    is_first = dist.get_rank() == first
    mapping = NodeSharedMapping.create(name, nbytes, store) if is_first else NodeSharedMapping.attach(name, store)
    populated = None
    if is_cuda(device) and is_first:
        thread = ThreadPoolExecutor(1)
        populated = thread.submit(mapping.populate)
        thread.shutdown(wait=False)
    return BegunMapping(mapping, populated, group, device, unit_bytes)


@dataclass(frozen=True)
class BegunMapping:
    """A mapping that all ranks of `group` have, and that one of them may still populate."""

    mapping: NodeSharedMapping
    populated: Future[None] | None
    group: ProcessGroup
    device: torch.device
    unit_bytes: int

    def end(self) -> NodeSharedMapping:
        """Wait until it is populated, and lock it. Collective; raises UserError when the memory is refused."""
        if is_cuda(self.device):
            if self.populated is not None:
                self.populated.result()
            dist.barrier(group=self.group)
            self.mapping.register_for_dma(self.unit_bytes)
        return self.mapping


def _madvise(address: int, size: int, advice: int) -> int:
    """0, or the error number. Other threads run meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(advice))
    return ctypes.get_errno() if failed else 0


def _file_name(name: str) -> str:
    return f"seesaw-{name}"


def _store_key(name: str) -> str:
    return f"seesaw/mapping/{name}"


def _not_enough(name: str, nbytes: int, error: OSError) -> UserError:
    return UserError(
        f"mapping={name}: {nbytes / _GIB:.1f} GiB of shared host memory were refused ({error.strerror}); "
        f"host memory must hold the KV pool and, with weight_reshard=host, a copy of the weights; "
        f"lower kv_offloading_size, or set weight_reshard=exchange"
    )


def _check_memory(name: str, nbytes: int) -> None:
    """Refuse what can never fit; warn of what does not fit now (memory may be reclaimed, a VM's may grow)."""
    limit = _cgroup_limit_bytes()
    if limit is not None and nbytes > limit:
        raise _not_enough(name, nbytes, OSError(errno.ENOMEM, f"the limit of this cgroup is {limit / _GIB:.1f} GiB"))
    available = _available_bytes()
    if nbytes > available:
        logger.warning(
            "mapping %s of %.1f GiB is larger than the %.1f GiB of host memory available now; "
            "if the processes are killed while it fills, lower kv_offloading_size",
            name,
            nbytes / _GIB,
            available / _GIB,
        )


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable line; a Linux kernel from 3.14 on is needed")


def _cgroup_limit_bytes() -> int | None:
    """The smallest memory limit of this process's cgroup and those above it; None when there is none."""
    limits = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, file_name = "/sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            root, file_name = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        relative = PurePosixPath(path.lstrip("/"))
        for folder in (relative, *relative.parents):
            limit_file = Path(root) / folder / file_name
            if limit_file.is_file():
                text = limit_file.read_text().strip()
                limits.extend([int(text)] if text.isdigit() else [])
    return min(limits, default=None)
