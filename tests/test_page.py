"""The page in a real browser: what a person at the line and a quality manager do with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import station_parts as plates
from conftest import texture
from page_parts import VIEWS, Person, Served, axe, browser
from quality_parts import dented, nagl_bundle, png

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def made() -> Iterator[Any]:
    with browser() as launched:
        yield launched


def test_pictures_are_inspected_and_the_last_is_told_large(made: Any, tmp_path: Path) -> None:
    bundle = plates.bundle(tmp_path)
    with Served(tmp_path / "station", bundle) as station, Person(made, station.url) as person:
        person.go("inspect")
        person.sees("READY")
        person.sees("Calibrated on 19 normal pictures")
        person.upload(("good.png", plates.plain()))
        person.page.wait_for_selector(".band.ok")
        person.upload(("bad.png", plates.bad()))
        person.page.wait_for_selector(".band.ng")
        assert person.word() == "NG"
        parts = station.get("/inspections")["items"]
        assert [(each["image"], each["source"]) for each in parts] == [
            ("bad.png", "page"),
            ("good.png", "page"),
        ]


@pytest.fixture(scope="module")
def gears(tiny_weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that can be taught defects."""
    bundle, _ = nagl_bundle(tiny_weights, tmp_path_factory.mktemp("gears"))
    return bundle


@pytest.fixture
def line(gears: Path, tmp_path: Path) -> Iterator[Served]:
    """A station with some history: five good gears, three dented, one that waits."""
    with Served(tmp_path / "station", gears) as station:
        for k in range(5):
            station.decided(png(texture(300 + k)), "good", part_id=f"good {k}")
        for k in range(3):
            station.decided(png(dented(310 + k)), "defect", part_id=f"dented {k}")
        station.inspect(png(dented(320)), part_id="waits")
        yield station


@pytest.fixture
def person(made: Any, line: Served) -> Iterator[Person]:
    with Person(made, line.url) as somebody:
        yield somebody


@slow
def test_the_queue_is_decided_by_single_keys(person: Person, line: Served) -> None:
    person.go("review")
    person.sees("waits")
    person.page.keyboard.press("r")
    person.page.wait_for_selector("#reason:focus")
    person.page.keyboard.type("dent at the rim")
    person.page.keyboard.press("Escape")
    person.page.keyboard.press("d")
    person.sees("Nothing waits")
    part = line.get("/inspections", part_id="waits")["items"][0]
    assert (part["decision"], part["decision_reason"]) == ("defect", "dent at the rim")
    person.page.keyboard.press("u")
    person.page.wait_for_selector("#reason")
    person.page.keyboard.press("g")
    person.sees("Nothing waits")
    assert line.get("/inspections", part_id="waits")["items"][0]["decision"] == "good"
    assert line.get("/audit/verify")["ok"]


@slow
def test_what_was_put_off_comes_again(person: Person, line: Served) -> None:
    """Behind the last part of the queue; nobody reads that nothing waits while something does."""
    for number in range(2):
        line.inspect(png(dented(340 + number)), part_id=f"late {number}")

    def waiting() -> int:
        return len(line.get("/inspections", pending="true")["items"])

    assert waiting() == 3
    person.go("review")
    person.page.wait_for_selector(".band")
    person.page.keyboard.press("ArrowRight")
    for left in (2, 1):
        person.page.keyboard.press("d")
        person.sees(f"{left} part{'s' * (left > 1)} to decide")
        assert waiting() == left
    person.page.wait_for_selector(".band")
    assert "Nothing waits" not in person.page.inner_text("#view")
    person.page.keyboard.press("d")
    person.sees("Nothing waits")
    assert waiting() == 0


@slow
def test_a_part_that_just_came_up_is_not_decided_by_a_late_hand(
    person: Person, line: Served
) -> None:
    person.go("inspect")
    person.page.wait_for_selector(".band.review")
    line.inspect(png(texture(330)), part_id="surprise")
    person.page.wait_for_selector(".band :text('surprise')")
    person.page.keyboard.press("d")
    person.sees("came up just now")
    assert line.get("/inspections", part_id="surprise")["items"][0]["decision"] is None
    person.page.wait_for_timeout(1000)
    person.page.keyboard.press("g")
    person.sees("surprise: decided good")


@slow
def test_a_scanned_code_is_a_part_id_and_no_command(person: Person, line: Served) -> None:
    person.go("inspect")
    person.page.wait_for_selector(".band :text('waits')")
    person.page.keyboard.type("GD-4711\n")
    person.page.wait_for_function("() => document.querySelector('#part-id').value === 'GD-4711'")
    assert person.page.url.endswith("#/inspect")
    assert line.get("/inspections", part_id="waits")["items"][0]["decision"] is None
    person.upload(("any.png", png(texture(332))))
    person.page.wait_for_selector(".band :text('GD-4711')")
    assert person.page.input_value("#part-id") == ""


@slow
def test_map_outlines_and_zoom(person: Person, line: Served) -> None:
    uid = line.get("/inspections", part_id="dented 0")["items"][0]["id"]
    person.go(f"part/{uid}")
    coloured = """() => {
        const canvas = document.querySelector('.stack canvas');
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return canvas.width > 90 && data.some((value, k) => k % 4 === 3 && value > 0);
    }"""
    person.page.wait_for_function(coloured)
    heat, lines = (person.page.locator(".stack canvas").nth(k) for k in range(2))
    person.page.get_by_label("Map opacity").fill("20")
    assert heat.evaluate("canvas => canvas.style.opacity") == "0.2"
    person.page.keyboard.press("m")
    person.page.wait_for_function(
        "() => document.querySelector('.stack canvas').style.opacity === '0'"
    )
    assert lines.is_visible()
    person.page.keyboard.press("o")
    lines.wait_for(state="hidden")
    person.page.keyboard.press("z")
    person.page.wait_for_selector(".frame.zoomed-in")
    scales = "[...document.querySelectorAll('.stack')].map(stack => stack.style.transform)"
    assert person.page.evaluate(scales) == ["scale(3)", "scale(3)"]  # its neighbour's as well


@slow
def test_a_part_that_is_worked_on_stays(person: Person, line: Served) -> None:
    person.go("inspect")
    person.page.wait_for_selector(".band :text('waits')")
    person.page.fill("#reason", "look at the rim")
    line.inspect(png(texture(331)), part_id="next")
    person.sees("Held; 1 newer")
    assert person.page.input_value("#reason") == "look at the rim"
    person.press("Defect")
    person.page.wait_for_selector(".band :text('next')")  # and the line is followed again
    part = line.get("/inspections", part_id="waits")["items"][0]
    assert (part["decision"], part["decision_reason"]) == ("defect", "look at the rim")


@slow
@pytest.mark.parametrize("way", ["box", "brush"])
def test_a_defect_is_taught_tried_saved_and_rolled_back(
    person: Person, line: Served, way: str
) -> None:
    good = line.get("/inspections", part_id="good 0")["items"][0]["id"]
    bad = line.get("/inspections", part_id="dented 0")["items"][0]["id"]
    person.go(f"part/{good}")
    person.press("Teach as normal")
    person.sees("To be taught as normal")
    person.go(f"part/{bad}")
    person.press("Teach the defect")
    area = person.page.locator(".mark-area canvas")
    area.wait_for()
    if way == "brush":
        person.page.get_by_role("button", name="Brush", exact=True).click()
    box = area.bounding_box()
    person.page.mouse.move(box["x"] + box["width"] * 0.42, box["y"] + box["height"] * 0.34)
    person.page.mouse.down()
    person.page.mouse.move(box["x"] + box["width"] * 0.66, box["y"] + box["height"] * 0.58, steps=5)
    person.page.mouse.up()
    person.press("Teach this place")
    person.sees("To be taught as a defect")
    person.go("teach")
    person.sees("Collected: 2")
    assert line.get("/recipes")[0]["versions"] == 1
    person.press("See what would change")
    person.sees("Labelled history, judged with it")
    assert line.get("/recipes")[0]["versions"] == 1
    person.page.fill("#teach-note", "the dent of Monday")
    person.press("Save as a new version")
    person.sees("Version 2 judges from now on")
    taught = line.get("/recipes")[0]
    assert taught["active"]["number"] == 2 and taught["categories"][0]["n_abnormal"] == 1
    assert taught["active"]["note"] == "the dent of Monday"
    person.go("recipes")
    person.press("Roll back to version 1")
    person.page.get_by_role("dialog").get_by_role("button", name="Roll back").click()
    person.sees("Version 1 judges from now on")
    assert line.get("/recipes")[0]["active"]["number"] == 1


@slow
def test_thresholds_show_their_cost_before_they_are_saved(person: Person, line: Served) -> None:
    person.go("thresholds")
    slider = person.page.get_by_role("slider", name="NG above")
    rejects = person.page.locator(".counts .big").first
    before = float(slider.get_attribute("aria-valuenow"))
    slider.focus()
    slider.press("Home")
    assert float(slider.get_attribute("aria-valuenow")) < before
    assert rejects.inner_text() == "5"  # all good parts
    person.page.wait_for_selector("text=true rate at most")
    assert line.get("/recipes")[0]["versions"] == 1
    slider.press("End")
    person.page.get_by_role("slider", name="REVIEW above").press("End")
    assert person.page.locator(".counts .big").nth(1).inner_text() == "3"  # all defects are missed
    handle = slider.bounding_box()
    middle, label = handle["x"] + handle["width"] / 2, handle["y"] + 12
    person.page.mouse.move(middle, label)
    person.page.mouse.down()
    person.page.mouse.move(middle - 60, label, steps=4)
    person.page.mouse.up()
    wanted = float(slider.get_attribute("aria-valuenow"))
    assert wanted < float(slider.get_attribute("aria-valuemax"))
    person.page.fill("#threshold-note", "fewer stops")
    person.press("Save as a new version")
    person.sees("Version 2 judges from now on")
    active = line.get("/recipes")[0]["active"]
    assert active["thresholds"]["gear"]["ng"] == pytest.approx(wanted, rel=1e-3)
    person.sees("Thresholds set by hand: no rate of false rejects is promised.")
    assert line.inspect(png(dented(321)))["by_hand"]


@slow
def test_a_golden_sample_stops_a_change_that_breaks_it(person: Person, line: Served) -> None:
    bad = line.get("/inspections", part_id="dented 0")["items"][0]["id"]
    person.go(f"part/{bad}")
    person.press("Golden sample")
    person.page.get_by_role("dialog").get_by_role("button", name="Must fail").click()
    person.sees("Kept as a golden sample")
    person.go("golden")
    person.sees("must fail")
    person.sees("It holds now")
    person.go("thresholds")
    for name in ("NG above", "REVIEW above"):
        person.page.get_by_role("slider", name=name).press("End")
    person.sees("would break")
    assert person.page.get_by_role("button", name="Save as a new version").is_disabled()


@slow
def test_dark_follows_the_computer_and_the_switch(made: Any, line: Served) -> None:
    def paper(person: Person) -> str:
        return str(person.page.evaluate("getComputedStyle(document.body).backgroundColor"))

    with Person(made, line.url, color_scheme="dark") as person:
        person.go("inspect")
        dark = paper(person)
        person.page.select_option("#theme", "light")
        assert paper(person) != dark
        person.page.reload()
        person.page.wait_for_selector("[data-ready]")
        assert paper(person) != dark  # the switch is kept
        person.page.select_option("#theme", "auto")
        assert paper(person) == dark
        person.page.emulate_media(color_scheme="light")
        person.page.wait_for_selector("html[data-theme=light]")
        assert paper(person) != dark


@slow
def test_nothing_is_cut_off_on_a_narrow_screen(made: Any, line: Served) -> None:
    uid = line.get("/inspections")["items"][0]["id"]
    with Person(made, line.url, viewport={"width": 360, "height": 740}) as person:
        for view in (*VIEWS, f"part/{uid}"):
            person.go(view)
            person.page.wait_for_timeout(150)
            assert person.page.evaluate("document.documentElement.scrollWidth") <= 360, view
        person.press("Menu")
        person.page.get_by_role("link", name="Audit log").click()
        person.page.wait_for_selector("[data-view='#/audit'][data-ready]")


@slow
def test_a_shift_without_a_mouse(person: Person, line: Served) -> None:
    page, keys = person.page, person.page.keyboard
    page.on("filechooser", lambda _: None)  # from now on; asked for late, a chooser may slip by
    person.go("inspect")
    page.wait_for_selector(".band.review")
    _tab_to(person, "Choose pictures")
    with page.expect_file_chooser() as chooser:
        keys.press("Enter")
    chooser.value.set_files(
        [{"name": "k.png", "mimeType": "image/png", "buffer": png(texture(340))}]
    )
    page.wait_for_selector(".band :text('k.png')")
    keys.press("2")  # Review
    page.wait_for_selector("[data-view='#/review'][data-ready]")
    keys.press("d")
    person.sees("Nothing waits")
    keys.press("4")  # Thresholds
    page.wait_for_selector("[data-view='#/thresholds'][data-ready]")
    _tab_to(person, "NG above")
    keys.press("ArrowRight")
    _tab_to(person, "Save as a new version")
    page.wait_for_function("() => !document.activeElement.disabled")
    keys.press("Enter")
    person.sees("Version 2 judges from now on")
    keys.press("9")  # Recipes
    page.wait_for_selector("[data-view='#/recipes'][data-ready]")
    _tab_to(person, "Roll back to version 1")
    keys.press("Enter")
    keys.type("back")
    keys.press("Enter")
    person.sees("Version 1 judges from now on")
    assert line.get("/recipes")[0]["active"]["number"] == 1


def _tab_to(person: Person, name: str) -> None:
    """Press Tab until something of that name has the focus."""
    said = "e => e.getAttribute('aria-label') || e.innerText || ''"
    for _ in range(80):
        person.page.keyboard.press("Tab")
        focused = person.page.evaluate_handle("document.activeElement")
        if str(focused.evaluate(said)).startswith(name):
            return
    raise AssertionError(f"Tab never reaches {name!r}")


@slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(made: Any, line: Served, scheme: str) -> None:
    source = axe()
    uid = line.get("/inspections", part_id="dented 0")["items"][0]["id"]
    with Person(made, line.url, color_scheme=scheme) as person:
        for view in (*VIEWS, f"part/{uid}"):
            person.go(view)
            person.page.wait_for_timeout(300)
            assert person.violations(source) == [], view
        for button in ("Shortcuts", "local, engineer", "Golden sample", "Teach the defect"):
            person.press(button)
            person.page.get_by_role("dialog").wait_for()
            assert person.violations(source) == [], button
            person.page.keyboard.press("Escape")


@slow
def test_keys_are_asked_for_and_roles_hold(
    made: Any, gears: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    data = tmp_path / "station"
    data.mkdir()
    keys = {}
    for role in ("engineer", "operator", "viewer"):
        code, out, _ = run("key", "add", f"Kim the {role}", "--role", role, "--data", data)
        assert code == 0
        keys[role] = out.strip()
    with Served(data, gears) as station, Person(made, station.url) as person:
        person.page.goto(station.url)
        for role, can in (("operator", True), ("viewer", False)):
            if role != "operator":
                person.page.click("#who")
            person.page.fill("dialog input[type=password]", keys[role])
            person.press("Use this key")
            person.sees(f"Kim the {role}, {role}")
            if can:
                person.upload(("bad.png", png(dented(350))))
                person.page.wait_for_selector(".band.review")
                person.page.wait_for_function(
                    "() => document.querySelector('.stack img')?.naturalWidth > 0"
                )
            person.go("review")
            assert person.page.get_by_role("button", name="Good").count() == int(can)
        assert person.page.evaluate(
            "localStorage.length === 0 || !JSON.stringify(localStorage).includes('ast_')"
        )
        person.go("shift")
        with person.page.expect_popup() as popup:
            person.page.get_by_role("link", name="Open the report").click()
        popup.value.get_by_role("heading", name="Shift report").wait_for()
        person.page.click("#who")
        person.press("Forget my key")
        person.sees("A key is needed")


@slow
def test_what_goes_wrong_is_said_in_one_line(made: Any, gears: Path, tmp_path: Path) -> None:
    data = tmp_path / "station"
    with Person(made, "") as person:
        with Served(data, gears) as station:
            person.url = station.url
            person.go("inspect")
            person.upload(("broken.png", b"no picture"))
            person.sees("1 picture not inspected")
            person.sees("broken.png:")
            person.go("recipes")
            person.page.fill("input[placeholder^='/data']", str(tmp_path / "nowhere"))
            person.page.get_by_role("button", name="Watch", exact=True).click()
            person.page.wait_for_selector("#notice .bad")
            assert "nowhere" in person.page.inner_text("#notice .bad p")
            port = station.port
        person.sees("The station does not answer")
        with Served(data, gears, port=port):
            person.page.wait_for_selector("#lost", state="hidden")


@slow
def test_folders_drift_repeatability_report_and_audit(
    person: Person, line: Served, tmp_path: Path
) -> None:
    camera = tmp_path / "camera"
    camera.mkdir()
    (camera / "0001.png").write_bytes(png(texture(360)))
    person.go("recipes")
    person.page.fill("input[placeholder^='/data']", str(camera))
    person.page.get_by_role("button", name="Watch", exact=True).click()
    person.sees("Watched: every picture")
    person.go("inspect")
    person.page.wait_for_selector(".band :text('0001.png')")
    person.go("recipes")
    bundle = plates.zipped(plates.bundle(tmp_path))
    person.page.set_input_files(
        "input[accept^='.zip']",
        [{"name": "plates.zip", "mimeType": "application/zip", "buffer": bundle}],
    )
    person.press("Upload and check")
    person.sees("plates, version 1, judges from now on")
    person.page.locator("#tools select").first.select_option("gears")
    for part in range(2):
        for look in range(2):
            line.inspect(
                png(texture(370 + 10 * part + look)), part_id=f"gauge {part}", recipe="gears"
            )
    person.go("line")
    person.sees("No sign of a change")
    person.sees("gauge 1")
    assert person.page.get_by_role("meter").count() == 2
    person.go("shift")
    with person.page.expect_popup() as popup:
        person.page.get_by_role("link", name="Open the report").click()
    popup.value.get_by_role("heading", name="Shift report: gears").wait_for()
    styled = popup.value.evaluate("document.adoptedStyleSheets[0].cssRules.length")
    assert styled > 3
    person.go("audit")
    person.press("Verify the whole log")
    person.sees("The log is whole.")
    person.go("parts")
    with person.page.expect_download() as saved:
        person.press("Save as CSV")
    assert saved.value.path().read_text().count("gauge") == 4


@slow
def test_pictures_are_dropped_and_pasted(person: Person, line: Served) -> None:
    person.go("parts")
    for kind, member in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        person.page.evaluate(
            """async ([kind, member, bytes]) => {
                const data = new DataTransfer();
                const content = new Uint8Array(bytes);
                data.items.add(new File([content], `${kind}.png`, {type: "image/png"}));
                const event = new Event(kind, {bubbles: true, cancelable: true});
                Object.defineProperty(event, member, {value: data});
                document.body.dispatchEvent(event);
            }""",
            [kind, member, list(png(texture(380 + len(kind))))],
        )
        person.page.wait_for_selector(f".band :text('{kind}.png')")
    assert line.get("/inspections")["items"][0]["source"] == "page"
