"""Filters of documents: what they keep, what is recorded, and that caches tell filtered data apart."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from espalier.data import tasks
from espalier.data.tasks import in_seqio
from espalier.data.text import document_files, user_data
from espalier.data.text.document_filters import DocumentFilter, Metadata
from espalier.data.text.documents import DataError
from espalier.data.tokenizers import vocabularies

RECORDS = [
    {"content": "a", "lang": "C", "meta": {"set": "web"}, "licences": ["MIT"]},
    {"content": "bb", "lang": "Go", "meta": {"set": "web"}, "licences": ["MIT", "GPL"]},
    {"content": "ccc", "lang": "C", "meta": {"set": "qa"}, "licences": []},
    {"content": "", "lang": "C", "meta": {"set": "web"}, "licences": ["MIT"]},
    {"content": "dddd", "lang": "C++", "meta": {"set": "book"}, "licences": None},
]


class Short(DocumentFilter):
    """Keeps texts of less than three characters."""

    def __call__(self, document):
        return len(document["text"]) < 3


@pytest.fixture(params=["jsonl", "parquet"])
def files(request, tmp_path):
    path = tmp_path / f"x.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)

    def find(*filters, **arguments):
        given = {"files": path.name, "data_root": str(tmp_path), "text_key": "content"}
        return document_files.find(
            name="mine",
            validation_fraction=0,
            filters=filters,
            cache_dir=tmp_path / "cache",
            **{**given, **arguments},
        )

    return find


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ([], "a bb ccc dddd"),
        ([Metadata(key="lang", keep=("C", "Go"))], "a bb ccc"),
        ([Metadata(key="lang", drop=["C"])], "bb dddd"),
        ([Metadata(key="meta.set", drop=("qa", "book"))], "a bb"),
        # All of a list, and an empty one is no permission.
        ([Metadata(key="licences", keep=("MIT",))], "a"),
        ([Metadata(key="licences", keep=("MIT", "GPL"))], "a bb"),
        ([Metadata(key="licences", drop=("GPL",))], "a ccc dddd"),
        ([Metadata(key="lang", keep=("C",)), Short()], "a"),
    ],
)
def test_what_is_kept(files, filters, kept):
    assert [d.text for d in files(*filters).documents("mine", "train")] == kept.split()


def test_the_first_filter_that_objects_counts_what_is_dropped(files):
    found = files(Metadata(key="meta.set", drop=("qa",)), Short())
    assert found.counts == {"train": {"documents": 2, "bytes": 3}}
    dropped = {"meta.set": {"documents": 1, "bytes": 3}, "Short": {"documents": 1, "bytes": 4}}
    assert found.dropped == dropped
    again = files(Metadata(key="meta.set", drop=("qa",)), Short())
    assert again.dropped == dropped  # as remembered


def test_the_hash_tells_filters_their_values_and_their_order_apart(files):
    one, other = Metadata(key="lang", keep=("C",)), Metadata(key="meta.set", keep=("web",))
    variants = [(), (one,), (other,), (one, other), (other, one), (Metadata(key="lang", keep="C"),)]
    assert len({files(*filters).digest for filters in variants}) == len(variants)
    assert files(one).digest == files(Metadata(key="lang", keep=("C",))).digest


def test_several_columns_make_one_text(tmp_path, files):
    joined = files(text_key=["content", "lang"])
    assert [d.text for d in joined.documents("mine", "train")] == [
        "a\n\nC",
        "bb\n\nGo",
        "ccc\n\nC",
        "C",
        "dddd\n\nC++",
    ]


def test_bad_filters_end_in_one_clear_error(files, tmp_path):
    with pytest.raises(ValueError, match="filter of 'lang' needs either keep or drop"):
        Metadata(key="lang")
    with pytest.raises(ValueError, match="mine: two filters have the name 'lang'"):
        files(Metadata(key="lang", keep=("C",)), Metadata(key="lang", drop=("Go",)))
    with pytest.raises(
        DataError, match=r"no key 'language'; present are.*'lang'.*the filter's key"
    ):
        list(files(Metadata(key="language", keep=("C",))).documents("mine", "train"))
    with pytest.raises(DataError, match=r"no key 'name'; present are 'set'"):
        list(files(Metadata(key="meta.name", keep=("C",))).documents("mine", "train"))
    with pytest.raises(DataError, match=r"filters dropped every document \(lang 4\)"):
        _ = files(Metadata(key="lang", keep=("Ada",))).counts
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(DataError, match="a text file has no metadata 'lang'"):
        list(files(Metadata(key="lang", keep=("C",)), files="x.txt").documents("mine", "train"))


def test_what_was_dropped_is_recorded_with_the_run_and_the_cache(tmp_path):
    seqio = in_seqio()

    from espalier.data.cache import task_cache

    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps({"text": r["content"], "lang": r["lang"]}) + "\n" for r in RECORDS)
    )
    digests = set()
    for filters in ((), (Metadata(key="lang", keep=("C",)),)):
        user_data.register_files(
            name="filtered",
            files=f"{tmp_path}/x.jsonl",
            vocabulary=vocabularies.byte(),
            validation_fraction=0,
            filters=filters,
            cache_dir=tmp_path / "cache",
        )
        facts = tasks.summary()["tasks"]["filtered"]
        opened = task_cache.open_task_cache(
            seqio.TaskRegistry.get("filtered"), "train", cache_dir=tmp_path, changed="build"
        )
        source = opened.manifest["description"]["source"]
        counts = {"lang": {"documents": 2, "bytes": 6}} if filters else None
        assert facts.get("dropped") == source.get("dropped") == counts
        assert facts["documents"] == {"train": opened.num_records}
        digests.add(opened.content)
    assert len(digests) == 2
    tasks.clear()
