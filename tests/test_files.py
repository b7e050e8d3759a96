"""Shards: each made once and whole, by whoever comes first; other inputs are refused, damage is said."""

import json
import threading
from dataclasses import replace

import pytest

from align.choices import Rejected
from align.files import Shards, whole
from align.say import UserError

INPUTS = {"seed": 7, "rule": Rejected.worst, "settings": {"length": 3}}


def shards_in(folder, inputs=INPUTS, **more):
    shards = Shards(**{"folder": folder, "what": "rows", "count": 3, "rows": 5, **more})
    shards.begin(inputs)
    return shards


def rows_of(number):
    return [{"at": 2 * number + i} for i in range(1 if number == 2 else 2)]


def filled(folder):
    shards = shards_in(folder)
    for number in shards.claim():
        shards.write(number, rows_of(number))
    return shards


def test_every_shard_is_claimed_once_and_read_back_in_order(tmp_path):
    shards = filled(tmp_path)
    assert list(shards.claim()) == shards.missing() == []
    assert shards.read(lambda row: row["at"]) == [0, 1, 2, 3, 4]
    assert Shards.open(tmp_path, "rows", "make them").read() == [{"at": i} for i in range(5)]
    made = json.loads((tmp_path / "manifest.json").read_text())
    assert made == {"seed": 7, "rule": "worst", "settings": {"length": 3}, "shards": 3, "rows": 5}
    assert (tmp_path / "00002-of-00003.jsonl").read_text() == '{"at": 4}\n'


@pytest.mark.parametrize(
    "change, what",
    [
        ({"inputs": {**INPUTS, "seed": 8}}, "seed: 7 -> 8"),
        ({"inputs": {**INPUTS, "settings": {"length": 4, "cut": True}}}, "settings.cut: None -> True; settings.length: 3 -> 4"),
        ({"count": 2}, "shards: 3 -> 2"),
    ],
)  # fmt: skip
def test_a_folder_of_other_inputs_is_refused_and_the_difference_is_named(change, what, tmp_path):
    shards_in(tmp_path)
    with pytest.raises(UserError) as refused:
        shards_in(tmp_path, **change)
    assert str(refused.value) == f"{tmp_path} holds rows of other inputs ({what}): delete it, or name another"


def test_shards_that_another_process_works_on_come_last_and_are_made_if_it_fails(tmp_path):
    shards, order = shards_in(tmp_path), []
    other = shards.claim()
    assert next(other) == 0

    def work():
        for number in shards_in(tmp_path).claim():
            order.append(number)
            shards.write(number, rows_of(number))

    thread = threading.Thread(target=work)
    thread.start()
    while shards.missing() != [0]:
        assert thread.is_alive()
    assert order == [1, 2]
    other.close()  # as an error in the loop does, or the end of the process
    thread.join(60)
    assert order == [1, 2, 0] and len(shards.read()) == 5


def test_what_one_process_decides_is_what_all_do(tmp_path):
    """Rank 0's decisions are played back to a process that sees no files of its own."""
    decisions = []
    first, second = shards_in(tmp_path / "first"), shards_in(tmp_path / "second")
    for number in first.claim(decide=lambda decision: decisions.append(decision()) or decisions[-1]):
        first.write(number, rows_of(number))
    told = iter(decisions)
    assert list(second.claim(decide=lambda decision: next(told))) == [0, 1, 2]


def test_damage_is_one_line_and_a_deleted_shard_is_made_again(tmp_path):
    shards = filled(tmp_path)
    second = tmp_path / "00001-of-00003.jsonl"
    for text, says in [
        (
            '{"at": 2}\n{"at"',
            f"{second} is damaged (Expecting ':' delimiter: line 1 column 6 (char 5)): delete it, and",
        ),
        ('{"at": 2}\n', f"{tmp_path} holds 4 rows in place of 5: delete it, and"),
        (None, f"{tmp_path} is not finished, {second.name} is missing:"),
    ]:
        second.unlink() if text is None else second.write_text(text)
        with pytest.raises(UserError) as damaged:
            shards.read()
        assert str(damaged.value) == f"{says} type the command that makes it again"
    second.write_text('{"other": 1}\n')
    with pytest.raises(UserError, match=r"is damaged \('at'\)"):
        shards.read(lambda row: row["at"])
    second.unlink()
    assert len(filled(tmp_path).read()) == 5


def test_a_folder_without_shards_says_what_to_type(tmp_path):
    with pytest.raises(UserError, match=r"nothing holds no rows: type align sample first$"):
        Shards.open(tmp_path / "nothing", "rows", "type align sample first")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="holds rows of another version of align: delete it"):
        Shards.open(tmp_path, "rows", "")


def test_a_folder_that_cannot_be_written_is_one_line_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    shards = Shards(folder=tmp_path / "file", what="rows", count=1, rows=1)
    with pytest.raises(UserError, match=r"cannot write .*file \(.*\): name another folder$"):
        shards.begin({})
    with pytest.raises(UserError, match=r"; set cache_dir=$"):
        replace(shards, remedy="; set cache_dir=").begin({})


def test_a_file_stays_as_it_was_until_it_is_whole(tmp_path):
    file = tmp_path / "figures.json"
    file.write_text("before")
    with pytest.raises(ZeroDivisionError), whole(file) as unfinished:
        unfinished.write_text("half")
        raise ZeroDivisionError
    assert file.read_text() == "before"
    with whole(file) as unfinished:
        unfinished.write_text("after")
    assert file.read_text() == "after" and not unfinished.exists()
