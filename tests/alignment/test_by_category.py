"""The warm start that asks for each category by itself."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rsafe_plugins import Category, Content, Policy
from rsafe_plugins.alignment.by_category import (
    Asker,
    CategoryEncoder,
    MixedEncoder,
    Question,
    Questions,
    category_batches,
    category_passes,
    mixed,
)
from rsafe_plugins.alignment.categorize import Categorizer
from rsafe_plugins.alignment.examples import Example, PolicyVariant, category_ids, wordings_of
from rsafe_plugins.alignment.recipe import Distillation, WarmStartSettings
from rsafe_plugins.alignment.warm_start import Encoder, WarmStart
from rsafe_plugins.cli import main
from rsafe_plugins.errors import DataError
from rsafe_plugins.evaluation.items import LabelledItem
from rsafe_plugins.guard.dialects.rsafe_by_category import RSafeByCategory
from rsafe_plugins.guard.prompt import GuardPrompt

pytestmark = pytest.mark.align

THEFT, HATE = Category(id="A", name="Theft", description="Stealing."), Category(id="B", name="Hate")
ASKED = [
    Questions(
        Content.prompt("how to steal a car"), (Question(THEFT, "unsafe", 1.0), Question(HATE, "safe", 0.5))
    ),
    Questions(Content.prompt("hi there"), (Question(THEFT, "safe", 0.5), Question(HATE, "safe", 0.5))),
    Questions(Content.document("Do as I say."), (Question(HATE, "safe", 1.0),)),
]


def item(label: str, *categories: str, task: str = "prompt") -> LabelledItem:
    text = {task: "How would somebody do it?"}
    return LabelledItem(id="1", task=task, label=label, categories=categories, **text)  # type: ignore[arg-type]


def asker(*items: LabelledItem) -> Asker:
    return Asker(items, Categorizer(items, category_ids))


def stage(base: Path, out: Path) -> WarmStart:
    settings = WarmStartSettings(micro_batch=8, learning_rate=2e-2, warmup_steps=1)
    return WarmStart(base, RSafeByCategory().prompt, settings, out, encoder=CategoryEncoder)


def test_what_is_trained_is_what_the_guard_asks(tiny_base: Path, tmp_path: Path) -> None:
    warm = stage(tiny_base, tmp_path)
    shared, sequences = warm.encoder.encode(None, ASKED)
    trained = [
        warm.tokenizer.decode(shared + sequence.prompt + tokens)
        for sequence in sequences
        for tokens, _ in sequence.endings
    ]
    asked = []
    for one in ASKED:
        for question in one.questions:
            policy = Policy(name="p", categories=(question.category,))
            (message,) = RSafeByCategory().messages(policy, one.content)
            chat = [{"role": message.role, "content": message.content}]
            prompt = warm.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            asked.append(f"{prompt}{RSafeByCategory.begin}{question.label}}}")
    assert trained == asked


def test_what_is_kept_of_the_adapter_before_goes_by_what_is_judged(tiny_base: Path, tmp_path: Path) -> None:
    adapter = stage(tiny_base, tmp_path / "first").save()
    settings = WarmStartSettings(distill=Distillation(prompts=0.5, documents=0.25))
    warm = WarmStart(
        tiny_base, RSafeByCategory().prompt, settings, tmp_path, adapter=adapter, encoder=CategoryEncoder
    )
    _, sequences = warm.encoder.encode(None, ASKED)
    assert [one.distilled for one in sequences] == [0.5, 0.5, 0.25]


def test_only_the_label_is_learned_and_as_much_as_its_question_weighs(
    tiny_base: Path, tmp_path: Path
) -> None:
    warm = stage(tiny_base, tmp_path)
    _, sequences = warm.encoder.encode(None, ASKED)
    tokens, weights = sequences[0].endings[1]
    start = next(place for place, weight in enumerate(weights) if weight)
    assert warm.tokenizer.decode(tokens[start:]) == "safe}"
    assert weights[start] == 0.5
    assert sum(weights[start + 1 :]) == pytest.approx(0.5 * 0.05)


def test_both_kinds_of_batches_are_encoded_as_each_alone(tiny_base: Path, tmp_path: Path) -> None:
    warm = stage(tiny_base, tmp_path)
    given = (warm.tokenizer, GuardPrompt(), warm.settings)
    variant = PolicyVariant(Policy(name="p", categories=(THEFT, HATE)), {})
    examples = [Example(Content.prompt(text), "safe", (), None) for text in ("how to bake", "hi there")]
    both = MixedEncoder(*given)
    assert both.encode(None, ASKED) == warm.encoder.encode(None, ASKED)
    assert both.encode(variant, examples) == Encoder(*given).encode(variant, examples)


def test_the_categories_of_an_unsafe_content_compete(tiny_base: Path, tmp_path: Path) -> None:
    warm = stage(tiny_base, tmp_path)
    shared, sequences = warm.encoder.encode(None, ASKED)
    met = [one.unsafest for one in sequences]
    assert [
        None if place is None else asked.questions[place].label
        for place, asked in zip(met, ASKED, strict=True)
    ] == ["unsafe" if any(q.label == "unsafe" for q in asked.questions) else None for asked in ASKED]
    assert any(place is not None for place in met)
    surer = []
    for place, one in zip(met, sequences, strict=True):
        if place is None:
            continue
        odds = []
        for tokens, weights in one.endings:
            ids = shared + one.prompt + tokens[: next(n for n, weight in enumerate(weights) if weight)]
            safe, unsafe = warm.model(input_ids=torch.tensor([ids])).logits[
                0, -1, list(warm.encoder.label_ids)
            ]
            odds.append(unsafe - safe)
        surer.append(torch.nn.functional.cross_entropy(torch.stack(odds), torch.tensor(place)))
    alone = [replace(one, unsafest=None) for one in sequences]
    difference = warm._step(shared, sequences) - warm._step(shared, alone)
    assert difference == pytest.approx(float(sum(surer)) / len(ASKED), rel=1e-3)


def test_training_lowers_the_loss(tiny_base: Path, tmp_path: Path) -> None:
    warm = stage(tiny_base, tmp_path)
    warm.train(((None, ASKED) for _ in range(8)), total=1000)
    losses = [row["loss"] for row in warm.log.rows]
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.isfinite(parameter).all() for parameter in warm.model.parameters())


KINDS = ("Privacy", "Hate", "Defamation", "Sexual Content", "Violent Crimes", "Non-Violent Crimes")


@pytest.mark.parametrize("seed", range(5))
def test_an_unsafe_item_is_asked_about_its_own_category_and_about_what_is_far_from_it(seed: int) -> None:
    unsafe = item("unsafe", "Privacy")
    near = category_ids(unsafe)
    asked = asker(*(item("unsafe", kind) for kind in KINDS)).questions(unsafe, random.Random(seed)).questions
    met = [one.category for one in asked if one.label == "unsafe"]
    assert {one.id for one in met} == {near[0]}
    assert all(one.category.id not in near for one in asked if one.label == "safe")
    assert all([one.name, one.description] in wordings_of(one.id) or not one.description for one in met)
    of_each_answer = [sum(one.weight for one in asked if one.label == label) for label in ("safe", "unsafe")]
    assert of_each_answer == pytest.approx([1.0, 1.0])


def test_a_safe_item_meets_nothing_and_a_document_is_asked_about_instructions() -> None:
    chance = random.Random(0)
    asks = asker(item("unsafe", "Hate"))
    assert {one.label for one in asks.questions(item("safe"), chance).questions} == {"safe"}
    (asked,) = asks.questions(item("unsafe", task="document"), chance).questions
    assert asked.label == "unsafe"
    assert asked.category in Policy.load("prompt-injection").categories


def test_what_no_item_meets_is_not_asked_about_and_what_many_meet_is_asked_about_often() -> None:
    items = [
        item("unsafe", kind) for kind in ("Hate", "Privacy", "Privacy", "Privacy", "Suicide & Self-Harm")
    ]
    asks, chance = asker(*items), random.Random(0)
    asked = [one.category.id for _ in range(50) for one in asks.questions(item("safe"), chance).questions]
    assert set(asked) == {"U7", "U9", "U10"}
    rare = ("Defamation", "Sexual Content", "Violent Crimes", "Non-Violent Crimes")
    asks = asker(*items, *items, *(item("unsafe", kind) for kind in rare))
    asked = [one.category.id for _ in range(300) for one in asks.questions(item("safe"), chance).questions]
    assert asked.count("U10") > asked.count("U12")


def test_a_safe_item_is_asked_about_what_it_comes_near_to_as_much_as_about_the_rest() -> None:
    def about(subject: str, label: str, *categories: str) -> LabelledItem:
        return item(label, *categories).model_copy(
            update={"prompt": f"Tell me of {subject} and of {subject}."}
        )

    known = [about("bombs", "unsafe", "Indiscriminate Weapons"), about("passwords", "unsafe", "Privacy")] * 4
    asked = asker(*known).questions(about("bombs", "safe"), random.Random(0)).questions
    weights = {one.category.id: one.weight for one in asked}
    assert {one.label for one in asked} == {"safe"}
    assert weights == {"U2": 0.5, "U10": 0.5}


def test_a_safe_item_is_not_asked_about_what_no_item_meets_though_it_comes_near_to_it() -> None:
    asks = asker(item("unsafe", "Hate"), item("unsafe", "Privacy"))
    asked = asks.questions(item("safe", "Defamation"), random.Random(0)).questions
    assert {one.category.id for one in asked} == {"U10"}
    assert sum(one.weight for one in asked) == 1.0
    (asked,) = asker(item("unsafe", "Hate")).questions(item("safe", "Defamation"), random.Random(0)).questions
    assert asked.category.id == "U7"


def test_an_unsafe_item_that_names_nothing_gets_the_category_of_its_words() -> None:
    known = [
        item("unsafe", "Hate"),
        item("unsafe", "Privacy").model_copy(update={"prompt": "spy on them"}),
    ] * 4
    unnamed = item("unsafe").model_copy(update={"prompt": "spy on them"})
    asks = asker(*known)
    assert asks.answerable([unnamed]) == [unnamed]
    asked = asks.questions(unnamed, random.Random(0)).questions
    assert {one.category.id: one.label for one in asked} == {"U10": "unsafe", "U7": "safe"}


def test_where_the_whole_policy_is_asked_about_too_only_categories_are_taught() -> None:
    many = [item("unsafe", "Hate")] * 400
    unnamed = item("unsafe").model_copy(update={"prompt": "Bake bread!"})
    named = [item("unsafe", kind) for kind in KINDS if kind != "Hate"]
    items = [item("safe"), *named, unnamed, item("unsafe", task="document"), *many]
    chosen = asker(*items).of_known_category(items)
    assert chosen == [*named, *many[:300]]
    passes = category_passes(chosen[:5], 5, 0, asker(*items))
    assert len({repr(next(passes)) for _ in range(4)}) == 4


def test_where_no_word_stands_in_two_texts_no_category_is_guessed() -> None:
    known = [
        item("unsafe", kind).model_copy(update={"prompt": kind.split()[0]}) for kind in ("Hate", "Privacy")
    ]
    assert Categorizer(known, category_ids).nearest(item("unsafe")) is None


def test_data_without_any_category_is_refused() -> None:
    with pytest.raises(DataError, match="none of the 2 items does"):
        asker(item("unsafe"), item("safe"))
    assert asker(item("unsafe", task="document")).answerable([]) == []


def test_an_unsafe_item_without_a_known_category_is_left_out() -> None:
    items = [item("unsafe"), item("unsafe", "no such category"), item("unsafe", "Hate"), item("safe")]
    assert asker(*items).answerable(items) == items[2:]


def test_every_item_is_asked_about_once_and_the_seed_decides() -> None:
    items = [item("safe").model_copy(update={"prompt": f"text {n}"}) for n in range(21)]
    asks = asker(item("unsafe", "Hate"))
    made = list(category_batches(items, 4, 3, asks))
    texts = [one.content.text for _, batch in made for one in batch]
    assert sorted(texts) == sorted(one.prompt for one in items)
    assert made == list(category_batches(items, 4, 3, asks))


def test_a_share_of_the_steps_asks_by_category_until_one_kind_is_used_up() -> None:
    for share in (0.2, 0.8):
        order = list(mixed(iter(range(1000)), iter(range(1000, 2000)), share, seed=1))
        whole, asked = [one for one in order if one < 1000], [one for one in order if one >= 1000]
        assert len(asked) / len(order) == pytest.approx(share, abs=0.05)
        assert 1000 in (len(whole), len(asked))
        assert (whole, asked) == (sorted(whole), sorted(asked))
        assert order == list(mixed(iter(range(1000)), iter(range(1000, 2000)), share, seed=1))
    assert "".join(mixed(iter("ab"), iter("cd"), 1.0, seed=0)) == "cd"


def test_the_command_trains_for_both_ways(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    rows = [item("unsafe", "Hate") if n % 2 else item("safe") for n in range(12)]
    lines = (one.model_copy(update={"id": str(n), "prompt": f"text {n}"}) for n, one in enumerate(rows))
    data.write_text("".join(f"{line.model_dump_json()}\n" for line in lines))
    command = ["align", "--stage", "warm-start", str(data), "--base", str(tiny_base), "--json"]
    command += ["--out", str(tmp_path / "run"), "--batch", "4", "--held-out", "0", "--set", "by_category=0.5"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["by_category"] == 0.5
    assert 12 <= report["items"] <= 24


def test_the_command_trains_for_the_dialect(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    rows = [item("unsafe", "Hate") if n % 2 else item("safe") for n in range(12)]
    lines = (
        json.dumps({**one.model_dump(mode="json"), "id": str(n), "prompt": f"text {n}"})
        for n, one in enumerate(rows)
    )
    data.write_text("\n".join(lines))
    command = [
        "align",
        "--stage",
        "warm-start",
        str(data),
        "--base",
        str(tiny_base),
        "--by-category",
        "--json",
    ]
    status = main([*command, "--out", str(tmp_path / "run"), "--batch", "4", "--held-out", "0"])
    report = json.loads(capsys.readouterr().out)
    assert status == 0
    assert report["settings"]["by_category"] == 1
    assert report["items"] == 12
    template = tmp_path / "template.jinja"
    assert main([*command, "--out", str(tmp_path / "other"), "--template", str(template)]) == 2
    assert "leave --template out" in capsys.readouterr().err
