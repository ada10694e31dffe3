"""`kvjax generate`."""

import dataclasses
import sys
import time
from collections.abc import Mapping
from typing import IO, Annotated, Any, ClassVar, final

import numpy as np
import tyro
from rich.console import Console

from kvjax.cli.base import (
    CLOSED_OUTPUT,
    MOST,
    UI,
    Assignments,
    Command,
    Count,
    Dtype,
    File,
    Flag,
    Fraction,
    Mesh,
    Model,
    Output,
    Seed,
    Text,
    load_model,
    option,
    optional,
    pick,
)
from kvjax.cli.questions import Asking
from kvjax.cli.stream import Stream
from kvjax.cli.tables import held_label
from kvjax.fields import Range
from kvjax.messages import shown
from kvjax.models import checks
from kvjax.models.bundled import DEFAULT
from kvjax.models.sampling import Sampling
from kvjax.models.stored_generation import sampling_of
from kvjax.models.tokenizer import encoded
from kvjax.plaintext import MARK, decoded

Temperature = Annotated[float | None, Range(0), optional("NUMBER")]
MOST_BYTES = 64 * 2**20
"""Of a prompt's file."""

Texts = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")
]


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Continue a prompt with a compressed cache."""

    summary: ClassVar[str] = "Continue a prompt with a compressed cache."
    resumes: ClassVar[bool] = False
    examples: ClassVar[str] = (
        "  kvjax generate --prompt '[KQ=ab3d] The sun is low. ? [KQ=' --stop ']'\n"
        "  kvjax generate --model DIR --prompt-file long.txt --compression snapkv \\\n"
        "      --keep 0.1 --max-new-tokens 200\n"
        "  kvjax generate --model smollm2 --prompt-file notes.txt --keep 0.25 \\\n"
        "      --compression snapkv --question 'Who came?' --question 'Why?'\n"
        "  kvjax generate --model DIR --prompt Hi --compression snapkv_kivi \\\n"
        "      --set evict.score.window=16 --set store.keys.bits=8\n"
    )

    model: Model = DEFAULT
    prompt: Text = None
    """What to continue."""
    prompt_file: File = None
    """File with what to continue; - is standard input."""
    question: Texts = ()
    """Ask this about the prompt; give it again for more. The prompt is read and
    compressed once, before any question is seen, and all are answered from that cache.
    Both go through the model's chat template, if it has one."""
    chat: Flag = False
    """Wrap the prompt as a user's message with the model's chat template."""
    compression: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")] = "none"
    """A compression from the list above, or a YAML file of one."""
    keep: Fraction = None
    """Fraction of the prompt's cache to keep; the preset's own if left out."""
    set: Assignments = ()
    """Set a field of the compression: --set evict.score.window=16."""
    max_new_tokens: Annotated[int, Range(1, MOST)] = 64
    """Tokens to make at most."""
    stop: Texts = ()
    """A text of one token that ends the reply, as the model's own end tokens do."""
    temperature: Temperature = None
    """0 takes the likeliest token; above it, tokens are drawn. Left out, this and the
    next two are as the checkpoint's generation_config.json has them, if it has any."""
    top_k: Count = None
    """Draw from this many likeliest tokens only."""
    top_p: Fraction = None
    """Draw from the likeliest tokens up to this probability only."""
    seed: Seed = None
    """Of the drawing; 0 if left out."""
    dtype: Dtype = "auto"
    """Of the parameters; auto: float32 if bundled or fetched, else bfloat16."""
    mesh: Mesh = None
    """Devices: data splits rows, model splits heads, as in data=2,model=4."""
    output: Output = Output()

    def run(self, ui: UI) -> Mapping[str, Any]:
        """See `Command.run`."""
        if sys.stdout is None:
            raise ValueError(CLOSED_OUTPUT)
        text = self._text()
        if not text:
            raise ValueError("the prompt is empty; give at least one token.")
        self._sampling({})
        c = pick(self.compression, self.keep, self.set)
        model, tokenizer = load_model(self.model, self.dtype, ui, self.mesh)
        drawing = self._sampling(model.config.generation_settings, ui)
        stops = [*model.config.eos_tokens, *self._stops(tokenizer)]
        if self.question:
            how = {"seed": self.seed or 0, "most": self.max_new_tokens}
            asking = Asking(model=model, tokenizer=tokenizer, c=c, stops=stops, **how)
            made = asking.about(text, self.question, drawing, ui)
            return made | {"compression": self.compression, "keep": c.keep}
        ids = self._encode(tokenizer, text)
        printer = Stream(tokenizer, sys.stdout, quiet=ui.json)
        out, times, sizes = self._generate(model, ids, c, drawing, stops, printer, ui)
        reply = np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist()
        return {
            "text": tokenizer.decode(reply, skip_special_tokens=True),
            "tokens": reply,
            "prompt_tokens": len(ids),
            "compression": self.compression,
            "keep": c.keep,
            **sizes,
            "prefill_s": round(times[0], 4),
            "decode_s": round(times[1], 4),
        }

    def show(self, result: Mapping[str, Any], console: Console) -> None:
        """See `Command.show`; the text itself was streamed."""
        print()
        made = sum(len(one["tokens"]) for one in result.get("answers", (result,)))
        seconds = result["decode_s"]
        note = (
            f"{result['prompt_tokens']} prompt tokens, cache "
            f"{held_label(result)} KiB ({result['compression']}); "
            f"{made} tokens in {seconds:.2f} s, compilation included"
        )
        print(note, file=sys.stderr)

    def _generate(self, model, ids, c, drawing, stops, printer, ui: UI):
        import jax
        import jax.numpy as jnp

        from kvjax.models.generation import generate_from
        from kvjax.models.inference import prefill

        start = time.perf_counter()
        tokens = jnp.asarray([ids], jnp.int32)
        # Before the cache gets room for that many.
        tokens, lengths = checks.prompt(model.config, tokens, None)
        checks.generation(model.config, lengths, self.max_new_tokens)
        with ui.status(f"reading {len(ids)} tokens"):
            logits, cache = prefill(
                model, tokens, None, c, max_new_tokens=self.max_new_tokens
            )
            jax.block_until_ready(logits)
        middle = time.perf_counter()
        out = generate_from(
            model,
            cache,
            logits,
            max_new_tokens=self.max_new_tokens,
            **dataclasses.asdict(drawing),
            stop_tokens=stops,
            key=jax.random.key(self.seed or 0),
            callback=printer,
        )
        printer.close()
        held = {"resident_bytes": cache.nbytes, "host_bytes": cache.host_nbytes}
        return out, (middle - start, time.perf_counter() - middle), held

    def _sampling(self, given: Mapping[str, Any], ui: UI | None = None) -> Sampling:
        """How tokens are drawn: as the command line says, and else the checkpoint."""
        own = {
            name: value
            for name in ("temperature", "top_k", "top_p")
            if (value := getattr(self, name)) is not None
        }
        found, others = sampling_of(given)
        made = dataclasses.replace(found, **own)
        if ui is not None and made.greedy:
            self._check_drawn()
        if ui is not None and not found.greedy and made.temperature:
            said = ", ".join(
                f"{n} {v}" for n, v in dataclasses.asdict(made).items() if v
            )
            ui.err.print(
                f"drawn with {said} (generation_config.json; --temperature 0 takes the "
                "likeliest token)"
            )
        if ui is not None and others:
            ui.err.print(f"generation_config.json: {shown(others)} is not applied")
        return made

    def _check_drawn(self) -> None:
        """Nothing is said of drawing where nothing is drawn."""
        asked = [n for n in ("top_k", "top_p", "seed") if getattr(self, n) is not None]
        if asked:
            raise ValueError(
                f"{option(asked[0])} is of drawing, and the likeliest token is taken. "
                "Give a --temperature above 0, or leave it out."
            )

    def _text(self) -> str:
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError("give either --prompt TEXT or --prompt-file FILE.")
        if self.prompt is not None:
            return self.prompt.removeprefix(MARK)
        assert self.prompt_file is not None
        if str(self.prompt_file) == "-":
            if sys.stdin is None:
                raise ValueError(
                    "--prompt-file -: standard input is closed. Pipe the prompt in, or "
                    "name a file."
                )
            return _prompt(sys.stdin.buffer, "--prompt-file: standard input")
        name = str(self.prompt_file)[:300]
        try:
            with self.prompt_file.open("rb") as file:
                return _prompt(file, name)
        except OSError as wrong:
            raise ValueError(f"Cannot read {name}: {wrong.strerror}.") from None

    def _encode(self, tokenizer, text: str) -> list[int]:
        if self.chat:
            if not getattr(tokenizer, "chat_template", None):
                raise ValueError(
                    f"{self.model} has no chat template; leave --chat out."
                )
            text = self._asked(tokenizer, text)
        ids = encoded(tokenizer, text, add_special_tokens=not self.chat)
        if not ids:
            raise ValueError("the prompt is empty; give at least one token.")
        return ids

    def _asked(self, tokenizer, text: str) -> str:
        """`text` as a user's message, with the prompt for an answer."""
        from kvjax.models.templates import TemplateFault, written

        try:
            return written(tokenizer, [{"role": "user", "content": text}], ask=True)
        except TemplateFault as wrong:
            raise ValueError(
                f"the chat template of {self.model} refuses the prompt ({wrong}). "
                "Leave --chat out, or mend the template."
            ) from wrong

    def _stops(self, tokenizer) -> list[int]:
        found = []
        for text in self.stop:
            ids = encoded(tokenizer, text, add_special_tokens=False)
            if len(ids) != 1:
                raise ValueError(
                    f"--stop {shown(text)} is {len(ids)} tokens of this model; each "
                    "stop must be one."
                )
            found += ids
        return found


def _prompt(file: IO[bytes], name: str) -> str:
    """What a file or a pipe holds, which may have no end."""
    data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{name} has more than {MOST_BYTES} bytes; no prompt has.")
    return decoded(data, name)
