"""When the validation, and what follows its cadence, is due."""

from dataclasses import replace


def due(setting):
    return [tokens for tokens in range(200, 1001, 200) if setting.due(tokens)]


def test_due_when_a_multiple_was_passed_and_at_the_end(setting):
    assert due(setting) == [400, 600, 1000]
    assert due(replace(setting, every_tokens=0)) == [1000]
    assert due(replace(setting, every_tokens=200)) == [200, 400, 600, 800, 1000]


def test_never_due_without_held_out_sequences(setting):
    assert due(replace(setting, num_sequences=0)) == []
