"""Text to tokens and back: one tokenizer, one rendering, for every command and backend.

``tokens`` is a model's tokenizer with its chat template, ``chat_template`` renders conversations,
``files`` makes one tokenizer from a model's files, ``stream`` decodes tokens as they arrive,
``worker`` is the child process for strangers' files, and ``plain`` reads text files.
"""

from supra_core.text.chat_template import Rendering
from supra_core.text.files import TOKENIZER
from supra_core.text.plain import read_text
from supra_core.text.tokens import EncodedText, ModelTokenizer, load_tokenizer

__all__ = [
    "TOKENIZER",
    "EncodedText",
    "ModelTokenizer",
    "Rendering",
    "load_tokenizer",
    "read_text",
]
