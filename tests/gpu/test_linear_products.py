"""Linear products by the algorithms that cuBLASLt proposes, and by the fastest of them in captured steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seesaw_ds.model.ops import products
from seesaw_ds.model.ops.cublaslt import proposed_products
from seesaw_ds.model.ops.products import TunedProducts

pytestmark = pytest.mark.gpu(1)

ROWS = [1, 20, 36, 112]


def matrices(num_out: int, num_in: int, is_transposed: bool, dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(num_out, num_in, dtype=dtype, device="cuda") * num_in**-0.5
    return weight.t().contiguous().t() if is_transposed else weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_transposed", [False, True], ids=["by rows", "by columns"])
@pytest.mark.parametrize("num_rows", ROWS)
def test_every_proposal_is_the_product(num_rows: int, is_transposed: bool, dtype: torch.dtype) -> None:
    weight = matrices(1280, 4096, is_transposed, dtype)
    x = torch.randn(num_rows, 4096, dtype=dtype, device="cuda")
    expected = F.linear(x.float(), weight.float())
    proposed = proposed_products(num_rows, weight)
    assert proposed
    for product in proposed:
        assert product.runs(x, weight)
        torch.testing.assert_close(product(x, weight).float(), expected, rtol=2e-2, atol=2e-2)


def test_rows_that_are_not_aligned_are_torchs() -> None:
    weight = torch.randn(1280, 4100, dtype=torch.bfloat16, device="cuda")
    assert not proposed_products(8, weight)


def test_weights_may_lie_at_any_multiple_of_16_bytes() -> None:
    memory = torch.randn(1280 * 4096 + 8, dtype=torch.bfloat16, device="cuda") * 4096**-0.5
    weight = memory[8:].view(1280, 4096)
    x = torch.randn(36, 4096, dtype=torch.bfloat16, device="cuda")
    for product in proposed_products(36, weight):
        torch.testing.assert_close(
            product(x, weight).float(), F.linear(x.float(), weight.float()), rtol=2e-2, atol=2e-2
        )


def test_a_captured_step_has_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_LEAST_GAIN", -1.0)  # some algorithm is taken for each size
    weights = [matrices(1280, 4096, is_transposed, torch.bfloat16) for is_transposed in (False, True)]
    linear = TunedProducts()
    linear.tune((rows, weight) for rows in [*ROWS, products.MOST_ROWS + 1] for weight in weights)
    assert set(linear._products) == set(ROWS)
    assert sum(map(len, linear._products.values())) == len(ROWS) * len(weights)
    for num_rows in ROWS:
        x = torch.randn(num_rows, 4096, dtype=torch.bfloat16, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [linear(x, weight) for weight in weights]
        x.normal_()
        graph.replay()
        for weight, result in zip(weights, results, strict=True):
            torch.testing.assert_close(result.float(), F.linear(x.float(), weight.float()), rtol=2e-2, atol=2e-2)
