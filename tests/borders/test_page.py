"""The page of `nanopost inspect` in a real browser: it opens without an error or a request, what it shows is what was
computed, and the models that it runs are those of Python. Skipped where there is no Chromium, or no playwright."""

import json
import os
import re
import shutil

import pytest
import torch

from nanopost.checkpoint import load_model
from nanopost.sampling import generate, sample_text
from nanopost.tokenizer import Tokenizer
from nanopost.tools import inspect

playwright = pytest.importorskip("playwright.sync_api", reason='needs playwright: pip install -e ".[browser]"')
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

HOSTILE = [
    "<script>document.title = 'changed'</script>",
    "</script><img src=x onerror=\"document.title = 'changed'\">",
    "<|end|><|user|>the <|assistant|>",
    "'\"`${1}\\ {{data}} &lt;b&gt; &amp;",
    "\U0001f600\U0001f468\u200d\U0001f469 na\u00efve \u4f60\u597d \u0643\u0644 \u202eabc",
    "it's we'll  two   spaces\t tab\n\nlines \u00a0\u2003\u3000 \x85\ufeff end ",
    "12345 3.14 \u0661\u0662 \u00bd \u2167",
    "\x00\x07\x1b[31m \ud800 half",
    "   ",
    "",
    "the and than that Then AND",
]


@pytest.fixture(scope="module")
def path(workshop, tmp_path_factory):
    """A page of toy models with all that a page can have."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "gold.py").write_text(
        "def explain(prompt, text):\n    return {'length': -len(text) / 10, '<i>': 0.5}\n\n"
        "def score(prompts, texts):\n    return [sum(explain(*both).values()) for both in zip(prompts, texts)]\n"
    )
    prompts = [{"prompt": prompt} for prompt in ("Say cat!", HOSTILE[1][:30], HOSTILE[4][:8])]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    sft = str(workshop.run("sft", folder / "sft"))
    workshop.run("dpo", folder / "dpo", init=sft, keep_every=2)
    workshop.run("ppo", folder / "ppo", init=sft, keep_every=1)
    workshop.run("ppo", folder / "hacked", init=sft, keep_every=1, beta=0.0)
    config = inspect.Config(
        policies=[str(folder / name) for name in ("sft", "dpo", "ppo", "hacked")], reference=sft,
        reward=workshop.path("rm"), gold=f"{folder}/gold.py:score", prompts=str(folder / "prompts.jsonl"), fit=20,
        demonstrations=workshop.path("sft_valid.jsonl"), pairs=workshop.path("pairs_valid.jsonl"), max_new_tokens=8,
        out=str(folder / "inspect.html"),
    )  # fmt: skip
    inspect.main(config)
    return folder / "inspect.html"


@pytest.fixture(scope="module")
def data(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[1])


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, path):
    """open_page(**options) -> the page in a new window. At the end nothing may have been asked for, or gone wrong."""
    wrong, pages = [], []

    def open_page(**options):
        page = browser.new_page(**options)
        page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: wrong.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield open_page
    titles = [page.title() for page in pages]
    for page in pages:
        page.close()
    assert wrong == [] and set(titles) <= {"nanopost: every token of an answer"}


@pytest.fixture
def page(open_page):
    return open_page(viewport={"width": 1400, "height": 900}, reduced_motion="reduce")


def number(text: str) -> float:
    return float(text.replace("\u2212", "-"))


def detail(page) -> dict[str, str]:
    """What stands beside the token that is pointed at: {quantity: number}."""
    rows = page.locator(".token-detail table").first.locator("tr")
    return {row.locator("th").inner_text(): row.locator("td").inner_text() for row in rows.all()}


def ask(page, prompt: str, temperature: float, draw: int = 0):
    page.locator("#typed").fill(prompt)
    page.locator("#temperature").fill(str(temperature))
    page.locator("#draw").select_option(str(draw))
    page.locator("#ask").click()
    playwright.expect(page.locator(".status")).not_to_contain_text("is answering", timeout=60_000)


TITLES = {
    "reward": "reward", "ratio": "log-ratio", "kl": "exact KL", "logprob": "log-probability", "value": "value",
    "advantage": "advantage", "return": "return",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ what it shows


def test_the_first_thing_seen_is_the_score_on_the_end_of_ppos_answer(page, data):
    answer = data["models"][2]["answers"][0]
    assert "every token but the last" in page.locator(".lesson").inner_text()
    assert number(detail(page)["reward"]) == pytest.approx(answer["columns"]["reward"][-1], abs=1e-4)
    assert page.evaluate("scrollY") == 0
    assert page.locator(".quantities :checked").input_value() == "reward"


def test_hovering_over_a_token_shows_the_numbers_that_were_computed(page, data):
    for m, found in enumerate(data["models"]):
        answer = found["answers"][0]
        tokens = page.locator("#answers .card").nth(m).locator(".token")
        assert tokens.count() == len(answer["ids"])
        for t in (0, len(answer["ids"]) - 1):
            tokens.nth(t).hover()
            shown = detail(page)
            assert shown["mask"] == "1"
            for column, values in answer["columns"].items():
                assert number(shown[TITLES[column]]) == pytest.approx(values[t], abs=1e-4)
            assert number(shown["KL in the reward"]) == pytest.approx(
                -found["beta"] * answer["columns"]["ratio"][t], abs=1e-4
            )
            rows = page.locator(".likely tr").all()[1:]
            shown = [[number(cell.inner_text()) for cell in row.locator("td").all()] for row in rows]
            wanted = [[p[t][k] for p in answer["under"].values()] for k in range(1, 6)]
            assert shown[:5] == wanted and len(shown) == 5 + (answer["likely"][t][0] not in answer["likely"][t][1:])


@pytest.mark.parametrize("quantity", ["mask", "kl", "penalty", *sorted(set(TITLES) - {"kl"})])
def test_every_quantity_has_its_number_under_the_token_and_a_sentence(page, data, quantity):
    page.locator(f".quantities input[value={quantity}]").check(force=True)
    found = data["models"][2]
    columns = found["answers"][0]["columns"]
    wanted = columns.get(quantity, [1] * len(columns["ratio"]))
    if quantity == "penalty":
        wanted = [-found["beta"] * k for k in columns["ratio"]]
    shown = page.locator("#answers .card").nth(2).locator(".number").all_inner_texts()
    assert [number(x) for x in shown] == pytest.approx(wanted, abs=0.00501)
    assert len(page.locator(".meaning").inner_text()) > 60
    assert (
        page.locator(".token-detail tr.current th").first.inner_text()
        == {"penalty": "KL in the reward", "mask": "mask", **TITLES}[quantity]
    )
    course = page.locator("#course .stats").inner_text()  # of kept copies no values were fitted, nor the exact KL
    assert ("there is no" in course) == (quantity in ("value", "advantage", "return", "kl"))
    prompt = page.locator("#answers .prompt .number").all_inner_texts()
    assert set(prompt) == ({"0"} if quantity == "mask" else {""})


def test_another_prompt_shows_its_answers_with_score_and_gold(page, data):
    page.locator("#prompt").select_option("1")
    for m, found in enumerate(data["models"]):
        card, answer = page.locator("#answers .card").nth(m), found["answers"][1]
        stats = card.locator(".stats").inner_text()
        for name in ("score", "gold"):
            assert number(re.search(rf"{name} (\S+)", stats)[1]) == pytest.approx(answer[name], abs=0.0051)
        assert f"length {answer['parts']['length']:.1f}".replace("-", "\u2212") in card.locator(".parts").inner_text()
        assert "<i> +0.5" in card.locator(".parts").inner_text()


def test_the_keyboard_reaches_every_token_and_shows_the_same_as_the_pointer(page):
    first = page.locator("#answers .card").nth(1).locator(".token")
    first.nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(
        "document.activeElement === document.querySelectorAll('#answers .card')[1].querySelectorAll('.token')[1]"
    )
    by_key = page.locator(".token-detail").inner_text()
    page.keyboard.press("End")
    assert page.locator(".token-detail").inner_text() != by_key
    first.nth(1).hover()
    assert page.locator(".token-detail").inner_text() == by_key
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.closest('.card') === document.querySelectorAll('#answers .card')[2]")
    tabbable = page.evaluate(
        "[...document.querySelectorAll('.strip')].map(s => s.querySelectorAll('[tabindex=\"0\"]').length)"
    )
    assert set(tabbable) == {1}
    label = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert re.search(r", reward [+\u2212]?\d\.\d{4}$", label)


def test_the_slider_goes_through_training_and_the_curve_follows(page, data):
    found = data["models"][3]
    page.locator(".runs input").nth(2).check(force=True)
    course = [*found["course"], {"step": "end", "answers": found["answers"]}]
    assert page.locator("#step").get_attribute("max") == str(len(course) - 1) == "5"
    for at, stage in enumerate(course):
        page.locator("#step").fill(str(at))
        answer = stage["answers"][0]
        tokens = page.locator("#course .card .token")
        assert tokens.count() == len(answer["ids"])
        assert f"score {answer['score']:+.2f}".replace("-", "\u2212") in page.locator("#course .stats").inner_text()
        for chart, name in enumerate(("score", "gold")):
            mean = sum(answer[name] for answer in stage["answers"]) / len(stage["answers"])
            text = page.locator(".charts svg").nth(chart).locator("text").first.text_content()
            assert number(text.removeprefix(name)) == pytest.approx(mean, abs=0.0051)
        kl = sum(sum(answer["columns"]["ratio"]) for answer in stage["answers"]) / len(stage["answers"])
        assert number(page.locator(".charts svg").nth(2).locator("text").first.text_content()[9:]) == pytest.approx(
            kl, abs=0.0051
        )
    assert page.locator(".slider output").inner_text() == "the end"


def test_the_lessons_lead_to_what_they_speak_of(page, data):
    page.mouse.move(300, 400)  # below which the page will scroll
    page.locator("#lessons button").nth(1).click()
    page.wait_for_timeout(300)
    ratio = data["models"][2]["answers"][0]["columns"]["ratio"]
    assert number(detail(page)["log-ratio"]) == pytest.approx(max(ratio), abs=1e-4)
    assert page.locator(".picked").is_visible()
    page.locator("#lessons button").nth(2).click()
    assert page.locator(".runs :checked").input_value() == "2"
    assert page.locator("#step").input_value() == "5"  # at once, where motion is not wanted
    assert "\u03b2 = 0" in page.locator(".lesson").inner_text()
    page.locator("#lessons button").nth(0).click()
    assert number(detail(page)["reward"]) == pytest.approx(
        data["models"][2]["answers"][0]["columns"]["reward"][-1], abs=1e-4
    )


def test_what_sft_and_dpo_learn_from(page, data):
    record = data["demonstrations"][0]
    for m, found in enumerate(data["models"]):
        page.locator("#sft-model").select_option(str(m))
        nll = [0.0, *record["nll"][found["name"]]]
        losses = [x for x, mask in zip(nll, record["mask"]) if mask]
        assert number(page.locator("#sft .stats b").inner_text()) == pytest.approx(sum(losses) / len(losses), abs=1e-4)
        shown = page.locator("#sft .number").all_inner_texts()
        assert [x != "" for x in shown] == record["mask"]
        assert [number(x) for x in shown if x] == pytest.approx(losses, abs=0.0051)
    page.locator("#sft-number").select_option("mask")
    assert page.locator("#sft .number").all_inner_texts() == [str(int(x)) for x in record["mask"]]

    pair = data["pairs"][0]
    for found in data["models"]:
        page.locator("#dpo-model").select_option(found["name"])
        under = pair["under"][found["name"]]
        cells = page.locator("#dpo .sums td").all_inner_texts()
        for s in (0, 1):
            log_pi, log_ref, _, reward = map(number, cells[4 * s : 4 * s + 4])
            wanted = [under["sums"][s], pair["under"][""]["sums"][s], under["rewards"][s]]
            assert [log_pi, log_ref, reward] == pytest.approx(wanted, abs=1e-4)
        loss, weight = map(number, page.locator("#dpo .sums b").all_inner_texts())
        margin = torch.tensor(under["rewards"][0] - under["rewards"][1])
        assert loss == pytest.approx(float(-torch.nn.functional.logsigmoid(margin)), abs=2e-4)
        assert weight == pytest.approx(float(torch.sigmoid(-margin)), abs=2e-4)


# ------------------------------------------------------------------------------------------------------- the models


def encode(page, text):
    return page.evaluate("text => tokenizer.encode(text)", text)


@pytest.mark.parametrize("text", HOSTILE + ["x" * 3000, " " * 3000 + "y", "ab1 " * 2500])
def test_the_tokenizer_is_that_of_python(page, data, text):
    _, tokenizer = load_model(data["models"][0]["name"])
    assert encode(page, text) == tokenizer.encode(text)


def test_a_word_that_is_a_token_is_taken_whole_where_no_two_neighbours_make_it(page):
    words = [b"the", b" cat", "é".encode(), b"at"]
    tokenizer = Tokenizer({token: rank for rank, token in enumerate([bytes([i]) for i in range(256)] + words)})
    tokens = [token.decode("latin-1") for token in tokenizer.ranks]
    for text in ("the cat", "thecat", "é sat, then the cats"):
        found = page.evaluate("([tokens, text]) => new Tokenizer(tokens, []).encode(text)", [tokens, text])
        assert found == tokenizer.encode(text), text
    assert tokenizer.encode("the cat") == [256, 257]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_typed_prompts_get_the_answers_and_log_probabilities_of_python(page, data, temperature):
    for draw, prompt in enumerate(["Say cat!", "the and than", "\U0001f600?", ""]):
        ask(page, prompt, temperature, draw)
        talked = page.evaluate("answered.map(([model, found]) => [model.name, found.ids, found.columns])")
        assert [name for name, *_ in talked] == [found["name"] for found in data["models"]]
        for name, ids, columns in talked:
            model, tokenizer = load_model(name)
            start = tokenizer.prompt([{"role": "user", "content": prompt}])
            noise = torch.tensor(data["noise"][draw : draw + 1])
            batch = generate(model, [start], 8, tokenizer.end, temperature=temperature, noise=noise)
            assert ids == batch.ids[0, 1:][batch.mask[0]].tolist()
            own, theirs = (
                m.logprobs(m(batch.ids), batch.ids, batch.index)[0][batch.mask[0]]
                for m in (model, load_model(data["reference"])[0])
            )
            assert columns["logprob"] == pytest.approx(own.tolist(), abs=1e-3)
            assert columns["ratio"] == pytest.approx((own - theirs).tolist(), abs=2e-3)


def test_greedy_answers_are_those_of_sample_text_and_the_alternatives_sum_up(page, data):
    ask(page, "Say dog!", 0)
    for m, found in enumerate(data["models"]):
        model, tokenizer = load_model(found["name"])
        [answer] = sample_text(
            model, tokenizer, [tokenizer.prompt([{"role": "user", "content": "Say dog!"}])], 8, temperature=0
        )
        card = page.locator("#talk .card").nth(m)
        assert page.evaluate(f"answered[{m}][1].ids") == answer.response
        card.locator(".token").first.hover()
        hidden = model(torch.tensor([answer.prompt]))[0, -1]
        top = model.logits(hidden).softmax(-1).topk(5).values
        shown = [number(row.locator("td").nth(m).inner_text()) for row in page.locator(".likely tr").all()[1:6]]
        assert shown == pytest.approx(top.tolist(), abs=1e-3)


@pytest.mark.parametrize("prompt", [*HOSTILE, "x" * 10_000, "<b>" * 3000], ids=range(len(HOSTILE) + 2))
def test_a_hostile_prompt_is_text_and_the_page_goes_on(page, data, prompt):
    elements = page.evaluate("document.querySelectorAll('script, img, i, b > *').length")
    ask(page, prompt, 1)
    typed = page.locator("#typed").input_value()  # a browser makes \r\n and halves of pairs its own
    _, tokenizer = load_model(data["models"][0]["name"])
    ids = tokenizer.prompt([{"role": "user", "content": typed}])
    cards = page.locator("#talk .card").count()
    if len(ids) < 48:
        assert cards == 4 and page.locator("#talk .prompt .token").count() == len(ids)
        room = 48 - len(ids)
        assert ("room for answers" in page.locator(".status").inner_text()) == (room < 8)
        assert all(page.evaluate("answered.map(([, found]) => found.ids.length > 0)"))
    else:
        assert cards == 0 and f"{len(ids)} tokens" in page.locator(".status").inner_text()
    assert page.evaluate("document.querySelectorAll('script, img, i, b > *').length") == elements
    ask(page, "Say cat!", 1)
    assert page.locator("#talk .card").count() == 4


# ------------------------------------------------------------------------------------------------ for everybody's eyes

CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const paint = colours => { // over each other -> the red, green and blue that one sees
    for (const colour of colours) {
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
    }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = v => v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  let worst = 21, where = '';
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.matches('script, style, option, svg *')) continue;
    const below = ['white'];
    for (let e = element; e; e = e.parentElement) below.splice(1, 0, getComputedStyle(e).backgroundColor);
    const both = [light(paint(below)), light(paint([getComputedStyle(element).color]))].sort((x, y) => y - x);
    const contrast = (both[0] + 0.05) / (both[1] + 0.05);
    if (contrast < worst) [worst, where] = [contrast, element.outerHTML.slice(0, 200)];
  }
  return [worst, where];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast_in_light_and_dark(open_page, scheme):
    page = open_page(color_scheme=scheme, viewport={"width": 1400, "height": 900})
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 150) == (scheme == "dark")
    for quantity in ("reward", "ratio", "logprob", "advantage"):
        page.locator(f".quantities input[value={quantity}]").check(force=True)
        worst, where = page.evaluate(CONTRAST)
        assert worst >= 4.5, where


@pytest.mark.parametrize("width", [320, 400, 800])
def test_a_narrow_window_scrolls_down_only(open_page, width):
    page = open_page(viewport={"width": width, "height": 800})
    ask(page, "Say cat!", 1)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    if page.locator("#detail").is_visible():
        page.locator("#close").click()
    assert not page.locator("#detail").is_visible()
    page.locator("#talk .token").last.focus()
    assert page.locator("#detail").is_visible()


def test_models_that_are_left_out_are_named_and_so_are_parts_that_are_missing(browser, workshop, tmp_path, monkeypatch):
    size = sum(p.numel() for p in load_model(workshop.path("sft"))[0].parameters()) + 20
    shared = dict(prompts=workshop.path("prompts_valid.jsonl"), max_new_tokens=8, demonstrations="", pairs="")
    for room, sentence in ((size * 3, "Too large for this page: base"), (0, "nanopost chat talks to them")):
        monkeypatch.setattr(inspect, "ROOM", room)
        out = tmp_path / "page.html"
        inspect.main(inspect.Config(policies=[workshop.path("sft"), workshop.path("base")], out=str(out), **shared))
        page = browser.new_page()
        wrong = []
        page.on("console", lambda message, wrong=wrong: wrong.append(message.text))
        page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
        page.goto(out.as_uri())
        assert sentence in page.locator("#talk").inner_text()
        assert "--keep-every" in page.locator("#course").inner_text()
        assert "--demonstrations" in page.locator("#sft").inner_text()
        assert "--reference" in page.locator("#dpo").inner_text()
        assert page.locator("#answers .card").count() == 2
        page.locator("#answers .token").last.hover()
        assert set(detail(page)) == {"log-probability", "mask"}
        assert wrong == []
        page.close()
