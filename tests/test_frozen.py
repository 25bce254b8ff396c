"""`@frozen` makes what `@dataclass(frozen=True)` makes: the same construction, comparison, text, and refusals."""

import copy
import inspect
import pickle
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields, replace

import pytest

from qlora_cli import TrainConfig
from qlora_cli.frozen import frozen


def declare(decorate, keyword):
    @decorate
    class Base:
        """A base."""

        first: int
        second: str = "b"

    @keyword
    class Child(Base):
        """With more fields, by name alone."""

        third: list = field(default_factory=list)
        hidden: int = field(default=0, compare=False, repr=False)

        def __post_init__(self):
            if self.first < 0:
                raise ValueError("negative")

    return Base, Child


OURS = declare(frozen, frozen(kw_only=True))
PYTHONS = declare(dataclass(frozen=True), dataclass(frozen=True, kw_only=True))

CALLS = [
    ((1,), {}),
    ((1, "x"), {}),
    ((), {"first": 1, "second": "y"}),
    ((), {}),
    ((1, "x", 3, 4), {}),
    ((1,), {"first": 2}),
    ((1,), {"unknown": 2}),
    ((1,), {"third": [1], "hidden": 5}),
    ((-1,), {}),
]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("given", "named"), CALLS)
def test_it_is_made_and_refused_as_pythons_own(which, given, named):
    found = []
    for kind in (OURS[which], PYTHONS[which]):
        try:
            found.append(repr(kind(*given, **named)).partition("<locals>.")[2])
        except (TypeError, ValueError) as error:
            found.append(type(error))
    assert found[0] == found[1]
    ours, pythons = (inspect.signature(kinds[which]).parameters for kinds in (OURS, PYTHONS))
    assert [(p.name, p.kind, p.annotation) for p in ours.values()] == [
        (p.name, p.kind, p.annotation) for p in pythons.values()
    ]
    assert OURS[which].__match_args__ == PYTHONS[which].__match_args__


def test_it_is_compared_changed_and_kept_as_pythons_own():
    base, child = OURS
    one = child(1, third=[2], hidden=3)
    assert one == child(1, third=[2], hidden=4) and one != child(2, third=[2]) and one != base(1)
    assert hash(base(1)) == hash(base(1)) and len({base(1), base(1), base(2)}) == 2
    assert replace(one, first=5) == child(5, third=[2]) and asdict(one) == {
        "first": 1, "second": "b", "third": [2], "hidden": 3,
    }  # fmt: skip
    assert copy.deepcopy(one) == one and child(1).third is not child(1).third
    with pytest.raises(FrozenInstanceError):
        one.first = 2
    with pytest.raises(FrozenInstanceError):
        del one.first
    match base(1, "x"):
        case base(first, second):
            assert (first, second) == (1, "x")


def test_settings_are_pickled_and_tell_their_signature():
    config = TrainConfig(model="m", rank=4)
    assert pickle.loads(pickle.dumps(config)) == config
    parameters = inspect.signature(TrainConfig).parameters
    assert list(parameters) == [option.name for option in fields(TrainConfig)]
    assert parameters["rank"].default == 16 and parameters["rank"].kind is inspect.Parameter.KEYWORD_ONLY
