"""`KvjaxLM`: what the harness asks, answered through compressed caches."""

import collections
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Self

import jax
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

from kvjax.compress.config import Compression
from kvjax.compress.presets import canonical
from kvjax.eval.lm_eval.arguments import compression_of, from_arguments
from kvjax.eval.lm_eval.reader import Ids, Reader, Split
from kvjax.eval.lm_eval.replying import Replier, Settings, settings
from kvjax.eval.lm_eval.rule import AbstractRule, rule_of
from kvjax.eval.lm_eval.scoring import Score, score
from kvjax.eval.lm_eval.splitting import Splitter
from kvjax.eval.lm_eval.tally import Tally
from kvjax.eval.lm_eval.words import Words
from kvjax.eval.record import fingerprint, versions
from kvjax.fields import Range, fit
from kvjax.messages import shown
from kvjax.models import checks
from kvjax.models.decoder import Decoder
from kvjax.models.prompts import NONE
from kvjax.narrow import narrow

Whole = Annotated[int, Range(1, 2**31 - 1)]


class KvjaxLM(TemplateLM):
    """A model and a compression, for `lm_eval.simple_evaluate(model=...)`.

    Args:
        model: a decoder.
        tokenizer: its Hugging Face tokenizer.
        compression: what is done to the caches: a `Compression`, the name of a preset
            or a YAML file; None: nothing.
        keep: the fraction kept, instead of the compression's own.
        compress_at: where a context is compressed: `last:N`, all but its last N tokens;
            `marker:TEXT`, in front of the last occurrence of a text. What is behind is
            read through the compressed cache.
        batch: contexts that are read together, at most.
        max_length: tokens of context and continuation; None: the model's range. Longer
            contexts are cut at the left, as the harness does it, and counted.
        max_new_tokens: of a reply, where the task does not say.
        rolling_from: tokens at the begin of a window of `loglikelihood_rolling` with
            nothing compressed in front (`kvjax.eval.lm_eval.rolling`).
        seed: of replies that are drawn.

    Raises:
        ValueError: any of them is not what it should be.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Any,
        compression: Compression | str | pathlib.Path | None = None,
        *,
        keep: float | None = None,
        compress_at: AbstractRule | str = "last:1",
        batch: int = 8,
        max_length: int | None = None,
        max_new_tokens: int = 256,
        rolling_from: int = 128,
        seed: int = 0,
    ):
        super().__init__()
        config = checks.model(model)
        self._words = Words(tokenizer, config)
        self.model, self.tokenizer = model, tokenizer
        self.compression = compression_of(compression, keep)
        checks.suits(config, self.compression)
        self.batch = fit(batch, Annotated[int, Range(1, 2**16)], "batch")
        longest = Range(2, config.max_positions, hint="The model has no larger range.")
        wanted = config.max_positions if max_length is None else max_length
        most = fit(wanted, Annotated[int, longest], "max_length")
        self.max_new_tokens = fit(max_new_tokens, Whole, "max_new_tokens")
        self.seed = fit(seed, Annotated[int, Range(0, 2**32 - 1)], "seed")
        self.tally = Tally()
        self._splitter = Splitter(
            words=self._words,
            rule=rule_of(compress_at),
            most=most,
            first=fit(rolling_from, Whole, "rolling_from"),
            compresses=self.compression != NONE,
            tally=self.tally,
        )
        self._reader = Reader(model, self.compression, self.batch, self.tally)
        self._replier = Replier(self._reader, tokenizer, self._words.ends)
        self._draws = 0

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict | None = None
    ) -> Self:
        """For the harness: `pretrained=DIR,compression=snapkv,keep=0.5`."""
        given = simple_parse_args_string(arg_string)
        return cls.create_from_arg_obj(given, additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Self:
        """The same, of a mapping; see `kvjax.eval.lm_eval.arguments`."""
        model, tokenizer, options = from_arguments(arg_dict, additional_config or {})
        return cls(model, tokenizer, **options)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._words.end

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text that has no context."""
        return self._words.begin

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation."""
        return self._splitter.most

    @property
    def tokenizer_name(self) -> str:
        """By which the harness keeps the requests of chats."""
        name = getattr(self.tokenizer, "name_or_path", "")
        return (name or type(self.tokenizer).__name__).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text."""
        del kwargs
        return self._words.encode(string, add_special_tokens)

    def apply_chat_template(
        self,
        chat_history: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = True,
    ) -> str:
        """A chat as the model's template writes it."""
        return self._words.chat(chat_history, add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """What results say of the model: compression, bytes, counts, versions."""
        return {
            "compression": canonical(self.compression),
            "keep": self.compression.keep,
            "compress_at": str(self._splitter.rule),
            "rolling_from": self._splitter.first,
            "max_length": self.max_length,
            "batch": self.batch,
            **self.tally.as_info(),
            "model_dtype": self.model.dtype.name,
            "model_fingerprint": fingerprint(self.model),
            "kvjax_versions": versions(),
        }

    @narrow
    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[Score]:
        """Of each continuation: log-probability, and whether it is the likeliest."""
        for index, request in enumerate(requests):
            if not request.args[1]:
                raise ValueError(
                    f"request {index} of the harness ({shown(request.args[0])}) has an "
                    "empty continuation, which has no likelihood. Mend the task."
                )
        self.tally.requests += len(requests)
        quiet = disable_tqdm or not (sys.stderr and sys.stderr.isatty())
        return super().loglikelihood(list(requests), disable_tqdm=quiet)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[Score]:
        del kwargs
        asked: list[tuple[Split, Ids]] = []
        for index, ((text, _), context, ids) in enumerate(requests):
            if not 0 < len(ids) <= self.max_length:
                raise ValueError(
                    f"the continuation of request {index} has {len(ids)} tokens; "
                    f"expected 1 to {self.max_length} (max_length)."
                )
            # The last of its tokens is not read.
            most = self.max_length + 1 - len(ids)
            asked.append((self._splitter.split(index, text, context, most), tuple(ids)))

        def done(index: int, found: Score) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[index][0], found)

        return self._scores(asked, done, disable_tqdm)

    @narrow
    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts; see `kvjax.eval.lm_eval.rolling`."""
        windows = [self._splitter.windows(request.args[0]) for request in requests]
        asked = [part for parts in windows for part in parts]
        self.tally.requests += len(requests)
        found = iter(self._scores(asked, lambda *_: None, disable_tqdm))
        sums = [sum(next(found)[0] for _ in parts) for parts in windows]
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    @narrow
    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Replies, which end in front of a stop text."""
        groups: dict[Settings, dict[int, Split]] = collections.defaultdict(dict)
        ends = self._words.ends
        eos = self.tokenizer.decode([ends[0]]) if ends else None
        for index, request in enumerate(requests):
            text, kwargs = request.args
            how = settings(kwargs, self.max_new_tokens, eos)
            if how.most >= self.max_length:
                raise ValueError(
                    f"request {index} asks for {how.most} tokens; context and reply "
                    f"have {self.max_length} together (max_length). Lower "
                    "max_gen_toks, of the task or by gen_kwargs, or max_new_tokens."
                )
            most = self.max_length - how.most
            ids = self.tok_encode(text)
            groups[how][index] = self._splitter.split(index, text, ids, most)
        self._reader.check(
            [split for those in groups.values() for split in those.values()]
        )
        self.tally.requests += len(requests)
        out = [""] * len(requests)
        with _bar(len(requests), "replies", disable_tqdm) as bar:
            for how, those in groups.items():

                def done(index: int, text: str) -> None:
                    out[index] = text
                    asked = requests[index].args
                    self.cache_hook.add_partial("generate_until", asked, text)
                    bar.update()

                self._replies(how, those, done)
        return out

    def _replies(
        self, how: Settings, those: Mapping[int, Split], done: Callable[[int, str], Any]
    ) -> None:
        """One reply to all requests of a context, where nothing is drawn."""
        wanted: dict[Any, list[int]] = collections.defaultdict(list)
        for index, split in those.items():
            wanted[split if how.sampling.greedy else index].append(index)
        owners = list(wanted.values())

        def tell(which: int, text: str) -> None:
            for index in owners[which]:
                done(index, text)

        key = jax.random.fold_in(jax.random.key(self.seed), self._draws)
        self._draws += 1
        self._replier.reply([those[some[0]] for some in owners], how, key, tell)

    def _scores(
        self,
        asked: Sequence[tuple[Split, Ids]],
        done: Callable[[int, Score], None],
        disable_tqdm: bool,
    ) -> list[Score]:
        self._reader.check([split for split, _ in asked])
        out: list[Score] = [(0.0, False)] * len(asked)
        with _bar(len(asked), "log-likelihoods", disable_tqdm) as bar:

            def tell(index: int, found: Score) -> None:
                out[index] = found
                done(index, found)
                bar.update()

            score(self._reader, asked, tell)
        return out


register_model("kvjax")(KvjaxLM)  # as a decorator it would hide the class's type


def _bar(total: int, what: str, disabled: bool) -> tqdm:
    """A progress bar where there is a terminal."""
    return tqdm(total=total, desc=what, disable=disabled or None)
