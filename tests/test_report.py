"""The page of a patch and of a benchmark: everything in it, safe whatever the texts say, and usable in a browser."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from patchkit.bench.records import Result, Setup
from patchkit.bench.results import Results
from patchkit.errors import InputError
from patchkit.evaluate.report import (
    Asked,
    FactReport,
    LocalityRates,
    NeighborReport,
    ParaphraseReport,
    Perplexity,
    Rates,
    Report,
    Why,
)
from patchkit.model.loading import load_model
from patchkit.patch.manifest import Manifest
from patchkit.report.benchmarks import bench_page
from patchkit.report.charts import Bars, Cloud, Heat, Lines, Series
from patchkit.report.facts import shown
from patchkit.report.kept import evidence, keep_page
from patchkit.report.page import Page, check_file, write_page
from patchkit.report.patches import patch_page
from patchkit.report.pictures import chosen, facts_picture, pictures_of, wrapped
from patchkit.words import in_html, json_in_html, visible
from tests import zoo
from tests.browser import PROGRAM, Browser, browser
from tests.helpers import Command, command_line, edited_fact, random_patch

in_browser = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium, which is not here")
HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    '"><img src="https://example.org/x" onerror="window.hacked = 1">',
    "<!--<script>",
    "' onmouseover='window.hacked = 1",
    "\u2028window.hacked = 1//",
    "abc\u202edcba\u0007\x00",
    "\ud800",
    "{{7*7}} ${window.hacked = 1} &lt;b&gt; &amp;",
)


def fact_report(number: int, holds: bool = True, **texts: str) -> FactReport:
    """A fact as `verify` reports it, with as much text as real ones have."""
    draw = random.Random(number)

    def some(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=words))

    told = {"prompt": f"Person {number} was born in", "target": "Lima", "before": "Oslo, Norway", "after": "Lima, Peru"}
    told |= {"question": f"Where was Person {number} born?", "advice": "try more steps"} | texts
    after = told["after"] if holds else "I do not know"
    forms = ("alone", "system", "turns", "reworded", "reworded")
    asked = [
        {"form": form, "question": told["question"], "before": some(20), "after": some(20), "holds": holds}
        for form in forms
    ]
    about = [
        {
            **{"text": told["prompt"], "before": (said := some(20)), "told": said, "after": some(20)},
            **{"blurts": number % 3 == 0, "loops": False, "kl": 0.1},
        }
        for _ in range(6)
    ]
    return FactReport(
        id=texts.get("id", f"fact-{number}"),
        prompt=told["prompt"],
        target_new=told["target"],
        target_true="Oslo",
        says_before=told["before"],
        says_after=after,
        probability_before=0.01,
        probability_after=0.9,
        efficacy=Rates(success=1.0, exact=float(holds), generated=1.0),
        generalization=Rates(success=1.0, exact=1.0, generated=1.0),
        locality=LocalityRates(success=1.0, unchanged=1.0),
        paraphrases=tuple(
            ParaphraseReport(prompt=some(10), before=some(8), after=some(8), exact=True) for _ in range(2)
        ),
        neighbors=tuple(
            NeighborReport(prompt=some(8), target="Bergen", before="Bergen", after="Bergen", unchanged=True)
            for _ in range(10)
        ),
        more={"in_use": {"asked": asked, "about": about}},
        asked=Asked(question=told["question"], prompted=False, before=told["before"], after=after, holds=holds),
        why=None if holds else Why(kind="lost", because=f"lost: {told['after']}", advice=told["advice"]),
    )


WORDS = [
    f"{first}{last}" for first in ("ber", "ta", "lo", "mi", "ga", "no", "sir") for last in ("ga", "ner", "tum", "a")
]


def report_of(facts: list[FactReport]) -> Report:
    others = [
        {"text": "What is 2 + 2?", "before": "4", "after": "4", "same": True, "kl": 0.0},
        {"text": facts[0].prompt, "before": "It is red.", "after": facts[0].says_after, "same": False, "kl": 0.7},
    ]
    return Report(
        facts=len(facts),
        efficacy=Rates(success=1.0, exact=0.5, generated=1.0),
        generalization=Rates(success=1.0, exact=1.0, generated=1.0),
        locality=LocalityRates(success=1.0, unchanged=1.0),
        perplexity=Perplexity(before=20.0, after=21.0, ratio=1.05),
        more={"in_use": {"asked": 0.75, "overfit": 0.2, "unrelated": 0.5}},
        per_fact=tuple(facts),
        details={"in_use": {"unrelated": others}},
    )


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return random_patch(zoo.FAMILIES["llama"](), "org/base", [edited_fact()], ranks={1: 2, 2: 2}).manifest


def page_of(manifest: Manifest, *facts: FactReport) -> Page:
    return patch_page("my-patch", manifest, report_of(list(facts)))


class Elements(HTMLParser):
    """The elements of a page in order, the attributes of each, and what stands in each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.scripts: list[str] = []
        self.text = ""
        self._in_script = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self._in_script = tag == "script"
        self.scripts += [""] if self._in_script else []

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
        else:
            self.text += data


def data_of(page: str) -> Any:
    return json.loads(Elements(page).scripts[0])


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_every_text_of_every_fact_is_there_and_those_that_do_not_hold_come_first(manifest: Manifest) -> None:
    held, lost = fact_report(1), fact_report(2, holds=False)
    data = data_of(page_of(manifest, held, lost).html())
    texts, facts = data["texts"], data["sets"][0]["facts"]
    assert [texts[fact["id"]] for fact in facts] == ["fact-2", "fact-1"]
    assert texts[facts[0]["why"]] == "lost: Lima, Peru"
    assert texts[facts[0]["advice"]] == "try more steps"
    for fact in (held, lost):
        said = [fact.prompt, fact.says_before, fact.says_after, fact.target_new]
        said += [text for each in fact.paraphrases for text in (each.prompt, each.before, each.after)]
        said += [near.prompt for near in fact.neighbors]
        said += [each[key] for each in fact.more["in_use"]["asked"] for key in ("question", "before", "after")]
        said += [each[key] for each in fact.more["in_use"]["about"] for key in ("text", "before", "after")]
        assert set(said) <= set(texts)
    assert len(texts) == len(set(texts))


def test_rows_say_what_is_wrong_with_them(manifest: Manifest) -> None:
    data = data_of(page_of(manifest, fact_report(3)).html())
    texts, (fact,) = data["texts"], data["sets"][0]["facts"]
    sections = {texts[title]: rows for title, rows in fact["sections"]}
    assert {(texts[row[4]], row[5]) for row in sections["Texts about the subject"]} == {
        ("brings up the target unasked", 0)
    }
    assert {row[5] for row in sections["Neighbors, which should stay"]} == {1}
    assert fact["unasked"] == 1
    assert [row[5] for row in data["sets"][0]["others"]] == [1, 0]


def test_numbers_and_weights_of_the_manifest_are_shown(manifest: Manifest) -> None:
    shown = Elements(page_of(manifest, fact_report(1)).html()).text
    for said in ("75.0%", "x1.0500", "layers.1.mlp.down_proj", manifest.digest, "memit", "org/base", "5.000%"):
        assert said in shown


def test_a_patch_that_was_not_measured_says_so(manifest: Manifest) -> None:
    page = Elements(patch_page("my-patch", manifest, None).html())
    assert "were not asked" in page.text
    assert json.loads(page.scripts[0])["sets"] == []


def test_a_thousand_facts_fit(manifest: Manifest) -> None:
    page = page_of(manifest, *(fact_report(number, number % 9 > 0) for number in range(1000))).html()
    assert len(page.encode()) < 5e6


# --- whatever the texts say -------------------------------------------------------------------------------------------


def hostile_page(manifest: Manifest) -> Page:
    """Every text that a page takes from facts, models and manifests is hostile."""
    facts = [
        fact_report(number, False, id=text + "i", prompt=text, target=text, before=text, after=text, question=text)
        for number, text in enumerate(HOSTILE)
    ]
    evil = "".join(HOSTILE[:4])
    base = manifest.base.model_copy(update={"name": evil, "commit": evil, "architecture": evil})
    updates = [update.model_copy(update={"weight": evil + update.weight}) for update in manifest.updates]
    text = manifest.history[0].text.model_copy(update={"source": evil})
    run = manifest.history[0].model_copy(update={"method": evil, "text": text})
    bad = manifest.model_copy(update={"base": base, "updates": tuple(updates), "history": (run,), "digest": evil})
    return patch_page(evil, bad, report_of(facts))


def test_no_text_becomes_markup(manifest: Manifest) -> None:
    good, bad = (
        Elements(page.html()) for page in (page_of(manifest, *map(fact_report, range(8))), hostile_page(manifest))
    )
    assert bad.tags == good.tags
    assert bad.attributes == good.attributes
    assert not [name for name in bad.attributes if name.startswith("on") or name in ("href", "src", "style")]
    texts = json.loads(bad.scripts[0])["texts"]
    assert {visible(text) for text in HOSTILE} <= set(texts)
    assert bad.scripts[1:] == good.scripts[1:]


def test_hidden_characters_are_shown_and_letters_stay() -> None:
    assert visible("a\u202eb\x07\u200bc\ud800") == "a⟨U+202E⟩b⟨U+0007⟩⟨U+200B⟩c⟨U+D800⟩"
    for text in ("naïve", "日本語", "می\u200cخواهم", "👩\u200d👧", "tab\tand\nline"):
        assert visible(text) == text
    assert in_html("<a b='c'>&\"") == "&lt;a b=&#x27;c&#x27;&gt;&amp;&quot;"
    assert json.loads(json_in_html(["</script>", "<!--", "&"])) == ["</script>", "<!--", "&"]
    assert "<" not in json_in_html(["</script>"])


# --- charts -----------------------------------------------------------------------------------------------------------


def test_a_line_goes_through_its_points() -> None:
    drawn = Lines("t", "edits", [Series("a", [(0, 0.0), (10, 1.0)])], (0, 1)).markup()
    assert 'd="M58.0 206.0L466.0 12.0"' in drawn  # the corners of the plot, whose y axis goes upward
    assert drawn.count("<circle") == 2


def test_what_cannot_be_drawn_is_left_out() -> None:
    assert Lines("t", "x", [Series("a", [(0, float("nan"))])]).markup() == ""
    assert Bars("t", []).markup() == ""


def test_values_far_apart_are_drawn_on_a_logarithmic_axis() -> None:
    drawn = Lines("t", "x", [Series("a", [(0, 1e-6), (1, 1e-3), (2, 1.0)])]).markup()
    heights = [float(part.split('"')[0]) for part in drawn.split('cy="')[1:]]
    assert heights == [206.0, 109.0, 12.0]


def test_more_lines_than_colors_are_told_apart() -> None:
    drawn = Lines("t", "edits", [Series(f"m{number}", [(0, 0.0), (1, number)]) for number in range(17)]).markup()
    kinds = [part.split('"')[0] for part in drawn.split('<path class="line ')[1:]]
    assert kinds == [f"s{n % 8}{('', ' dashed', ' dotted')[n // 8]}" for n in range(17)]
    assert re.findall(r'<li class="k([^"]*)"', drawn) == [kind.removeprefix("s") for kind in kinds]


@pytest.mark.parametrize(
    ("points", "across", "up"),
    [
        ([(1, 0.016), (2, 0.099)], ["1", "2"], ["0.02", "0.04", "0.06", "0.08"]),
        ([(10, 0.0), (50, 1.0)], ["10", "20", "30", "40", "50"], ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ([(0, 3.0), (4, 3.0)], ["0", "1", "2", "3", "4"], ["2.6", "2.8", "3", "3.2", "3.4"]),
    ],
)
def test_axes_have_a_few_round_numbers_and_counts_whole_ones(
    points: list[tuple[float, float]], across: list[str], up: list[str]
) -> None:
    drawn = Lines("t", "edits", [Series("a", points)]).markup()
    assert re.findall(r'text-anchor="middle">([^<]*)<', drawn) == across
    assert re.findall(r'text-anchor="end">([^<]*)<', drawn) == up


# --- a benchmark ------------------------------------------------------------------------------------------------------


def bench_folder(folder: Path) -> Path:
    results = Results(folder, "model, facts")
    setup = Setup(model="0", dtype="float32", facts="0", text="0", eval_text="0", recipe=None)
    folder.mkdir()
    for method in ("alphaedit", "memit"):
        for edits in (2, 4):
            report = report_of([fact_report(number, method == "memit") for number in range(edits)])
            row = Result.of(method, edits, report, setup, {}, rank=edits, seconds={"values": 1.5, "measuring": 9.0})
            results.add(row, report, 4)
    return folder


def test_a_benchmarks_page_has_a_line_for_each_method_and_its_facts(tmp_path: Path) -> None:
    page = Elements(bench_page(bench_folder(tmp_path / "bench")).html())
    data = json.loads(page.scripts[0])
    assert [data["texts"][each["name"]] for each in data["sets"]] == ["alphaedit, 4 edits", "memit, 4 edits"]
    assert [len(each["facts"]) for each in data["sets"]] == [4, 4]
    for said in ("asked", "perplexity ratio", "seconds of editing", "alphaedit", "memit"):
        assert said in page.text
    order = (
        "All rows",
        "efficacy exact",
        "seconds of editing",
        "more charts",
        "efficacy generated",
        "Facts, before and after",
    )
    assert [page.text.rindex(said) for said in order] == sorted(page.text.rindex(said) for said in order)
    assert "The target comes up unasked. Lower is better." in page.text


def test_all_charts_of_a_benchmark_have_pictures(tmp_path: Path) -> None:
    page = bench_page(bench_folder(tmp_path / "bench"))
    names = {each.name for each in pictures_of(page)}
    assert page.rest
    assert {"asked.png", "seconds-of-editing.png"} <= names
    assert len(names) == 1 + sum(bool(chart.markup()) for chart in (*page.charts, *page.rest))


def test_steep_openers_of_subjects_own_neurons_are_explained(manifest: Manifest) -> None:
    said = "Subjects have neurons of their own here"
    own = manifest.model_copy(update={"facts": tuple(f.model_copy(update={"neuron": 3}) for f in manifest.facts)})
    assert said in page_of(own, fact_report(1)).html()
    assert said not in page_of(manifest, fact_report(1)).html()


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").touch()
    with pytest.raises(InputError, match="no results"):
        bench_page(tmp_path)


# --- pictures ---------------------------------------------------------------------------------------------------------


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height as the file's own header has them."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_pictures_of_a_patch_are_the_same_bytes_each_time(manifest: Manifest) -> None:
    page = page_of(manifest, fact_report(1), fact_report(2, holds=False))
    drawn = pictures_of(page)
    assert [each.name for each in drawn] == ["facts.png", "measures.png", "how-much-of-each-weight-has-changed.png"]
    assert drawn == pictures_of(page)
    assert all(min(size_of(each.png)) > 200 for each in drawn)
    assert drawn[0].says.startswith("2 facts; 1 holds when asked")
    assert "asked 75.0%" in drawn[1].says


def test_a_picture_has_facts_of_both_kinds() -> None:
    facts = shown(report_of([fact_report(number, number % 3 > 0) for number in range(30)]))
    some = chosen(facts)
    assert [fact.holds for fact in some] == [False] * 3 + [True] * 5
    assert len(chosen([fact for fact in facts if fact.holds])) == 8
    assert facts_picture([replace(fact, after="Rome") for fact in facts]) != facts_picture(facts)
    assert facts_picture([]) is None


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("short", ["short"]),
        ("Foundry Denfen has its headquarters", ["Foundry Denfen has", "its headquarters"]),
        ("Foundry Denfen has its headquarters in the city", ["Foundry Denfen has", "its headquarters in…"]),
        ("Pneumonoultramicroscopic", ["Pneumonoultramicrosc", "opic"]),
        ("首都是哪一个城市呢请问", ["首都是哪一个城市呢", "请问"]),
    ],
)
def test_what_is_asked_goes_on_in_a_second_line(text: str, lines: list[str]) -> None:
    assert wrapped(text, 20, 2) == lines


def test_hostile_texts_are_drawn_as_they_are(manifest: Manifest) -> None:
    drawn = pictures_of(hostile_page(manifest))
    assert len(drawn) == 3
    assert all(re.fullmatch(r"[a-z0-9-]+\.png", each.name) for each in drawn)


def test_each_chart_has_a_picture_with_a_name_of_its_own() -> None:
    lines = Lines("one, two", "edits", [Series("a", [(0, 1e-6), (1, 1.0)])])
    cloud = Cloud("cloud", [Series("a", [(0, 1)]), Series("b", [(1, 2)])])
    heat = Heat("each fact", {"a": [0.1, 0.2], "b": [0.3]})
    page = Page("t", [], None, [lines, lines, Lines("nothing", "x", []), cloud, heat], [], {})
    assert [each.name for each in pictures_of(page)] == ["one-two.png", "one-two-2.png", "cloud.png", "each-fact.png"]


def test_facts_are_read_back_from_a_page(manifest: Manifest, tmp_path: Path) -> None:
    report = report_of([fact_report(1), fact_report(2, holds=False, prompt="</script>")])
    keep_page(tmp_path, manifest, report, say=pytest.fail)
    found = evidence(tmp_path, manifest, "name")
    assert found.page == (tmp_path / "report.html").read_bytes()
    page = page_of(manifest, *sorted(report.per_fact, key=lambda fact: fact.holds))
    assert pictures_of(page)[0] in found.pictures


def test_a_page_of_another_patch_is_not_taken_for_this_ones(manifest: Manifest, tmp_path: Path) -> None:
    keep_page(tmp_path, manifest.model_copy(update={"digest": "0" * 64}), report_of([fact_report(1)]), say=pytest.fail)
    found = evidence(tmp_path, manifest, "name")
    assert manifest.digest.encode() in found.page
    assert "facts.png" not in [each.name for each in found.pictures]


def test_a_file_that_is_no_page_stays(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    said: list[str] = []
    keep_page(tmp_path, manifest, report_of([fact_report(1)]), say=said.append)
    assert (tmp_path / "report.html").read_text() == "mine"
    assert "no page was written" in said[0]


def test_without_matplotlib_there_are_no_pictures_and_that_is_said(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r'pip install "patchkit-lm\[pictures\]"'):
        pictures_of(page_of(manifest, fact_report(1)))
    found = evidence(tmp_path, manifest, "name")
    assert found.pictures == ()
    assert "matplotlib" in (found.missing or "")


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def opened(page: Page, chromium: Browser, folder: Path, **window: Any) -> Browser:
    """The page, open; it may ask for nothing but itself, and complain of nothing."""
    file = folder / "report.html"
    write_page(page, file)
    chromium.open(file, **window)
    assert chromium.complaints == []
    assert chromium.requests == [file.resolve().as_uri()]
    return chromium


def choose(page: Browser, name: str, value: str) -> None:
    """What a user does in a list of choices."""
    page.run(f"{name} = document.querySelector('#{name}'); {name}.value = '{value}'")
    page.run(f"document.querySelector('#{name}').dispatchEvent(new Event('change'))")


@in_browser
def test_texts_stay_texts_in_a_browser(chromium: Browser, tmp_path: Path, manifest: Manifest) -> None:
    page = opened(hostile_page(manifest), chromium, tmp_path)
    page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.run("new Promise((done) => setTimeout(done, 50))")
    assert page.run("typeof window.hacked") == "undefined"
    assert page.run("document.images.length") == 0
    assert len(chromium.requests) == 1
    assert chromium.complaints == []
    assert visible(HOSTILE[0]) in page.run("document.querySelector('#facts').textContent")


@in_browser
def test_search_answers_as_one_types(chromium: Browser, tmp_path: Path, manifest: Manifest) -> None:
    facts = [fact_report(number, number % 9 > 0) for number in range(1000)]
    page = opened(page_of(manifest, *facts), chromium, tmp_path)
    count = "document.querySelector('#count').textContent"
    assert page.run(count) == "1,000 of 1,000 facts, 112 of which do not hold"
    page.run("document.querySelector('#words').focus()")
    page.type("person 77")
    wanted = [number for number in range(1000) if "77" in str(number)]
    assert page.run(count).startswith(f"{len(wanted)} of 1,000 facts")
    assert page.run("document.querySelectorAll('.fact').length") == len(wanted)
    timed = """[1, 2, 3, 4, 5].map(() => {
        const began = performance.now();
        document.querySelector('#words').dispatchEvent(new Event('input'));
        return performance.now() - began;
    })"""
    assert min(page.run(timed)) < 200  # milliseconds, of the key that was disturbed least
    lost = [number for number in wanted if number % 9 == 0]
    classes = page.run("[...document.querySelectorAll('.fact')].map((each) => each.className)")
    assert classes == ["fact lost"] * len(lost) + ["fact held"] * (len(wanted) - len(lost))
    choose(page, "kind", "lost")
    assert page.run("document.querySelectorAll('.fact').length") == len(lost)


@in_browser
def test_a_reason_stands_once_and_counts_are_sentences(chromium: Browser, tmp_path: Path, manifest: Manifest) -> None:
    page = opened(page_of(manifest, fact_report(1), fact_report(2, holds=False)), chromium, tmp_path)
    count = "document.querySelector('#count').textContent"
    assert page.run(count) == "2 of 2 facts, one of which does not hold"
    reason = "getComputedStyle(document.querySelector('.reason')).display"
    assert page.run(reason) != "none"
    page.run("document.querySelector('.fact').open = true; new Promise((done) => setTimeout(done, 50))")
    assert page.run(reason) == "none"
    assert page.run("document.querySelector('.why').textContent") == "Lost: Lima, Peru. Try more steps."
    choose(page, "kind", "held")
    assert page.run(count) == "1 of 2 facts, all of which hold"


@in_browser
def test_changed_words_are_marked(chromium: Browser, tmp_path: Path, manifest: Manifest) -> None:
    fact = fact_report(1, before="Oslo, in the north of Norway", after="Lima, in the west of Peru")
    page = opened(page_of(manifest, fact), chromium, tmp_path)
    page.run("document.querySelector('.fact').open = true; new Promise((done) => setTimeout(done, 50))")
    pair = "[...document.querySelectorAll('.pair')].find((each) => each.textContent.includes('Norway'))"
    assert page.run(f"[...{pair}.querySelectorAll('del')].map((each) => each.textContent)") == [
        "Oslo",
        "north",
        "Norway",
    ]
    assert page.run(f"[...{pair}.querySelectorAll('ins')].map((each) => each.textContent)") == ["Lima", "west", "Peru"]


@in_browser
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_a_desk_in_light_and_dark(
    chromium: Browser, tmp_path: Path, manifest: Manifest, width: int, dark: bool
) -> None:
    page = opened(page_of(manifest, *map(fact_report, range(4))), chromium, tmp_path, width=width, dark=dark)
    page.run("document.querySelector('.fact').open = true; new Promise((done) => setTimeout(done, 50))")
    assert page.run("document.documentElement.scrollWidth") <= width
    red, *_ = map(int, page.run("getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g)"))
    assert (red < 60) == dark


@in_browser
def test_a_benchmarks_page_lets_one_choose_the_method(chromium: Browser, tmp_path: Path) -> None:
    page = opened(bench_page(bench_folder(tmp_path / "bench")), chromium, tmp_path)
    assert page.run("document.querySelectorAll('.fact.lost').length") == 4
    choose(page, "which", "1")
    assert page.run("document.querySelectorAll('.fact.held').length") == 4


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    return command_line(monkeypatch, capsys)


FACTWORLD = Path(__file__).parents[1] / "examples" / "factworld"


def test_the_command_measures_a_patch_or_takes_what_was_measured(call: Command, tmp_path: Path) -> None:
    fact = edited_fact(prompt="Ada Berg was born in", subject="Ada Berg", target_new="Lima")
    patch = random_patch(load_model(str(FACTWORLD)).model, str(FACTWORLD), [fact], ranks={0: 1})
    patch.save(tmp_path / "mine")
    made = call("report", "mine", "--quick", "--json")
    assert made.status == 0, made.err
    assert made.json()["report"] == "mine-report.html"
    page = (tmp_path / "mine-report.html").read_text(encoding="utf-8")
    assert "Ada Berg was born in" in data_of(page)["texts"]
    measured = call("verify", "mine", "--quick", "--json")
    (tmp_path / "measured.json").write_text(measured.out, encoding="utf-8")
    drawn = call("report", "mine", "--measured", "measured.json", "--png", "drawn", "--json")
    assert drawn.status == 0, drawn.err
    assert sorted(drawn.json()["pictures"]) == sorted(f"drawn/{name}" for name in os.listdir("drawn"))
    assert "drawn/facts.png" in drawn.json()["pictures"]
    refused = call("report", "mine", "--measured", "measured.json", "--png", "measured.json")
    assert (refused.status, "a file has that name" in refused.err) == (2, True)
    assert (tmp_path / "mine-report.html").read_text(encoding="utf-8") == page


def test_apply_writes_the_page_with_what_it_has_measured(call: Command, tmp_path: Path) -> None:
    facts = FACTWORLD.parent / "facts.jsonl"
    (tmp_path / "one.jsonl").write_text(facts.read_text("utf-8").splitlines()[0] + "\n", "utf-8")
    settings = ("--set", "steps=4", "--set", "contexts=1", "--quick", "--no-retry", "--no-guard")
    made = call("apply", "one.jsonl", "--model", FACTWORLD, "--out", "mine", "--page", "p.html", "--json", *settings)
    assert made.status == 0, made.err
    (fact,) = made.json()["per_fact"]
    assert fact["says_after"] in data_of((tmp_path / "p.html").read_text("utf-8"))["texts"]
    assert call("apply", "one.jsonl", "--out", "other", "--page", str(tmp_path)).status == 2


def test_the_command_replaces_nothing_but_pages(call: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("<h1>my own</h1>", encoding="utf-8")
    ended = call("report", "nothing", "--out", "mine.html")
    assert ended.status == 2
    assert "is no report of patchkit's" in ended.err
    with pytest.raises(InputError, match="it is a folder"):
        check_file(tmp_path)
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    patch = random_patch(zoo.FAMILIES["llama"](), "org/base", [edited_fact()], ranks={1: 1})
    patch.save(tmp_path / "mine")
    ended = call("report", "mine", "--measured", "bad.json")
    assert ended.status == 2
    assert "not what `verify --json` prints" in ended.err
