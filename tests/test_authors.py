"""What is learnt of a conversation, token by token, as the original authors' own functions have it: tests/make_conversations.py."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.make_conversations import COUNT, DIFFERENT, KINDS, hashed, made_up, ours
from tokenizer import Tokenizer

RECORDS = json.loads(Path("tests/fixtures/conversations.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained("tests/fixtures/tokenizer")


def differs(record, tokenizer):
    """The formats in which our ids or labels are not theirs."""
    return [style for style, made in ours(record, tokenizer).items() if [hashed(values) for values in made] != record[style]]


def test_ids_and_labels_are_the_authors(tokenizer):
    same = [record for record in RECORDS if "differs" not in record]
    assert not [(record["id"], record["kind"], found) for record in same if (found := differs(record, tokenizer))]
    assert len(same) == COUNT == 200 and sum("plain" in record for record in same) > 50
    assert min(Counter(record["kind"] for record in same).values()) >= 15 and {record["kind"] for record in same} == {*KINDS}


@pytest.mark.parametrize("record", [record for record in RECORDS if "differs" in record], ids=lambda record: record["kind"])
def test_where_ours_is_another_on_purpose(record, tokenizer):
    if "mark" in record["kind"]:
        with pytest.raises(ValueError, match="text contains '(</s>|ASSISTANT:)'"):
            ours(record, tokenizer)
    else:
        assert differs(record, tokenizer) == ["v1"]


def test_the_file_holds_the_conversations_that_are_made():
    said = [{name: value for name, value in record.items() if name not in ("v1", "plain")} for record in RECORDS]
    assert said == made_up() and len(said) == COUNT + len(DIFFERENT)
