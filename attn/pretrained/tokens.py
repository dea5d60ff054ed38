"""Tokens of texts, by the library tokenizers: from tokenizer.json, from older files, or from a GGUF file."""

import pathlib
import re
from collections.abc import Mapping, Sequence

from attn.pretrained.files import FileError, read_json

_BLANKS = {"Ġ": " ", "▁": " ", "Ċ": "\\n"}  # what pieces of tokens have in place of blanks and line ends
_FILES = "tokenizer.json, vocab.json with merges.txt, or vocab.txt"


class Tokens:
    """A tokenizer.

    Args:
      tokenizer: of the library tokenizers.
      path: of its file, for messages.
    """

    def __init__(self, tokenizer, path: pathlib.Path):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer, self.path = tokenizer, path

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of a text, with those that the model expects around it unless `special` is False."""
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        return self._tokenizer.decode([int(token) for token in tokens])

    def save(self, path: pathlib.Path):
        """Write it as tokenizer.json."""
        self._tokenizer.save(str(path))

    def names(self, tokens: Sequence[int]) -> list[str]:
        """Return a short text for each token, with its blanks as they are."""
        pieces = (self._tokenizer.id_to_token(int(token)) or "?" for token in tokens)
        return ["".join(_BLANKS.get(letter, letter) for letter in piece) for piece in pieces]


def load_tokens(path: pathlib.Path, metadata: Mapping | None = None) -> Tokens:
    """Load the tokenizer beside a model's weights.

    Args:
      path: the folder, or a GGUF file.
      metadata: of a GGUF file; None of a folder.

    Raises:
      FileError: there is none, it cannot be read, or the library tokenizers is not installed.
    """
    try:
        import tokenizers
    except ImportError:
        raise FileError(f"{path}: its tokens need the library tokenizers: pip install tokenizers") from None
    try:
        return Tokens(
            *(_of_folder(tokenizers, path) if metadata is None else (_of_gguf(tokenizers, metadata, path), path))
        )
    except FileError:
        raise
    except Exception as error:  # the library raises Exception itself
        raise FileError(f"{path}: the tokenizer cannot be read ({' '.join(str(error).split())[:200]})") from None


def _of_folder(tokenizers, folder: pathlib.Path):
    folder = folder if folder.is_dir() else folder.parent
    if (file := folder / "tokenizer.json").exists():
        read_json(file)  # for the message of a damaged file
        return tokenizers.Tokenizer.from_file(str(file)), file
    if (file := folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        model = tokenizers.models.BPE.from_file(str(file), str(folder / "merges.txt"))
        return _byte_level(tokenizers, model), file
    if (file := folder / "vocab.txt").exists():
        return _of_vocabulary(tokenizers, file), file
    raise FileError(f"{folder}: has no tokenizer that can be read, must have {_FILES}")


def _of_vocabulary(tokenizers, file: pathlib.Path):
    """Make BERT's tokenizer of words and pieces, or, if no piece begins with ##, one of whole symbols."""
    words = file.read_text(encoding="utf-8").split("\n")
    vocabulary = {word.rstrip("\r"): number for number, word in enumerate(words) if word}
    missing = [word for word in ("[CLS]", "[SEP]", "[UNK]") if word not in vocabulary]
    if missing:
        raise FileError(f"{file}: has no {missing[0]}")
    if any(word.startswith("##") for word in vocabulary):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=not any(map(_has_capitals, vocabulary)))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = tokenizers.decoders.WordPiece()
    else:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
        longest_first = "|".join(map(re.escape, sorted(vocabulary, key=len, reverse=True)))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(longest_first), "isolated")
        tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens([word for word in vocabulary if re.fullmatch(r"\[[A-Z]{3,4}\]", word)])
    ends = [(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return tokenizer


def _has_capitals(word: str) -> bool:
    return word != word.lower() and not word.startswith("[")


def _byte_level(tokenizers, model):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _of_gguf(tokenizers, metadata: Mapping, path: pathlib.Path):
    """Make the tokenizer that the metadata of a GGUF file describe: pieces of bytes, joined by merges."""
    kind, rule = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or rule not in ("smollm", "default", "gpt-2"):
        raise FileError(
            f"{path}: its tokenizer is {kind!r} with {rule!r}, must be 'gpt2' with smollm, gpt-2 or default"
        )
    pieces = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = _byte_level(tokenizers, tokenizers.models.BPE(vocabulary, merges))
    if rule == "smollm":  # digits are tokens of their own
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizer.pre_tokenizer]
        )
    types = metadata.get("tokenizer.ggml.token_type", ())
    control = [pieces[number] for number, type_ in enumerate(types) if type_ == 3]
    tokenizer.add_special_tokens(control)
    return tokenizer
