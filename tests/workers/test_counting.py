"""What a worker tells of its counts adds up to what it counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from userspace_proxy.metrics import Outcome, ServicePortMetrics
from userspace_proxy.workers.counting import Tally, add

KNOWN_TO_ALL = {"ejected", "ejections"}
"""Each worker hears of them from the others, and the control process counts them itself."""
NUMBERS = ["opened", "active", "to_endpoint", "to_client", "dials", "received", "replied", "affinity_hits"]
TABLES = {"ended": list(Outcome), "dial_failures": [110, 111], "drops": ["ECONNREFUSED", "no room for a flow"]}


def plain(metrics: ServicePortMetrics) -> dict[str, object]:
    tables = {name: {key: n for key, n in getattr(metrics, name).items() if n} for name in TABLES}
    return tables | {name: getattr(metrics, name) for name in NUMBERS}


def test_every_count_is_told() -> None:
    """A count that is added to `ServicePortMetrics` has to be told by workers as well."""
    assert set(ServicePortMetrics.__slots__) == {*NUMBERS, *TABLES, *KNOWN_TO_ALL}


def test_nothing_is_told_of_what_did_not_change() -> None:
    metrics = ServicePortMetrics()
    tally = Tally(1, metrics)
    assert tally.growth() is None
    metrics.ended[Outcome.NOT_CAPTURED] += 1
    assert tally.growth() is not None
    assert tally.growth() is None


events = st.one_of(
    st.tuples(st.sampled_from(NUMBERS), st.none(), st.integers(1, 100)),
    *(st.tuples(st.just(name), st.sampled_from(keys), st.integers(1, 100)) for name, keys in TABLES.items()),
    st.just("leave"),
    st.just("tell"),
)


@given(st.lists(events, max_size=40))
def test_told_bit_by_bit_it_is_the_same(steps: list[object]) -> None:
    counted, known = ServicePortMetrics(), ServicePortMetrics()
    tally = Tally(1, counted)

    def tell() -> None:
        growth = tally.growth()
        if growth is not None:
            add(growth, known)

    for step in steps:
        match step:
            case "tell":
                tell()
            case "leave":
                counted.active -= min(1, counted.active)
            case (str(name), None, int(n)):
                setattr(counted, name, getattr(counted, name) + n)
            case (str(name), key, int(n)):
                getattr(counted, name)[key] += n
    tell()
    assert plain(known) == plain(counted)
