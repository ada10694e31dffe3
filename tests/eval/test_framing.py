"""How tasks become tokens: as text, and by chat templates of several kinds."""

import pytest

from kvjax.eval.framing import framing
from kvjax.eval.tasks import Episode, Task, Turn, make_task
from kvjax.eval.text import Tokenizer
from tests.eval import tiny

CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}({{ m['content'] }}){% endfor %}"
)
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'system' %}({{ m['content'] }})"
    "{% endif %}{% endfor %}"
)
THINKS = (
    "{% for m in messages %}({{ m['content'] }}){% endfor %}"
    "{% if add_generation_prompt and not enable_thinking %}[no thought]{% endif %}"
)


class Words(Task):
    """Of words, with a system's message."""

    name = "words"
    unit = "words"
    system = "be brief"

    @property
    def max_new_tokens(self) -> int:
        return 5

    def episode(self, rng, size, turns=1):
        raise NotImplementedError

    def score(self, item, reply):
        return float(reply == item.answer)


FIRST = Turn(question="who?", answer="me", meta={}, prefix="it is ")
SECOND = Turn(question="why?", answer="so", meta={})
EPISODE = Episode(context="a text. ", turns=(FIRST, SECOND))


def framed(template: str | None, task: Task, chat: str = "auto", **fields):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return framing(Tokenizer(tokenizer, 100), task, chat, **fields)


def text(frame, tokens) -> str:
    return frame.tokenizer.decode(tokens)


def test_records_are_read_as_they_are():
    frame = framed(CHATML, make_task("fact"))
    assert text(frame, frame.prompt(EPISODE)) == "a text. "
    assert text(frame, frame.prompt(EPISODE, aware=True)) == "a text. who?"
    assert text(frame, frame.asked(FIRST)) == "who?it is "
    assert text(frame, frame.asked(SECOND, FIRST)) == "mewhy?"
    assert frame.begin == (1,) and frame.prompt(EPISODE)[0] == 1
    assert frame.ends == () and not frame.chat


def test_words_without_a_template():
    frame = framed(None, Words(), ends=[7])
    assert text(frame, frame.prompt(EPISODE)) == "be brief\n\na text. "
    assert text(frame, frame.asked(FIRST)) == "who?\nit is "
    assert text(frame, frame.asked(SECOND, FIRST)) == "me\n\nwhy?\n"
    assert 7 in frame.ends


def test_a_chat_is_what_its_template_writes():
    frame = framed(CHATML, Words())
    whole = frame.tokenizer.raw.apply_chat_template(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "a text. who?"},
            {"role": "assistant", "content": "it is me"},
            {"role": "user", "content": "why?"},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    read = (*frame.prompt(EPISODE), *frame.asked(FIRST), *frame.asked(SECOND, FIRST))
    assert "".join(map(frame.tokenizer.piece, read)) == whole.replace(" me", " me")
    assert frame.chat and frame.begin == ()


LAST_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'system' %}("
    "{% if loop.last and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] }}: {% endif %}{{ m['content'] }})"
    "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM, LAST_SYSTEM])
def test_a_system_message_without_its_role_begins_the_first(template):
    frame = framed(template, Words())
    assert text(frame, frame.prompt(EPISODE)) == "(be brief\n\na text. "
    assert text(frame, frame.asked(FIRST)) == "who?)it is "


@pytest.mark.parametrize("template", [None, CHATML])
def test_no_space_is_put_between_what_is_read_at_once_and_later(template):
    """Of the SentencePiece kind, which put one in front of every text."""
    tokenizer = sentencepieces()
    tokenizer.chat_template = template
    frame = framing(Tokenizer(tokenizer, 100), Words())
    read = (*frame.prompt(EPISODE), *frame.asked(FIRST))
    whole = f"{frame.opening}a text. who?{frame.closing}it is "
    assert str(tokenizer.decode(read)).lstrip() == whole
    assert len(tokenizer.encode("who?")) == len("\N{LOWER ONE EIGHTH BLOCK}who?")


def sentencepieces():
    """Of characters, with a mark for spaces and for the beginning, as Llama 2's."""
    import tokenizers
    from tokenizers import decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    space = "\N{LOWER ONE EIGHTH BLOCK}"
    known = sorted({*"abcdefghijklmnopqrstuvwxyz.?:\n<>", space})
    made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(known)}, []))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    )
    made.decoder = decoders.Replace(space, " ")
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_thinking_is_asked_for():
    frame = framed(THINKS, Words())
    assert text(frame, frame.asked(FIRST)) == "who?)[no thought]it is "
    assert text(frame, framed(THINKS, Words(), thinking=True).asked(SECOND)) == "why?)"


def test_length_counts_all_that_is_read_and_the_reply():
    frame, task = framed(CHATML, Words()), Words()
    read = (*frame.prompt(EPISODE), *frame.asked(FIRST), *frame.asked(SECOND, FIRST))
    assert frame.measure(task, EPISODE) == len(read) + task.max_new_tokens
    records = make_task("fact")
    frame = framed(None, records)
    assert frame.measure(records, EPISODE) == len("a text. who?it is mewhy?so")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[-1]['content'] }}", "does not write each message once"),
        ("{{ raise_exception('never') }}", "refuses plain questions.*never"),
        ("{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}", "once"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "once"),
        ("{{ messages[-1].content | length }}" + CHATML, "around other messages"),
        *(
            (
                f"{{% for m in messages %}}{{{{ m.content{change} }}}}|{{% endfor %}}",
                "once",
            )
            for change in (
                " | e",
                " | replace('  ', ' ')",
                " | replace('\t', ' ')",
                "[:1000]",
                " | wordwrap(79)",
            )
        ),
        ("{% for m in messages[::-1] %}{{ m.content }}|{% endfor %}", "in their order"),
    ],
)
def test_templates_that_lose_messages_are_refused(template, said):
    with pytest.raises(ValueError, match=said):
        framed(template, Words())


def test_a_chat_needs_a_template():
    with pytest.raises(ValueError, match="has no chat template"):
        framed(None, Words(), "always")
    assert framed(CHATML, make_task("fact"), "always").chat
    assert not framed(CHATML, Words(), "never").chat
