import pytest

from orchestrator.spec import Schedule
from orchestrator.train.schedule import learning_rate, warmup_steps


def rates(schedule: Schedule, total: int) -> list[float]:
    return [learning_rate(step, total, schedule, 1.0) for step in range(1, total + 1)]


def test_warmup_rises_from_above_zero_and_the_step_after_it_has_the_full_rate():
    assert rates(Schedule("constant", 4), 6) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_linear_reaches_neither_zero_nor_the_floor_before_the_last_step_is_done():
    assert rates(Schedule("linear", 0), 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates(Schedule("linear", 0, min_ratio=0.5), 4) == pytest.approx([1.0, 0.875, 0.75, 0.625])


def test_cosine_is_half_way_down_in_the_middle():
    values = rates(Schedule("cosine", 0), 10)
    assert values[0] == 1.0 and values[5] == pytest.approx(0.5) and 0 < values[-1] < 0.03
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(("warmup", "steps"), [(0.1, 10), (0.03, 3), (0.0, 0), (7, 7), (500, 100)])
def test_warmup_is_a_share_below_one_and_a_count_from_one_on(warmup, steps):
    assert warmup_steps(Schedule("cosine", warmup), 100) == steps


def test_a_single_step_has_the_full_rate():
    assert rates(Schedule("cosine", 0), 1) == [1.0]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="constant, linear, cosine"):
        learning_rate(2, 4, Schedule("square", 0), 1.0)
