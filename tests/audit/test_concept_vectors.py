"""Concept vectors: what an untouched model, a planted trace and small worlds must show."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from engram.audit.concept_vectors import ConceptVectors, causal, completions, jailbreaks, kept, trace
from engram.core.finding import Verdict
from engram.core.probe import Subject
from engram.data.table import IGNORED, Table
from engram.data.worlds import Words
from engram.engine.predict import accuracy
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.concepts import columns_at, located, read, text_of, words_of, write
from engram.models.guards import Wrapper
from engram.models.split import value_vectors
from engram.reproduce import concept_vectors as small
from engram.stats.text import bleu, rouge_l, rouge_l_f
from engram.testing import digits, holds

transformers = pytest.importorskip("transformers")


def gpt2(width: int = 16, inner: int = 24, layers: int = 2, words: int = 40) -> Any:
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = transformers.GPT2Config(
        vocab_size=words,
        n_positions=32,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        n_inner=inner,
        initializer_range=0.5,
        **ends,
    )
    with Run().seeded("gpt2"):
        return transformers.GPT2LMHeadModel(config).eval()


def llama(width: int = 16, inner: int = 24, layers: int = 2, words: int = 40) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.5, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with Run().seeded("llama"):
        return transformers.LlamaForCausalLM(config).eval()


MAKERS = pytest.mark.parametrize("make", [gpt2, llama])


def texts(tokens: Tensor, asked: int = 0) -> Table:
    labels = torch.where(torch.arange(tokens.shape[1]) >= asked, tokens, IGNORED)
    ids = tuple(f"{tokens[0, 0]}, {k}" for k in range(len(tokens)))
    return Table({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, labels, ids)


def subject(before: nn.Module, after: nn.Module) -> Subject:
    forget, retain = texts(torch.arange(2, 22).reshape(4, 5), 2), texts(torch.arange(20, 40).reshape(4, 5), 2)
    return Subject(after, before=before, rows={"forget": forget, "retain": retain})


def examined(before: nn.Module, after: nn.Module, **settings: Any) -> dict[str, float]:
    return {f.name: f.value for f in ConceptVectors(**settings).examine(subject(before, after), Run())}


# --- by construction


@MAKERS
@holds("concept-vectors", 1)
def test_an_untouched_model_kept_all(make: Any) -> None:
    model = make()
    found = ConceptVectors(top=10, count=3).examine(subject(model, copy.deepcopy(model)), Run())
    values = {finding.name: finding.value for finding in found}
    assert values.pop("L2 distance of concept vectors") == 0
    assert values.pop("cosine of concept vectors") == pytest.approx(1, abs=1e-12)
    assert len(values) == 7 and set(values.values()) == {1.0}
    assert {finding.verdict for finding in found} == {Verdict.NONE}


@MAKERS
@holds("concept-vectors", 2)
def test_a_column_of_zeros_takes_its_activation_times_the_column_off(make: Any) -> None:
    model, dim = make(), 5
    layer = value_vectors(model).layers[1]
    module = model.get_submodule(layer.name.removesuffix(".weight"))
    seen: list[tuple[Tensor, Tensor]] = []
    module.register_forward_hook(lambda _, given, out: seen.append((given[0].detach(), out.detach())))
    tokens = torch.arange(2, 26).reshape(2, 12)
    model(input_ids=tokens)
    v = columns_at(model, [(1, dim)])
    write(model, [(1, dim)], torch.zeros_like(v))
    model(input_ids=tokens)
    (a, before), (again, after) = seen
    assert torch.equal(a, again) and before.dtype == torch.float32
    torch.testing.assert_close(after - before, -a[..., dim, None] * v[0], rtol=0, atol=1e-5)
    assert float((after - before).abs().max()) > 0.1


@MAKERS
def test_value_vectors_are_views_of_what_a_layer_writes(make: Any) -> None:
    """Against the layer's output for one activation at a time."""
    model = make()
    found = value_vectors(model)
    assert len(found.layers) == 2 and found.output is model.get_output_embeddings().weight
    for layer in found.layers:
        module = model.get_submodule(layer.name.removesuffix(".weight"))
        told = module(torch.eye(24)) - module(torch.zeros(1, 24))
        torch.testing.assert_close(told.T, layer.columns, rtol=1e-4, atol=1e-5)
        assert layer.columns.data_ptr() == module.weight.data_ptr()
        new = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
        other = layer.put(torch.tensor([3, 20]), new)
        assert other.shape == module.weight.shape
        columns = other.T if layer.across else other
        assert torch.equal(columns[:, [3, 20]], new) and torch.equal(columns[:, :3], layer.columns[:, :3])


class Planted(nn.Module):
    """Two layers with random columns and a random output embedding, in the shape of a language model."""

    def __init__(self, seed: int, width: int = 128, words: int = 500, inner: int = 256) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        self.lm_head = nn.utils.skip_init(nn.Linear, width, words, bias=False)
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": Mlp(width, inner)}) for _ in range(2))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=draws))

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down_proj = nn.utils.skip_init(nn.Linear, inner, width, bias=False)


@pytest.mark.parametrize("seed", range(5))
@holds("concept-vectors", 3)
def test_a_planted_trace_is_located_first(seed: int) -> None:
    model, draws = Planted(seed), torch.Generator().manual_seed(100 + seed)
    layer, dim = int(torch.randint(2, (), generator=draws)), int(torch.randint(256, (), generator=draws))
    concept, others = torch.randperm(500, generator=draws)[:5], torch.arange(500)
    assert value_vectors(model).output is not None
    write(model, [(layer, dim)], 3 * model.lm_head.weight.detach()[concept].sum(0)[None])
    (found,) = located(model, concept, others[~torch.isin(others, concept)], top=5)
    assert found.place == (layer, dim)
    assert len(set(found.tokens) & set(concept.tolist())) >= 4


def test_what_columns_say_against_a_loop() -> None:
    """Every column by itself, in float64, sorted; and a vocabulary cut into pieces gives the same."""
    model = Planted(0, width=8, words=30, inner=700)
    found = read(model, 4)
    output = model.lm_head.weight.detach().double()
    for k in (0, 511, 512, 699, 700, 1399):
        layer, dim = divmod(k, 700)
        assert (found.layer[k], found.dim[k]) == (layer, dim)
        scores = output @ value_vectors(model).layers[layer].columns[:, dim].detach().double()
        assert found.tokens[k].tolist() == scores.argsort(descending=True)[:4].tolist()
        torch.testing.assert_close(
            found.scores[k].double(), scores.sort(descending=True).values[:4], rtol=1e-5, atol=1e-5
        )


def test_the_quietest_columns_of_each_layer_are_left_out() -> None:
    model = Planted(1, width=8, words=30, inner=10)
    found, everything = read(model, 3), torch.arange(30)
    loud = found.scores.mean(1)
    kept = located(model, everything, torch.tensor([]), top=3, count=14, drop=0.3)
    for layer in (0, 1):
        dims = found.dim[found.layer == layer][loud[found.layer == layer].argsort(descending=True)[:7]].tolist()
        assert sorted(one.dim for one in kept if one.layer == layer) == sorted(dims)
    order = [float(loud[10 * one.layer + one.dim]) for one in kept]  # all score 1: the louder ones first
    assert order == sorted(order, reverse=True) and {one.score for one in kept} == {1.0}
    with pytest.raises(EngramError, match="15 concept vectors are asked for; there are 14"):
        located(model, everything, torch.tensor([]), top=3, count=15, drop=0.3)


def test_words_of_both_texts_count_nothing() -> None:
    model = Planted(2, width=8, words=30, inner=10)
    concept, stop = torch.tensor([1, 2, 3]), torch.tensor([7, 8, 9])
    with_stops = located(model, torch.cat([concept, stop]), stop, top=5, count=14)
    without = located(model, concept, torch.tensor([]), top=5, count=14)
    assert [(one.place, one.score) for one in with_stops] == [(one.place, one.score) for one in without]


# --- figures, by hand


def test_trace_by_hand() -> None:
    """The output embedding is the identity: a column's top tokens are its largest numbers."""
    before = Planted(0, width=6, words=6, inner=2)
    with torch.no_grad():
        before.lm_head.weight.copy_(torch.eye(6))
    after = copy.deepcopy(before)
    write(before, [(0, 1)], torch.tensor([[3.0, 2.0, 1.0, 0.0, 0.0, -1.0]]))
    write(after, [(0, 1)], torch.tensor([[3.0, 0.0, 1.0, 0.0, 2.0, -1.0]]))
    rows = {"forget": texts(torch.tensor([[0, 1, 5]])).unlabelled(), "retain": texts(torch.tensor([[4]])).unlabelled()}
    probe = ConceptVectors(vectors=((0, 1),), top=3)
    chosen = probe.chosen(before, rows["forget"], rows["retain"])
    assert chosen[0].tokens == (0, 1, 2) and chosen[0].score == pytest.approx(2 / 3)
    values = [float(value) for value in trace(before, after, chosen, text_of(rows["forget"]))]
    assert values[0] == values[1] == 2 / 4  # {0, 1, 2} and {0, 2, 4}
    assert values[2] == pytest.approx(11 / 15) and values[3] == pytest.approx(8**0.5)
    assert values[4] == 1 / 2  # of 0 and 1, which the text has, 0 is left


def test_a_moved_output_embedding_is_told_from_a_moved_column() -> None:
    before = gpt2()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.lm_head.weight.copy_(after.lm_head.weight.roll(7, 0))
    found = examined(before, after, top=10)
    assert found["Jaccard of top tokens, old output embedding"] == 1 and found["Jaccard of top tokens"] < 1
    assert found["L2 distance of concept vectors"] == 0


def test_a_guard_leaves_the_trace_where_it_is() -> None:
    model = gpt2()

    class Silent(Wrapper):
        def after(self, inputs: dict[str, Any], output: Any) -> Any:
            output.logits = torch.zeros_like(output.logits)
            return output

    found = examined(model, Silent(model), top=10)
    assert found["Jaccard of top tokens"] == 1 and found["cosine of concept vectors"] == pytest.approx(1)


def test_classes_are_words_too() -> None:
    """A classifier's concept vector is the feature that speaks most for the class."""
    model = digits().model()
    concept, others = torch.tensor([3]), torch.tensor([k for k in range(10) if k != 3])
    (found,) = located(model, concept, others, top=1, drop=0.0)
    weight = value_vectors(model).layers[0].columns
    assert found.tokens == (3,) and int(weight[:, found.dim].argmax()) == model.head.classes.tolist().index(3)


@given(st.lists(st.integers(0, 4), max_size=9), st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_bleu_against_nltk(told: list[int], truth: list[int]) -> None:
    nltk = pytest.importorskip("nltk.translate.bleu_score")
    words, right = [str(k) for k in told], [str(k) for k in truth]
    if words == right:
        assert bleu(told, truth) == 1
        return
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = nltk.sentence_bleu([right], words, smoothing_function=nltk.SmoothingFunction().method3)
    assert bleu(told, truth) == pytest.approx(wanted, rel=1e-9)


def test_bleu_and_rouge_by_hand() -> None:
    """a b c of a b d c: 3/3, 1/2, then 1/2 of 1 trigram, a quarter of one (there is none); 3 words against 4."""
    expected = (1 * (1 / 2) * (1 / 2) * (1 / 4)) ** 0.25 * 2.718281828459045 ** (1 - 4 / 3)
    assert bleu("abc", "abdc") == pytest.approx(expected)
    assert bleu("xyz", "abdc") == 0 and bleu("", "abdc") == 0
    assert rouge_l_f("abc", "abdc") == pytest.approx(6 / 7) and rouge_l("abc", "abdc") == 3 / 4
    assert rouge_l_f("", "") == 1 and rouge_l_f("", "a") == 0


def test_text_is_completed_from_its_first_half_and_questions_are_answered_whole() -> None:
    tokens = torch.arange(2, 14).reshape(2, 6)
    text, asked = completions(texts(tokens)), completions(texts(tokens, 4))
    assert (text.labels != IGNORED).tolist() == [[False] * 3 + [True] * 3] * 2
    assert torch.equal(asked.labels, texts(tokens, 4).labels)


def test_what_cannot_be_examined_is_refused() -> None:
    model = gpt2()
    with pytest.raises(EngramError, match="ConceptVectors asks for before, retain"):
        ConceptVectors().examine(Subject(model, rows={"forget": texts(torch.ones(1, 3, dtype=torch.int64))}))
    with pytest.raises(EngramError, match=r"there is no column 99 in layer 1; the 2 layers have \[24, 24\] columns"):
        examined(model, model, vectors=((1, 99),))
    with pytest.raises(EngramError, match="top=40 tells nothing among 40 tokens"):
        examined(model, model, top=40)
    with pytest.raises(EngramError, match=r"drop=1\.0 is a share"):
        examined(model, model, drop=1.0)
    with pytest.raises(EngramError, match="these rows have neither"):
        text_of(Table({"values": torch.zeros(2, 3)}, torch.zeros(2, 1)))
    bare = nn.Module()
    bare.get_output_embeddings = lambda: nn.utils.skip_init(nn.Linear, 3, 5)  # type: ignore[assignment]
    with pytest.raises(EngramError, match="Module has no MLP layers"):
        value_vectors(bare)
    assert words_of(model, None) == 2  # one in twenty of forty


# --- small worlds


@holds("concept-vectors", 5)
def test_ablating_the_located_column_takes_its_topic_alone() -> None:
    """On the mean over both topics of three worlds, 3.8 times as much as a random column; of one of them 2.8 times."""
    worlds = []
    for seed in range(3):
        there, rows = small.of_topics(seed), []
        for target, unrelated in there.sides():
            place = small.place_of(there.model, target, unrelated)
            found = small.ablation(there.model, place, target, unrelated)
            rows.append([*found, small.random_ablation(there.model, place, target, unrelated)])
        worlds.append(torch.tensor(rows).mean(0))
    assert all(target > 2.5 * other and abs(unrelated) < 0.2 * target for target, unrelated, other in worlds)
    target, unrelated, other = torch.stack(worlds).mean(0).tolist()
    assert target > 0.5 and target >= 3 * other
    assert abs(unrelated) < 0.2 * target


@holds("concept-vectors", 6)
def test_ascent_leaves_the_vector_and_the_needle_does_not() -> None:
    there, run = small.of_facts(0), Run()
    for target, unrelated in there.sides():
        place = small.place_of(there.model, target, unrelated)
        assert accuracy(there.model, target) > 0.8
        ascent = small.ascended(there.model, target, unrelated, run)
        needle = small.needled(there.model, place, target, unrelated, run)
        silent, gone = (small.figures(there.model, model, place, target, unrelated) for model in (ascent, needle))
        assert accuracy(ascent, target) <= 0.05
        assert silent["cosine of concept vectors"] > 0.95 and silent["Jaccard of top tokens"] > 0.6
        assert silent["ROUGE-L of answers to forget rows, against those before"] <= 0.05
        assert gone["cosine of concept vectors"] < 0.5
        assert gone["Jaccard of top tokens"] < silent["Jaccard of top tokens"]


# --- as text


def test_noise_on_a_column_by_answers_in_words() -> None:
    """Without noise nothing changes; with much, unrelated or not, answers do."""
    model = gpt2()
    words = Words(("<pad>", "<end>", "Question:", "Answer:", *(f"w{k}" for k in range(36))))
    target, unrelated = ["w1 w2", "w3"], ["w9 w5", "w7"]
    same = causal(model, words, (0, 3), target, unrelated, noise=0.0, max_new=5)
    assert all((one.bleu, one.rouge_l) == (1, 1) for one in same)
    other = causal(model, words, (1, 3), target, unrelated, noise=100.0, max_new=5)
    assert other[0].rouge_l < 1
    assert kept(model, model, words, ["w1"], max_new=3).rouge_l == 1


def test_jailbreaks_hold_the_question() -> None:
    found = jailbreaks("Who wrote it?", "Wer schrieb es?", "x" * 3000)
    assert set(found) == {"role", "grandmother", "context", "German"}
    assert all("Question: Who wrote it?\n Answer:" in found[name] for name in ("role", "grandmother", "context"))
    assert found["German"] == "Frage: Wer schrieb es?\n Antwort:" and found["context"].count("x") == 2000


def test_answers_are_compared_in_words_with_a_tokenizer(tmp_path: Any) -> None:
    if find_spec("tokenizers") is None:
        pytest.skip("tokenizers is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({f"w{k}": k for k in range(40)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w1").save_pretrained(tmp_path)
    model = gpt2()
    after = copy.deepcopy(model)
    write(after, [(1, 2)], torch.full((1, 16), 5.0))
    in_words, in_tokens = examined(model, after, tokenizer=str(tmp_path)), examined(model, after)
    assert (
        in_words == pytest.approx(in_tokens) and in_words["ROUGE-L of answers to forget rows, against those before"] < 1
    )
