"""The nearest rows of a category's bank: by exact search, or through an index of faiss.

An index is an inverted file (Sivic and Zisserman 2003; Douze et al., "The Faiss library", arXiv
2401.08281): k-means cuts the bank into about ``4 sqrt(M)`` lists, and a query is compared with the
rows of those lists alone whose centres are nearest to it. Of the bank it finds the nearest row
nearly always; where it does not, the distance comes out larger, never smaller. docs/benchmarks.md
has the recall on real patches.

A bundle keeps the centres and each row's list, plain tensors of one or two hundredths of the bank's
size: the same results wherever it is loaded, in no time, by any version of faiss, and without
handing bytes of a file to a parser of foreign code.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from importlib.util import find_spec
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor

from anomalyst.errors import InputError
from anomalyst.methods.memory_bank import Banks, nearest_cosine, nearest_euclidean

Search = Literal["exact", "approximate"]
Metric = Literal["cosine", "euclidean"]

LEAST = 5000
"""Rows under which a bank is searched exactly all the same: an index would gain nothing there."""

NO_GRAPH = (
    "search=approximate looks into an index, which no graph holds; fit with search=exact, or "
    "export Detector.load(BUNDLE, options={'search': 'exact'})"
)
"""What stands in the way of an export. It would be another search than the bundle's, and is held
against the bundle's: so the user says first that the bundle is to search exactly."""

_LISTS = 4  # times the root of the rows
_PROBES = 32  # lists that a query is compared with
_ROUNDS = 5  # of k-means
_SAMPLE = 32  # rows a centre that k-means sees
_CENTRES, _LIST_OF = "__centres__ ", "__lists__ "  # no category's name starts so


class BankSearch:
    """Finds the nearest row of a category's bank.

    Parameters
    ----------
    banks
        Where the rows are; their owner may change them at any time.
    search
        ``exact`` or ``approximate``.
    metric
        ``cosine`` takes rows and queries of unit length.
    seed
        Fixes an index.

    Raises
    ------
    InputError
        An index is asked for, and faiss is not installed.
    """

    def __init__(self, banks: Banks, search: Search, metric: Metric, seed: int) -> None:
        if search == "approximate" and find_spec("faiss") is None:
            raise InputError(
                "search=approximate needs faiss: pip install 'anomalyst[index]', or search=exact"
            )
        self._banks = banks
        self._approximate = search == "approximate"
        self._metric = metric
        self._seed = seed
        self._made: dict[str, tuple[Tensor, InvertedLists]] = {}  # each with the bank it is of

    def nearest(self, queries: Tensor, category: str | None) -> tuple[Tensor, Tensor]:
        """Return the distance ``[N]`` (of cosine ``1 - cos``) to the nearest row, and the row.

        A graph that is traced, and a GPU, search exactly.
        """
        bank = self._banks[category]
        here = queries.device.type == "cpu" and not torch.compiler.is_compiling()
        if not here or not self._indexed(bank):
            exact = nearest_cosine if self._metric == "cosine" else nearest_euclidean
            return exact(queries, bank)
        row = self._lists(category or "", bank).nearest(queries)
        if self._metric == "cosine":
            return 1 - (queries * bank[row]).sum(dim=1), row
        return (queries - bank[row]).norm(dim=1), row

    def tensors(self) -> dict[str, Tensor]:
        """Return banks and indexes, for the bundle."""
        found = self._banks.tensors()
        for name, bank in list(found.items()):
            if self._indexed(bank):
                lists = self._lists(name, bank)
                found |= {f"{_CENTRES}{name}": lists.centres, f"{_LIST_OF}{name}": lists.list_of}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned; indexes only where they are searched."""
        inner = (_CENTRES, _LIST_OF)
        banks = {name: rows for name, rows in tensors.items() if not name.startswith(inner)}
        self._banks.load(banks)
        self._made = {
            name: (bank, InvertedLists(bank, centres.cpu(), list_of.cpu(), self._metric))
            for name, bank in banks.items()
            if self._indexed(bank)
            and (centres := tensors.get(f"{_CENTRES}{name}")) is not None
            and (list_of := tensors.get(f"{_LIST_OF}{name}")) is not None
        }

    def _indexed(self, bank: Tensor) -> bool:
        return self._approximate and bank.shape[0] >= LEAST

    def _lists(self, category: str, bank: Tensor) -> InvertedLists:
        """Return the category's index, made anew where its bank has changed."""
        of, lists = self._made.get(category, (None, None))
        if lists is None or of is not bank:
            lists = InvertedLists.of(bank, self._metric, self._seed)
            self._made[category] = bank, lists
        return lists


class InvertedLists:
    """A bank ``[M, C]`` cut into lists by their ``centres`` ``[L, C]``.

    ``list_of`` ``[M]``, int32, tells the list of each row.
    """

    def __init__(self, bank: Tensor, centres: Tensor, list_of: Tensor, metric: Metric) -> None:
        self.centres = centres
        self.list_of = list_of
        self._bank = bank
        self._metric = metric

    @classmethod
    def of(cls, bank: Tensor, metric: Metric, seed: int) -> InvertedLists:
        """Cut a bank into lists by k-means."""
        faiss = _faiss()
        rows = _array(bank)
        means = faiss.Kmeans(
            rows.shape[1],
            _LISTS * isqrt(rows.shape[0]),
            niter=_ROUNDS,
            seed=seed % 2**31,
            spherical=metric == "cosine",
            max_points_per_centroid=_SAMPLE,
            min_points_per_centroid=1,  # fewer would be remarked upon
        )
        means.train(rows)
        _, nearest = means.index.search(rows, 1)
        list_of = torch.from_numpy(nearest[:, 0]).int()
        return cls(bank, torch.from_numpy(means.centroids.copy()), list_of, metric)

    def nearest(self, queries: Tensor) -> Tensor:
        """Return the row ``[N]`` that is nearest of those in the lists nearest to each query."""
        index = self._index
        _faiss()
        _, rows = index.search(_array(queries), 1)
        found: Tensor = torch.from_numpy(rows[:, 0])
        return found

    @cached_property
    def _index(self) -> Any:
        faiss = _faiss()
        inner = self._metric == "cosine"
        kind = faiss.METRIC_INNER_PRODUCT if inner else faiss.METRIC_L2
        count, width = self.centres.shape
        quantizer = faiss.IndexFlatIP(width) if inner else faiss.IndexFlatL2(width)
        quantizer.add(_array(self.centres))
        index = faiss.IndexIVFFlat(quantizer, width, count, kind)
        index.nprobe = min(_PROBES, count)
        rows, lists = _array(self._bank), self.list_of.long().numpy()
        # Each row's list is known: nothing is compared again.
        index.add_core(len(rows), faiss.swig_ptr(rows), None, faiss.swig_ptr(lists))
        return index


def _faiss() -> Any:
    """Return the package, which takes as many threads as torch does from then on."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _array(rows: Tensor) -> Any:
    return rows.detach().cpu().float().contiguous().numpy()
