"""Tokenizers from the key-values of a GGUF file, built for the `tokenizers` library.

`tokenizer.ggml.model` is "gpt2" (byte-level BPE with merges) or "llama" (SentencePiece BPE, whose
merges follow from the scores). Nothing is cached: building the former (49 000 tokens, 0.1 s) was
measured to be no slower than parsing the same tokenizer from a tokenizer.json.
"""

import math

from .errors import LoadError
from .tokenizer import SPACE, Tokenizer, tokenizers_errors

MAX_PIECE = 256  # characters of a SentencePiece token; the work grows with the square

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5  # tokenizer.ggml.token_type

# How a text is cut before BPE, by `tokenizer.ggml.pre`: each expression in turn splits the pieces
# that the ones before it left. These are the models' own, from their tokenizer.json.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LEAD = r"[^\r\n\p{L}\p{N}]?"
LLAMA3 = rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{CONTRACTION}|{WORD}|\p{{N}}|{REST}"
QWEN35 = (
    rf"{CONTRACTION}|{LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = rf"{LEAD}{UPPER}*{LOWER}+|{LEAD}{UPPER}+{LOWER}*|\p{{N}}|{REST_SLASH}"
GPT4O = (
    rf"{LEAD}{UPPER}*{LOWER}+{CONTRACTION}?|{LEAD}{UPPER}+{LOWER}*{CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}|{REST_SLASH}"
)
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
CHINESE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

PRE_TOKENIZERS = {
    ("default",): [PUNCTUATION, GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling"): [GPT2],
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"): [
        r"\p{N}",
        GPT2,
    ],
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"): [LLAMA3],
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): [LLAMA3],
    ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "grok-2"): [QWEN2],
    ("qwen35",): [QWEN35],
    ("tekken", "mistral"): [TEKKEN],
    ("gpt-4o", "llama4", "minimax-m2"): [GPT4O],
    ("falcon",): [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    ("deepseek-llm",): [
        r"[\r\n]",
        r"\s?[\p{Lu}\p{Ll}\p{Lt}&&[^\x{1D400}-\x{1D7FF}]]+",  # letters that have a case
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        CHINESE,
        r"\p{N}+",
    ],
    ("deepseek-coder",): [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CHINESE, r"\p{N}"],
    ("deepseek-v3", "hunyuan-dense"): [
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        DEEPSEEK3,
    ],
}
SPLITS = {name: splits for names, splits in PRE_TOKENIZERS.items() for name in names}

SPECIAL_NAMES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
}

# A piece that is a token whole is not taken apart by the merges.
IGNORE_MERGES = {
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"),
    *("tekken", "mistral"),
}
ADD_BOS = IGNORE_MERGES  # where the file does not say

# Texts of control tokens that end an answer, also where the file names only one of them.
END_OF_TURN = {
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
}


def tokenizer_from_gguf(checkpoint):
    """Builds the tokenizer that a GGUF file describes.

    Raises:
        LoadError: no tokenizer in the file, of a kind that is not known, or inconsistent.
    """
    get, path = checkpoint._get, checkpoint.path
    kind = get("tokenizer.ggml.model", str)
    if kind not in BUILDERS:
        raise LoadError(path, f"tokenizer model {kind!r}: expected one of {', '.join(BUILDERS)}")
    tokens = _array(checkpoint, "tokenizer.ggml.tokens", str)
    types = _array(checkpoint, "tokenizer.ggml.token_type", int, len(tokens), [1] * len(tokens))
    ids = _special_ids(checkpoint, kind, tokens)
    with tokenizers_errors(path):
        backend, add_bos = BUILDERS[kind](checkpoint, tokens, types)
        _add_tokens(backend, tokens, types, spaces=kind == "llama")
        _add_bos_eos(
            backend,
            ids.get("bos") if get("tokenizer.ggml.add_bos_token", bool, add_bos) else None,
            ids.get("eos") if get("tokenizer.ggml.add_eos_token", bool, False) else None,
        )
    eos = {i for i in checkpoint.generation.get("eos_token_id", ()) if i < len(tokens)}
    eos |= {i for i, t in enumerate(types) if t == CONTROL and tokens[i] in END_OF_TURN}
    return Tokenizer(
        backend,
        path,
        bos_id=ids.get("bos"),
        eos_ids=eos | {ids["eos"]} if "eos" in ids else eos,
        chat_template=get("tokenizer.chat_template", str, None),
        special_tokens={SPECIAL_NAMES[name]: tokens[i] for name, i in ids.items()},
    )


def _special_ids(checkpoint, kind, tokens):
    """ "bos", "eos", "unknown", "padding" -> token id, of those that there are."""
    ids = {"bos": 1, "eos": 2} if kind == "llama" else {}  # SentencePiece's own defaults
    for name in SPECIAL_NAMES:
        given = checkpoint._get(f"tokenizer.ggml.{name}_token_id", int, None)
        if given is not None:
            ids[name] = given
    for name, i in ids.items():
        if not 0 <= i < len(tokens):
            raise LoadError(
                checkpoint.path, f"{name} token id {i}: expected one of the {len(tokens)} tokens"
            )
    return ids


def _array(checkpoint, key, kind, length=None, default=None):
    items = checkpoint.metadata.get(key, default)
    if not isinstance(items, list) or not set(map(type, items)) <= {kind}:
        raise LoadError(checkpoint.path, f"expected {key!r} to be an array of {kind.__name__}")
    if length is not None and len(items) != length:
        raise LoadError(checkpoint.path, f"{key!r} has {len(items)} items, expected {length}")
    return items


def _vocabulary(checkpoint, tokens):
    vocabulary = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(vocabulary) != len(tokens):
        seen = set()
        twice = next(t for t in tokens if t in seen or seen.add(t))
        raise LoadError(checkpoint.path, f"the token {twice!r} occurs twice in the vocabulary")
    return vocabulary


def _gpt2(checkpoint, tokens, types):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = checkpoint._get("tokenizer.ggml.pre", str, "default")
    if pre not in SPLITS:
        known = ", ".join(sorted(SPLITS))
        raise LoadError(checkpoint.path, f"pre-tokenizer {pre!r}: expected one of {known}")
    merges = checkpoint.metadata.merges("tokenizer.ggml.merges")
    backend = Tokenizer(
        models.BPE(_vocabulary(checkpoint, tokens), merges, ignore_merges=pre in IGNORE_MERGES)
    )
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend, pre in ADD_BOS


def _sentencepiece(checkpoint, tokens, types):
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _array(checkpoint, "tokenizer.ggml.scores", float, len(tokens))
    if not all(map(math.isfinite, scores)):
        raise LoadError(checkpoint.path, "expected finite 'tokenizer.ggml.scores'")
    vocabulary = _vocabulary(checkpoint, tokens)
    unknown = next((tokens[i] for i, t in enumerate(types) if t == UNKNOWN), None)
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            _merges_from_scores(checkpoint.path, tokens, types, scores, vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = checkpoint._get("tokenizer.ggml.add_space_prefix", bool, True)
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return backend, True


def _merges_from_scores(path, tokens, types, scores, vocabulary):
    """SentencePiece joins the neighbors whose joint token has the highest score: so every way to
    cut a token in two known ones is a merge, ranked by the score of the whole."""
    longest = max(map(len, tokens), default=0)
    if longest > MAX_PIECE:
        raise LoadError(path, f"a token has {longest} characters, expected at most {MAX_PIECE}")
    mergeable = {t for t, kind in zip(tokens, types, strict=True) if kind in (1, USER_DEFINED)}
    merges = []
    for token in sorted(mergeable, key=lambda t: (-scores[vocabulary[t]], vocabulary[t])):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in cuts if pair[0] in mergeable and pair[1] in mergeable]
        merges += sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


BUILDERS = {"gpt2": _gpt2, "llama": _sentencepiece}


def _add_tokens(backend, tokens, types, spaces):
    """Tokens that are cut out of a text before anything else. Control tokens are left out when
    decoding; those that a user defined are not."""
    from tokenizers import AddedToken

    control = [t for t, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL)]
    defined = [t for t, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    # SentencePiece's are matched after its stand-in for spaces has been put in.
    backend.add_tokens([AddedToken(t, normalized=spaces and SPACE in t) for t in defined])


def _add_bos_eos(backend, bos, eos):
    """Texts begin with token `bos` and end with token `eos`, where these are not None."""
    from tokenizers import processors

    bos, eos = ([] if i is None else [(backend.id_to_token(i), i)] for i in (bos, eos))
    if bos or eos:
        names = [token for token, _ in bos], [token for token, _ in eos]
        backend.post_processor = processors.TemplateProcessing(
            single=[*names[0], "$A", *names[1]], special_tokens=list({*bos, *eos})
        )
