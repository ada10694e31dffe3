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
from kvjax.models import checks
from kvjax.models.decoder import Decoder
from kvjax.models.sampling import Sampling
from kvjax.models.tokenizer import encoded

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
            ValueError: an empty question, a template that changes the text, or more
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
        logits, cache = extend(self.model, cache, jnp.asarray([ids], jnp.int32))
        out = generate_from(
            self.model,
            cache,
            logits[:, -1],
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
        text, heads, tails = text.strip(), [], []
        for question in questions:
            if not question.strip():
                raise ValueError("--question is empty; ask something, or leave it out.")
            head, tail = self._written(text, question.strip())
            heads.append(head)
            tails.append(tail)
        if len({*heads}) > 1:
            raise ValueError(
                "the chat template writes another text for each question, so that none "
                "can be read before them. Ask with --prompt, one at a time."
            )
        plain = not getattr(self.tokenizer, "chat_template", None)
        ids = encoded(self.tokenizer, heads[0], add_special_tokens=plain)
        if not ids:
            raise ValueError("the prompt is empty; give at least one token.")
        return ids, [self._behind(ids, heads[0], tail, plain) for tail in tails]

    def _behind(self, ids: list[int], head: str, tail: str, plain: bool) -> list[int]:
        """Tokens of `tail` behind `head`: no begin token, no space in front."""
        whole = encoded(self.tokenizer, head + tail, add_special_tokens=plain)
        if whole[: len(ids)] == ids and len(whole) > len(ids):
            return whole[len(ids) :]
        return encoded(self.tokenizer, tail, add_special_tokens=False)

    def _written(self, text: str, question: str) -> tuple[str, str]:
        """A chat up to the end of the text, and from the question on."""
        from kvjax.models.templates import TemplateFault, written

        if not getattr(self.tokenizer, "chat_template", None):
            return text + _BETWEEN, f"Question: {question}\nAnswer:"
        both = f"{text}{_BETWEEN}{question}"
        message = {"role": "user", "content": both}
        try:
            chat = written(self.tokenizer, [message], ask=True)
        except TemplateFault as wrong:
            raise ValueError(
                f"the chat template refuses the question ({wrong}). Mend the template."
            ) from wrong
        at = chat.rfind(both)
        if at < 0:
            raise ValueError(
                "the chat template changes the text, so that it cannot be read before "
                "the question. Ask with --prompt, one question at a time."
            )
        cut = at + len(text) + len(_BETWEEN)
        return chat[:cut], chat[cut:]
