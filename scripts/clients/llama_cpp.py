"""llama.cpp's own logits of a GGUF, through the C functions in xllamacpp's library: its Python class only generates.

The functions take their parameters as structs of which only the first fields are set here; a buffer larger than the
struct stands for the rest. Reference: llama.cpp, include/llama.h.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np


class _Parameters(ctypes.Structure):
    """llama_model_params or llama_context_params, as the library fills it in; the rest of its bytes are not used."""

    _fields_ = [("words", ctypes.c_uint32 * 256)]


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    ]


class LlamaCpp:
    """A loaded model."""

    def __init__(self, path: Path, *, context: int = 512) -> None:
        self._library, self.context = _library(), context
        self._library.llama_backend_init()
        parameters = self._library.llama_model_default_params()
        self._model = self._library.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {path}")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        parameters = self._library.llama_context_default_params()
        for index in range(3):  # n_ctx, n_batch, n_ubatch
            parameters.words[index] = context
        self._context = self._library.llama_init_from_model(self._model, parameters)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """float32[tokens, vocabulary] of a text of at most `context` tokens."""
        ids = np.ascontiguousarray(tokens, np.int32)
        wanted = np.ones(len(ids), np.int8)
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        batch = _Batch(n_tokens=len(ids), token=ids.ctypes.data, logits=wanted.ctypes.data)
        code = self._library.llama_decode(self._context, batch)
        if code:
            raise ValueError(f"llama_decode returned {code}")
        size = self._library.llama_vocab_n_tokens(self._vocabulary)
        flat = self._library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(flat, (len(ids), size)).copy()

    def encode(self, text: str) -> list[int]:
        """Its own tokenizer's ids of a text, without BOS."""
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 8))()
        count = self._library.llama_tokenize(self._vocabulary, raw, len(raw), ids, len(ids), False, True)
        return list(ids[:count])

    def continues(self, prompt: list[int], tokens: list[int]) -> bool:
        """Whether each token is the likeliest after the prompt and those before it: greedy text, in one pass."""
        logits = self.logits(np.asarray([*prompt, *tokens]))
        return logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


def perplexity(model: LlamaCpp, windows: np.ndarray) -> float:
    """exp of the mean over all windows of −log p(token | those before it in the window)."""
    losses = []
    for window in windows:
        logits = model.logits(window)[:-1].astype(np.float64)
        peak = logits.max(-1, keepdims=True)
        total = np.log(np.exp(logits - peak).sum(-1)) + peak[:, 0]
        losses.append(total - logits[np.arange(len(window) - 1), window[1:]])
    return float(np.exp(np.mean(losses)))


def _library() -> ctypes.CDLL:
    found = importlib.util.find_spec("xllamacpp")
    assert found is not None
    assert found.origin is not None
    library = ctypes.CDLL(str(next(Path(found.origin).parent.glob("*.so"))))
    pointer, structs = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_model_default_params", _Parameters, []),
        ("llama_context_default_params", _Parameters, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Parameters]),
        ("llama_init_from_model", pointer, [pointer, _Parameters]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", structs, [pointer]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ("llama_decode", structs, [pointer, _Batch]),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), [pointer]),
        (
            "llama_tokenize",
            ctypes.c_int32,
            [pointer, ctypes.c_char_p, structs, ctypes.POINTER(structs), structs, ctypes.c_bool, ctypes.c_bool],
        ),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)(lambda level, text, data: None)
    library.llama_log_set.argtypes = [type(quiet), pointer]
    library.llama_log_set(quiet, None)
    library.kept = quiet  # type: ignore[attr-defined]
    return library
