"""From categories to the words that CLIP reads, given by the user, known or the name itself."""

from __future__ import annotations

import logging

import pytest
from pydantic import BaseModel, ValidationError

from anomalyst.errors import InputError
from anomalyst.methods.class_names import Names, class_name


class Options(BaseModel):
    names: Names = {}


def parsed(given: object) -> dict[str, str]:
    return Options.model_validate({"names": given}).names


@pytest.mark.parametrize(
    ("category", "words"),
    [
        ("bottle", "bottle"),
        ("metal_nut", "metal nut"),
        ("pipe_fryum", "pipe fryum"),
        ("macaroni1", "macaroni"),
        ("macaroni2", "macaroni"),
        ("pcb1", "printed circuit board"),
        ("pcb2", "printed circuit board"),
        ("pcb3", "printed circuit board"),
        ("pcb4", "printed circuit board"),
        ("chewinggum", "chewing gum"),
        ("_01_b_", "01 b"),
        ("pcb", "pcb"),
    ],
)
def test_names_of_the_data_sets_become_words(category: str, words: str) -> None:
    assert class_name(category, {}, "anople") == words


def test_given_words_come_first_and_are_taken_as_they_are() -> None:
    names = {"01": "metal plate", "pcb1": "board_1", "bottle": ""}
    assert class_name("01", names, "anople") == "metal plate"
    assert class_name("pcb1", names, "anople") == "board_1"
    assert class_name("pcb2", names, "anople") == "printed circuit board"
    assert class_name("bottle", names, "anople") == "bottle"


def test_without_a_category_the_method_says_what_it_needs() -> None:
    with pytest.raises(InputError) as error:
        class_name(None, {"01": "metal plate"}, "anople")
    assert str(error.value) == (
        "anople needs a class name: say which product it is (--category NAME)"
    )


@pytest.mark.parametrize("category", ["01", "__", "", "1_2-3", "!?"])
def test_what_has_no_letter_is_no_name_and_the_mend_is_told(category: str) -> None:
    with pytest.raises(InputError) as error:
        class_name(category, {"02": "wood"}, "anople")
    assert str(error.value) == (
        f"category {category!r} is no class name that anople could read: "
        f"call it by words, such as 'metal plate', or fit with --set names='{category}:WORDS'"
    )


@pytest.mark.parametrize("given", ["01:", "01:!!", {"01": "42"}])
def test_an_option_without_a_letter_is_refused(given: object) -> None:
    with pytest.raises(ValidationError, match="the words for '01' have no letter"):
        Options(names=given)


def test_words_without_a_letter_are_refused_too() -> None:
    with pytest.raises(InputError, match="category 'bottle' is no class name"):
        class_name("bottle", {"bottle": "42"}, "anople")


def test_a_name_that_is_not_english_is_warned_of_and_taken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert class_name("Schlüssel", {}, "anople") == "Schlüssel"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "class name 'Schlüssel': CLIP reads English; "
        "call it by words, such as 'metal plate', or fit with --set names='Schlüssel:WORDS'"
    )
    caplog.clear()
    assert class_name("Schlüssel", {"Schlüssel": "key"}, "anople") == "key"
    assert not caplog.records


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("", {}),
        ("01:metal plate", {"01": "metal plate"}),
        (" 01 : metal plate , 02:wood ,", {"01": "metal plate", "02": "wood"}),
        ("a:b:c", {"a": "b:c"}),
        ({"01": "metal plate"}, {"01": "metal plate"}),
    ],
)
def test_names_are_read_as_the_command_line_gives_them(
    given: object, names: dict[str, str]
) -> None:
    assert parsed(given) == names


@pytest.mark.parametrize("given", ["metal plate", "01:wood,metal plate", "01=wood"])
def test_names_without_a_colon_say_how_they_are_written(given: str) -> None:
    with pytest.raises(ValidationError, match="write it as CATEGORY:WORDS,CATEGORY:WORDS"):
        parsed(given)
