"""Which tokenizer a model reads, and the tokenizers of models that are not OpenAI's."""

import dataclasses
import string
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from etils import epath

from clip_jax.errors import WeightsError
from clip_jax.tokenizer import Tokenizer, batch_rows, describe

Clean = Literal["canonicalize", "lower", "whitespace"]


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer a model was trained with; plain data for the model card.

    Attributes:
        kind: CLIP's byte-level BPE, or a SentencePiece model.
        file: the SentencePiece model's, beside the weights; None: not known.
        clean: what is done to a text before SentencePiece sees it: "lower" lowers it,
            "canonicalize" also takes out the punctuation; white space is collapsed in any case.
        pad: the id behind a short text.
    """

    kind: Literal["clip", "sentencepiece"] = "clip"
    file: str | None = None
    clean: Clean = "whitespace"
    pad: int = 0

    @classmethod
    def siglip(cls, vocab_size: int, clean: Clean, file: str | None) -> "TokenizerSpec":
        """SigLIP's: the first version pads with end of text, the second (Gemma's) with <pad>."""
        return cls("sentencepiece", file, clean, pad=0 if vocab_size == GEMMA_VOCAB_SIZE else 1)

    def load(self, directory: epath.PathLike | None, context_length: int) -> "AnyTokenizer":
        """The tokenizer itself.

        Args:
            directory: where `file` lies, local or gs://; None: `file` is a path by itself.
            context_length: of the model.

        Raises:
            WeightsError: the SentencePiece model is missing or damaged.
        """
        if self.kind == "clip":
            return Tokenizer(context_length)
        if self.file is None:
            raise WeightsError(
                "the model reads the tokens of a SentencePiece model, and its file is not beside "
                "the weights: pass its path (SigLIP's is called spiece.model or tokenizer.model)"
            )
        path = epath.Path(directory or "") / self.file
        return SentencePieceTokenizer(path, context_length, self.clean, self.pad)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the model card."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any] | str) -> "TokenizerSpec":
        """The inverse of `to_dict`; older cards hold the name of CLIP's."""
        return cls() if isinstance(values, str) else cls(**values)


CLIP_BPE = TokenizerSpec()
GEMMA_VOCAB_SIZE = 256_000
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class SentencePieceTokenizer:
    """The tokenizer of a SentencePiece model, as SigLIP and LiT use it.

    Args:
        path: the model's file.
        context_length: T, of the batches, unless a call says otherwise.
        clean: see `TokenizerSpec`.
        pad: likewise.

    Raises:
        WeightsError: the file is missing or damaged, or the package `sentencepiece` is missing.
    """

    def __init__(self, path: epath.PathLike, context_length: int, clean: Clean, pad: int) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise WeightsError(
                f"{path} needs the package sentencepiece: pip install 'clip-nnx[sentencepiece]'"
            ) from error
        path = epath.Path(path)
        if not path.exists():
            raise WeightsError(f"no SentencePiece model at {path}")
        try:
            self._model = SentencePieceProcessor(model_proto=path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise WeightsError(f"{path} is no SentencePiece model: {error}") from error
        self.context_length, self._clean, self._pad = context_length, clean, pad

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without end of text.

        Raises:
            TypeError: `text` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"expected a string to tokenize, got {describe(text)}")
        if self._clean == "canonicalize":
            text = text.replace("_", " ").translate(_NO_PUNCTUATION)
        if self._clean != "whitespace":
            text = text.lower()
        return list(self._model.encode(" ".join(text.split())))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Returns the text that `ids` spell."""
        return str(self._model.decode([int(i) for i in ids]))

    def __call__(
        self,
        texts: str | Sequence[str],
        context_length: int | None = None,
        truncate: bool = False,
    ) -> np.ndarray:
        """Returns int32 [B, T]: the ids of a text, end of text, padding; else as `Tokenizer`."""
        length = self.context_length if context_length is None else context_length
        end = (self._model.eos_id(),)
        return batch_rows(self.encode, texts, length, truncate, (), end, self._pad)


AnyTokenizer = Tokenizer | SentencePieceTokenizer
