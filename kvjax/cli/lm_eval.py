"""`kvjax lm-eval`."""

import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, final

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from kvjax.cli.base import (
    MOST,
    UI,
    Assignments,
    Command,
    Count,
    Dtype,
    Flag,
    Folder,
    Fraction,
    Items,
    Model,
    Names,
    Output,
    Seed,
    Text,
    load_model,
    numbers,
    optional,
    pick,
    split,
)
from kvjax.cli.tables import print_table
from kvjax.fields import Range, fit
from kvjax.files import write_json
from kvjax.messages import shown
from kvjax.models.bundled import DEFAULT, model_directory
from kvjax.places import busy, check_place, held

INSTALL = 'lm-eval is not installed: pip install "kvjax[lm-eval]".'
Shots = Annotated[int | None, Range(0, 10**4), optional("N")]
Whole = Annotated[int, Range(1, MOST)]


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class LmEval(Command):
    """Tasks of lm-evaluation-harness with a compressed cache."""

    resumes: ClassVar[bool] = False
    summary: ClassVar[str] = "Run tasks of lm-evaluation-harness with a compression."
    examples: ClassVar[str] = (
        "  kvjax lm-eval --model DIR --compression snapkv --keep 0.5 \\\n"
        "      --tasks gsm8k,hellaswag --num-fewshot 8 --limit 100 --out results/mine\n"
        "  kvjax lm-eval --model DIR --tasks ruler --lengths 4096 --compression h2o\n"
        "  kvjax lm-eval --model DIR --tasks mine --include-path my_tasks \\\n"
        "      --compression snapkv --compress-at marker:Question:\n"
        "\n"
        "What is in front of the point (--compress-at) is compressed; what is behind\n"
        "is read through the compressed cache. last:N is all but the last N tokens,\n"
        "marker:TEXT in front of the last occurrence of a text. Needs the extra\n"
        "lm-eval; `lm_eval ls tasks` lists the tasks."
    )

    tasks: Annotated[str, tyro.conf.arg(metavar="A,B,C")]
    """Tasks, groups, tags or patterns of the harness, or YAML files of tasks."""
    model: Model = DEFAULT
    compression: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")] = "none"
    """A compression from the list above, or a YAML file of one."""
    keep: Fraction = None
    """Fraction of a context's cache to keep; the preset's own if left out."""
    set: Assignments = ()
    """Set a field of the compression: --set evict.score.window=16."""
    compress_at: Annotated[str, tyro.conf.arg(metavar="last:N|marker:TEXT")] = "last:1"
    """Where contexts are compressed."""
    limit: Items = None
    """Items of each task, the first ones."""
    num_fewshot: Shots = None
    """Examples in front of each item; the task's own if left out."""
    include_path: Folder = None
    """Folder with YAML files of more tasks, which may run code that is beside them."""
    lengths: Names = None
    """Lengths of tasks that make their data: 4096,8192 of ruler."""
    apply_chat_template: Flag = False
    """Ask by the model's chat template, examples as turns of their own."""
    system_instruction: Text = None
    """What the chat begins with."""
    batch_size: Annotated[int, Range(1, 2**16)] = 8
    """Contexts at a time."""
    max_length: Count = None
    """Tokens of context and continuation; the model's range if left out."""
    max_new_tokens: Whole = 256
    """Tokens of a reply, where the task does not say."""
    rolling_from: Whole = 128
    """In whole texts, tokens at the begin with nothing compressed in front."""
    seed: Seed = None
    """Of examples and of replies that are drawn; the harness's own if left out."""
    out: Folder = None
    """New directory for results.json; left out, the table is all there is."""
    dtype: Dtype = "auto"
    """Of the parameters; auto: float32 if bundled or fetched, else bfloat16."""
    output: Output = Output()

    def run(self, ui: UI) -> Mapping[str, Any]:
        """See `Command.run`."""
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError(INSTALL)
        if not ui.bars:  # those of the harness itself
            os.environ.setdefault("TQDM_DISABLE", "1")
        names = split(self.tasks)
        if not names:
            raise ValueError(
                "--tasks names none. Give some, as in --tasks gsm8k,hellaswag."
            )
        c = pick(self.compression, self.keep, self.set)
        metadata = self._metadata()
        self._check_out()
        from kvjax.eval.lm_eval import KvjaxLM
        from kvjax.eval.lm_eval.rule import rule_of
        from kvjax.eval.lm_eval.running import load_tasks

        rule = rule_of(self.compress_at)
        with ui.status("loading tasks"):
            tasks = load_tasks(names, self.include_path, metadata)
        model, tokenizer = load_model(self.model, self.dtype, ui)
        lm = KvjaxLM(
            model,
            tokenizer,
            c,
            compress_at=rule,
            batch=self.batch_size,
            max_length=self.max_length,
            max_new_tokens=self.max_new_tokens,
            rolling_from=self.rolling_from,
            seed=self.seed or 0,
        )
        if self.out is None:
            return self._evaluated(lm, tasks)
        with held(self.out) as mine:
            if not mine:
                raise busy(self.out)
            self._check_out()
            return self._evaluated(lm, tasks)

    def _metadata(self) -> dict[str, Any]:
        """What tasks that make their data are told."""
        found: dict[str, Any] = {"pretrained": model_directory(self.model)}
        if self.lengths is not None:
            lengths = numbers("--lengths", self.lengths, int)
            wanted = fit(lengths, tuple[Annotated[int, Range(1)], ...], "--lengths")
            found["max_seq_lengths"] = list(wanted)
        return found

    def _check_out(self) -> None:
        """Before anything is loaded: nothing that is there is written over."""
        if self.out is None:
            return
        check_place(self.out)
        left = ".*.tmp"  # of a writer that was killed
        if self.out.is_dir() and not all(p.match(left) for p in self.out.iterdir()):
            raise ValueError(
                f"{shown(str(self.out))} is not empty, and results of another run are "
                "never written over. Give a new directory with --out."
            )

    def _evaluated(self, lm: Any, tasks: Any) -> Mapping[str, Any]:
        """Run the tasks, and write what came of them."""
        import lm_eval

        from kvjax.eval.lm_eval.running import RESULTS, plain, rows_of

        names = ("random_seed", "numpy_random_seed", "fewshot_random_seed")
        evaluate: Any = lm_eval.simple_evaluate
        found = evaluate(
            model=lm,
            model_args={"pretrained": self.model, "dtype": lm.model.dtype.name},
            tasks=list(split(self.tasks)),
            task_manager=tasks,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            batch_size=self.batch_size,
            apply_chat_template=self.apply_chat_template,
            fewshot_as_multiturn=self.apply_chat_template,
            system_instruction=self.system_instruction,
            log_samples=False,
            **({} if self.seed is None else dict.fromkeys(names, self.seed)),
        )
        found = plain(found)
        result = {
            "model": self.model,
            "compression": self.compression,
            "config": found["config"],
            "rows": rows_of(found),
            "out": None if self.out is None else str(self.out / RESULTS),
        }
        if self.out is not None:
            try:
                write_json(pathlib.Path(self.out) / RESULTS, found)
            except OSError:  # what was computed is not lost
                self.show({**result, "out": None}, Console(stderr=True, markup=False))
                raise
        return result

    def show(self, result: Mapping[str, Any], console: Console) -> None:
        """See `Command.show`."""
        config = result["config"]
        title = f"{result['model']}, {result['compression']}"
        if config["keep"] is not None:
            title += f" keep {config['keep']:g}"
        title += f", compressed at {config['compress_at']}"
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        table.add_column("task")
        for name in ("shots", "items"):
            table.add_column(name, justify="right")
        for name in ("filter", "metric"):
            table.add_column(name)
        table.add_column("value ± stderr", justify="right")
        for row in result["rows"]:
            said = [row[name] for name in ("task", "shots", "items")]
            said += [row["filter"], row["metric"], _value(row)]
            table.add_row(*("" if one is None else str(one) for one in said))
        print_table(console, table)
        console.print(_sizes(config), soft_wrap=True, highlight=False)
        if result["out"]:
            console.print(f"written: {result['out']}", soft_wrap=True, highlight=False)


def _value(row: Mapping[str, Any]) -> str:
    value, error = row["value"], row["stderr"]
    said = f"{value:.4f}" if isinstance(value, float) else str(value)
    return said if error is None else f"{said} ± {error:.4f}"


def _sizes(config: Mapping[str, Any]) -> str:
    """What caches held, and what should be known about the scores."""
    resident, full = config["resident_bytes"], config["full_bytes"]
    said = [f"{config['requests']} requests, {config['contexts']} contexts"]
    if resident is not None:
        said.append(f"{resident / 1024:.0f} KiB each ({full / 1024:.0f} uncompressed)")
    counts = {
        "truncated_requests": "cut at the left",
        "single_token_requests": "of one token, not compressed",
    }
    said += [f"{config[name]} {text}" for name, text in counts.items() if config[name]]
    if config["rolling_tokens"]:
        plain, all_of = config["rolling_tokens_uncompressed"], config["rolling_tokens"]
        said.append(f"{plain} of {all_of} text tokens with nothing compressed in front")
    return "; ".join(said)
