"""Vectors of texts: pools against one text at a time, centring and whitening against formulas, files, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.covariance import ledoit_wolf
from torch import Tensor, nn
from torch.nn import functional as F

from engram.errors import EngramError
from engram.models.text import Embedder, embed, read_vectors

WORDS = ["a", "aquarium", "fish", "flat", "great", "maple", "oak", "of", "photo", "shark", "the", "tree", "white"]
TEXTS = ["maple tree", "a photo of a white shark", "shark", "great white shark", "the oak tree", "fish"]
SIZE: dict[str, Any] = {"vocab_size": len(WORDS) + 3}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *WORDS]
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, "a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $0 </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=10)


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    return _made(lambda: BertModel(BertConfig(**SIZE, **small)))


@pytest.fixture(scope="module")
def gpt() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**SIZE, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    return _made(lambda: GPT2LMHeadModel(config))


def _made(make: Callable[[], nn.Module]) -> nn.Module:
    from engram.models import seeded

    with seeded(torch.Generator().manual_seed(0)):
        return make().eval()


def saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def hidden(model: Any, tokenizer: Any, text: str) -> Tensor:
    """The last hidden states of one text, [T, d] float64, by a whole forward pass."""
    output = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
    return output.hidden_states[-1][0].double()


TAKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h.mean(0),
    "last": lambda h: h[-1],
    "cls": lambda h: h[0],
}


@pytest.mark.parametrize("pool", TAKEN)
@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_pools_are_those_of_one_text_at_a_time(
    kind: str, pool: str, tokenizer: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(kind)
    found = embed(TEXTS, saved(model, tokenizer, tmp_path), pool=pool)
    wanted = torch.stack([F.normalize(TAKEN[pool](hidden(model, tokenizer, text)), dim=0) for text in TEXTS])
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), wanted, rtol=0, atol=1e-6)
    assert torch.equal(embed(TEXTS, (model, tokenizer), pool=pool), found)
    assert torch.allclose(embed(TEXTS[::-1], (model, tokenizer), pool=pool).flip(0), found, rtol=0, atol=1e-6)


def test_a_text_is_told_apart_from_the_others_it_is_embedded_with(bert: nn.Module, tokenizer: Any) -> None:
    alone = torch.cat([embed([text], (bert, tokenizer)) for text in TEXTS])
    assert torch.allclose(embed(TEXTS, (bert, tokenizer)), alone, rtol=0, atol=1e-6)
    assert float((alone @ alone.T - torch.eye(len(TEXTS))).abs().max()) > 0.1


def test_the_model_stays_as_it_is_and_answers_in_eval_mode(bert: nn.Module, tokenizer: Any) -> None:
    before = {name: value.clone() for name, value in bert.state_dict().items()}
    first = embed(TEXTS, (bert.train(), tokenizer))
    assert torch.equal(embed(TEXTS, (bert.eval(), tokenizer)), first)
    assert all(torch.equal(value, before[name]) for name, value in bert.state_dict().items())
    assert all(p.grad is None for p in bert.parameters())


def test_own_is_what_clip_calls_the_embedding_of_a_text(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**SIZE, **tower, "max_position_embeddings": 10, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**tower, "image_size": 8, "patch_size": 4}
    alone = _made(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**text, projection_dim=6)))
    whole = _made(lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)))
    ids = tokenizer("maple tree", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = F.normalize(alone(input_ids=ids).text_embeds, dim=1)  # type: ignore[operator]
    assert torch.allclose(embed(["maple tree"], (alone, tokenizer), pool="own"), wanted, rtol=0, atol=1e-6)
    both = embed(TEXTS, saved(whole, tokenizer, tmp_path), pool="own")
    assert both.shape == (6, 6)
    assert embed(TEXTS, (whole, tokenizer)).shape == (6, 8)


def test_own_of_a_model_without_one_is_refused(gpt: nn.Module, tokenizer: Any) -> None:
    with pytest.raises(EngramError, match="GPT2LMHeadModel has no text embedding of its own; use pool='mean'"):
        embed(TEXTS, (gpt, tokenizer), pool="own")


def test_of_an_encoder_decoder_the_encoder_is_read(tokenizer: Any) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(**SIZE, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model: Any = _made(lambda: T5ForConditionalGeneration(config))
    with torch.no_grad():
        states = model.encoder(**tokenizer("the oak tree", return_tensors="pt")).last_hidden_state[0]
    found = embed(["the oak tree"], (model, tokenizer))[0]
    assert torch.allclose(found, F.normalize(states.mean(0), dim=0), rtol=0, atol=1e-6)


# --- a fixed vocabulary


def drawn(texts: Any) -> Tensor:
    """A function that encodes: a point in a cone, of its own for each text."""
    rows = [torch.randn(6, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in texts]
    return torch.stack(rows) * torch.arange(1.0, 7.0) + 5.0


VOCABULARY = [f"word {k}" for k in range(40)]


def test_centring_takes_the_mean_of_the_vocabulary_off() -> None:
    wanted = F.normalize(drawn(TEXTS).double() - drawn(VOCABULARY).double().mean(0), dim=1)
    found = embed(TEXTS, drawn, centre=VOCABULARY)
    assert torch.allclose(found.double(), wanted, rtol=0, atol=1e-6)
    plain = embed(TEXTS, drawn)
    assert float((plain @ plain.T).min()) > float((found @ found.T).min()) + 0.5  # the cone is opened


@pytest.mark.parametrize("size", [3, 40])
def test_whitening_is_the_inverse_root_of_a_shrunk_covariance(size: int) -> None:
    words = drawn(VOCABULARY[:size]).double()
    covariance = torch.from_numpy(ledoit_wolf(words.numpy())[0])
    found = embed(TEXTS, drawn, centre=VOCABULARY[:size], whiten=True).double()
    values, vectors = np.linalg.eigh(covariance.numpy())
    root = torch.from_numpy(vectors @ np.diag(values**-0.5) @ vectors.T)
    assert torch.allclose(root @ covariance @ root, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-9)
    assert torch.allclose(found, F.normalize((drawn(TEXTS).double() - words.mean(0)) @ root, dim=1), rtol=0, atol=1e-6)


def test_the_vocabulary_is_read_once_and_words_said_twice_count_once() -> None:
    asked: list[int] = []

    def counted(texts: Any) -> Tensor:
        asked.append(len(texts))
        return drawn(texts)

    embedder = Embedder(counted, centre=[*VOCABULARY, *VOCABULARY], whiten=True)
    first = embedder(TEXTS)
    assert torch.equal(embedder(TEXTS), first)
    assert sorted(asked) == [6, 6, 40]


def test_spelling_knows_letters_alone() -> None:
    names = ["maple tree", "maple trees", "shark"]
    found = embed(names, "spelling")
    assert found.shape == (3, 512)
    assert torch.equal(found, torch.cat([embed([name], "spelling") for name in names]))
    cosines = found @ found.T
    assert cosines[0, 1] > 0.7 > 0.2 > cosines[0, 2]


# --- files of vectors


def test_files_of_every_kind_hold_the_same_vectors(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vectors = {name: drawn([name])[0] for name in ("oak", "maple")}
    save_file(vectors, tmp_path / "named.safetensors")
    rows = {"class": list(vectors), "vector": [row.double().tolist() for row in vectors.values()]}
    pq.write_table(pa.table(rows), tmp_path / "named.parquet")
    for file in ("named.safetensors", "named.parquet"):
        found = read_vectors(tmp_path / file)
        assert set(found) == set(vectors)
        assert all(torch.equal(row, vectors[name].double()) for name, row in found.items())
    matrix = torch.stack(list(vectors.values()))
    save_file({"anything": matrix}, tmp_path / "rows.safetensors")
    np.save(tmp_path / "rows.npy", matrix.numpy())
    for file in ("rows.safetensors", "rows.npy"):
        found = read_vectors(tmp_path / file)
        assert list(found) == ["0", "1"] and torch.equal(torch.stack([found["0"], found["1"]]), matrix.double())


def _csv(path: Path) -> Path:
    path.with_suffix(".csv").write_text("oak,1,2")
    return path.with_suffix(".csv")


def _pickled(path: Path) -> Path:
    np.save(path.with_suffix(".npy"), np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return path.with_suffix(".npy")


def _ragged(path: Path) -> Path:
    save_file({"oak": torch.ones(2), "maple": torch.ones(3)}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def _broken(path: Path) -> Path:
    path.with_suffix(".safetensors").write_bytes(b"no tensors")
    return path.with_suffix(".safetensors")


def _missing(path: Path) -> Path:
    return path.with_suffix(".parquet")


def _infinite(path: Path) -> Path:
    np.save(path.with_suffix(".npy"), np.array([[1.0, np.inf]]))
    return path.with_suffix(".npy")


def _numbers(path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1, 2], "b": [[1.0], [2.0]]}), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (_csv, "unknown kind of vector file '.csv'"),
        (_pickled, "cannot be read: Object arrays cannot be loaded"),
        (_ragged, "all of one length"),
        (_broken, "cannot be read"),
        (_missing, "cannot be read"),
        (_infinite, "have to be finite"),
        (_numbers, "one column of names and one of lists"),
    ],
)
def test_another_file_is_refused(write: Callable[[Path], Path], says: str, tmp_path: Path) -> None:
    with pytest.raises(EngramError, match=says):
        read_vectors(write(tmp_path / "vectors"))


# --- refusals


def _flat(texts: Any) -> Tensor:
    return torch.ones(len(texts), 4)


@pytest.mark.parametrize(
    ("texts", "encoder", "options", "says"),
    [
        (["oak"], "spelling", {"pool": "meen"}, "unknown pool 'meen'; did you mean 'mean'"),
        (["oak"], "nowhere/at-all", {}, "'nowhere/at-all' is no directory of a transformers model"),
        (["oak"], 7, {}, "'7' is no directory"),
        (["oak", " "], drawn, {}, "there is no text to embed: ' '"),
        ([], drawn, {}, "there are no texts"),
        ("oak", drawn, {}, "not the text 'oak' alone"),
        (["oak"], drawn, {"whiten": True}, "whitening needs a fixed vocabulary"),
        (["oak"], _flat, {"centre": ["a", "b"], "whiten": True}, "all have the same vector"),
        (["oak"], _flat, {"centre": ["a", "b"]}, "the text 'oak' has no direction"),
        (["oak", "fish"], lambda texts: torch.ones(1, 4), {}, r"gave \[1, 4\] for 2 texts"),
        (["oak"], lambda texts: torch.full((1, 4), torch.nan), {}, "all finite"),
    ],
)
def test_what_cannot_be_embedded_is_named(texts: Any, encoder: Any, options: Any, says: str) -> None:
    with pytest.raises(EngramError, match=says):
        embed(texts, encoder, **options)


def test_texts_too_long_and_models_without_a_tokenizer_are_refused(
    bert: nn.Module, gpt: nn.Module, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(EngramError, match="has 11 tokens; the encoder takes 1 to 10"):
        embed([" ".join(WORDS[:9])], (bert, tokenizer))
    with pytest.raises(EngramError, match="has 9 tokens; the encoder takes 1 to 8"):
        embed([" ".join(WORDS[:7])], (gpt, tokenizer))
    bert.save_pretrained(tmp_path / "bare")  # type: ignore[operator]
    with pytest.raises(EngramError, match=r"there is no tokenizer in .*bare"):
        embed(["oak"], tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").write_text("{}")
    with pytest.raises(EngramError, match=r"the tokenizer in .*bare cannot be read"):
        embed(["oak"], tmp_path / "bare")
