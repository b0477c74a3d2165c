"""Text to tokens and back: one tokenizer, one rendering, for every command and backend.

``tokens`` is a model's tokenizer with its chat template, ``chat_template`` renders conversations,
``files`` makes one tokenizer of whatever files a model states it in, ``stream`` turns tokens to
text as they come, and ``reading`` opens text files.
"""

from supra_core.text.chat_template import Rendering
from supra_core.text.files import TOKENIZER
from supra_core.text.reading import read_text
from supra_core.text.tokens import EncodedText, ModelTokenizer, load_tokenizer

__all__ = [
    "TOKENIZER",
    "EncodedText",
    "ModelTokenizer",
    "Rendering",
    "load_tokenizer",
    "read_text",
]
