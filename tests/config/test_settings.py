"""What a field says of itself is found wherever the field is nested; paths name parts by their names."""

from dataclasses import dataclass, field

from nltrain.settings import MAY_CHANGE, MAY_CHANGE_WITH_DATA, flatten, may_change_patterns, part_type


@dataclass(frozen=True)
class Part:
    name: str = "a"
    speed: int = field(default=1, metadata=MAY_CHANGE)


@dataclass(frozen=True)
class Room:
    parts: tuple[Part, ...] = ()
    seed: int = field(default=0, metadata=MAY_CHANGE_WITH_DATA)
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Whole:
    room: Room = field(default_factory=Room)
    where: Part = field(default_factory=Part, metadata=MAY_CHANGE)
    width: int = 8


def test_marked_fields_are_found_below_dataclasses_and_tuples_of_them() -> None:
    assert may_change_patterns(Whole) == ("room.parts.*.speed", "where")
    assert may_change_patterns(Whole, with_other_data=True) == ("room.parts.*.speed", "room.seed", "where")


def test_a_tuple_of_dataclasses_is_distinguished_from_one_of_values() -> None:
    assert part_type(tuple[Part, ...]) is Part
    assert part_type(tuple[int, ...]) is None and part_type(int) is None


def test_parts_are_addressed_by_name_and_other_lists_are_leaves() -> None:
    tree = {"levels": [{"name": "slow", "lr": 1}, {"name": "fast", "lr": 2}], "betas": [1, 2], "empty": {}, "none": []}
    assert flatten(tree) == {
        "levels.slow.name": "slow",
        "levels.slow.lr": 1,
        "levels.fast.name": "fast",
        "levels.fast.lr": 2,
        "betas": [1, 2],
        "empty": {},
        "none": [],
    }
    assert flatten(3, "a.b") == {"a.b": 3}
