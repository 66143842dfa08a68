"""What the quality routes take and answer, as pydantic models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from anomalyst.station.limits import Note, Short
from anomalyst.station.schemas import DecisionWord, Verdict

Score = Annotated[float, Field(allow_inf_nan=False)]
Number = Annotated[int, Field(ge=-1_000_000, le=1_000_000)]
Id = Annotated[str, Field(max_length=64)]


class _Taken(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Counts(BaseModel):
    """What became of labelled parts; ``*_at_most`` are the rates that the counts allow (95 %).

    ``ordered``: share of pairs of a good and a defective part in which the latter scores higher.
    """

    n_good: int
    n_defect: int
    false_rejects: int
    misses: int
    reviews: int
    unjudged: int
    false_rejects_at_most: float | None
    misses_at_most: float | None
    ordered: float | None


class ThresholdState(BaseModel):
    """The limits that judge a category now, and the rates that its calibration is asked for."""

    ng: float | None
    review: float | None
    by_hand: bool
    calibrated: bool
    alpha: float
    alpha_review: float


class PastScore(BaseModel):
    """A labelled part as the active version scores it."""

    id: str
    score: float
    label: DecisionWord
    verdict: Verdict | None


class History(BaseModel):
    """Labelled parts of a category, newest first, and the scores of its calibration."""

    category: str
    scores: list[PastScore]
    calibration: list[float]
    thresholds: ThresholdState
    confusion: Counts
    left_out: int


class GoldenAnswer(BaseModel):
    """A golden sample as it is judged; ``held_before`` is that of the active version."""

    id: int
    inspection: str | None
    image_sha256: str
    category: str
    expected: Literal["pass", "fail"]
    note: str
    score: float | None
    verdict: Verdict | None
    holds: bool
    held_before: bool


class Broken(BaseModel):
    """Why a change was refused, and the golden samples that it would break."""

    error: str
    broken: list[GoldenAnswer] = []


class ThresholdsTaken(_Taken):
    """Limits as scores; both null: back to the calibration."""

    category: Short | None = None
    ng: Score | None = None
    review: Score | None = None


class ThresholdsSaved(ThresholdsTaken):
    """The same, to be saved."""

    note: Note = ""


class ThresholdsAnswer(Counts):
    """How history and golden samples would be judged; ``before``: how they are."""

    category: str
    before: Counts
    golden: list[GoldenAnswer]
    blocked: bool


class DefectTaken(_Taken):
    """A defective part with its defect: a box (x, y, w, h) in pixels, or a mask as base64 PNG."""

    id: Id
    box: tuple[Number, Number, Number, Number] | None = None
    mask: Annotated[str, Field(max_length=16 << 20)] | None = None


class Lesson(_Taken):
    """Inspections to teach, by their ids.

    ``calibration``: ``kept`` uses the pictures that calibrated before, as far as they are here;
    ``history`` parts decided good as well.
    """

    category: Short | None = None
    normal: Annotated[list[Id], Field(max_length=64)] = []
    abnormal: Annotated[list[DefectTaken], Field(max_length=64)] = []
    calibration: Literal["kept", "history"] = "kept"


class LessonSaved(Lesson):
    """A preview's token, or what to teach without a look at it first."""

    token: Id | None = None
    note: Note = ""


class Changed(BaseModel):
    """A labelled part whose verdict changes."""

    id: str
    label: DecisionWord
    before: Verdict | None
    after: Verdict | None
    score_before: float
    score_after: float


class CalibrationChange(BaseModel):
    """How many pictures calibrate, before and after, and in words what that means."""

    before: int
    after: int
    kept: int
    history: int
    needed_for: dict[str, int]
    words: str


class CalibrationPictures(BaseModel):
    """How many pictures calibrated a category, and how many of them are here."""

    category: str
    pictures: int
    here: int


class TeachAnswer(BaseModel):
    """What a lesson would change; ``blocked`` when it breaks golden samples."""

    token: str
    category: str
    before: Counts
    after: Counts
    changed: list[Changed]
    golden: list[GoldenAnswer]
    blocked: bool
    calibration: CalibrationChange


class GoldenTaken(_Taken):
    """An inspection whose picture must from now on be judged so."""

    inspection: Id
    expected: Literal["pass", "fail"]
    note: Note = ""


class Moment(BaseModel):
    """A part and when it was judged."""

    id: str
    time: str


class ChangeAnswer(BaseModel):
    """An alarm: the part that gave it, and the one with which it probably began."""

    at: Moment
    since: Moment
    direction: Literal["higher", "lower"]
    usual: float
    now: float


class WatchedAnswer(BaseModel):
    """A stream that is watched; ``evidence`` is 1 from the alarm on."""

    baseline: int
    count: int
    evidence: float
    usual: float | None
    now: float | None
    change: ChangeAnswer | None


class DriftAnswer(BaseModel):
    """Scores and features against calibration; ``alarm`` in plain words, null without one."""

    category: str | None
    since: str | None
    score: WatchedAnswer | None
    features: WatchedAnswer | None
    evidence: float
    alarm: str | None
    parts_a_false_alarm: int
    words: str


class NoteTaken(_Taken):
    """What was found when an alarm was looked into."""

    note: Note = ""


class PartAnswer(BaseModel):
    """Looks at one part."""

    part_id: str
    n: int
    mean: float
    sd: float
    flips: int | None


class RepeatabilityAnswer(BaseModel):
    """How far the same part gets the same score and verdict (AIAG MSA, one-way ANOVA)."""

    parts: list[PartAnswer]
    repeatability_sd: float | None
    part_sd: float | None
    flip_rate: float | None
    grr_percent: float | None
    distinct: int | None
    words: str
