"""How caches and compressions show themselves."""

import re

import jax
import pytest
import treescope

import kvjax
from kvjax.summary import bytes_label, describe_cache, describe_compression
from tests.small import LENGTHS, batch, preset, small_model

HEADS = ["layers", "part", "slots", "keys", "values", "bytes", "filled", "free"]


@pytest.fixture(scope="module")
def prefilled():
    """The cache of the small batch under a preset."""

    def prefill(name: str, layers: int = 3) -> kvjax.KVCache:
        model = small_model(layers=layers)
        return kvjax.prefill(model, batch()[0], LENGTHS, preset(name))[1]

    return prefill


def table(text: str) -> list[dict[str, str]]:
    """The lines behind the first one, by their headings."""
    _, heads, *lines = text.splitlines()
    rows = []
    for line in lines:
        row = {}
        for name in re.finditer(r"\S+", heads):
            if HEADS.index(name[0]) < HEADS.index("bytes"):
                row[name[0]] = line[name.start() :].split("  ")[0]
            else:  # numbers stand to the right
                row[name[0]] = line[: name.end()].split("  ")[-1].strip()
        rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("name", "kind", "slots", "keys"),
    [
        ("none", "Slots", "112 per head", "PlainArray"),
        ("snapkv", "Slots", "28 per head", "PlainArray"),
        ("adakv_snapkv", "Ragged", "56 in all", "PlainArray"),
        ("kivi_2bit", "Slots", "160 per head", "AffineArray"),
    ],
)
def test_equal_layers_are_one_line_a_part(prefilled, name, kind, slots, keys):
    cache = prefilled(name)
    body, tail = table(describe_cache(cache))
    assert (body["layers"], tail["layers"]) == ("0..2", "")
    assert (body["part"], body["slots"]) == (kind, slots)
    assert body["keys"] == body["values"] == keys
    assert (tail["part"], tail["keys"]) == ("Tail", "float32")
    kept = [cache.kept_positions(layer) for layer in range(3)]
    live = sum(len(head) for layer in kept for row in layer for head in row)
    assert int(body["filled"]) + int(tail["filled"]) == live
    sizes = [part.positions.size for layer in cache.layers for part in layer.parts]
    assert int(body["filled"]) + int(body["free"]) == sum(sizes)


def test_the_first_line_compares_with_all_tokens(prefilled):
    cache = prefilled("snapkv")
    first = describe_cache(cache).splitlines()[0]
    plain = 3 * 2 * 2 * 32 * 4 * LENGTHS.sum()  # layers, K and V, heads, D, float32
    share = cache.nbytes / plain
    size = bytes_label(cache.nbytes)
    assert first.startswith(f"3 rows, 75..112 tokens seen, {size}: {share:.2f} of ")


def test_layers_that_differ_have_lines_of_their_own(prefilled):
    rows = table(describe_cache(prefilled("pyramidkv")))
    assert [row["layers"] for row in rows] == ["0", "", "1", "", "2", ""]
    assert len({row["slots"] for row in rows if row["part"] == "Ragged"}) == 3


def test_fill_follows_what_is_fed(prefilled):
    cache = prefilled("snapkv")
    before = table(describe_cache(cache))[1]
    _, cache = kvjax.extend(small_model(layers=3), cache, batch()[1][:, :5])
    after = table(describe_cache(cache))[1]
    # Layers, rows, heads, tokens.
    assert int(after["filled"]) == int(before["filled"]) + 3 * 3 * 2 * 5
    assert int(after["free"]) == int(before["free"]) - 3 * 3 * 2 * 5


@pytest.mark.parametrize("name", ["decoupled", "quest", "h2o_decode", "lowrank_keys"])
def test_every_kind_of_part_is_shown(prefilled, name):
    cache = prefilled(name)
    shown = {row["part"] for row in table(describe_cache(cache))}
    layers = cache.layers
    kinds = {type(p).__name__ for layer in layers for p in (*layer.parts, layer.tail)}
    assert shown - {"Tracking"} == kinds
    assert ("Tracking" in shown) == (layers[0].tracking is not None)


@pytest.mark.parametrize("name", ["none", "adakv_snapkv"])
def test_without_values_only_sizes_are_shown(prefilled, name):
    cache, told = prefilled(name), []

    def traced(cache):
        told.append(describe_cache(cache))
        return cache.length

    jax.jit(traced)(cache)
    assert told[0].splitlines()[0] == f"3 rows, {bytes_label(cache.nbytes)}"
    heads = told[0].splitlines()[1].split()
    assert heads == HEADS[:-2]
    whole = [row["slots"] for row in table(describe_cache(cache))]
    assert [row["slots"] for row in table(told[0])] == whole
    gone = jax.tree.map(lambda x: x.copy(), cache)
    jax.tree.map(lambda x: x.delete(), gone)
    assert describe_cache(gone) == told[0]


class Printer:
    """What IPython hands to `_repr_pretty_`."""

    shown = ""

    def text(self, text: str) -> None:
        self.shown += text


# Of treescope, which asks NumPy for everything it has.
@pytest.mark.filterwarnings("ignore:The chararray class:DeprecationWarning")
def test_notebooks_show_the_summary(prefilled):
    cache, c = prefilled("snapkv"), preset("snapkv")
    for value, text in (
        (cache, describe_cache(cache)),
        (c, describe_compression(c)),
    ):
        printer = Printer()
        value._repr_pretty_(printer, False)
        assert printer.shown == text
        shown = treescope.render_to_text([value, value])
        lines = [line.strip() for line in shown.splitlines()]
        assert all(line.strip() in lines for line in text.splitlines())
        assert treescope.render_to_html(value)
    one = treescope.render_to_text([kvjax.Compression(visibility="query_aware")])
    assert one == "[Compression: {visibility: query_aware}]"


def test_repr_stays_that_of_the_dataclass(prefilled):
    c = preset("snapkv")
    assert repr(c).startswith("Compression(prefill=Dense(")
    assert repr(prefilled("none")).startswith("KVCache(groups=(LayerCache(")


def test_a_compression_is_its_yaml():
    c = kvjax.compression("snapkv", **{"evict.budget.keep": 0.125})
    assert "keep: 0.125" in describe_compression(c)
    assert not describe_compression(c).endswith("\n")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (512, "512 B"),
        (2048, "2 KiB"),
        (1000.2 * 1024, "1000 KiB"),
        (3 << 20, "3 MiB"),
        (5 << 30, "5 GiB"),
        (9 << 40, "9216 GiB"),
    ],
)
def test_bytes_are_read_by_people(size, text):
    assert bytes_label(size) == text
