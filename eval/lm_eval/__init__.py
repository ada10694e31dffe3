"""kvjax as a model of EleutherAI's lm-evaluation-harness (the extra `lm-eval`).

lm_eval.simple_evaluate(model=KvjaxLM(model, tokenizer, "snapkv", keep=0.5), tasks=[..])

Importing this makes `kvjax` known to the harness, too: `--model kvjax` of its registry.
"""

try:
    import lm_eval  # noqa: F401
except ImportError as wrong:
    raise ImportError(
        'kvjax.eval.lm_eval needs lm-eval: pip install "kvjax[lm-eval]".'
    ) from wrong

from kvjax.eval.lm_eval.model import KvjaxLM as KvjaxLM
from kvjax.eval.lm_eval.rule import LastTokens as LastTokens
from kvjax.eval.lm_eval.rule import Marker as Marker
