"""Layouts: their text form, who is where, and that the ranks of a replica share a model without gap or overlap."""

from __future__ import annotations

import pytest

from seesaw_ds.layout import LayoutPair, ParallelLayout, Phase, Range, RankCoords, Shard, split_evenly

LAYOUTS = ["T1", "T4", "P3", "T2P2", "D2T2", "D3P2", "D2T4P3"]
UNEQUAL_STAGES = ["P2[6,1]", "P1[7]", "T2P2[3,4]", "D2T2P3[1,4,2]"]


@pytest.mark.parametrize("text", LAYOUTS + UNEQUAL_STAGES)
def test_text_is_read_and_written(text):
    assert str(ParallelLayout.parse(text)) == text


def test_sizes_of_one_and_the_order_of_letters_do_not_matter():
    layout = ParallelLayout(dp=2, tp=4, pp=1)
    for text in ("D2T4", "T4D2", "D2T4P1"):
        assert ParallelLayout.parse(text) == layout
    assert (layout.replica_size, layout.world_size) == (4, 8)


@pytest.mark.parametrize(
    "text",
    [
        *("", "T0", "T", "2T", "T2T2", "X2", "t2", "T2 P2", "T-1", "T2,P2"),
        *("T2[3,1]", "P2[]", "P2[3,0]", "P2[3,1", "P2[3,1,]", "P2[3, 1]", "[3,1]", "P2[3,1][3,1]", "P2[3,1]P2"),
    ],
)
def test_what_is_not_a_layout_is_refused_with_the_rule(text):
    with pytest.raises(ValueError, match=r"a layout is letters D, T, P with sizes, each at most once"):
        ParallelLayout.parse(text)


@pytest.mark.parametrize(("text", "numbers"), [("P4[9,9,8]", 3), ("T2P1[3,1]", 2)])
def test_each_stage_needs_its_number_of_layers(text, numbers):
    with pytest.raises(ValueError, match=rf"numbers of layers, not {numbers}; give one for each stage"):
        ParallelLayout.parse(text)


def test_stages_have_the_layers_that_the_text_says():
    layout = ParallelLayout.parse("D2T2P3[1,4,2]")
    assert layout == ParallelLayout(2, 2, 3, (1, 4, 2)) != ParallelLayout(2, 2, 3)
    assert layout.stage_layers(7) == (Range(0, 1), Range(1, 5), Range(5, 7))
    assert layout.shard(11, 7, 8) == Shard(Range(5, 7), Range(4, 8))
    assert layout.with_equal_stages == ParallelLayout(2, 2, 3)


def test_stages_that_do_not_add_up_to_the_model_are_refused():
    with pytest.raises(ValueError, match=r"P2\[3,1\]': the stages have 4 layers, but num_hidden_layers=5; change"):
        ParallelLayout.parse("P2[3,1]").stage_layers(5)


def test_ranks_count_the_tensor_axis_fastest_and_the_data_axis_slowest():
    layout = ParallelLayout.parse("D2T2P3")
    assert layout.coords(1) == RankCoords(dp=0, pp=0, tp=1)
    assert layout.coords(2) == RankCoords(dp=0, pp=1, tp=0)
    assert layout.coords(6) == RankCoords(dp=1, pp=0, tp=0)
    assert [layout.rank(layout.coords(rank)) for rank in range(12)] == list(range(12))


@pytest.mark.parametrize(
    ("text", "num_layers"),
    [(text, num_layers) for num_layers in (3, 4, 7) for text in LAYOUTS] + [(text, 7) for text in UNEQUAL_STAGES],
)
def test_a_replica_owns_every_layer_and_head_once(text, num_layers):
    layout = ParallelLayout.parse(text)
    for first in range(0, layout.world_size, layout.replica_size):
        shards = [layout.shard(rank, num_layers, 8) for rank in range(first, first + layout.replica_size)]
        owned = [(i, h) for layers, heads in shards for i in layers.indices() for h in heads.indices()]
        assert sorted(owned) == [(i, h) for i in range(num_layers) for h in range(8)]
        assert {shard.kv_heads.size for shard in shards} == {8 // layout.tp}


def test_early_parts_take_the_remainder():
    assert split_evenly(5, 3) == (Range(0, 2), Range(2, 4), Range(4, 5))
    assert [part.size for part in split_evenly(2, 4)] == [1, 1, 0, 0]


def test_ranges_intersect_and_shift():
    assert Range(2, 6).intersect(Range(4, 9)) == Range(4, 6)
    assert Range(0, 2).intersect(Range(5, 7)).size == 0
    assert Range(4, 6).within(Range(3, 9)) == Range(1, 3)
    left, right = Shard(Range(0, 3), Range(0, 4)), Shard(Range(2, 5), Range(4, 8))
    assert left.intersect(right).is_empty
    assert left.intersect(Shard(Range(2, 5), Range(3, 8))) == Shard(Range(2, 3), Range(3, 4))


def test_pair_gives_each_phase_its_layout():
    pair = LayoutPair.parse("D2P2 -> D2T2")
    assert (pair[Phase.PREFILL], pair[Phase.DECODE]) == (ParallelLayout(dp=2, pp=2), ParallelLayout(dp=2, tp=2))
    assert (pair.dp, pair.replica_size, pair.world_size) == (2, 2, 4)
    assert str(pair) == "D2P2->D2T2"
    assert not pair.is_static
    assert LayoutPair.parse("T2").is_static
    assert str(LayoutPair.parse("T2->T2")) == "T2"
    assert str(LayoutPair.parse("P2[3,1]->P2[3,1]")) == "P2[3,1]"
    assert not LayoutPair.parse("P2->P2[3,1]").is_static
    unequal = LayoutPair.parse("P4[9,9,8,6]->T2P2[17,15]")
    assert str(unequal) == "P4[9,9,8,6]->T2P2[17,15]"
    assert unequal.with_equal_stages == LayoutPair.parse("P4->T2P2")
    assert Phase.PREFILL.other is Phase.DECODE
    assert Phase.DECODE.other is Phase.PREFILL


@pytest.mark.parametrize(
    ("text", "num_cells", "is_nested"),
    [("P4->T4", 4, True), ("T2P2->T4", 4, True), ("P2", 1, True), ("T2P3->T3P2", 6, False)],
)
def test_cells_of_a_layer_are_whole_in_both_phases(text, num_cells, is_nested):
    pair = LayoutPair.parse(text)
    assert (pair.cells_per_layer, pair.is_nested) == (num_cells, is_nested)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("P2->T4", r"both phases must use the same ranks \(prefill 2, decode 4\)"),
        ("D2P2->T4", r"the data-parallel size must be the same in both phases \(prefill D2, decode D1\)"),
        ("P2->T2->P2", r'give one layout \("T2"\) or two'),
        ("P2->", r"layout='': a layout is letters"),
    ],
)
def test_pair_that_does_not_fit_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        LayoutPair.parse(text)
