"""What docs/results/ compares: models, their evaluations, the columns of pages."""

import dataclasses
from collections.abc import Mapping

from kvjax.eval.report.comparison import (
    Column,
    columns_at,
    full_column,
    plain_column,
)
from kvjax.eval.report.comparison.scores import SEEDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """One model of the comparison.

    Attributes:
        recipe: of `configs/train/`, or empty for a bundled model.
        name: of the bundled model.
        sets: changes to the recipe.
        texts: whether it trains on texts: those that `results.py` is given.
    """

    recipe: str = ""
    name: str = "kvjax-tiny"
    sets: tuple[str, ...] = ()
    texts: bool = False


SEED1 = ("init=kvjax-tiny-seed1", "seed=1")

MODELS: Mapping[str, Model] = {
    "base": Model(),
    "base-seed1": Model(name="kvjax-tiny-seed1"),
    "smollm2": Model(name="smollm2"),
    "smollm2-tolerant": Model(recipe="smollm2_tolerant", texts=True),
    "smollm2-control": Model(
        recipe="smollm2_tolerant",
        sets=(
            "sampling.choices=[]",
            "objective.distill=0.0",
            "objective.next_token=1.0",
        ),
        texts=True,
    ),
    "smollm2-surrogate": Model(recipe="smollm2_surrogate", texts=True),
    "tolerant": Model(recipe="tolerant"),
    "tolerant-seed1": Model(recipe="tolerant", sets=SEED1),
    "control": Model(recipe="tolerant", sets=("sampling.choices=[]",)),
    "control-seed1": Model(recipe="tolerant", sets=("sampling.choices=[]", *SEED1)),
    "dms": Model(recipe="dms"),
    "dms-seed1": Model(recipe="dms", sets=SEED1),
    "dms-immediate": Model(recipe="dms", sets=("dms.window=1",)),
    "dms-immediate-seed1": Model(recipe="dms", sets=("dms.window=1", *SEED1)),
    "duo": Model(recipe="duo"),
    "duo-seed1": Model(recipe="duo", sets=SEED1),
    "surrogate": Model(recipe="surrogate"),
    "surrogate-seed1": Model(recipe="surrogate", sets=SEED1),
    "matryoshka": Model(recipe="matryoshka"),
    "matryoshka-start": Model(
        recipe="matryoshka",
        sets=("stages.0.steps=1", "optimizer.learning_rate=1.0e-9"),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model under an evaluation of `configs/eval/`, with more options."""

    model: str
    config: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.config}-{self.model}"


REAL = ("smollm2", "smollm2-tolerant", "smollm2-control", "smollm2-surrogate")
"""The models of the page of real tolerance."""

TOLERANCE = ("base", "tolerant", "control")
"""The models of the page of tolerance, of the first seed."""

EVALUATIONS: Mapping[str, tuple[Evaluation, ...]] = {
    "ruler": (
        Evaluation(
            model="smollm2",
            config="words",
            options=("--suite", "ruler", "--visibility", "query_agnostic"),
        ),
    ),
    "real_tolerance": tuple(
        Evaluation(
            model=model,
            config="real_tolerance",
            options=(
                *("--suite", "tolerance"),
                *("--task-set", "*.essays={held_out}"),
                *("--task-set", "novel.path={held_out}"),
                *("--task-set", "wikitext.path={data}/lm/wikitext-2/test.txt"),
                *(("--compression", "surrogate") if "surrogate" in model else ()),
            ),
        )
        for model in REAL
    ),
    "tolerance": tuple(
        Evaluation(model=f"{model}{seed}", config=config)
        for config in ("tolerance", "one_bit", "transfer")
        for seed in SEEDS
        for model in TOLERANCE
    ),
    "dms": tuple(
        Evaluation(model=f"{model}{seed}", config="dms", options=options)
        for seed in SEEDS
        for model, options in (
            ("dms", ("--compression", "dms")),
            ("dms-immediate", ("--compression", "dms", "--set", "window=1")),
            ("base", ("--compression", "h2o,tova")),
        )
    ),
    "duo": tuple(Evaluation(model=f"duo{seed}", config="duo") for seed in SEEDS),
    "surrogate": tuple(
        Evaluation(model=f"surrogate{seed}", config="surrogate") for seed in SEEDS
    ),
    "matryoshka": tuple(
        Evaluation(model=m, config="matryoshka")
        for m in ("matryoshka", "matryoshka-start")
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """What a page says before its table, and the table's columns."""

    title: str
    text: str
    columns: tuple[Column, ...]


PAGES: Mapping[str, Page] = {
    "ruler": Page(
        title="RULER on a real model",
        text="SmolLM2-135M-Instruct as `kvjax fetch smollm2` gets it, eleven of "
        "RULER's tasks, needles in sentences that are made up, the question hidden "
        "from the scores. What the model itself can do is the column *full*.",
        columns=(
            full_column("words-smollm2"),
            *columns_at("words-smollm2", "random", "snapkv", keeps=(0.5, 0.25)),
            plain_column("words-smollm2", "kivi_4bit"),
            plain_column("words-smollm2", "kivi_2bit"),
        ),
    ),
    "dms": Page(
        title="DMS",
        text="`dms` is `kvjax-tiny` trained to give up three tokens of four, each 16 "
        "tokens after it was read; *immediate* is the same training and evaluation "
        "with a delay of one token. Beside them the base model under methods without "
        "training, at the same slots per layer. *full, trained* has every token "
        "visible, for which the model was not trained.",
        columns=(
            full_column("dms-base"),
            *columns_at("dms-dms", "dms", keeps=(0.25, 0.125)),
            *columns_at(
                "dms-dms-immediate", "dms", keeps=(0.25, 0.125), after=", immediate"
            ),
            *columns_at("dms-base", "h2o", "tova", keeps=(0.25, 0.125)),
            full_column("dms-dms", ", trained"),
        ),
    ),
    "matryoshka": Page(
        title="Matryoshka projections",
        text="Keys and values are cut to a leading share of their coefficients. "
        "*trained* are the projections of the recipe `matryoshka`, *start* the "
        "principal components that it starts from. The model itself stays as it is.",
        columns=(
            full_column("matryoshka-matryoshka"),
            *columns_at(
                "matryoshka-matryoshka",
                "matryoshka",
                keeps=(0.5, 0.375, 0.25, 0.125),
                after=", trained",
            ),
            *columns_at(
                "matryoshka-matryoshka-start",
                "matryoshka",
                keeps=(0.5, 0.375, 0.25, 0.125),
                after=", start",
            ),
        ),
    ),
    "duo": Page(
        title="DuoAttention gates",
        text="Half of the KV heads, chosen by the trained gates, keep all tokens; the "
        "others keep 4 sinks and the newest 64 tokens of the prompt, an eighth of it. "
        "The model itself stays as it is. Beside it methods without training that keep "
        "half of the tokens in all heads.",
        columns=(
            full_column("duo-duo"),
            *columns_at(
                "duo-duo", "duo", "snapkv", "streaming_llm", "random", keeps=(0.5,)
            ),
        ),
    ),
    "surrogate": Page(
        title="Surrogate scores",
        text="A small network beside each layer predicts what later questions will "
        "look at; the model itself stays as it is. The question is hidden from all "
        "scores.",
        columns=(
            full_column("surrogate-surrogate"),
            *columns_at(
                "surrogate-surrogate",
                "surrogate",
                "snapkv",
                "expected_attention",
                "keydiff",
                keeps=(0.25, 0.125),
            ),
        ),
    ),
}
