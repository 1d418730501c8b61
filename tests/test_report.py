"""The page of a recipe: complete, true to the records, and in need of nothing else."""

import base64
import csv
import html.parser
import io
import json
import re

import mnistlab as ml
import pytest
from mnistlab import runs
from mnistlab.report import report


@pytest.fixture(scope="module")
def page():
    return report("dense-8k")


class Links(html.parser.HTMLParser):
    """What a page loads or links to."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.images: list[dict] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.found += [found[key] for key in ("src", "href") if key in found]
        self.images += [found] if tag == "img" else []


def test_it_holds_all_that_it_shows(page):
    links = Links(page)
    assert links.found and all(link.startswith("data:") for link in links.found)
    assert all(image["alt"] for image in links.images)
    assert "<script" not in page and "@import" not in page and "url(" not in page


def test_its_numbers_are_those_of_the_records(page):
    known = ml.results("dense-8k")
    assert str(known) in page and f"{known.params:,}" in page
    rows = re.findall(r"<tr>(<td.*?)</tr>", page)[: known.n]
    shown = [re.findall(r">([^<]*)</td>", row)[2] for row in rows]
    assert shown == [f"{100 * value:.2f}" for value in known.values]


def test_its_csv_is_every_epoch_of_every_seed(page):
    (uri,) = (link for link in Links(page).found if link.startswith("data:text/csv"))
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(uri.partition(",")[2]).decode())))
    records = ml.results("dense-8k").records
    assert len(rows) == sum(len(record["history"]) for record in records)
    last = records[-1]["history"][-1]
    assert float(rows[-1]["val_loss"]) == last["val_loss"]
    assert int(rows[-1]["seed"]) == len(records) - 1


def test_with_weights_it_shows_confusion_mistakes_and_samples(page):
    record = ml.results("dense-8k").records[0]
    assert "weights" in record
    assert len(Links(page).images) == 4
    assert f"({record['test']['correct']:,} of 10,000;" in page


def test_without_weights_it_says_so(tmp_path):
    lines = []
    for record in runs.read("dense-8k"):
        record.pop("weights", None)
        lines.append(json.dumps(record))
    (tmp_path / "dense-8k.jsonl").write_text("\n".join(lines))
    page = report("dense-8k", tmp_path)
    assert "No weights of seed 0 are kept" in page and len(Links(page).images) == 1


def test_no_records_no_page(tmp_path):
    with pytest.raises(ValueError, match="no records of 'dense-8k'"):
        report("dense-8k", tmp_path)
