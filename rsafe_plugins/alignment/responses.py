"""More responses, made of what the data has: after prompts that aren't theirs."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rsafe_plugins.evaluation.items import LabelledItem

_PASSAGE = 10  # words that a harmless prompt has at least to stand for a response


def crossed(items: Sequence[LabelledItem], most: int, chance: random.Random) -> list[LabelledItem]:
    """Unsafe responses after harmless prompts, and as many harmless ones after unsafe prompts.

    So what tells them apart is the response, and not what was asked for: few sets have harmful answers to harmless
    prompts, or harmless answers to harmful ones that are no refusals. Every other harmless response is therefore a
    harmless prompt of at least 10 words.

    Args:
        items: Labelled items of any task.
        most: So many at most are made, and two at most of each unsafe response; none where the items have no unsafe
            responses, or prompts of one label only.
        chance: Source of randomness.
    """
    responses = {
        unsafe: [item for item in items if item.task == "response" and item.unsafe == unsafe]
        for unsafe in (True, False)
    }
    prompts = {
        unsafe: [item.prompt for item in items if item.task == "prompt" and item.unsafe == unsafe]
        for unsafe in (True, False)
    }
    passages = [prompt for prompt in prompts[False] if len(prompt.split()) >= _PASSAGE]
    declined = [item.response for item in responses[False]] or passages
    if not (responses[True] and prompts[True] and passages):
        return []
    made: list[LabelledItem] = []
    harmful = list(responses[True])
    chance.shuffle(harmful)
    for number, item in enumerate((harmful * 2)[: most // 2]):
        answer = chance.choice(passages if number % 2 else declined)
        made.append(
            item.model_copy(
                update={"id": f"{item.id}/harmful-{number}", "prompt": chance.choice(prompts[False])}
            )
        )
        made.append(
            LabelledItem(
                id=f"{item.id}/harmless-{number}",
                task="response",
                prompt=chance.choice(prompts[True]),
                response=answer,
                label="safe",
            )
        )
    return made
