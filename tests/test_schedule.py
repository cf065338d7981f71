"""The order of mini-batches: blocks, visits, warm-up, coverage, resume."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpsft.psft.schedule import BlockSampler, BlockSchedule


def schedule(**changes):
    arguments = dict(num_rows=64 * 16, mini_batch_size=16, total_steps=256, seed=3)
    return BlockSchedule(**{**arguments, **changes})


def test_one_visit_goes_through_the_rows_in_order_with_a_snapshot_every_k_steps():
    plan = schedule(reference_steps=8, total_steps=64)
    positions = [plan.position(step) for step in range(64)]
    assert [p.mini_batch for p in positions] == list(range(64))
    assert [step for step, p in enumerate(positions) if p.is_snapshot] == list(range(0, 64, 8))
    assert sorted(row for step in range(64) for row in plan.rows(step)) == list(range(1024))


def test_the_paper_s_order_is_plain_sft_s_order():
    paper, sft = schedule(reference_steps=8), schedule(reference_steps=1, warmup_steps=256)
    assert [paper.rows(step) for step in range(256)] == [sft.rows(step) for step in range(256)]


def test_four_visits_show_each_mini_batch_four_times_before_the_next_block():
    plan = schedule(reference_steps=8, num_iterations=4)
    positions = [plan.position(step) for step in range(256)]
    for block in range(8):
        steps = positions[block * 32 : (block + 1) * 32]
        assert Counter(p.mini_batch for p in steps) == {m: 4 for m in range(block * 8, block * 8 + 8)}
        assert [p.visit for p in steps] == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8
        assert [p.is_snapshot for p in steps] == [True] + [False] * 31
        assert [p.mini_batch for p in steps[:8]] == list(range(block * 8, block * 8 + 8))
        assert [p.mini_batch for p in steps[8:16]] != [p.mini_batch for p in steps[:8]]
    # four epochs of 64 steps cover all rows; one epoch a quarter of them
    assert plan.unseen_share() == 0.0
    assert schedule(reference_steps=8, num_iterations=4, total_steps=64).unseen_share() == 0.75


def test_warm_up_comes_first_and_takes_rows_of_its_own():
    plan = schedule(reference_steps=8, num_iterations=4, warmup_steps=8, total_steps=192)
    positions = [plan.position(step) for step in range(192)]
    assert all(p.is_warmup and not p.is_snapshot for p in positions[:8])
    assert positions[8].is_snapshot and positions[8].mini_batch == 8
    # 184 steps are left: five whole blocks of 32, and the last of 24 steps is shortened to 6 mini-batches × 4 visits
    assert Counter(p.mini_batch for p in positions[168:]) == {m: 4 for m in range(48, 54)}


def test_mini_batches_are_always_full_and_nothing_is_skipped():
    plan = schedule(num_rows=21, mini_batch_size=4, total_steps=18, reference_steps=3)
    rows = [row for step in range(18) for row in plan.rows(step)]
    assert len(rows) == 72
    for data_pass in range(3):
        assert sorted(rows[data_pass * 21 : data_pass * 21 + 21]) == list(range(21))
    assert rows[:21] != rows[21:42]


def test_the_sampler_yields_what_the_schedule_says_epoch_by_epoch():
    plan = schedule(num_rows=21, mini_batch_size=4, total_steps=18, reference_steps=3, num_iterations=2)
    done = 0
    sampler = BlockSampler(lambda: plan, 6, 4, step=lambda: done)
    assert len(sampler) == 24
    for done in (0, 6, 8, 12):  # 8: resumed in the middle of the second epoch
        first = done // 6 * 6
        assert list(sampler) == [row for step in range(first, first + 6) for row in plan.rows(step)]


def test_a_seed_changes_the_order_and_nothing_else_does():
    assert schedule().rows(5) == schedule().rows(5)
    assert schedule().rows(5) != schedule(seed=4).rows(5)


@settings(deadline=None, max_examples=100)
@given(
    num_rows=st.integers(1, 40),
    mini_batch_size=st.integers(1, 9),
    reference_steps=st.integers(1, 6),
    num_iterations=st.integers(1, 4),
    warmup_steps=st.integers(0, 20),
    total_steps=st.integers(1, 60),
)
def test_no_row_is_seen_again_before_every_other_row_was_in_the_stream(
    num_rows, mini_batch_size, reference_steps, num_iterations, warmup_steps, total_steps
):
    plan = BlockSchedule(
        num_rows,
        mini_batch_size,
        reference_steps=reference_steps,
        num_iterations=num_iterations,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
    )
    positions = [plan.position(step) for step in range(total_steps)]
    visits = Counter(p.mini_batch for p in positions)
    assert sorted(visits) == list(range(len(visits)))  # no mini-batch of the stream is skipped
    assert all(count <= num_iterations for count in visits.values())
    first_seen = [p.mini_batch for p in positions if p.visit == 0]
    assert first_seen == sorted(first_seen)
    seen = {row for step in range(total_steps) for row in plan.rows(step)}
    assert abs(plan.unseen_share() - (1 - len(seen) / num_rows)) < 1e-9
    for step, position in enumerate(positions):
        if position.visit > 0:  # a snapshot lies between the block's first visit and nothing else
            assert not position.is_snapshot
        if position.is_snapshot:
            assert step == warmup_steps or positions[step - 1].block == position.block - 1


def ended_early(*steps, **changes):
    plan = schedule(**changes)
    for step in steps:
        plan.end_block(step)
    return plan


def test_a_block_that_ends_early_hands_its_unseen_mini_batches_to_the_next():
    plan = ended_early(3, 9, reference_steps=8, total_steps=32)
    positions = [plan.position(step) for step in range(32)]
    assert [step for step, p in enumerate(positions) if p.is_snapshot] == [0, 3, 9, 17, 25]
    assert [p.mini_batch for p in positions] == list(range(32))
    assert [p.block for p in positions] == [0] * 3 + [1] * 6 + [2] * 8 + [3] * 8 + [4] * 7
    assert plan.early_ends == [3, 9]


def test_a_block_that_ends_early_loses_its_remaining_visits():
    plan = ended_early(6, 13, reference_steps=4, num_iterations=3, total_steps=64)
    positions = [plan.position(step) for step in range(64)]
    assert sorted(p.mini_batch for p in positions[:6]) == sorted([0, 1, 2, 3] + [p.mini_batch for p in positions[4:6]])
    assert [p.visit for p in positions[:13]] == [0] * 4 + [1] * 2 + [0] * 4 + [1] * 3
    assert positions[6].is_snapshot and [p.mini_batch for p in positions[6:10]] == [4, 5, 6, 7]
    assert positions[13].is_snapshot and [p.mini_batch for p in positions[13:17]] == [8, 9, 10, 11]


@pytest.mark.parametrize("step", [0, 5, 8, 16])
def test_a_block_cannot_end_early_in_the_warm_up_or_where_it_ends_anyway(step):
    plan = ended_early(step, reference_steps=8, warmup_steps=8, total_steps=64)
    assert plan.early_ends == []


def test_the_last_block_is_shortened_after_an_early_end_too():
    plan = ended_early(5, reference_steps=4, num_iterations=4, total_steps=29)
    assert Counter(plan.position(step).mini_batch for step in range(21, 29)) == {8: 4, 9: 4}
