"""Products and norms of decode steps by row_kernels.cu, against float32 torch; in captured steps too."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from seesaw_ds.model.ops.row_kernels import MOST_ROWS, RowKernels, make_row_kernels
from seesaw_ds.model.ops.torch_ops import TorchOps
from seesaw_ds.parallel.host_slots import HostSlots

pytestmark = pytest.mark.gpu(1, capability=(9, 0))

# (out, in) with fewer tiles than multiprocessors, a few units each, and with more: cut tiles before whole ones.
WEIGHTS = [(128, 128), (384, 1024), (5120, 8192), (8192, 4096), (28672, 8192), (41088, 1280), (57344, 256)]
ROWS = [1, 7, 8, 20, 36, 57, 64, 65, 92, MOST_ROWS]


def made(dtype: torch.dtype) -> RowKernels:
    """On the devices that they are for they have to be there."""
    kernels = make_row_kernels(dtype, torch.device("cuda"))
    assert kernels is not None and kernels.prepare(), "no nvcc, or the kernels do not compile"
    return kernels


def matrix(num_out: int, num_in: int, is_transposed: bool, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    weight = torch.randn(num_out, num_in, dtype=dtype, device="cuda") * num_in**-0.5
    return weight.t().contiguous().t() if is_transposed else weight


def rows(num_rows: int, size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(num_rows, size, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("is_transposed", [False, True], ids=["by rows", "by columns"])
@pytest.mark.parametrize("size", WEIGHTS, ids=str)
def test_products(size: tuple[int, int], is_transposed: bool, dtype: torch.dtype) -> None:
    weight = matrix(*size, is_transposed, dtype)
    kernels = made(dtype)
    for num_rows in ROWS:
        assert kernels.multiplies(num_rows, weight)
        x = rows(num_rows, size[1], dtype)
        product = kernels.multiply(x, weight)
        torch.testing.assert_close(product.float(), F.linear(x.float(), weight.float()), rtol=1e-2, atol=2e-2)
        assert torch.equal(kernels.multiply(x, weight), product), "parts are added up in one order"


@pytest.mark.parametrize("num_cells", [1, 2, 8])
def test_gated_products(num_cells: int) -> None:
    weight = matrix(28672, 2048, False)
    kernels = made(torch.bfloat16)
    assert kernels.gates(weight, num_cells)
    for num_rows in ROWS:
        x = rows(num_rows, 2048)
        expected = TorchOps().linear_act_and_mul(x.float(), weight.float(), num_cells)
        torch.testing.assert_close(kernels.multiply_gated(x, weight, num_cells).float(), expected, rtol=3e-2, atol=3e-2)


def test_layers_take_them_for_all_that_they_can_do() -> None:
    from seesaw_ds.model.ops.cuda_ops import CudaOps

    weight = matrix(512, 256, False)
    kernels = made(torch.bfloat16)
    ops = CudaOps(rows=kernels)
    x = rows(MOST_ROWS, 256)
    ops.tune_linear([MOST_ROWS, MOST_ROWS + 1], [weight])
    assert torch.equal(ops.linear(x, weight), kernels.multiply(x, weight))
    assert torch.equal(ops.linear_act_and_mul(x, weight, 2), kernels.multiply_gated(x, weight, 2))
    more = rows(MOST_ROWS + 1, 256)
    for y, bias in ((more, None), (x, rows(1, 512)[0]), (rows(256, MOST_ROWS).t(), None)):
        expected = F.linear(y.float(), weight.float(), bias if bias is None else bias.float())
        torch.testing.assert_close(ops.linear(y, weight, bias).float(), expected, rtol=1e-2, atol=2e-2)


class Alone:
    """A group of one rank, and memory that it shares with itself."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)


@pytest.mark.parametrize("is_transposed", [False, True], ids=["by rows", "by columns"])
@pytest.mark.parametrize("size", [(768, 1024), (5120, 8192), (8192, 4096)], ids=str)
def test_sum_over_one_rank(size: tuple[int, int], is_transposed: bool) -> None:
    weight = matrix(*size, is_transposed)
    kernels = made(torch.bfloat16)
    slots = HostSlots(Alone(), torch.device("cuda"), Alone(), 0)  # type: ignore[arg-type]
    for num_rows in ROWS:
        assert kernels.reduces(num_rows, weight, slots)
        x = rows(num_rows, size[1])
        expected = F.linear(x.float(), weight.float())
        for _ in range(3):
            total = kernels.multiply_and_reduce(x, weight, slots)
            torch.testing.assert_close(total.float(), expected, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("size", [1024, 8192, 16384])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(size: int, offset: float) -> None:
    kernels = made(torch.bfloat16)
    reference = TorchOps(norm_adds_one=offset == 1.0)
    for num_rows in ROWS:
        x, residual, weight = rows(num_rows, size), rows(num_rows, size), rows(1, size)[0]
        assert kernels.norms(x)
        norm, total = reference.add_rms_norm(x.float(), residual.float(), weight.float(), 1e-5)
        kernels.add_rms_norm(x, residual, weight, 1e-5, offset)
        torch.testing.assert_close(x.float(), norm, rtol=1e-2, atol=2e-2)
        torch.testing.assert_close(residual.float(), total, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("num_rows", [4, 36, 64, MOST_ROWS])
def test_kernels_that_start_early_wait_for_each_other(num_rows: int) -> None:
    """A chain of them, each of which reads what the one before writes, has the same bits whether it is captured and
    replayed, kernels side by side, or goes on only when a kernel has ended.
    """
    up, down, weight = matrix(7168, 2048, False), matrix(2048, 3584, True), rows(1, 2048)[0]
    kernels = made(torch.bfloat16)
    x, residual = rows(num_rows, 2048), rows(num_rows, 2048)

    def step(is_apart: bool) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, total = x.clone(), residual.clone()
        for _ in range(20):
            kernels.add_rms_norm(hidden, total, weight, 1e-5, 0.0)
            if is_apart:
                torch.cuda.synchronize()
            gated = kernels.multiply_gated(hidden, up, 2)
            if is_apart:
                torch.cuda.synchronize()
            hidden = kernels.multiply(gated, down)
            if is_apart:
                torch.cuda.synchronize()
        return hidden, total

    expected = step(is_apart=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(is_apart=False)
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    for result, value in zip(results, expected, strict=True):
        assert value.isfinite().all()
        assert torch.equal(result, value)
