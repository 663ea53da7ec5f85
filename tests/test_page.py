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
    config = SimpleNamespace(run=run, data=demo, size=32, resize="squash", split_seed=0, processes=1, split="test")
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
    torch.save(checkpoint | {"unsure_below": 1.0}, run / "classifier.pt")
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
    label.main(["--run", str(run), "--export", str(target / "train")])
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
    assert all(text.rpartition(", ")[2] in styles and " by " in text for text in alternatives[2:])
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


def test_what_a_checkpoint_cannot_do_is_not_shown(bare_server, demo, desktop):
    """An MLP alone: no regions, neighbours, repainting or collection, and no words about them; it says it is unsure."""
    open_and_upload(desktop, bare_server.address, min((demo / "test").rglob("*.jpg")))
    assert desktop.get_by_role("heading", name="Unsure: perhaps").count() == 1
    assert desktop.get_by_text("It may be none of the styles").is_visible()
    assert desktop.get_by_role("tab").all_text_contents() == ["A painting", "API"]
    for words in ("regions", "similar", "another style", "Repaint", "cluster.py", "train.py"):
        assert not desktop.get_by_text(words).locator("visible=true").count(), words
    assert desktop.get_by_role("button", name="Repaint").locator("visible=true").count() == 0
    bare_server.log.seek(0)
    log = bare_server.log.read()
    assert log.count("the page shows no ") == 3
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
    box = phone.get_by_label("Its style is")
    expect(box).to_have_value("")
    tab_to(phone, "Its style is")
    for key in ("ArrowDown", "ArrowDown", "Enter"):
        phone.keyboard.press(key)
    expect(box).not_to_have_value("")
    style = box.input_value()
    tab_to(phone, "Save this label")
    phone.keyboard.press("Enter")
    phone.get_by_text(f"Saved: {style}.").wait_for()
    saved = corrections(run)[before:]
    assert [(row[1].replace("_", " "), row[2]) for row in saved] == [(style, path.read_bytes())]
    tab_to(phone, "Undo")
    phone.keyboard.press("Enter")
    phone.get_by_text(f"Undone: {style} for {path.name}.").wait_for()
    assert len(corrections(run)) == before
    tab_to(phone, "Repaint it as")
    for key in ("ArrowDown", "Enter"):
        phone.keyboard.press(key)
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
