"""What connects a worker with the others: all-reduces, transports for changes of layout, pipeline links.

Every function is collective over the replica.
"""

from __future__ import annotations

import torch

from seesaw_ds.config import RunConfig
from seesaw_ds.layout import Phase
from seesaw_ds.parallel.all_reduce import AllReduce, BackendAllReduce, choose_all_reduce
from seesaw_ds.parallel.groups import ParallelState
from seesaw_ds.parallel.links import PipelineLink, choose_link
from seesaw_ds.parallel.transport import BackendTransport, Transport, choose_early_transport, choose_transport
from seesaw_ds.plan.memory import most_step_tokens
from seesaw_ds.reshard.plan import plan_reshard
from seesaw_ds.worker.slots import DecodingSlots, TokenFeedback


def make_all_reduces(
    run: RunConfig, state: ParallelState, has_graphs: bool, device: torch.device
) -> dict[Phase, AllReduce]:
    """One for each phase; one for both with a static layout."""
    decode = choose_all_reduce(state[Phase.DECODE].tp, device, has_graphs)
    if run.layout_pair.is_static:
        prefill = decode
    elif run.may_stay:
        prefill = choose_all_reduce(state[Phase.PREFILL].tp, device, has_graphs)
    else:
        prefill = BackendAllReduce(state[Phase.PREFILL].tp)
    return {Phase.PREFILL: prefill, Phase.DECODE: decode}


def make_transport(run: RunConfig, state: ParallelState, device: torch.device) -> Transport:
    """For weights and KV that change layout."""
    if run.layout_pair.is_static:  # nothing will travel
        return BackendTransport(state.replica, device)
    return choose_transport(state.replica, device)


def make_early_transport(
    run: RunConfig, state: ParallelState, num_layers: int, transport: Transport, device: torch.device
) -> Transport | None:
    """For weights that come early; None where none can. Its locked memory is there before memory is measured.

    `transport` is the one for what does not come early.
    """
    if run.layout_pair.is_static or run.weight_reshard != "exchange":
        return None
    if not plan_reshard(run.layout_pair, num_layers).rounds(Phase.DECODE):
        return None
    return choose_early_transport(transport, state.replica, device)


def make_links(
    run: RunConfig, state: ParallelState, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> dict[Phase, PipelineLink]:
    """One for each phase. A static layout has one pipeline: its steps of both kinds follow each other on one link."""
    num_tokens = most_step_tokens(run)
    prefill = choose_link(state[Phase.PREFILL], state.replica, hidden_size, num_tokens, dtype, device)
    if run.layout_pair.is_static:
        return dict.fromkeys(Phase, prefill)
    decode = choose_link(state[Phase.DECODE], state.replica, hidden_size, num_tokens, dtype, device)
    return {Phase.PREFILL: prefill, Phase.DECODE: decode}


def make_feedback(
    run: RunConfig, state: ParallelState, links: dict[Phase, PipelineLink], slots: DecodingSlots
) -> dict[Phase, TokenFeedback]:
    """Over the links, and one for both phases where these are."""
    prefill = TokenFeedback(state[Phase.PREFILL], links[Phase.PREFILL], slots)
    if run.layout_pair.is_static:
        return dict.fromkeys(Phase, prefill)
    return {Phase.PREFILL: prefill, Phase.DECODE: TokenFeedback(state[Phase.DECODE], links[Phase.DECODE], slots)}
