"""The page in a real browser: examples, upload, result, correction, the collection; phone, keyboard, screen reader."""

import contextlib
import re
import shutil
import signal
import sqlite3
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_TRAIN, served
from conftest import picture as picture_file
from PIL import Image

import cluster
import label
import train
import wikiart
from common.run import load_checkpoint, save_checkpoint
from serve import panels, uploads

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium here: apt-get install chromium, as .ci/run does")
TIMEOUT = 60_000  # milliseconds: on a busy machine everything takes long


@pytest.fixture(scope="module")
def run(trained, demo, tmp_path_factory):
    """A run folder with a classifier, its codes and an untrained painter."""
    run = tmp_path_factory.mktemp("page")
    for name in ("classifier.pt", "facts.json"):
        shutil.copy(trained / name, run)
    settings = {"size": 32, "resize": "squash", "split_seed": 0, "processes": 1, "split": "test", "seed": 0}
    config = SimpleNamespace(run=run, data=demo, **settings)
    cluster.codes_of("classifier", config, torch.device("cpu"))
    classes = load_checkpoint(run / "classifier.pt")["classes"]
    arguments = {"styles": len(classes), "width": 8}
    model = wikiart.make_model("StyleAutoencoder", arguments)
    save_checkpoint(
        run / "style.pt",
        {
            "model": "StyleAutoencoder",
            "arguments": arguments,
            "classes": classes,
            "data": {"size": 32, "resize": "squash"},
            "weights": model.state_dict(),
        },
    )
    return run


@pytest.fixture(scope="module")
def bare(trained, tmp_path_factory):
    """A run folder with nothing but the MLP, which is never sure enough."""
    run = tmp_path_factory.mktemp("bare")
    checkpoint = torch.load(trained / "mlp/classifier.pt", weights_only=True)
    torch.save(checkpoint | {"temperature": 1e3}, run / "classifier.pt")
    return run


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root, which containers are, Chromium starts without its sandbox only.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, width, height=800, scheme="light"):
    """A page of this size; what its scripts complain about fails the test."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page, errors = context.new_page(), []
    page.set_default_timeout(TIMEOUT)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert not errors


@pytest.fixture
def phone(browser):
    with opened(browser, 390, 844, "dark") as page:
        yield page


@pytest.fixture
def desktop(browser):
    with opened(browser, 1280) as page:
        yield page


def open_and_upload(page, address, path):
    page.goto(address)
    page.locator("input[type=file]").first.set_input_files(path)
    page.get_by_role("heading", name=re.compile("%")).wait_for()


def open_and_upload_again(page, path):
    page.locator("input[type=file]").first.set_input_files(path)
    page.locator("figcaption", has_text=path.name).wait_for()


def choose(page, label, style):
    box = page.get_by_label(label)
    box.click()
    box.fill(style)
    page.get_by_role("option", name=style, exact=True).click()


def save(page):
    page.get_by_role("button", name="Save this label").click()
    page.get_by_text("Saved:").wait_for()


def corrections(run):
    if not (run / "corrections.sqlite").exists():
        return []
    with sqlite3.connect(run / "corrections.sqlite") as base:
        return base.execute(
            "SELECT guess, choice, picture, name FROM corrections JOIN pictures USING (hash) ORDER BY number"
        ).fetchall()


def test_from_upload_to_training_on_the_correction(run, demo, phone, tmp_path):
    """Two corrections, the server killed after each click; then export, and training on what was there and is new."""
    paths = sorted((demo / "test").rglob("*.jpg"))
    classifier = wikiart.Classifier.load(run / "classifier.pt", "cpu")
    expected = []
    for path, style in zip(paths[:2], ("Dots", "Hatching"), strict=True):
        with served(run, "--data", demo) as server:
            open_and_upload(phone, server.address, path)
            guess, share = classifier.top(classifier.predict([path])[0])[0]
            assert phone.get_by_role("heading", name=f"{guess.replace('_', ' ')}, {share:.0%}").count() == 1
            assert len(corrections(run)) == len(expected)  # nothing yet
            choose(phone, "Its style is", style)
            save(phone)
            server.send_signal(signal.SIGKILL)
            server.wait()
        expected.append((guess, style, path.read_bytes(), path.name))
        assert corrections(run) == expected
    target = tmp_path / "paintings"
    shutil.copytree(demo, target, ignore=shutil.ignore_patterns(".cache"))
    for path in paths[:2]:  # the collection has never seen them
        (target / path.relative_to(demo)).unlink()
    label.main(["export", str(target / "train"), "--run", str(run)])
    for _, style, picture, name in expected:
        exported = list((target / "train" / style).glob(f"{name.rpartition('.')[0]}-*"))
        assert [path.read_bytes() for path in exported] == [picture]
    train.main([*TINY_TRAIN, "--data", str(target), "--run", str(tmp_path / "run"), "--epochs", "1"])
    before, after = (len(wikiart.WikiArt(root, "train", size=32, processes=1)) for root in (demo, target))
    assert after == before + 2


@pytest.fixture(scope="module")
def server(run, demo):
    with served(run, "--data", demo) as process:
        yield process


def test_the_result_says_why(server, run, demo, phone):
    path = min((demo / "test").rglob("*.jpg"))
    open_and_upload(phone, server.address, path)
    assert phone.locator(".bars meter").count() >= 3
    alternatives = phone.locator("figure img").evaluate_all("images => images.map(image => image.alt)")
    assert alternatives[0] == "The uploaded painting"
    assert re.match("Evidence for .*: strongest (top|middle|bottom|centre)", alternatives[1])
    assert len(alternatives) == 2 + 6
    styles = [name.name.replace("_", " ") for name in (demo / "train").iterdir()]
    assert all(re.match(r".+ by .+, .+, \d{4}$", text) and text.split(", ")[1] in styles for text in alternatives[2:])
    sizes = phone.locator("figure img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert min(sizes) > 0

    choose(phone, "Repaint it as", "Facets")
    phone.get_by_role("button", name="Repaint").click()
    phone.get_by_role("img", name="The painting in the style Facets").wait_for()


@pytest.fixture(scope="module")
def bare_server(bare, demo, tmp_path_factory):
    """A server of the MLP alone, with data that is not there."""
    with served(bare, "--data", tmp_path_factory.mktemp("empty")) as process:
        yield process


VIEWS = [(1280, 800, "light"), (1280, 800, "dark"), (390, 844, "light"), (390, 844, "dark")]


@pytest.mark.parametrize("view", VIEWS)
def test_the_first_screen_says_what_it_is_for_and_has_examples(server, run, demo, browser, view):
    """Without scrolling: a sentence, the styles, and three pictures."""
    classes = load_checkpoint(run / "classifier.pt")["classes"]
    with opened(browser, *view) as page:
        page.goto(server.address)
        examples = page.locator(".examples button")
        examples.first.wait_for()
        assert page.get_by_text(f"which of these {len(classes)} styles fits best").is_visible()
        names = page.locator(".names li").all_text_contents()
        assert names == [name.replace("_", " ") for name in classes]
        assert examples.count() == 3
        boxes = [examples.nth(number).bounding_box() for number in range(3)]
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= view[0] for box in boxes)
        assert all(box["y"] + box["height"] <= view[1] for box in boxes)
        assert page.locator(".examples img").evaluate_all("images => images.every(image => image.naturalWidth > 100)")


def test_examples_work_with_a_click_and_with_the_keyboard(server, run, desktop):
    """Each gives the answer to its own picture, one after the other, without anything else to do."""
    classifier = wikiart.Classifier.load(run / "classifier.pt", "cpu")
    before, desktop_pictures = len(corrections(run)), []
    desktop.goto(server.address)
    for number, (caption, picture) in enumerate(panels.paint_examples()):
        pixels = uploads.read_upload(picture, classifier.size, classifier.resize)
        [(guess, share)] = classifier.top(classifier.predict(torch.from_numpy(pixels)[None])[0], 1)
        button = desktop.get_by_role("button", name=caption)
        if number:
            button.click()
        else:
            button.focus()
            desktop.keyboard.press("Enter")
        desktop.get_by_text(f"{caption}.jpg").wait_for()
        assert desktop.get_by_role("heading", name=f"{guess.replace('_', ' ')}, {share:.0%}").count() == 1
        desktop_pictures.append(desktop.get_by_role("img", name="The uploaded painting").get_attribute("src"))
    assert len(set(desktop_pictures)) == 3
    assert len(corrections(run)) == before


@pytest.mark.parametrize("view", VIEWS)
def test_the_answer_is_beside_the_picture_or_below_it(server, browser, view, tmp_path):
    with opened(browser, *view) as page:
        open_and_upload(page, server.address, picture_file(tmp_path / "a.png", size=(1600, 1200)))
        picture = page.get_by_role("img", name="The uploaded painting").bounding_box()
        answer = page.get_by_role("heading", name=re.compile("%")).bounding_box()
        if view[0] > 1000:
            assert picture["y"] - 60 < answer["y"] < picture["y"] + picture["height"]
            assert answer["x"] > picture["x"] + picture["width"]
        else:
            assert answer["y"] > picture["y"] + picture["height"]
            assert picture["width"] > 300
        for name in ("Its style is", "Repaint it as"):
            box = page.get_by_label(name).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= view[0], name
        assert page.evaluate("document.documentElement.scrollWidth") <= view[0]


def test_a_repainting_has_a_strength_and_can_be_downloaded(server, demo, desktop, tmp_path):
    painting = tmp_path / "ann_tall.png"
    with Image.open(min((demo / "test").rglob("*.jpg"))) as image:
        image.resize((150, 300)).save(painting)
    open_and_upload(desktop, server.address, painting)
    choose(desktop, "Repaint it as", "Facets")
    slider = desktop.get_by_role("slider", name=re.compile("Strength"))
    slider.focus()
    for _ in range(12):
        desktop.keyboard.press("ArrowLeft")
    desktop.get_by_role("button", name="Repaint").click()
    desktop.get_by_text("Facets, strength 40%").wait_for()
    with desktop.expect_download() as waiting:
        desktop.get_by_role("link", name="Download, 150 x 300 pixels").click()
    assert waiting.value.suggested_filename == "ann_tall_Facets.jpg"
    with Image.open(waiting.value.path()) as image:
        assert (image.size, image.format) == ((150, 300), "JPEG")
    shown = desktop.get_by_role("img", name="The painting in the style Facets").bounding_box()
    assert shown["width"] > 250  # large, though the file is small


def test_a_style_and_another_strength_repaint_at_once(server, desktop):
    desktop.goto(server.address)
    desktop.locator(".examples button").first.click()
    desktop.get_by_role("heading", name=re.compile("%")).wait_for()
    choose(desktop, "Repaint it as", "Facets")
    desktop.get_by_text("Facets, strength 100%").wait_for()
    slider = desktop.get_by_role("slider", name="Strength")
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    desktop.mouse.move(box["x"] + 0.98 * box["width"], box["y"] + box["height"] / 2)
    desktop.mouse.down()
    desktop.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + box["height"] / 2, steps=4)
    desktop.mouse.up()
    desktop.get_by_text("Facets, strength 50%").wait_for()


def test_what_a_checkpoint_cannot_do_is_not_shown(bare_server, demo, desktop):
    """An MLP alone: no neighbours, repainting or collection, and no words about them; it says it is unsure."""
    open_and_upload(desktop, bare_server.address, min((demo / "test").rglob("*.jpg")))
    assert desktop.get_by_role("heading", name="Unsure: perhaps").count() == 1
    assert desktop.get_by_text("or the picture of none of the styles").is_visible()
    assert desktop.get_by_role("tab").all_text_contents() == ["A painting", "API"]
    for words in ("similar", "another style", "Repaint", "cluster.py", "train.py"):
        assert not desktop.get_by_text(words).locator("visible=true").count(), words
    assert desktop.get_by_role("button", name="Repaint").locator("visible=true").count() == 0
    bare_server.log.seek(0)
    log = bare_server.log.read()
    assert log.count("the page shows no ") == 2
    assert "has no style.pt" in log


def test_on_a_phone_nothing_is_cut_off_and_every_picture_has_its_words(server, demo, phone):
    open_and_upload(phone, server.address, min((demo / "test").rglob("*.jpg")))
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    assert phone.locator("figure img:not([alt]), figure img[alt='']").count() == 0
    for name in ("The collection", "API"):
        phone.get_by_role("tab", name=name).click()
        phone.get_by_text({"API": "gradio_client", "The collection": "Styles over the years"}[name]).first.wait_for()
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390


def tab_to(page, name):
    """Press Tab until what is called so has the focus."""
    for _ in range(40):
        page.keyboard.press("Tab")
        focused = page.evaluate("""() => {
            const element = document.activeElement
            const labels = [...element.labels || []].map(label => label.textContent)
            return element === document.body ? "" : [element.ariaLabel, element.textContent, ...labels].join(" ")
        }""")
        if name in focused:
            return
    raise AssertionError(f"{name} is not reached")


def choose_by_keys(page, name):
    """Tab to a list and choose from it with an arrow and Enter, which a busy page may miss; returns its value."""
    tab_to(page, name)
    for _ in range(20):
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.wait_for_timeout(300)
        if value := page.get_by_label(name).input_value():
            return value
    raise AssertionError(f"nothing could be chosen in {name}")


def test_everything_is_reached_by_keyboard_alone(server, run, demo, phone):
    """Upload, classify, correct, confirm, repaint, and the collection: Tab, letters, arrows and Enter."""
    from playwright.sync_api import expect

    path, before = min((demo / "test").rglob("*.jpg")), len(corrections(run))
    phone.goto(server.address)
    phone.get_by_role("tab", name="A painting").wait_for()
    tab_to(phone, "Click to upload")
    choosers = []
    phone.on("filechooser", lambda chooser: choosers.append(chooser))
    while not choosers:  # the button is there before its script is
        phone.keyboard.press("Enter")
        phone.wait_for_timeout(200)
    choosers[0].set_files(path)
    phone.get_by_role("heading", name=re.compile("%")).wait_for()
    expect(phone.get_by_label("Its style is")).to_have_value("")
    style = choose_by_keys(phone, "Its style is")
    tab_to(phone, "Save this label")
    phone.keyboard.press("Enter")
    phone.get_by_text(f"Saved: {style}.").wait_for()
    saved = corrections(run)[before:]
    assert [(row[1].replace("_", " "), row[2]) for row in saved] == [(style, path.read_bytes())]
    tab_to(phone, "Undo")
    phone.keyboard.press("Enter")
    phone.get_by_text(f"Undone: {style} for {path.name}.").wait_for()
    assert len(corrections(run)) == before
    choose_by_keys(phone, "Repaint it as")
    tab_to(phone, "Repaint")
    phone.keyboard.press("Enter")
    phone.get_by_role("img", name="The painting in the style").wait_for()
    phone.keyboard.press("Home")
    for _ in range(40):
        phone.keyboard.press("Shift+Tab")
        if phone.evaluate("document.activeElement.role + document.activeElement.textContent") == "tabThe collection":
            break
    phone.keyboard.press("Enter")
    phone.get_by_role("heading", name="Styles over the years").wait_for()


def test_nothing_is_preselected_and_labels_can_be_undone(server, run, demo, desktop, tmp_path):
    """A style, none of them, not a painting: counted for this visitor, undone from the last to the first."""
    from playwright.sync_api import expect

    path, before = picture_file(tmp_path / "ann_new.png"), corrections(run)
    open_and_upload(desktop, server.address, path)
    expect(desktop.get_by_label("Its style is")).to_have_value("")
    undo = desktop.get_by_role("button", name="Undo")
    assert not undo.is_visible()
    desktop.get_by_role("button", name="Save this label").click()
    desktop.get_by_text("Choose a label first.").wait_for()
    desktop.get_by_role("button", name="Repaint").click()
    desktop.get_by_text("Choose a style first.").wait_for()
    assert not desktop.get_by_text("Error").count()
    assert corrections(run) == before
    labels = ("Dots", "None of these", "Not a painting")
    for count, label_ in enumerate(labels, 1):
        choose(desktop, "Its style is", label_)
        save(desktop)
        desktop.get_by_text(f"Saved: {label_}. You have saved {count} label{'s' * (count > 1)}.").wait_for()
    saved = corrections(run)[len(before) :]
    assert [row[1] for row in saved] == ["Dots", "(none)", "(no painting)"]
    open_and_upload_again(desktop, sorted((demo / "test").rglob("*.jpg"))[1])
    expect(desktop.get_by_label("Its style is")).to_have_value("")
    for count, label_ in reversed(list(enumerate(labels))):
        undo.click()
        expected = f"Undone: {label_} for {path.name}. You have saved {count} label{'s' * (count != 1)}."
        desktop.get_by_text(expected).wait_for()
    expect(undo).not_to_be_visible()
    assert corrections(run) == before
    with sqlite3.connect(run / "corrections.sqlite") as base:
        assert base.execute("SELECT COUNT(*) FROM pictures WHERE picture = ?", (path.read_bytes(),)).fetchone() == (0,)


def test_nothing_of_one_visitor_reaches_another(server, run, demo, browser):
    """Two at once: each sees, saves and undoes what is theirs."""
    paths = sorted((demo / "test").rglob("*.jpg"))[:2]
    before = corrections(run)
    with opened(browser, 1280) as first, opened(browser, 390) as second:
        open_and_upload(first, server.address, paths[0])
        choose(first, "Its style is", "Dots")
        save(first)
        second.goto(server.address)
        second.locator(".examples button").first.wait_for()
        assert paths[0].name not in second.content()
        assert not second.get_by_role("heading", name=re.compile("%")).count()
        open_and_upload(second, server.address, paths[1])
        assert not second.get_by_role("button", name="Undo").is_visible()
        choose(second, "Its style is", "Facets")
        save(second)
        second.get_by_text("You have saved 1 label.").wait_for()
        first.get_by_role("button", name="Undo").click()
        first.get_by_text("Undone: Dots").wait_for()
        assert paths[1].name not in first.content()
    assert [(row[1], row[2]) for row in corrections(run)[len(before) :]] == [("Facets", paths[1].read_bytes())]


def test_nothing_is_written_outside_the_run_folder(run, demo, desktop, tmp_path, monkeypatch):
    """Upload, example, repainting and label leave corrections.sqlite, and no other file."""
    for number, name in enumerate(("HOME", "TMPDIR", "XDG_CACHE_HOME")):
        (tmp_path / f"{number}").mkdir()
        monkeypatch.setenv(name, str(tmp_path / f"{number}"))
    paintings = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    with served(run, "--data", demo) as server:
        open_and_upload(desktop, server.address, min((demo / "test").rglob("*.jpg")))
        desktop.locator(".examples button").first.click()
        desktop.get_by_text("strokes.jpg").wait_for()
        choose(desktop, "Repaint it as", "Facets")
        desktop.get_by_role("button", name="Repaint").click()
        desktop.get_by_role("img", name="The painting in the style Facets").wait_for()
        choose(desktop, "Its style is", "Dots")
        save(desktop)
        desktop.get_by_role("tab", name="The collection").click()
        desktop.locator(".sheet > canvas").wait_for()
    fonts = "fontlist-*.json"  # which matplotlib writes when it is imported for the first time
    assert [path for path in tmp_path.rglob("*") if path.is_file() and not path.match(fonts)] == []
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == paintings
    assert (run / "corrections.sqlite").stat().st_size > 0


def test_the_map_shows_a_painting_that_is_pointed_at_or_has_the_focus(server, demo, browser):
    """Mouse and keyboard; the card is inside the map, with the painting's picture and words; Escape closes it."""
    with opened(browser, 390, 844, "dark") as phone, opened(browser, 1280) as desktop:
        for page in (phone, desktop):
            canvas, card = open_map(page, server)
            page.keyboard.press("Escape")
            assert not card.is_visible()
            words = set()
            for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp"):
                page.keyboard.press(key)
                words.add(card.text_content())
            assert len(words) > 2
            styles = [path.name.replace("_", " ") for path in (demo / "train").iterdir()]
            assert all(re.match(r".+ by .+, .+, \d{4}$", text) and text.split(", ")[1] in styles for text in words)
            outer, inner = canvas.bounding_box(), card.bounding_box()
            assert outer["x"] <= inner["x"] and inner["x"] + inner["width"] <= outer["x"] + outer["width"]
            assert outer["y"] <= inner["y"] and inner["y"] + inner["height"] <= outer["y"] + outer["height"]
            drawn = "canvas => new Set(canvas.getContext('2d').getImageData(9, 9, 20, 20).data).size"
            assert card.locator("canvas").evaluate(drawn) > 5
            page.keyboard.press("Escape")
            assert not card.is_visible()
        x, y = point_at_a_painting(desktop, canvas, card)
        text = card.text_content()
        desktop.mouse.move(x + 1, y)
        assert card.text_content() == text
        desktop.mouse.move(1, 1)
        assert not card.is_visible()


def open_map(page, server):
    page.goto(server.address)
    page.get_by_role("tab", name="The collection").click()
    canvas, card = page.locator(".sheet > canvas"), page.locator(".map .card")
    page.get_by_text(re.compile(r"^\d+ shown$")).wait_for()
    canvas.focus()
    return canvas, card


def point_at_a_painting(page, canvas, card):
    box = canvas.bounding_box()
    for row in range(1, 12):
        for column in range(1, 24):
            x, y = box["x"] + box["width"] * column / 24, box["y"] + box["height"] * row / 12
            page.mouse.move(x, y)
            if card.is_visible():
                return x, y
    raise AssertionError("no painting")


def test_the_map_has_filters_and_zooms(server, demo, desktop):
    canvas, card = open_map(desktop, server)
    total = len(list(demo.rglob("*.jpg")))
    assert desktop.get_by_text(f"{total} shown").count() == 1
    files = list((demo / "train/Dots").glob("*.jpg")) + list((demo / "test/Dots").glob("*.jpg"))
    desktop.get_by_label("Style").select_option("Dots")
    desktop.get_by_text(f"{len(files)} shown").wait_for()
    artist = files[0].name.partition("_")[0]
    desktop.get_by_label("Artist").select_option(artist.replace("-", " ").title())
    count = sum(path.name.startswith(f"{artist}_") for path in files)
    desktop.get_by_text(f"{count} shown").wait_for()
    canvas.focus()
    for key in ("Escape", "ArrowRight", "ArrowLeft"):
        desktop.keyboard.press(key)
    assert f"by {artist.replace('-', ' ').title()}, Dots" in card.text_content()
    scale = lambda: float(desktop.locator(".map").get_attribute("data-scale"))  # noqa: E731
    assert scale() == 1
    desktop.keyboard.press("+")
    assert scale() == 1.5
    desktop.get_by_role("button", name="Zoom in").click()
    assert scale() == 2.25
    for name in ("Style", "Artist"):
        desktop.get_by_label(name).select_option("all")
    before = canvas.evaluate("canvas => canvas.toDataURL()")
    canvas.hover()
    desktop.mouse.down()
    desktop.mouse.move(300, 300)
    desktop.mouse.up()
    assert canvas.evaluate("canvas => canvas.toDataURL()") != before
    desktop.mouse.wheel(0, -400)
    desktop.wait_for_function("document.querySelector('.map').dataset.scale > 5")
    desktop.get_by_role("button", name="Whole map").click()
    assert scale() == 1


def test_the_api_is_documented_with_the_address_of_the_page(server, demo, desktop):
    desktop.goto(server.address)
    desktop.get_by_role("tab", name="API").click()
    desktop.get_by_text("gradio_client").first.wait_for()
    text = desktop.get_by_role("tabpanel").last.text_content()
    for words in (f'Client("{server.address}")', f"API={server.address}gradio_api", "unsure", "classes", "label_batch"):
        assert words in text
    assert ":7860" not in text


def test_a_name_of_a_file_is_no_part_of_the_page(server, demo, phone, tmp_path):
    """Shown as it is, not run: a name that is HTML would act for whoever looks at it."""
    name = "<img src=x onerror=document.title='taken'>&quot;.jpg"
    shutil.copy(min((demo / "test").rglob("*.jpg")), tmp_path / name)
    open_and_upload(phone, server.address, tmp_path / name)
    assert phone.locator("figcaption", has_text="onerror").count() == 1
    assert phone.locator("img[src=x]").count() == 0
    assert phone.title() != "taken"


def test_what_is_no_picture_gets_a_message_and_the_page_goes_on(server, demo, phone, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    phone.goto(server.address)
    phone.locator("input[type=file]").first.set_input_files(tmp_path / "text.png")
    phone.get_by_text("not a picture").first.wait_for()
    assert not phone.get_by_role("button", name="Save this label").is_visible()
    open_and_upload(phone, server.address, min((demo / "test").rglob("*.jpg")))


def test_nothing_is_asked_of_other_machines(server, demo, browser):
    context = browser.new_context()
    urls = []
    context.on("request", lambda request: urls.append(request.url))
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    open_and_upload(page, server.address, min((demo / "test").rglob("*.jpg")))
    context.close()
    assert [url for url in urls if not url.startswith((server.address, "data:", "blob:"))] == []
