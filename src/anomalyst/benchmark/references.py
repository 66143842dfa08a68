"""Which references a category of the setting ``generalist`` gets, and what is judged with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from anomalyst.data.layouts import Dataset, few_shot, seeded_order
from anomalyst.errors import InputError
from anomalyst.types import References, Sample


@dataclass(frozen=True)
class Task:
    """References of some categories, one entry a category, and the images judged with them."""

    references: tuple[References, ...]
    queries: tuple[Sample, ...]


def draw_tasks(
    target: Dataset, shots: int, abnormal: int, seed: int, by_type: bool = False
) -> list[Task]:
    """Return the tasks that judge every test image once, a category after the other.

    Normal references come from the training images, abnormal ones from the test images that have a
    mask. A draw depends on the seed and the category's own files only, and fewer references are
    always among more.

    Parameters
    ----------
    shots, abnormal
        References a category; without abnormal ones all categories are one task.
    by_type
        Judge the images of each defect type with abnormal references of that type, and the normal
        images with those of one type that the seed draws.

    Raises
    ------
    InputError
        A category has too few images to draw from.
    """
    normal = {
        name: few_shot(target.only([name]).train, shots, seed)  # a line a category, if it fails
        for name in target.categories
    }
    if abnormal == 0:
        return [Task(tuple(References(name, normal[name]) for name in normal), target.test)]
    tasks = []
    for name in normal:
        defects = _Defects.of(name, target.test, seed)
        if by_type:
            for drawn, queries in defects.by_type(abnormal):
                tasks.append(Task((References(name, normal[name], drawn),), queries))
        else:
            drawn = defects.draw(abnormal)
            tasks.append(Task((References(name, normal[name], drawn),), defects.samples))
    return tasks


@dataclass(frozen=True)
class _Defects:
    """The test images of a category, and its defect types in the order drawn by the seed.

    ``types`` holds the images of each that can be drawn, in that order too: those with a mask, and
    one less where no image of the type would be left to judge.
    """

    category: str
    samples: tuple[Sample, ...]
    types: dict[str | None, list[Sample]]

    @classmethod
    def of(cls, category: str, samples: Sequence[Sample], seed: int) -> _Defects:
        own = tuple(sample for sample in samples if sample.category == category)
        found: dict[str | None, list[Sample]] = {}
        for sample in sorted(own, key=lambda sample: sample.path.parts):
            if sample.label == 1:
                found.setdefault(sample.defect, []).append(sample)
        names = sorted(found, key=str)
        types = {}
        for name in (names[place] for place in seeded_order(len(names), seed, category)):
            masked = [sample for sample in found[name] if sample.mask is not None]
            order = seeded_order(len(masked), seed, category, str(name))
            types[name] = [masked[place] for place in order][: len(found[name]) - 1]
        return cls(category, own, types)

    def draw(self, count: int) -> tuple[Sample, ...]:
        """Return so many images: the first of each type, then the second of each, and so on."""
        longest = max(map(len, self.types.values()), default=0)
        turns = [
            images[turn]
            for turn in range(longest)
            for images in self.types.values()
            if turn < len(images)
        ]
        if len(turns) < count:
            raise self._too_few(count, len(turns), "")
        return tuple(turns[:count])

    def by_type(self, count: int) -> Iterator[tuple[tuple[Sample, ...], tuple[Sample, ...]]]:
        """Yield each type's references, and what is judged with them."""
        if not self.types:
            raise self._too_few(count, 0, "")
        for place, (name, images) in enumerate(self.types.items()):
            if len(images) < count:
                raise self._too_few(count, len(images), f" of type {name!r}")
            judged = tuple(
                sample
                for sample in self.samples
                if (sample.defect == name if sample.label == 1 else place == 0)
            )
            yield tuple(images[:count]), judged

    def _too_few(self, wanted: int, there: int, kind: str) -> InputError:
        return InputError(
            f"abnormal: {wanted} of {self.category!r}{kind} cannot be drawn: {there} defective "
            "test images have a mask and leave one of their type to be judged"
        )
