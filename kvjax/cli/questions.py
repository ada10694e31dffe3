"""Several questions about one text, which is read and compressed once."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvjax.cli.base import UI
from kvjax.cli.stream import Stream
from kvjax.compress.config import Compression
from kvjax.eval.framing import Framing, chat_framing, plain_framing
from kvjax.eval.tasks import Episode, Turn
from kvjax.eval.text import Tokenizer
from kvjax.models import checks
from kvjax.models.decoder import Decoder
from kvjax.models.sampling import Sampling

_BETWEEN = "\n\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """How questions are answered.

    Attributes:
        model, tokenizer: who answers.
        c: what is done to the cache of the text.
        stops: tokens that end an answer.
        most: tokens of an answer.
        seed: of what is drawn.
    """

    model: Decoder
    tokenizer: Any
    c: Compression
    stops: Sequence[int]
    most: int
    seed: int = 0

    def about(
        self, text: str, questions: Sequence[str], drawing: Sampling, ui: UI
    ) -> dict[str, Any]:
        """Print the answers as they come, and give them back.

        Raises:
            ValueError: an empty text or question, a template that changes them, or more
                tokens than the model takes; before anything is computed.
        """
        import jax
        import jax.numpy as jnp

        from kvjax.models.inference import prefill

        text_ids, tails = self._tokens(text, questions)
        start, config = time.perf_counter(), self.model.config
        tokens, lengths = checks.prompt(
            config, jnp.asarray([text_ids], jnp.int32), None
        )
        room = max(map(len, tails)) + self.most
        checks.generation(config, lengths, room)
        with ui.status(f"reading {len(text_ids)} tokens"):
            logits, cache = prefill(
                self.model, tokens, None, self.c, max_new_tokens=room
            )
            jax.block_until_ready(logits)
        middle, answers = time.perf_counter(), []
        for number, question in enumerate(questions):
            made = self._answer(cache, tails[number], number, drawing, question, ui)
            answers.append(made)
        return {
            "answers": answers,
            "prompt_tokens": len(text_ids),
            "resident_bytes": cache.nbytes,
            "host_bytes": cache.host_nbytes,
            "prefill_s": round(middle - start, 4),
            "decode_s": round(time.perf_counter() - middle, 4),
        }

    def _answer(self, cache, ids, number, drawing, question, ui: UI) -> dict[str, Any]:
        import jax
        import jax.numpy as jnp

        from kvjax.models.generation import generate_from
        from kvjax.models.inference import extend

        if not ui.json:
            print(f"{_BETWEEN[1:] * (number > 0)}> {question}", flush=True)
        printer = Stream(self.tokenizer, sys.stdout, quiet=ui.json)
        tokens = jnp.asarray([ids], jnp.int32)
        logits, cache = extend(self.model, cache, tokens, last=True)
        out = generate_from(
            self.model,
            cache,
            logits[:, 0],
            max_new_tokens=self.most,
            **dataclasses.asdict(drawing),
            stop_tokens=self.stops,
            key=jax.random.fold_in(jax.random.key(self.seed), number),
            callback=printer,
        )
        printer.close()
        if not ui.json:
            print()
        reply = np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist()
        return {
            "question": question,
            "text": self.tokenizer.decode(reply, skip_special_tokens=True),
            "tokens": reply,
        }

    def _tokens(
        self, text: str, questions: Sequence[str]
    ) -> tuple[list[int], list[list[int]]]:
        """Tokens up to the end of the text, and for each question those behind it."""
        for question in questions:
            if not question.strip():
                raise ValueError("--question is empty; ask something, or leave it out.")
        text = text.strip()
        if not text:
            raise ValueError("the prompt is empty; give it some text.")
        frame, turns = self._framed([question.strip() for question in questions])
        prompt = frame.prompt(Episode(context=text + _BETWEEN, turns=tuple(turns)))
        return list(prompt), [list(frame.asked(turn)) for turn in turns]

    def _framed(self, questions: Sequence[str]) -> tuple[Framing, list[Turn]]:
        """As evaluations ask: by the chat template, if there is one."""
        tokenizer = Tokenizer(self.tokenizer, self.model.config.vocab_size)
        about = {"answer": "", "meta": {}}
        if not tokenizer.has_template:
            turns = [
                Turn(question=f"Question: {one}", prefix="Answer:", **about)
                for one in questions
            ]
            return plain_framing(tokenizer), turns
        turns = [Turn(question=one, **about) for one in questions]
        return chat_framing(tokenizer), turns
