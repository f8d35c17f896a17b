import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from spmd_train.config import ConfigError
from spmd_train.data import load_tokenizer

TEXTS = ["hello world", "naïve café — 日本語 🙂", "", "  two  spaces\n\tand a tab\r\n", "a" * 1000]
CORPUS = [f"the {noun} {verb} over hello world {i}" for i in range(200)
          for noun, verb in [("cat", "jumps"), ("dog", "sleeps")]]  # fmt: skip


def hugging_face(path, *, special=("<s>", "</s>"), template=None, truncate=0):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{template} $A", special_tokens=[(template, tokenizer.token_to_id(template))]
        )
    if truncate:
        tokenizer.enable_truncation(truncate)
        tokenizer.enable_padding(length=truncate)
    tokenizer.save(str(path))
    return str(path)


def sentence_piece(folder, **options):
    options = {"vocab_size": 300, "byte_fallback": True, **options}
    (folder / "corpus.txt").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "sp"),
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return str(folder / "sp.model")


@pytest.mark.parametrize("kind", ["bytes", "tokenizers", "sentencepiece"])
def test_tokenizer_decodes_what_it_encoded(kind, tmp_path):
    path = {
        "bytes": lambda: "bytes",
        "tokenizers": lambda: hugging_face(tmp_path / "tokenizer.json"),
        "sentencepiece": lambda: sentence_piece(tmp_path),
    }[kind]()
    tokenizer = load_tokenizer(path)
    encoded = tokenizer.encode_batch(TEXTS)
    assert [tokenizer.decode(ids) for ids in encoded] == TEXTS
    assert all(ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer) for ids in encoded)
    assert all(ids.max(initial=0) < tokenizer.vocab_size for ids in encoded)
    assert 0 <= tokenizer.marker < tokenizer.vocab_size
    assert all(tokenizer.marker not in ids for ids in encoded)
    assert tokenizer.decode([tokenizer.marker, *encoded[0], tokenizer.marker]) == TEXTS[0]


def test_tokenizer_bytes_are_utf8():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.marker) == (256, 0)
    assert tokenizer.encode_batch(["é!"])[0].tolist() == [0xC3, 0xA9, 0x21]
    assert tokenizer.decode([0xC3, 0x21]) == "\N{REPLACEMENT CHARACTER}!"


def test_tokenizer_marker_is_what_the_file_puts_before_a_text(tmp_path):
    path = hugging_face(tmp_path / "a.json", special=("<s>", "<doc>"), template="<doc>")
    vocab = json.loads((tmp_path / "a.json").read_text())["model"]["vocab"]
    assert load_tokenizer(path).marker == vocab["<doc>"]


@pytest.mark.parametrize(
    ("special", "expected"),
    [(("</s>", "<s>"), "<s>"), (("<pad>", "<|endoftext|>"), "<|endoftext|>")],
)
def test_tokenizer_marker_is_found_by_name(special, expected, tmp_path):
    path = hugging_face(tmp_path / "a.json", special=special)
    assert load_tokenizer(path).marker == special.index(expected)


def test_tokenizer_saved_truncation_cuts_no_document(tmp_path):
    whole = load_tokenizer(hugging_face(tmp_path / "a.json"))
    cut = load_tokenizer(hugging_face(tmp_path / "b.json", truncate=4))
    for text in TEXTS:
        np.testing.assert_array_equal(cut.encode_batch([text])[0], whole.encode_batch([text])[0])


def test_tokenizer_vocabulary_holds_added_ids(tmp_path):
    path = hugging_face(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    before = load_tokenizer(path)
    added = {**content["added_tokens"][0], "id": before.vocab_size, "content": "<extra>"}
    content["added_tokens"].append(added)
    (tmp_path / "a.json").write_text(json.dumps(content))
    after = load_tokenizer(path)
    assert after.vocab_size == before.vocab_size + 1
    assert after.encode_batch(["<extra>"])[0].tolist() == [before.vocab_size]
    assert after.fingerprint != before.fingerprint


def test_tokenizer_sentencepiece_marker_is_bos_else_eos(tmp_path):
    with_bos = sentencepiece.SentencePieceProcessor(model_file=sentence_piece(tmp_path))
    assert load_tokenizer(str(tmp_path / "sp.model")).marker == with_bos.bos_id() >= 0
    path = sentence_piece(tmp_path, bos_id=-1)
    without = sentencepiece.SentencePieceProcessor(model_file=path)
    assert without.bos_id() == -1
    assert load_tokenizer(path).marker == without.eos_id() >= 0


def test_tokenizer_mistakes_are_told(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.tokenizer='gpt2': expected 'bytes', or the path"):
        load_tokenizer("gpt2")
    with pytest.raises(ConfigError, match=r"cannot be read: No such file"):
        load_tokenizer(str(tmp_path / "none.json"))
    for name in ("bad.json", "bad.model"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ConfigError, match=rf"data\.tokenizer='.*{name}' is not a"):
            load_tokenizer(str(tmp_path / name))
    with pytest.raises(ConfigError, match="has no token that begins a text"):
        load_tokenizer(hugging_face(tmp_path / "a.json", special=("<pad>",)))
    with pytest.raises(ConfigError, match="neither a bos nor an eos token"):
        load_tokenizer(sentence_piece(tmp_path, bos_id=-1, eos_id=-1))
