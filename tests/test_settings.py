"""Words of the command line to settings of a detector."""

from __future__ import annotations

import pytest

from anomalyst.errors import InputError
from anomalyst.scoring import Decision
from anomalyst.settings import detector_settings, given_decision, parse_eval_size


def test_explicit_words_win_over_the_preset() -> None:
    paper = detector_settings("anomaly-dino", "paper", [])
    assert paper["image_size"] == 448 and paper["options"] == {"rotations": 8}
    assert paper["backbone"] == "dinov2-small" and paper["layers"] == [11]
    words = ["rotations=2", "layers=5,7", "resize=256", "square=true"]
    chosen = detector_settings("anomaly-dino", "paper", words, backbone="x", image_size=224)
    assert chosen == {
        "backbone": "x",
        "layers": [5, 7],
        "image_size": 224,
        "resize": 256,
        "square": True,
        "options": {"rotations": "2"},
    }
    assert detector_settings("anomaly-dino", "paper", []) == paper  # nothing leaked into it


@pytest.mark.parametrize("word", ["layers=a", "resize=", "square=maybe", "rotations"])
def test_malformed_words_are_refused(word: str) -> None:
    with pytest.raises(InputError, match=word.partition("=")[0]):
        detector_settings("anomaly-dino", None, [word])


def test_a_large_alpha_lifts_the_review_level_with_it() -> None:
    assert given_decision(None, None) == Decision(0.01, 0.05)
    assert given_decision(0.2, None) == Decision(0.2, 0.2)
    assert given_decision(0.02, 0.3, Decision(0.1, 0.1)) == Decision(0.02, 0.3)
    assert given_decision(None, None, Decision(0.1, 0.2)) == Decision(0.1, 0.2)


def test_eval_size() -> None:
    assert parse_eval_size("256") == 256
    assert parse_eval_size("original") is None
    with pytest.raises(InputError, match="0"):
        parse_eval_size("0")
