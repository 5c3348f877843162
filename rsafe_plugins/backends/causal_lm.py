"""A causal language model in transformers: chats to tokens, static prefixes, scores and greedy text in batches."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from rsafe_plugins.backends.base import Completion, Request, Usage
from rsafe_plugins.backends.encoding import Encoded, encode
from rsafe_plugins.backends.tokens import Tokens, common_length
from rsafe_plugins.errors import BackendError, BackendUnavailable

_PREFIXES = 4  # static prefixes whose keys and values are kept
_SHORTEST_PREFIX = 64  # tokens that must be saved for a prefix to be worth an extra pass
_RECENT = 16  # earlier chats among which a single request's static part is looked for
_SHARERS = 4  # where many requests wait, a prefix must serve so many others
_BATCH_TOKENS = 32768  # of a batch, prefixes and answers included; a longer request goes alone
_ROOM = 64  # tokens whose keys and values are made room for at once
_DECODED_WITH = 8  # tokens before the answer: some tokenizers drop the space that a text begins with
# Many folders name only one of the tokens that end a turn, and not always the one that the template writes.
_ENDS_OF_TURN = frozenset(
    ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|return|>")
)
# A dummy layer stands for one without attention, or one that uses another's keys and values.
_KEY_VALUE_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")

Layers = list[tuple[Any, Any]]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What transformers loads from a model's folder; see `load`."""

    model: Any
    tokenizer: Any
    device: torch.device


def load(model: str, *, adapter: str | None, device: str | None, dtype: str | None) -> Loaded:
    """Loads weights, adapter and tokenizer.

    Args:
        model: A Hugging Face name, a folder, or a GGUF file.
        adapter: A PEFT adapter's folder or Hugging Face name, or None.
        device: `cpu`, `cuda`, `cuda:1`, or `auto` for all GPUs; None for a GPU where there is one.
        dtype: `float32`, `bfloat16`, `float16`; None for float32 on a CPU and the weights' own elsewhere.

    Raises:
        BackendUnavailable: Something is missing or can't be loaded.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BackendUnavailable(
            f"device is {device!r}, and torch sees no CUDA device here: use 'cpu', or install torch for CUDA."
        )
    where: dict[str, Any] = {"pretrained_model_name_or_path": model, "trust_remote_code": False}
    if model.lower().endswith(".gguf"):
        path = Path(model)
        where |= {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    placed: dict[str, Any] = {} if device == "cpu" else {"device_map": device}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(**where)
        weights: Any = AutoModelForCausalLM.from_pretrained(
            **where, **placed, dtype=dtype or ("float32" if device == "cpu" else "auto")
        )
        if "gguf_file" in where and hasattr(weights.config, "quantization_config"):
            # They are plain tensors by now. Taken for quantized ones, they could be neither trained nor saved.
            del weights.config.quantization_config
            weights.hf_quantizer, weights.is_quantized = None, False
        if adapter is not None:
            weights = _with_adapter(weights, adapter)
    except ImportError as error:
        raise BackendUnavailable(
            f"Loading {model} needs a package that is missing ({_first_line(error)}): "
            'pip install "rsafe-plugins[transformers]" peft gguf.'
        ) from error
    except BackendUnavailable:
        raise
    except Exception as error:
        with_adapter = f" with the adapter {adapter}" if adapter is not None else ""
        raise BackendUnavailable(
            f"transformers can't load {model}{with_adapter} ({type(error).__name__}: {_first_line(error)})."
        ) from error
    if tokenizer.chat_template is None:
        raise BackendUnavailable(
            f"{model} comes without a chat template, so it can't be asked as a chat: use an instruction-tuned "
            "model, or set chat_template in its tokenizer_config.json."
        )
    return Loaded(weights.eval(), tokenizer, torch.device(weights.device))


def _with_adapter(weights: Any, adapter: str) -> Any:
    from peft import PeftConfig, PeftModel

    if PeftConfig.from_pretrained(adapter).is_prompt_learning:
        raise BackendUnavailable(
            f"The adapter {adapter} must be one of weights (LoRA), not a learned prompt."
        )
    adapted: Any = PeftModel.from_pretrained(weights, adapter)
    # Two products fewer a layer; at lower precision, adding a small change to the weights would round it away.
    return adapted.merge_and_unload() if weights.dtype == torch.float32 else adapted


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message").rstrip(".")


class CausalLM:
    """A loaded model that answers batches. For one thread at a time.

    Args:
        loaded: Model and tokenizer.
        context: Tokens that prompt and answer may have together; the model may allow fewer.

    Attributes:
        context: As given, or fewer.

    Raises:
        BackendUnavailable: The model keeps something else than keys and values, so prefixes can't be reused.
    """

    def __init__(self, loaded: Loaded, *, context: int | None = None) -> None:
        self._model, self._tokenizer, self._device = loaded.model, loaded.tokenizer, loaded.device
        config = self._model.config.get_text_config(decoder=True)
        layers = DynamicCache(config=config).layers
        if getattr(self._model, "_is_stateful", False) or not all(
            type(layer).__name__ in _KEY_VALUE_LAYERS for layer in layers
        ):
            raise BackendUnavailable(
                f"{type(self._model).__name__} keeps a recurrent state instead of keys and values, which this "
                "engine can't batch: serve it with vLLM and use the openai backend."
            )
        limits = (context, getattr(config, "max_position_embeddings", None))
        self.context = min((limit for limit in limits if limit is not None), default=2**31)
        self._window = min(
            (layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)),
            default=2**31,
        )
        base = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        self._accepted = inspect.signature(base.forward).parameters.keys()
        self._ends = _ends_of_turn(self._model, self._tokenizer)
        self._prefixes: OrderedDict[Tokens, Layers] = OrderedDict()
        self._recent: deque[Encoded] = deque(maxlen=_RECENT)

    def encode(self, request: Request) -> Encoded:
        """A request in tokens.

        Raises:
            InputTooLong: It doesn't fit the context.
            BackendError: The template refuses the chat, or the text isn't Unicode.
        """
        return encode(self._tokenizer, request, self.context)

    def plan(self, waiting: Sequence[Encoded], size: int) -> tuple[list[int], int]:
        """Which of the waiting requests to answer next, as one batch, and how many first tokens they share.

        The oldest is always among them; the others are of its kind, share its static prefix, and are those
        nearest to it in length.

        Args:
            waiting: At least one request, oldest first.
            size: Rows that a batch may have.
        """
        oldest = waiting[0]
        alike = [
            index for index in range(1, len(waiting)) if bool(waiting[index].tails) == bool(oldest.tails)
        ]
        shared = self._shared(oldest, [waiting[index] for index in alike])
        alike = [
            index
            for index in alike
            if len(waiting[index].tokens) > shared
            and waiting[index].tokens[:shared] == oldest.tokens[:shared]
        ]
        alike.sort(key=lambda index: abs(waiting[index].length - oldest.length))
        batch, rows, longest = [0], len(oldest.paths), oldest.length
        for index in alike:
            rows += len(waiting[index].paths)
            longest = max(longest, waiting[index].length)
            if rows > size or rows * longest > _BATCH_TOKENS:
                break
            batch.append(index)
        return sorted(batch), shared

    def answer(
        self, batch: Sequence[Encoded], shared: int, is_wanted: Callable[[int], bool]
    ) -> list[Completion | BackendError]:
        """Answers requests of one kind, in order.

        Args:
            batch: Requests that either all have candidates or all have none.
            shared: How many first tokens they share; fewer than each of them has.
            is_wanted: Whether the request at an index is still waited for; asked before each new token.
        """
        self._recent.extend(batch)
        try:
            return self._answer(batch, shared, is_wanted)
        except torch.OutOfMemoryError:
            pass  # the tensors of the failed attempt are free once this block is left
        middle = max(1, len(batch) // 2)
        answers: list[Completion | BackendError] = []
        for first, half in ((0, batch[:middle]), (middle, batch[middle:])):
            if half:
                self.free()
                answers += self._answer_half(half, shared, first, is_wanted)
        return answers

    def _answer_half(
        self, half: Sequence[Encoded], shared: int, first: int, is_wanted: Callable[[int], bool]
    ) -> list[Completion | BackendError]:
        try:
            return self._answer(half, shared, lambda index: is_wanted(first + index))
        except torch.OutOfMemoryError:
            error = BackendError(
                f"The memory of {self._device} is too small for {len(half)} requests at once, of up to "
                f"{max(one.length for one in half)} tokens: lower batch_size or context."
            )
        return [error] * len(half)

    def free(self) -> None:
        """Forgets the static prefixes and hands unused memory back to the device."""
        self._prefixes.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _shared(self, oldest: Encoded, others: Sequence[Encoded]) -> int:
        """How many of the oldest request's first tokens are a static prefix worth keeping apart.

        A prefix is static if other chats begin with it. Among the lengths that qualify, the one that saves most
        tokens beyond what is cached already.
        """
        tokens = oldest.tokens
        cached = max((self._usable(prefix, tokens) for prefix in self._prefixes), default=0)
        chats = [one for one in (*others, *self._recent) if one.request.messages != oldest.request.messages]
        lengths = sorted((self._usable(one.tokens, tokens) for one in chats), reverse=True)
        shared, most = cached, 0
        for sharers, length in enumerate(lengths, 1):
            saved = length - cached
            if sharers >= min(_SHARERS, len(others)) and saved >= _SHORTEST_PREFIX and sharers * saved > most:
                shared, most = length, sharers * saved
        return shared if shared >= _SHORTEST_PREFIX else 0

    @staticmethod
    def _usable(prefix: Tokens, tokens: Tokens) -> int:
        # The last token is always computed: what follows it is asked for.
        return min(common_length(prefix, tokens), len(tokens) - 1)

    def _answer(
        self, batch: Sequence[Encoded], shared: int, is_wanted: Callable[[int], bool]
    ) -> list[Completion | BackendError]:
        # Between prefix and prompt there is padding, and a sliding window would count it.
        if max(len(one.tokens) for one in batch) + max(one.new for one in batch) > self._window:
            shared = 0
        with torch.inference_mode():
            layers, cached = self._prefix(batch[0].tokens[:shared])
            usages = [Usage(len(one.tokens), shared) for one in batch]
            usages[0] = Usage(len(batch[0].tokens), cached)
            if batch[0].tails:
                return self._score(batch, usages, shared, layers)
            return self._generate(batch, usages, shared, layers, is_wanted)

    def _prefix(self, tokens: Tokens) -> tuple[Layers, int]:
        """Keys and values of a prefix, and how many tokens of them were there already."""
        if not tokens:
            return [], 0
        nearest = max(self._prefixes, key=lambda prefix: common_length(prefix, tokens), default=())
        cached = common_length(nearest, tokens)
        layers = _first(self._prefixes[nearest], cached) if cached else []
        if cached:
            self._prefixes.move_to_end(nearest)
        if cached < len(tokens):
            batch = _Batch(self, layers, cached, [tokens[cached:]])
            batch.step(1)
            layers = [(layer.keys, layer.values) for layer in batch.layers]
            self._prefixes[tokens] = layers
            if len(self._prefixes) > _PREFIXES:
                self._prefixes.popitem(last=False)
        return layers, cached

    def _score(
        self, batch: Sequence[Encoded], usages: Sequence[Usage], shared: int, layers: Layers
    ) -> list[Completion | BackendError]:
        paths = [(index, path) for index, one in enumerate(batch) for path in one.paths]
        rows = [batch[index].tokens[shared:] + path for index, path in paths]
        kept = 1 + max(len(path) for _, path in paths)
        logits = _Batch(self, layers, shared, rows).step(kept)
        logprobs = logits.float().log_softmax(-1)
        answers: list[Completion | BackendError] = []
        for index, one in enumerate(batch):
            scores: dict[str, float] = {}
            for name, tail in one.tails.items():
                row, length = next(
                    (row, len(path))
                    for row, (owner, path) in enumerate(paths)
                    if owner == index and path[: len(tail) - 1] == tail[:-1]
                )
                start = kept - 1 - length
                picked = logprobs[row, range(start, start + len(tail)), list(tail)]
                scores[name] = float(picked.double().sum())
            if any(map(math.isnan, scores.values())):
                answers.append(_no_number())
                continue
            # Rounding can lift a certainty above it.
            scores = {name: min(score, 0.0) for name, score in scores.items()}
            answers.append(
                Completion(finish_reason="candidates", logprobs=MappingProxyType(scores), usage=usages[index])
            )
        return answers

    def _generate(
        self,
        batch: Sequence[Encoded],
        usages: Sequence[Usage],
        shared: int,
        layers: Layers,
        is_wanted: Callable[[int], bool],
    ) -> list[Completion | BackendError]:
        answers: list[Completion | BackendError] = [BackendError("The request was cancelled.")] * len(batch)
        generated: list[list[int]] = [[] for _ in batch]
        active = [index for index in range(len(batch)) if is_wanted(index)]
        if not active:
            return answers
        rows = _Batch(self, layers, shared, [batch[index].tokens[shared:] for index in active])
        while active:
            values, following = rows.step(1)[:, -1].max(-1)
            kept: list[int] = []
            for row, (index, value, token) in enumerate(
                zip(active, values.tolist(), following.tolist(), strict=True)
            ):
                if math.isnan(value):
                    answers[index] = _no_number()
                    continue
                generated[index].append(token)
                answer = self._finished(batch[index], generated[index], usages[index])
                if answer is not None:
                    answers[index] = answer
                elif is_wanted(index):
                    kept.append(row)
            active = [active[row] for row in kept]
            rows.keep(kept, [generated[index][-1] for index in active])
        return answers

    def sample(
        self,
        prompt: Tokens,
        count: int,
        choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        max_tokens: int,
        ends: Collection[int],
    ) -> list[list[int]]:
        """Continues one prompt several times, and computes the prompt once.

        Args:
            prompt: At least one token.
            count: Continuations (>= 1).
            choose: Takes the tokens so far of those that go on, (rows, tokens), and the logits of their next ones,
                (rows, vocabulary), and returns these, (rows,).
            max_tokens: Tokens that a continuation may have.
            ends: Tokens that end one; they are part of it.

        Returns:
            The tokens of each.
        """
        sampled: list[list[int]] = [[] for _ in range(count)]
        active = list(range(count))
        with torch.inference_mode():
            layers, _ = self._prefix(prompt[:-1])
            rows = _Batch(self, layers, len(prompt) - 1, [prompt[-1:]] * count)
            while active:
                seen = torch.tensor([[*prompt, *sampled[index]] for index in active], device=self._device)
                following = choose(seen, rows.step(1)[:, -1]).tolist()
                for index, token in zip(active, following, strict=True):
                    sampled[index].append(token)
                kept = [
                    row
                    for row, index in enumerate(active)
                    if sampled[index][-1] not in ends and len(sampled[index]) < max_tokens
                ]
                active = [active[row] for row in kept]
                rows.keep(kept, [sampled[index][-1] for index in active])
        return sampled

    def _finished(self, one: Encoded, generated: Sequence[int], usage: Usage) -> Completion | None:
        """The completion, once an end of turn, a stop string or the budget is reached."""
        request = one.request
        usage += Usage(completion_tokens=len(generated))
        if generated[-1] in self._ends:
            return Completion(text=self._text(one, generated[:-1]), usage=usage)
        if request.stop:
            # The end of the text suffices: a token is at least a byte long, but for control tokens.
            nearest = max(len(stop.encode()) for stop in request.stop) + _DECODED_WITH
            if any(stop in self._decode(generated[-nearest:]) for stop in request.stop):
                text = self._text(one, generated)
                ends = [text.index(stop) for stop in request.stop if stop in text]
                if ends:
                    return Completion(text=text[: min(ends)], usage=usage)
        if len(generated) >= request.max_tokens:
            return Completion(text=self._text(one, generated), finish_reason="length", usage=usage)
        return None

    def _text(self, one: Encoded, generated: Sequence[int]) -> str:
        before = one.tokens[-_DECODED_WITH:]
        prefix, whole = self._decode(before), self._decode([*before, *generated])
        return whole[len(prefix) :] if whole.startswith(prefix) else self._decode(generated)

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def forward(self, cache: Cache, ids: Any, mask: Any, positions: Any, kept: int) -> Any:
        """Logits, shape (rows, kept, vocabulary), after each of the last `kept` tokens."""
        inputs = {"position_ids": positions, "logits_to_keep": kept}
        known = {name: value for name, value in inputs.items() if name in self._accepted}
        output = self._model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **known
        )
        return output.logits[:, -kept:]

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self._device


class _Batch:
    """Rows of tokens after a shared prefix, padded on the left, with their keys and values."""

    def __init__(self, engine: CausalLM, layers: Layers, shared: int, rows: Sequence[Tokens]) -> None:
        self._engine = engine
        longest = max(map(len, rows))
        padding = [longest - len(row) for row in rows]
        self._ids = torch.tensor(
            [[0] * pad + list(row) for pad, row in zip(padding, rows, strict=True)], device=engine.device
        )
        self._mask = torch.tensor(
            [[1] * shared + [0] * pad + [1] * (longest - pad) for pad in padding], device=engine.device
        )
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, shared:]
        self._cache = Cache(layer_class_to_replicate=_GrowingLayer)
        for keys, values in _first(layers, shared):
            layer = _GrowingLayer()
            if keys is not None:
                # It makes a copy, so the prefix itself stays as it is.
                layer.update(_rows(keys, len(rows)), _rows(values, len(rows)))
            self._cache.layers.append(layer)

    @property
    def layers(self) -> Sequence[Any]:
        return self._cache.layers

    def step(self, kept: int) -> Any:
        return self._engine.forward(self._cache, self._ids, self._mask, self._positions, kept)

    def keep(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Goes on with these rows alone, each after its new token."""
        if not rows:
            return
        if len(rows) < len(self._ids):
            indices = torch.tensor(rows, device=self._engine.device)
            for layer in self.layers:
                if layer.get_seq_length():
                    layer.batch_select_indices(indices.to(layer.keys.device))
            self._mask, self._positions = self._mask[indices], self._positions[indices]
        self._ids = torch.tensor(tokens, device=self._engine.device).unsqueeze(1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(rows), 1)], dim=1)
        self._positions = self._positions[:, -1:] + 1


class _GrowingLayer(DynamicLayer):
    """Keys and values of a layer, with room for more: copying them for every token takes most of its time on a CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room: Any = (None, None)

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._room = (
            _roomy(self._room[0], self.keys, key_states),
            _roomy(self._room[1], self.values, value_states),
        )
        length = self.get_seq_length() + key_states.shape[-2]
        self.keys, self.values = (room[..., :length, :] for room in self._room)
        return self.keys, self.values


def _roomy(room: Any, states: Any, new: Any) -> Any:
    """A tensor that begins with the states and the new ones: where the states lie already, if they fit there."""
    length = states.shape[-2] if states.numel() else 0
    longer = length + new.shape[-2]
    if room is None or room.data_ptr() != states.data_ptr() or room.shape[-2] < longer:
        # What was computed in one go may be all there is.
        room = new.new_empty(*new.shape[:-2], longer + (_ROOM if length else 0), new.shape[-1])
        if length:
            room[..., :length, :] = states
    room[..., length:longer, :] = new
    return room


def _rows(states: Any, rows: int) -> Any:
    return states.expand(rows, *states.shape[1:])


def _first(layers: Layers, length: int) -> Layers:
    return [
        (None, None) if keys is None else (keys[..., :length, :], values[..., :length, :])
        for keys, values in layers
    ]


def _ends_of_turn(model: Any, tokenizer: Any) -> frozenset[int]:
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    known = [number for token, number in tokenizer.get_vocab().items() if token in _ENDS_OF_TURN]
    return frozenset(end for end in [*ends, *known, tokenizer.eos_token_id] if end is not None)


def _no_number() -> BackendError:
    return BackendError(
        "The model's output is no number: its weights are damaged, or it needs another dtype."
    )
